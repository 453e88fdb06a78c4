"""Merged weights against the live engine and against DeepSpeed's own converter."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from two_rank_saves import CASES

from lgpt.checkpoint.convert import merged_weights
from lgpt.checkpoint.deepspeed_files import read_safely
from lgpt.core.errors import CheckpointError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_equal_the_live_engines_exactly(saves, case):
    live = torch.load(saves.folder / case / "live.pt", weights_only=True)
    merged = merged_weights(saves.step(case, 3) / "model")
    assert merged.keys() == live.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == live[name].dtype, name
        assert torch.equal(tensor, live[name]), name


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_equal_deepspeeds_own_conversion(saves, case):
    theirs = torch.load(saves.folder / case / "deepspeed.pt", weights_only=True)
    merged = merged_weights(saves.step(case, 3) / "model")
    # DeepSpeed 0.19.8 leaves frozen parameters out of ZeRO-1 checkpoints' conversion.
    lost = {"frozen.weight", "frozen.bias"} if case == "zero1_fp32" else set()
    assert merged.keys() - lost == theirs.keys() - lost
    for name in theirs:
        assert torch.equal(merged[name], theirs[name].to(merged[name].dtype)), name


def test_shared_parameters_are_one_tensor_and_integers_stay_integers(saves):
    merged = merged_weights(saves.step("zero3_bf16", 3) / "model")
    assert merged["head.weight"] is merged["embedding.weight"]
    assert merged["calls"].item() == 3
    assert merged["calls"].dtype == torch.int64


@pytest.fixture
def step_folder(saves, request, tmp_path) -> Path:
    return Path(shutil.copytree(saves.step(request.param, 3), tmp_path / "step_3"))


both = pytest.mark.parametrize("step_folder", ["zero2_fp32", "zero3_fp32"], indirect=True)


@both
def test_a_missing_shard_is_counted(step_folder):
    next((step_folder / "model").glob("*rank_1*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="saved by 2 ranks but holds 1 optimizer"):
        merged_weights(step_folder / "model")


@both
def test_a_truncated_shard_is_named(step_folder):
    shard = next((step_folder / "model").glob("*rank_1*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=shard.name):
        merged_weights(step_folder / "model")


@both
def test_names_that_do_not_add_up_are_listed(step_folder):
    for path in (step_folder / "model").glob("*model_states.pt"):
        state = torch.load(path, weights_only=True)
        state["module"]["ghost.weight"] = state["module"].pop("running_mean")
        state["buffer_names"] = ["calls"]
        state["shared_params"]["stray"] = "embedding.weight"
        torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"extra \['stray'\]|missing \['ghost.weight'\]"):
        merged_weights(step_folder / "model")


@both
def test_sizes_that_do_not_add_up_are_told(step_folder):
    for path in (step_folder / "model").glob("*model_states.pt"):
        state = torch.load(path, weights_only=True)
        state["param_shapes"][1].pop("embedding.weight")
        torch.save(state, path)
    with pytest.raises(CheckpointError, match="elements"):
        merged_weights(step_folder / "model")


def test_stage_1_in_bf16_is_read_which_deepspeeds_own_converter_refuses(saves):
    """With float32 gradients it is another optimizer of DeepSpeed, whose shards name no stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = saves.folder / "bf16_optimizer"
    with pytest.raises(ValueError, match="is not a zero checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="global_step2")
    merged = merged_weights(folder / "global_step2")
    live = torch.load(folder / "live.pt", weights_only=True)
    assert merged.keys() == live.keys()
    for name, tensor in live.items():
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("step_folder", ["zero2_bf16"], indirect=True)
def test_shards_of_no_zero_stage_are_told(step_folder):
    for path in (step_folder / "model").glob("*optim_states.pt"):
        torch.save({"optimizer_state_dict": {"clip_grad": 1.0}}, path)
    with pytest.raises(CheckpointError, match=r"was not saved by ZeRO stage 1, 2 or 3"):
        merged_weights(step_folder / "model")


def test_a_folder_without_shards_says_what_to_give(tmp_path):
    with pytest.raises(CheckpointError, match=r"no ZeRO shards .* ZeRO stage 1, 2 or 3"):
        merged_weights(tmp_path)


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("step_folder", ["zero2_fp32"], indirect=True)
def test_code_in_a_shard_is_refused_by_name_and_not_run(step_folder, tmp_path):
    victim = tmp_path / "made_by_the_payload"
    shard = next((step_folder / "model").glob("zero_pp_rank_0_*optim_states.pt"))
    torch.save({"optimizer_state_dict": Payload(victim)}, shard)
    with pytest.raises(CheckpointError, match=r"more than tensors .*: it names posix.mkdir"):
        merged_weights(step_folder / "model")
    assert not victim.exists()


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 do an enum's member: an attribute of its class."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return getattr, (self.owner, self.name)


def test_a_stage_that_is_pickled_by_its_name_is_read(tmp_path):
    stages = {stage: ByName(ZeroStageEnum, stage.name) for stage in ZeroStageEnum}
    torch.save({int(stage): pickled for stage, pickled in stages.items()}, tmp_path / "shard.pt")
    assert read_safely(tmp_path / "shard.pt") == {int(stage): int(stage) for stage in stages}


@pytest.mark.parametrize(
    ("owner", "name"), [(ZeroStageEnum, "__class__"), (torch.Size, "weights"), (ZeroStageEnum, [])]
)
def test_no_other_attribute_is_taken_from_a_shard(tmp_path, owner, name):
    torch.save({"stage": ByName(owner, name)}, tmp_path / "shard.pt")
    with pytest.raises(CheckpointError, match=r"more than tensors .*: it names getattr"):
        read_safely(tmp_path / "shard.pt")


class WithMetadata:
    """Pickled as a tensor whose metadata is a number: one byte away from a real one."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(2).untyped_storage(), dtype=torch.float32, _internal=True
        )
        arguments = (storage, 0, (2,), (1,), False, OrderedDict(), 5)
        return torch._utils._rebuild_tensor_v2, arguments


def test_a_tensor_that_cannot_be_rebuilt_is_told(tmp_path):
    torch.save({"module": WithMetadata()}, tmp_path / "shard.pt")
    with pytest.raises(CheckpointError, match=r"shard\.pt cannot be read: expected dict, got"):
        read_safely(tmp_path / "shard.pt")
