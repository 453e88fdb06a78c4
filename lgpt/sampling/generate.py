"""Writing picture tokens one after the other, with a KV cache.

Shapes: B pictures, L tokens of a picture, T text tokens, V codes, h w token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.models.latent_gpt import LatentGPT
from lgpt.sampling.logits import check_sampling, guided, next_tokens


@torch.no_grad()
def generate_tokens(
    model: LatentGPT,
    text: Optional[Float[Tensor, "batch words text_width"]] = None,
    text_mask: Optional[Bool[Tensor, "batch words"]] = None,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int],
    progress: Optional[Callable[[int], Any]] = None,
    must_be_finite: bool = True,
) -> Int[Tensor, "batch h w"]:
    """Draw one picture a seed.

    With guidance other than 1, every picture runs twice in the same batch: with its text, and with
    the null embedding.

    Args:
        model: In eval mode; text must be on its device.
        text: Text embeddings, one row a picture; None draws unconditional pictures.
        text_mask: True where a text position holds a word.
        guidance: Scale of classifier-free guidance; must be 1 without text.
        temperature: Below 1 prefers likely tokens.
        top_k: Draw among so many likeliest tokens; 0 = all.
        top_p: Draw among the likeliest tokens with this much probability; 1 = all.
        seeds: One a picture. The same text and seed give the same picture in any batch, up to
            floating-point noise.
        progress: Called with 1 after every token position.
        must_be_finite: False draws on, whatever comes out, where logits are not finite.

    Raises:
        SettingsError: A number is out of its range.
        CheckpointError: Logits are not finite.
    """
    check_sampling(guidance, temperature, top_k, top_p)
    batch, length = len(seeds), model.config.num_tokens
    is_guided = guidance != 1 and text is not None
    if text is None and guidance != 1:
        raise ValueError(f"guidance {guidance} has no effect without text; leave it at 1.")
    if text is not None and len(text) != batch:
        raise ValueError(f"{len(text)} rows of text for {batch} seeds")
    null_text = None
    if is_guided and text is not None:
        text = torch.cat([text, text])
        text_mask = None if text_mask is None else torch.cat([text_mask, text_mask])
        null_text = torch.arange(2 * batch, device=text.device) >= batch
    state = model.start_decoding(text, text_mask, null_text, max_batch=batch)
    uniforms_LB = _uniforms(seeds, length)
    tokens: list[Tensor] = []
    finite: list[Tensor] = []  # on the device: asking at every token would wait for it each time
    for position in range(length):
        previous = tokens[-1] if tokens else None
        if previous is not None and is_guided:
            previous = torch.cat([previous, previous])
        logits_BV = model.decode_next(previous, state).float()
        if is_guided:
            logits_BV = guided(logits_BV[:batch], logits_BV[batch:], guidance)
        finite.append(logits_BV.isfinite().all())
        uniforms_B = uniforms_LB[position].to(logits_BV.device)
        tokens.append(
            next_tokens(logits_BV, uniforms_B, temperature=temperature, top_k=top_k, top_p=top_p)
        )
        if progress is not None:
            progress(1)
    if must_be_finite and not torch.stack(finite).all():
        raise CheckpointError(
            "The transformer's logits are not finite, so its pictures mean nothing: its weights "
            "are damaged or of a run that diverged; convert an earlier checkpoint."
        )
    grid = (batch, model.config.grid_height, model.config.grid_width)
    return torch.stack(tokens, dim=1).view(grid)


def _uniforms(seeds: Sequence[int], length: int) -> Float[Tensor, "length batch"]:
    """Each picture's own numbers, drawn on the CPU so that every device draws the same."""
    columns = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        columns.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(columns, dim=1)
