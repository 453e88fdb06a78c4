"""Weights written piece by piece: against safetensors' own reader and DeepSpeed's converter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from two_rank_saves import CASES, TinyModel

from lgpt.checkpoint.export import convert_run
from lgpt.checkpoint.safetensors_writer import parse_size, write_safetensors
from lgpt.checkpoint.weight_source import Piece, TensorInfo
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.model_folder import read_weights


class Pieces:
    """A source of tensors in uneven pieces, in an order of its own."""

    def __init__(self, tensors: dict[str, torch.Tensor], lost: int = 0) -> None:
        self._tensors, self._lost = tensors, lost
        self.names = list(tensors)
        self.aliases: dict[str, str] = {}
        self.tensors = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}

    def pieces(self) -> Iterator[Piece]:
        for step in (0, 1):
            for name, tensor in reversed(self._tensors.items()):
                flat, third = tensor.reshape(-1), tensor.numel() // 3
                values = flat[:third] if step == 0 else flat[third : flat.numel() - self._lost]
                yield Piece(name, third * step, values)


def every_dtype() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        str(dtype): (torch.randn(5, 3) * 10).to(dtype)
        for dtype in (
            torch.bool,
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
        )
    }
    return {**tensors, "scalar": torch.tensor(3), "empty": torch.empty(0, 4)}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_safetensors_reads_every_dtype_back_bit_for_bit(tmp_path, max_shard_bytes):
    tensors = every_dtype()
    write_safetensors(Pieces(tensors), tmp_path, dtype=None, max_shard_bytes=max_shard_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / file)
        size = sum(tensor.nbytes for tensor in part.values())
        assert size <= max_shard_bytes or len(part) == 1 or max_shard_bytes == 1
        assert all(index["weight_map"][name] == file for name in part)
        found.update(part)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_floats_are_rounded_once_and_integers_stay(tmp_path):
    tensors = every_dtype()
    write_safetensors(Pieces(tensors), tmp_path, dtype=torch.bfloat16, max_shard_bytes=10**9)
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(found[name], expected), name


def test_a_source_that_leaves_elements_out_is_not_taken(tmp_path):
    source = Pieces({"a": torch.ones(4), "b": torch.ones(5)}, lost=2)
    with pytest.raises(CheckpointError, match="do not make up 2 tensors; a lacks 2 elements"):
        write_safetensors(source, tmp_path, dtype=None, max_shard_bytes=10**9)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("700", 700), ("2kb", 2000)]
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-1GB", "0"])
def test_a_size_that_is_none_says_how_to_write_it(text):
    with pytest.raises(SettingsError, match=r"size '.*' (is no number of bytes; write|must be)"):
        parse_size(text)


@pytest.fixture
def deepspeeds(saves, request, tmp_path) -> Path:
    """A folder as DeepSpeed alone leaves it: its tag, and `latest`."""
    folder = tmp_path / "deepspeed"
    shutil.copytree(saves.step(request.param, 3) / "model", folder / "model")
    (folder / "latest").write_text("model")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("max_shard_bytes", [10**9, 120])
@pytest.mark.parametrize("deepspeeds", CASES, indirect=True)
def test_what_deepspeed_alone_saved_is_written_bit_for_bit(
    saves, deepspeeds, request, tmp_path, max_shard_bytes
):
    case = request.node.callspec.params["deepspeeds"]
    export = convert_run(deepspeeds, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert (export.kind, export.step) == ("weights", 3)
    assert export.num_parameters == sum(p.numel() for p in TinyModel().parameters())
    assert (max_shard_bytes == 120) == (not (tmp_path / "out" / "model.safetensors").exists())
    found, _ = read_weights(tmp_path / "out")
    live = torch.load(saves.folder / case / "live.pt", weights_only=True)
    assert found.keys() == live.keys()
    for name, tensor in live.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("deepspeeds", ["zero2_bf16", "zero3_bf16"], indirect=True)
def test_a_tied_head_that_crashes_deepspeeds_converter_is_stored_once(deepspeeds, tmp_path):
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    with pytest.raises(RuntimeError, match="share memory"):
        convert_zero_checkpoint_to_state_dict(
            str(deepspeeds), str(tmp_path / "theirs"), safe_serialization=True
        )
    out = convert_run(deepspeeds, tmp_path / "ours").folder
    with safe_open(out / "model.safetensors", "pt") as stored:
        both = {"head.weight", "embedding.weight"}
        assert len(both & set(stored.keys())) == 1
        assert stored.metadata()["head.weight"] == "embedding.weight"
    model = TinyModel()
    # safetensors' own loader ties them again.
    missing, unexpected = load_model(model, out / "model.safetensors", strict=True)
    assert not missing
    assert not unexpected
    assert torch.equal(model.head.weight, load_file(out / "model.safetensors")["embedding.weight"])
    assert model.head.weight is model.embedding.weight
