"""Files are data: the package holds no call that lets a file choose what code runs."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "lgpt").rglob("*.py"))
SHIPPED = [
    path
    for folder in ("lgpt", "launch")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".ipynb", ".sh", ".sbatch", ".yaml", ".json")
]
WORDS = ("weights_only=False", "allow_pickle=True", "trust_remote_code=True", "unsafe_load")
# Modules whose readers run what a file says.
UNPICKLERS = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
HARMLESS = ("pickle.UnpicklingError", "pickle.PicklingError")
RUNNERS = ("eval", "exec", "compile", "__import__")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shipped_file_asks_for_unsafe_loading(path: Path) -> None:
    text = "".join(path.read_text(encoding="utf-8").split())
    assert [word for word in WORDS if word in text] == []


def dotted(node: ast.AST) -> str:
    """`a.b.c` of nested attributes; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def unsafe_uses(tree: ast.AST, module: str) -> Iterator[str]:
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.ImportFrom) and node.module in (*UNPICKLERS, "torch.serialization"):
            yield f"{where}: from {node.module} import ..."
        elif isinstance(node, ast.Import):
            yield from (
                f"{where}: import {alias.name} as {alias.asname}"
                for alias in node.names
                if alias.name.split(".")[0] in UNPICKLERS and alias.asname is not None
            )
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            if name.split(".")[0] in UNPICKLERS and name not in HARMLESS:
                yield f"{where}: {name}"
        elif isinstance(node, ast.Call):
            yield from (f"{where}: {problem}" for problem in unsafe_call(node, module))


def unsafe_call(node: ast.Call, module: str) -> Iterator[str]:
    name = dotted(node.func)
    words = {word.arg: word.value for word in node.keywords}
    if name in RUNNERS:
        yield name
    if name == "torch.load":
        given = words.get("weights_only")
        if not (isinstance(given, ast.Constant) and given.value is True):
            yield "torch.load without weights_only=True"
    if name in ("torch.jit.load", "torch.package.PackageImporter", "torch.export.load"):
        yield name
    if name in ("np.load", "numpy.load") and "allow_pickle" in words:
        given = words["allow_pickle"]
        if not (isinstance(given, ast.Constant) and given.value is False):
            yield "np.load with allow_pickle"
    if name in ("yaml.load", "yaml.load_all", "yaml.compose", "yaml.full_load"):
        loader = dotted(words["Loader"]) if "Loader" in words else ""
        found = getattr(importlib.import_module(module), loader, None) if loader else None
        if not (isinstance(found, type) and issubclass(found, yaml.SafeLoader)):
            yield f"{name} with a Loader that is no SafeLoader"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_unpickle(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert list(unsafe_uses(tree, module)) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "pickle.load(stream)",
        "pickle.Unpickler(stream).load()",
        "from pickle import loads",
        "import pickle as p",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "eval(text)",
        "torch.jit.load(path)",
        "joblib.load(path)",
    ],
)
def test_the_check_sees_unsafe_lines(line: str) -> None:
    assert list(unsafe_uses(ast.parse(line), "lgpt.models.ddconfig"))


def test_the_check_lets_safe_lines_pass() -> None:
    text = (
        "import pickle\n"
        "torch.load(path, weights_only=True)\n"
        "np.load(path, allow_pickle=False)\n"
        "yaml.load(text, Loader=_Loader)\n"
        "model.eval()\n"
    )
    assert list(unsafe_uses(ast.parse(text), "lgpt.models.ddconfig")) == []
