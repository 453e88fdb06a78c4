"""Conversion beside DeepSpeed's own, as `lgpt bench convert` does it, and its memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from lgpt.checkpoint.bench_convert import _measure
from lgpt.checkpoint.deepspeed_files import read_safely
from lgpt.checkpoint.synthetic_shards import write_synthetic_shards
from lgpt.checkpoint.weight_source import whole_tensors
from lgpt.checkpoint.zero_shards import ZeroShards
from lgpt.cli import app
from lgpt.core.errors import SettingsError

pytestmark = pytest.mark.slow
MIB = 2**20


def bench(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", "convert", *map(str, words), "--json"])
    if done.exception is not None:
        raise done.exception
    (result,) = json.loads(done.stdout.splitlines()[-1])["conversions"]
    return dict(result)


def test_both_converters_give_the_same_bits_of_a_written_checkpoint(tmp_path):
    config = tmp_path / "small.yaml"
    transformer = {"layers": 2, "hidden": 36, "heads": 3, "mlp_hidden": 50}
    config.write_text(
        yaml.safe_dump({"extends": "phase3_500m", "name": "small", "transformer": transformer})
    )
    work = tmp_path / "work"
    result = bench("--config", config, "--stage", 3, "--ranks", 5, "--rounds", 1, "--work", work)
    assert result["differing"] == []
    assert result["tensors"] > 20
    assert result["safetensors_error"] is None
    assert result["time_ratio"] > 0
    assert 0 < result["memory_ratio"] < 1
    assert not work.exists(), "what was written is removed"


def test_a_tied_head_is_compared_though_deepspeeds_writes_no_safetensors_of_it(saves, tmp_path):
    shutil.copytree(saves.step("zero2_bf16", 3) / "model", tmp_path / "global_step3")
    result = bench(tmp_path / "global_step3", "--rounds", 1, "--work", tmp_path / "work")
    assert "share memory" in result["safetensors_error"]
    assert result["differing"] == []
    assert result["tensors"] == 10


def test_phase_2_has_no_transformer_to_write(tmp_path):
    with pytest.raises(SettingsError, match="--config names a run of phase 2"):
        bench("--config", "phase2_vqvae", "--work", tmp_path)


def layout(value: Any, depth: int) -> Any:
    """Names in nested dicts."""
    if not isinstance(value, dict) or depth == 0:
        return None
    return {name: layout(each, depth - 1) for name, each in value.items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_written_shards_are_laid_out_as_real_ones(saves, tmp_path, stage):
    real = saves.step(f"zero{stage}_bf16", 3) / "model"
    groups = read_safely(next(real.glob("*model_states.pt")))["param_shapes"]
    write_synthetic_shards(tmp_path / "step", groups, stage=stage, ranks=2)
    assert {path.name for path in real.iterdir()} == {p.name for p in (tmp_path / "step").iterdir()}
    for path in real.iterdir():
        theirs, ours = read_safely(path), read_safely(tmp_path / "step" / path.name)
        if "optimizer_state_dict" in theirs:
            assert theirs.keys() == ours.keys()
            names = [layout(each["optimizer_state_dict"], 2) for each in (theirs, ours)]
            assert names[0] == names[1]
            key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
            sizes = [
                [vector.shape for vector in each["optimizer_state_dict"][key]]
                for each in (theirs, ours)
            ]
            assert sizes[0] == sizes[1]
        else:
            assert layout(ours, 1).items() <= layout(theirs, 1).items()
            assert theirs["param_shapes"] == ours["param_shapes"]


@pytest.mark.parametrize("stage", [2, 3])
def test_conversion_needs_the_memory_of_one_shard_and_not_of_the_model(tmp_path, stage):
    shapes = {f"layer_{number}.weight": (1024, 4096) for number in range(30)}
    write_synthetic_shards(tmp_path / "step", [shapes, {"norm.weight": (7,)}], stage=stage, ranks=6)
    model_bytes = sum(4 * rows * columns for rows, columns in shapes.values())
    partition_bytes, shard_bytes = model_bytes // 6, 40 * MIB
    command = ["-m", "lgpt", "convert", tmp_path / "step", tmp_path / "out"]
    measured = _measure([*map(str, command), "--max-shard-size", str(shard_bytes)])
    assert measured.error is None
    assert measured.peak_bytes is not None
    bound = shard_bytes + partition_bytes + 300 * MIB
    assert bound < model_bytes
    assert measured.peak_bytes < bound
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 10
    assert sum(sizes) == pytest.approx(model_bytes, rel=0.01)
    shutil.rmtree(tmp_path / "step")  # gigabytes, which pytest would keep


@pytest.mark.parametrize("stage", [2, 3])
def test_sizes_that_no_rank_count_divides_come_back_whole(tmp_path, stage):
    """Against the flat vectors put together the slow way."""
    groups = [{"a": (3, 5), "b": (1,), "c": (2, 2, 2)}, {"d": (11,), "e": ()}]
    write_synthetic_shards(tmp_path / "step", groups, stage=stage, ranks=4)
    found = whole_tensors(ZeroShards(tmp_path / "step"))
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    ranks = [
        read_safely(tmp_path / "step" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        for rank in range(4)
    ]
    vectors = [each["optimizer_state_dict"][key] for each in ranks]
    for index, group in enumerate(groups):
        place = 0
        whole = torch.cat([vector[index] for vector in vectors])
        for name, shape in group.items():
            size = torch.Size(shape).numel()
            if stage == 3:
                length = -(-size // 4)
                parts = [vector[index][place : place + length] for vector in vectors]
                expected, place = torch.cat(parts)[:size], place + length
            else:
                expected, place = whole[place : place + size], place + size
            assert torch.equal(found[name], expected.view(shape)), name


def test_an_unknown_stage_is_not_written(tmp_path: Path):
    with pytest.raises(SettingsError, match="stage 1 cannot be written; allowed: 2, 3"):
        write_synthetic_shards(tmp_path / "step", [{"a": (2,)}], stage=1, ranks=2)
