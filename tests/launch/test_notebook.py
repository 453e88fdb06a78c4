"""The phase 1 notebook runs from its first cell to its last, and lies in git without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lgpt.planning.parameters import run_parameters
from lgpt.settings.run import load_run_settings

NOTEBOOK = Path(__file__).parents[2] / "launch" / "experiment_pretrained.ipynb"


def test_the_notebook_is_valid_and_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    tagged = [cell.id for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [code[0].id], "parameters stand first, where they are looked for"


def test_a_real_vqgan_is_trained_on_with_settings_that_fit_one_device(monkeypatch):
    monkeypatch.setenv("VQGAN", "dalle-mini/vqgan_imagenet_f16_16384")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell.source for cell in notebook.cells if cell.id == "parameters")
    names: dict[str, Any] = {}
    exec(parameters, names)
    run = load_run_settings(names["CONFIG"], names["OVERRIDES"], environ={}, world_size=1)
    assert (run.phase, run.data.dataset, run.vqvae.checkpoint) == (1, "flickr30k", names["VQGAN"])
    assert run_parameters(run) < 60e6
    assert not any("circle" in prompt or "square" in prompt for prompt in names["PROMPTS"])


@pytest.mark.slow
def test_the_notebook_trains_draws_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = NOTEBOOK.parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("VQGAN", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = next(n for n, cell in enumerate(notebook.cells) if cell.id == "parameters")
    tiny = f"""
RUNS, NAME = {str(tmp_path / "runs")!r}, "tiny"
OVERRIDES = ["data.shapes.train_images=64", "data.shapes.val_images=16"]
OVERRIDES += ["training.validation_images=16", "transformer.layers=2", "transformer.hidden=32"]
STEPS, VQGAN_STEPS = 8, 6
PROMPTS, GUIDANCE, TOP_K = PROMPTS[:1], [1.0, 2.0], [0, 5]
"""
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(tiny))
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()

    said = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for name in ("pictures", "curve", "sample", "compare"):
        shown = [output for output in said[name] if "image/png" in output.get("data", {})]
        assert shown, f"cell {name} shows no picture"
    done = json.loads((tmp_path / "runs" / "tiny" / "DONE").read_text())
    assert done["step"] == 8
    logged = "".join(output.get("text", "") for output in said["mlflow"])
    assert "latent-gpt-pretrained-vqvae, run tiny, FINISHED" in logged
    assert "pretrained_taming" in logged
    assert "notebook/guidance_top_k_0.png" in logged
