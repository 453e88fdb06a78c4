"""From logits to the next token: guidance, temperature, top-k, top-p, and the draw. Pure.

Shapes: B pictures, V codes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lgpt.core.errors import SettingsError
from lgpt.settings.training import GUIDANCE_SCHEDULES


def guided(
    conditional_BV: Float[Tensor, "batch codes"],
    unconditional_BV: Float[Tensor, "batch codes"],
    guidance: float,
) -> Float[Tensor, "batch codes"]:
    """u + g (c - u): 0 is unconditional, 1 leaves the prompt as it is, more follows it harder.

    Source: Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, with g = w + 1.
    """
    return unconditional_BV + guidance * (conditional_BV - unconditional_BV)


def guidance_at(
    position: int, tokens: int, guidance: float, schedule: str = "constant", power: float = 1.0
) -> float:
    """The scale for one token: from 1, no guidance, at the first to `guidance` at the last.

    With t = (position / (tokens - 1))^power: linear is 1 + (g - 1) t (Tian et al. 2024, VAR,
    https://arxiv.org/abs/2404.02905), cosine is 1 + (g - 1) (1 - cos(pi t)) / 2; with a power that
    is RAR's power-cosine (Yu et al. 2024, https://arxiv.org/abs/2411.00776).

    Args:
        position: Of the token in the picture, 0 .. tokens - 1.
        tokens: Of the whole picture.
        guidance: g, at least 0.
        schedule: constant, linear or cosine.
        power: Greater than 0; above 1 guidance comes later. Without effect on constant.
    """
    assert schedule in GUIDANCE_SCHEDULES, schedule
    if schedule == "constant":
        return guidance
    progress = (position / max(tokens - 1, 1)) ** power
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return 1 + (guidance - 1) * progress


def keep_top_k(logits_BV: Float[Tensor, "batch codes"], k: int) -> Float[Tensor, "batch codes"]:
    """-inf for all but the k largest (and what ties with the k-th); 0 keeps all."""
    if k == 0 or k >= logits_BV.shape[1]:
        return logits_BV
    least_B1 = logits_BV.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def keep_top_p(logits_BV: Float[Tensor, "batch codes"], p: float) -> Float[Tensor, "batch codes"]:
    """-inf outside the smallest set of codes whose probabilities sum to at least p; 1 keeps all.

    Source: Holtzman et al. 2019 (nucleus sampling), https://arxiv.org/abs/1904.09751.
    """
    if p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=1, descending=True)
    probabilities = sorted_BV.softmax(dim=1)
    mass_before = probabilities.cumsum(dim=1) - probabilities
    kept = sorted_BV.masked_fill(mass_before >= p, float("-inf"))
    return torch.empty_like(kept).scatter_(1, order_BV, kept)


def draw(
    logits_BV: Float[Tensor, "batch codes"], uniforms_B: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The token whose slice of the summed-up probabilities holds the uniform number.

    In float64: with 16384 codes a float32 sum has lost the small probabilities at its end.

    Args:
        logits_BV: Any floating type; -inf is never drawn.
        uniforms_B: One number in [0, 1) a picture.

    Returns:
        Always a code: the last one where logits are NaN.
    """
    sums_BV = logits_BV.double().softmax(dim=1).cumsum(dim=1)
    total_B1 = sums_BV[:, -1:]
    wanted_B1 = uniforms_B.double().unsqueeze(1) * total_B1
    # A product that rounds up to the total would fall behind the last code.
    wanted_B1 = torch.minimum(wanted_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    tokens_B = torch.searchsorted(sums_BV, wanted_B1, right=True).squeeze(1)
    # Sums of NaN hold nothing, and a code that is none would end in a device-side assert.
    return tokens_B.clamp(max=logits_BV.shape[1] - 1)


def next_tokens(
    logits_BV: Float[Tensor, "batch codes"],
    uniforms_B: Float[Tensor, " batch"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, " batch"]:
    """Temperature, then top-k, then top-p, then the draw; all in float32 or more."""
    logits_BV = logits_BV.float() / temperature
    return draw(keep_top_p(keep_top_k(logits_BV, top_k), top_p), uniforms_B)


def check_sampling(
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    guidance_schedule: str = "constant",
    guidance_power: float = 1.0,
) -> None:
    """Refuse numbers that have no meaning, all at once.

    Raises:
        SettingsError: At least one is out of its range.
    """
    claims = (
        (guidance >= 0, f"guidance must be at least 0, got {guidance}; 1 switches it off."),
        (
            guidance_schedule in GUIDANCE_SCHEDULES,
            f"guidance_schedule must be one of {', '.join(GUIDANCE_SCHEDULES)}, got "
            f"{guidance_schedule!r}.",
        ),
        (
            guidance_power > 0,
            f"guidance_power must be greater than 0, got {guidance_power}; 1 is the plain curve.",
        ),
        (
            guidance_power == 1 or guidance_schedule != "constant",
            f"guidance_power {guidance_power} has no effect with guidance_schedule constant; take "
            "linear or cosine, or leave it at 1.",
        ),
        (
            temperature > 0,
            f"temperature must be greater than 0, got {temperature}; top_k=1 takes the likeliest "
            "token.",
        ),
        (top_k >= 0, f"top_k must be at least 0, got {top_k}; 0 means all codes."),
        (0 < top_p <= 1, f"top_p must lie in (0, 1], got {top_p}; 1 means all codes."),
    )
    if problems := [text for is_fine, text in claims if not is_fine]:
        raise SettingsError(problems)
