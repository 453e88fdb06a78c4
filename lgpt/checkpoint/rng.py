"""The random number generators of one rank as tensors: Python, numpy, torch and its CUDA device."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lgpt.core.distributed import rank, seed_everything, world_size


def capture_rng_state() -> dict[str, Tensor]:
    """Where this rank's generators stand; tensors only, so that loading unpickles no code."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: Mapping[str, Tensor]) -> None:
    """Put this rank's generators where `capture_rng_state` found them."""
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def branch_rng_state(state: Mapping[str, Tensor]) -> None:
    """Give this rank generators of its own when another number of ranks goes on.

    There is no generator of the save for every rank, so each gets a seed that follows from where
    rank 0's stood, from its own number and from how many there are: the same start always goes on
    the same way, and no two ranks draw alike.

    Args:
        state: Rank 0's, of the save.
    """
    digest = hashlib.sha256(f"{rank()} of {world_size()}".encode())
    for name in ("python", "numpy", "torch"):
        digest.update(state[name].numpy().tobytes())
    seed_everything(int.from_bytes(digest.digest()[:7], "big"))
