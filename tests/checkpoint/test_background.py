"""Saves in the background: the same files, the same guarantees."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import tiny_runs
import torch
from test_chaos import whole_steps
from test_resume import steps_of, tensors_in

from lgpt.checkpoint.background import CopiedStates, Writer, copy_to_memory
from lgpt.checkpoint.deepspeed_files import read_safely
from lgpt.checkpoint.manifest import record_files
from lgpt.core.errors import CheckpointError


def test_a_copy_is_what_would_have_been_written_then(tmp_path):
    flat = torch.randn(100)
    module = OrderedDict(first=flat[:50].view(5, 10), second=flat[50:], none=torch.zeros(3, 0))
    module._metadata = {"": {"version": 1}}
    turned = torch.nn.Parameter(torch.randn(3, 4).t())
    state = {"module": module, "turned": turned, "list": [1, "x", (torch.ones(2).bfloat16(), None)]}
    torch.save(state, tmp_path / "then.pt")
    copied = copy_to_memory(state)
    with torch.no_grad():
        flat.zero_()
        turned.zero_()
    torch.save(copied, tmp_path / "copied.pt")
    then, now = (torch.load(tmp_path / f"{name}.pt") for name in ("then", "copied"))
    assert all(map(torch.equal, tensors_in(then["module"]), tensors_in(now["module"])))
    assert torch.equal(then["turned"], now["turned"])
    assert now["turned"].stride() == (1, 4)
    assert torch.equal(then["list"][2][0], now["list"][2][0])
    assert copied["module"]._metadata == module._metadata
    # The memory that two tensors share is in the file once.
    storages = [copied["module"][name].untyped_storage().data_ptr() for name in ("first", "second")]
    assert storages[0] == storages[1]


def test_a_writer_digests_what_it_wrote_and_keeps_what_stopped_it(tmp_path):
    states = CopiedStates()
    states.by_path[tmp_path / "a.pt"] = {"x": torch.arange(5)}
    writer = Writer(tmp_path, states)
    writer.start()
    writer.join()
    writer.raise_what_failed()
    assert writer.records == record_files(tmp_path, ["a.pt"])
    assert torch.load(tmp_path / "a.pt")["x"].tolist() == [0, 1, 2, 3, 4]
    states.by_path[tmp_path / "gone" / "b.pt"] = {}
    failing = Writer(tmp_path, states)
    failing.start()
    failing.join()
    with pytest.raises(RuntimeError, match="gone"):
        failing.raise_what_failed()


def test_a_writer_that_runs_out_of_memory_does_not_count_as_done(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise MemoryError("std::bad_alloc")

    states = CopiedStates()
    states.by_path[tmp_path / "a.pt"] = {"x": torch.arange(5)}
    writer = Writer(tmp_path, states)
    monkeypatch.setattr(torch, "save", full)
    writer.start()
    writer.join()
    with pytest.raises(CheckpointError, match=r"ended with MemoryError: std::bad_alloc"):
        writer.raise_what_failed()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trains", "deepspeed", "precision"),
    [("vqvae", "zero2_bf16", "fp32"), ("transformer", "zero3_bf16", "bf16")],
)
def test_background_saves_hold_what_waited_ones_hold(ranks, folder, trains, deepspeed, precision):
    changes = {
        "deepspeed": deepspeed,
        "training": {"max_steps": 5, "precision": precision},
    }
    ends = []
    for asynchronous in (False, True):
        name = f"{trains}-{asynchronous}"
        checkpoint = {"every_steps": 2, "keep_every": 2, "asynchronous": asynchronous}
        config = tiny_runs.write_run(folder, name, trains, checkpoint=checkpoint, **changes)
        outcome = ranks.train(config)
        assert outcome.codes == [0, 0], outcome.log[-3000:]
        ends.append(folder / "runs" / name)
    assert steps_of(ends[0]) == steps_of(ends[1])
    assert whole_steps(ends[0]) == whole_steps(ends[1]) == [5, 4, 2]
    for path in sorted((ends[0] / "checkpoints").glob("step_*/model/*.pt")):
        other = ends[1] / path.relative_to(ends[0])
        ours, theirs = tensors_in(read_safely(path)), tensors_in(read_safely(other))
        assert len(ours) == len(theirs) > 0
        assert all(map(torch.equal, ours, theirs)), path


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_background_is_told_at_a_later_step(ranks, folder: Path):
    """No file may grow beyond 200,000 bytes: shards are larger, all others smaller."""
    config = tiny_runs.write_run(
        folder,
        "full",
        "vqvae",
        training={"max_steps": 4},
        checkpoint={"every_steps": 1, "asynchronous": True},
    )
    stopped = ranks.train(config, max_file_bytes=200_000)
    assert stopped.codes == [3, 3], stopped.log[-3000:]
    assert "could not write" in stopped.log
    assert "step 1/4" in stopped.log  # the save itself was only begun there
    went_on = ranks.train(config, "checkpoint.on_failed_save=continue", max_file_bytes=200_000)
    # The last save has no next one that could make up for it.
    assert went_on.codes == [3, 3], went_on.log[-3000:]
    assert went_on.log.count("Training goes on (checkpoint.on_failed_save: continue)") == 3
    assert "step 4/4" in went_on.log
    checkpoints = folder / "runs" / "full" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == []
    assert ranks.train(config).codes == [0, 0]
    assert whole_steps(checkpoints.parent) == [4, 3]
