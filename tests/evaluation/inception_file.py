"""A file of random Inception weights that gives features of a usual size, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from lgpt.models.inception import InceptionFeatures


def write_random_inception(path: Path) -> Path:
    """Under pytorch-fid's names."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in InceptionFeatures().state_dict().items():
        module, kind = name.rsplit(".", 1)
        if kind == "weight":
            scale = (2 / tensor[0].numel()) ** 0.5
            kernel = torch.randn(tensor.shape, generator=generator) * scale
            state[f"{module}.conv.weight"] = kernel
        else:
            for part in ("weight", "running_var", "bias", "running_mean"):
                fill = torch.ones_like if part in ("weight", "running_var") else torch.zeros_like
                state[f"{module}.bn.{part}"] = fill(tensor)
    torch.save(state, path)
    return path
