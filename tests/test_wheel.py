"""An installed wheel works outside the checkout: run configs and ds_configs travel inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_wheel_resolves_a_shipped_config_far_from_the_checkout(tmp_path: Path):
    copy, installed = tmp_path / "copy", tmp_path / "installed"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("lgpt", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(installed), str(copy)], check=True, timeout=120)
    shutil.rmtree(copy)

    done = subprocess.run(
        [sys.executable, "-m", "lgpt", "config", "show", "demo/phase3_shapes", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    resolved = json.loads(done.stdout.splitlines()[-1])
    assert resolved["deepspeed"]["zero_optimization"]["stage"] == 3
    for kind in ("*.yaml", "*.cpp"):
        shipped = {path.relative_to(ROOT / "lgpt") for path in (ROOT / "lgpt").rglob(kind)}
        assert shipped
        assert shipped == {path.relative_to(installed / "lgpt") for path in installed.rglob(kind)}
