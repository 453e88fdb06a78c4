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
from lgpt.sampling.logits import check_sampling, guidance_at, guided, next_tokens


@torch.no_grad()
def generate_tokens(
    model: LatentGPT,
    text: Optional[Float[Tensor, "batch words text_width"]] = None,
    text_mask: Optional[Bool[Tensor, "batch words"]] = None,
    *,
    guidance: float = 1.0,
    guidance_schedule: str = "constant",
    guidance_power: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int],
    given: Optional[Int[Tensor, "batch given"]] = None,
    progress: Optional[Callable[[int], Any]] = None,
    row_done: Optional[Callable[[Tensor], Any]] = None,
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
        guidance_schedule: constant, linear or cosine, see `guidance_at`.
        guidance_power: See `guidance_at`.
        temperature: Below 1 prefers likely tokens.
        top_k: Draw among so many likeliest tokens; 0 = all.
        top_p: Draw among the likeliest tokens with this much probability; 1 = all.
        seeds: One a picture. The same text and seed give the same picture in any batch: bit for
            bit with packed weights (`pack_for_decoding`), else up to floating-point noise.
        given: Each picture's first tokens in raster order; the others are drawn after them.
        progress: Called with the number of new tokens of each picture.
        row_done: Called after every row with the rows there are, [B, rows, w].
        must_be_finite: False draws on, whatever comes out, where logits are not finite.

    Raises:
        SettingsError: A number is out of its range.
        CheckpointError: Logits are not finite.
    """
    check_sampling(guidance, temperature, top_k, top_p, guidance_schedule, guidance_power)
    length, width = model.config.num_tokens, model.config.grid_width
    tokens_BL = _blank(len(seeds), length, text, given, guidance, model)
    kept = 0 if given is None else given.shape[1]
    decoder = GuidedDecoder(model, text, text_mask, len(seeds), is_guided=guidance != 1)
    uniforms_LB = _uniforms(seeds, length).to(tokens_BL.device)
    if kept and progress is not None:
        progress(kept)
    finite: list[Tensor] = []  # on the device: asking at every token would wait for it each time
    for position in range(kept, length):
        scale = guidance_at(position, length, guidance, guidance_schedule, guidance_power)
        logits_BV = decoder.logits(tokens_BL, position, scale)
        finite.append(logits_BV.isfinite().all())
        tokens_BL[:, position] = next_tokens(
            logits_BV, uniforms_LB[position], temperature=temperature, top_k=top_k, top_p=top_p
        )
        if progress is not None:
            progress(1)
        if row_done is not None and (position + 1) % width == 0:
            row_done(tokens_BL[:, : position + 1].view(len(seeds), -1, width))
    if must_be_finite and not torch.stack(finite).all():
        raise CheckpointError(
            "The transformer's logits are not finite, so its pictures mean nothing: its weights "
            "are damaged or of a run that diverged; convert an earlier checkpoint."
        )
    return tokens_BL.view(-1, model.config.grid_height, width)


def _blank(
    batch: int,
    length: int,
    text: Optional[Tensor],
    given: Optional[Tensor],
    guidance: float,
    model: LatentGPT,
) -> Tensor:
    """Tokens [B, L] of which only the given ones are filled in; refuses what does not fit."""
    if text is None and guidance != 1:
        raise ValueError(f"guidance {guidance} has no effect without text; leave it at 1.")
    if text is not None and len(text) != batch:
        raise ValueError(f"{len(text)} rows of text for {batch} seeds")
    device = next(model.parameters()).device
    tokens_BL = torch.zeros(batch, length, dtype=torch.long, device=device)
    if given is not None:
        if len(given) != batch or given.shape[1] >= length:
            raise ValueError(
                f"given tokens are {list(given.shape)} for {batch} seeds and pictures of {length} "
                "tokens; something must be left to draw"
            )
        tokens_BL[:, : given.shape[1]] = given
    return tokens_BL


class GuidedDecoder:
    """Logits of one position after the other; with guidance both halves in one batch."""

    def __init__(
        self,
        model: LatentGPT,
        text: Optional[Tensor],
        text_mask: Optional[Tensor],
        batch: int,
        *,
        is_guided: bool,
    ) -> None:
        self.model, self.batch, self.is_guided = model, batch, is_guided
        null_text = None
        if is_guided and text is not None:
            text = torch.cat([text, text])
            text_mask = None if text_mask is None else torch.cat([text_mask, text_mask])
            null_text = torch.arange(2 * batch, device=text.device) >= batch
        self.state = model.start_decoding(text, text_mask, null_text, max_batch=batch)

    def logits(self, tokens_BL: Tensor, position: int, guidance: float) -> Tensor:
        """Of the token at `position`, [B, V] in float32; those before it must have been read."""
        rows = 2 if self.is_guided else 1
        if self.state.position == 0 and position > 0:
            logits = self.model.read_given(tokens_BL[:, :position].repeat(rows, 1), self.state)
        else:
            previous = tokens_BL[:, position - 1].repeat(rows) if position else None
            logits = self.model.decode_next(previous, self.state)
        logits = logits.float()
        if not self.is_guided:
            return logits
        return guided(logits[: self.batch], logits[self.batch :], guidance)


def _uniforms(seeds: Sequence[int], length: int) -> Float[Tensor, "length batch"]:
    """Each picture's own numbers, drawn on the CPU so that every device draws the same."""
    columns = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        columns.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(columns, dim=1)
