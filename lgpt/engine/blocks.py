"""Activation checkpointing and torch.compile for the blocks of a model.

Both work through the module's own call, so that DeepSpeed's hooks gather a block under ZeRO-3
before it is computed, and again before it is recomputed.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from typing import Any, Callable

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.engine.memory import Holes
from lgpt.engine.start import Float32Products, load_deepspeed
from lgpt.models.latent_gpt import LatentGPT
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_blocks import Level, Middle
from lgpt.settings.blocks import BlockSettings, VqvaeBlockSettings

_log = get_logger(__name__)

_holes = Holes()

# Kept by `selective`: what is dear to compute. Norms, rotations, gates and copies are made again.
_KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
# Kept too; by its name, because it exists only where flash-attn has been imported. Before 2.7
# flash-attn registered no operation: no policy sees its attention, which is then made again.
_KEPT_OF_FLASH_ATTN = "flash_attn::_flash_attn_forward"


def apply_block_settings(model: LatentGPT, settings: BlockSettings) -> None:
    """Set how `model` runs its blocks from now on; call it before the engine is built.

    Raises:
        SettingsError: blocks.compile cannot work here.
    """
    if settings.compile:
        _compile(model)
    if settings.checkpointing == "none":
        return
    run_checkpointed = _checkpointed_call(settings)
    step = settings.every if settings.checkpointing == "every_n" else 1

    def call(index: int, block: nn.Module, *args: Any) -> Any:
        # Nothing is kept without gradients, so there is nothing to make again.
        if index % step == 0 and torch.is_grad_enabled():
            return run_checkpointed(_recomputed(block), *args)
        return block(*args)

    model.call_block = call


def apply_vqvae_block_settings(model: VQVAE, settings: VqvaeBlockSettings) -> None:
    """Set how `model` runs the parts of its encoder and decoder from now on."""
    if settings.checkpointing == "none":
        return

    def call(part: nn.Module, x: torch.Tensor) -> Any:
        # A frozen encoder runs without gradients, and validation too.
        if torch.is_grad_enabled():
            return checkpoint(_recomputed(part), x, use_reentrant=False)
        return part(x)

    for module in model.modules():
        if isinstance(module, (Level, Middle)):
            module.call_part = call


def _recomputed(part: nn.Module) -> Callable[..., Any]:
    """What is to be called now and, in backward, again.

    With `Float32Products` where they are on: torch switches every such mode off for the time of
    `Tensor.backward`, in which `part` is computed again and must save the same types.
    """
    products = Float32Products if Float32Products.is_on else contextlib.nullcontext

    def call(x: torch.Tensor, *args: Any) -> Any:
        if x.device.type == "cpu":
            _holes.give_back()  # here nothing of other blocks is alive but what they kept
        with products():
            return part(x, *args)

    return call


def _checkpointed_call(settings: BlockSettings) -> Callable[..., Any]:
    if settings.checkpointed_by == "deepspeed":
        return load_deepspeed().checkpointing.checkpoint  # type: ignore[no-any-return]
    if settings.checkpointing != "selective":
        return functools.partial(checkpoint, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _KEPT or operation.name() == _KEPT_OF_FLASH_ATTN:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _compile(model: LatentGPT) -> None:
    """Compile each block's computation, not its call: DeepSpeed's hooks stay outside."""
    if Float32Products.is_on:
        raise SettingsError(
            "blocks.compile does not go with this CPU, which multiplies bf16 so slowly that lgpt "
            "computes products in float32; set blocks.compile=false or training.precision=fp32."
        )
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        raise SettingsError(
            "blocks.compile needs g++ on a CPU, and there is none on the PATH; install it or set "
            "blocks.compile=false."
        )
    for block in model.blocks:
        block.all_positions = torch.compile(block.all_positions)
    _log.info("blocks are compiled at the first step: that one takes a while")
