"""Weights that stay as they are inside a model that is trained: float32 buffers, not parameters."""

from __future__ import annotations

from torch import nn


def freeze_in_float32(module: nn.Module) -> None:
    """Turn every parameter of a module into a float32 buffer of the same name, in eval mode.

    Unlike a parameter that needs no gradient, a buffer is not cut up by ZeRO-3, has no master or
    moment, and lies whole in a checkpoint under its name, so what is made of it needs no other
    file. The caller keeps it from being cast (`codebook.keep_float32`).
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().float())
    module.eval()
