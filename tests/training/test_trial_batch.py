"""The search for a micro batch that fits, on a device that only pretends to be full."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from lgpt.core.distributed import seed_everything
from lgpt.core.errors import OutOfMemoryError
from lgpt.settings.run import load_run_settings
from lgpt.settings.training import BatchSettings
from lgpt.training.train_vqvae import VqvaeTask
from lgpt.training.trial_batch import largest_that_fits, refuse_what_does_not_fit

CPU = torch.device("cpu")


class FullAbove:
    """A task on a device with room for so many pictures."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []

    def trial_batch(self, images: int) -> None:
        self.tried.append(images)
        if images > self.room:
            raise torch.OutOfMemoryError("no room")


def test_the_search_finds_what_trying_all_finds():
    for count in range(6):
        candidates = [2 * i + 1 for i in range(count)]
        for room in range(12):
            fitting = [images for images in candidates if images <= room]
            got = largest_that_fits(candidates, lambda images, room=room: images <= room)
            assert got == (max(fitting) if fitting else None)


def test_a_batch_that_fits_is_tried_once():
    task = FullAbove(16)
    refuse_what_does_not_fit(
        task.trial_batch, BatchSettings(global_batch_images=64, micro_batch_images=16), CPU
    )
    assert task.tried == [16]


def test_one_that_does_not_names_the_largest_that_fits_and_divides():
    batch = BatchSettings(global_batch_images=48, micro_batch_images=24)
    with pytest.raises(OutOfMemoryError, match=r"24 pictures .*set batch.micro_batch_images to 8 "):
        refuse_what_does_not_fit(FullAbove(11).trial_batch, batch, CPU)


def test_when_nothing_fits_other_ways_are_named():
    batch = BatchSettings(global_batch_images=4, micro_batch_images=4)
    with pytest.raises(OutOfMemoryError, match=r"nor does a single one.*data\.resolution"):
        refuse_what_does_not_fit(FullAbove(0).trial_batch, batch, CPU)


def task_of(folder: Path, trains: str) -> VqvaeTask:
    """Both players, with bare modules for engines."""
    # Dropout draws, and moving averages note what a forward sees.
    vqvae = {**tiny.VQVAE, "dropout": 0.1}
    changes = {}
    if trains == "decoder":
        vqvae.pop("codebook_update")
        changes = {"init_from": "x", "finetuning": {"trains": "decoder"}}
    config = tiny.vqvae_run(
        folder,
        4,
        vqvae=vqvae,
        loss={"adversarial": "hinge"},
        discriminator={
            "layers": 1,
            "channels": 16,
            "start_step": 0,
            "warmup_steps": 0,
            "lecam_weight": 0.1,
            "adaptive_weight": True,
        },
        **changes,
    )
    task = VqvaeTask(load_run_settings(tiny.write(folder / "run.yaml", config), environ={}), CPU)
    task.engine, task.adversary.engine = (
        SimpleNamespace(module=player, train=player.train)
        for player in (task.model, task.adversary.model)
    )
    return task


@pytest.mark.parametrize("trains", ["all", "decoder"])
def test_a_trial_changes_neither_weights_nor_gradients_nor_generators(
    tmp_path, trains, monkeypatch
):
    task = task_of(tmp_path, trains)
    players = [task.model, task.adversary.model]
    before = [copy.deepcopy(player.state_dict()) for player in players]
    seed_everything(3)
    drawn = torch.rand(3)
    seed_everything(3)
    taken: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: taken.append(a[0]) or empty(*a, **k))
    task.trial_batch(2)
    monkeypatch.undo()
    learned = sum(p.numel() for player in players for p in player.parameters())
    assert 6 * learned in taken, "room for the gradients of both players"
    assert torch.equal(torch.rand(3), drawn)
    for player, state in zip(players, before):
        assert all(torch.equal(state[name], value) for name, value in player.state_dict().items())
        assert all(parameter.grad is None for parameter in player.parameters())
    assert task.model.quantize.finish_step(seed=0, step=0) == 0
    if trains == "all":
        assert not bool(task.model.quantize.is_initialized), "the trial's latents were forgotten"


def bytes_of_tensors() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_trial_that_runs_out_of_memory_keeps_nothing_of_it(tmp_path):
    """Or the next one has less room than a training step will have."""
    task = task_of(tmp_path, "all")
    before = bytes_of_tensors()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    task.model.decoder.conv_out.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        task.trial_batch(2)
    assert bytes_of_tensors() == before
