"""A VQ-VAE's weights as first weights of one that is trained: what must agree, what is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lgpt.core.errors import CheckpointError
from lgpt.models.vqvae import MOVING_AVERAGES, TRAINING_ONLY, VQVAE
from lgpt.models.vqvae_config import VQVAEConfig

# Moving averages begin at the codes with this count: about what a step adds, 2 of 16384 codes at
# 128 pictures of 256 tokens.
_FIRST_COUNT = 1.0


def refuse_another_architecture(
    there: Mapping[str, Any], here: Mapping[str, Any], what: str
) -> None:
    """Weights of the same shapes may still mean something else: unit-length codes, for example.

    Args:
        there: `VQVAEConfig.to_dict` of the weights.
        here: That of the model they are for.
        what: Names the weights in the message.

    Raises:
        CheckpointError: It names every difference, and what to write to have none.
    """
    may_differ = {*TRAINING_ONLY, "resolution", "attn_resolutions"}
    if _levels_with_attention(there) != _levels_with_attention(here):
        may_differ = set(TRAINING_ONLY)
    names = [name for name in here if name not in may_differ and there.get(name) != here[name]]
    if not names:
        return
    told = ", ".join(f"{name} is {there.get(name)} there and {here[name]} here" for name in names)
    message = f"{what} is another VQ-VAE than the vqvae section describes: {told}; "
    if "input_range" in names:
        raise CheckpointError(f"{message}phase 2 trains on pictures in [-1, 1] only.")
    words = " ".join(f"vqvae.{name}={json.dumps(there.get(name))}" for name in names)
    raise CheckpointError(f"{message}set {words.replace(', ', ',')}.")


def _levels_with_attention(config: Mapping[str, Any]) -> list[bool]:
    whole = VQVAEConfig.from_dict(dict(config))
    levels = range(len(whole.ch_mult))
    return [whole.resolution // 2**level in whole.attn_resolutions for level in levels]


def fitted_codes(state: Mapping[str, Tensor], model: VQVAE) -> dict[str, Tensor]:
    """The state dict with moving averages of its codes if the model has them, without otherwise.

    Moving averages that the state brings are kept; else each code is the average of itself.
    """
    plain = {name: tensor for name, tensor in state.items() if name not in MOVING_AVERAGES}
    quantizer = model.quantize
    if not quantizer.uses_moving_averages:
        return plain
    has_averages = all(name in state for name in MOVING_AVERAGES)
    if has_averages and bool(state["quantize.is_initialized"]):
        return dict(state)
    codes = state["quantize.embedding.weight"].float()
    if quantizer.is_normalized:
        codes = functional.normalize(codes, dim=1)
    return {
        **plain,
        "quantize.ema_count": torch.full((len(codes),), _FIRST_COUNT),
        "quantize.ema_sum": codes * _FIRST_COUNT,
        "quantize.is_initialized": torch.ones((), dtype=torch.uint8),
    }
