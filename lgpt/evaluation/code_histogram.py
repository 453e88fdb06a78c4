"""How often each code was used, as a picture: codes sorted by their use, on a logarithmic axis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lgpt.evaluation.picture_metrics import code_perplexity

_WIDTH, _HEIGHT = 640, 360
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 34, 20, 40
_PAPER, _INK, _GRID = (255, 255, 255), (40, 40, 40), (222, 222, 222)
_BAR, _EVEN = (66, 115, 179), (200, 80, 40)


def usage_histogram(counts: Int[Tensor, " codes"]) -> Image.Image:
    """Draw the counts, most used code first; codes that were never used leave the right end empty.

    A level line tells how often each would be used if all were used equally.
    """
    ordered = np.sort(counts.cpu().numpy())[::-1]
    num_codes, total = len(ordered), int(ordered.sum())
    # One decade at least, so that the axis has two ticks.
    decades = max(1, math.ceil(math.log10(max(int(ordered[0]), 1))))
    sheet = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    floor = _TOP + height

    def level(uses: float) -> float:
        """Where the axis has so many uses; below one use it ends, a little under 1."""
        return floor - height * (math.log10(max(uses, 0.5)) + 0.3) / (decades + 0.3)

    for power in range(decades + 1):
        y = level(10.0**power)
        brush.line((_LEFT, y, _LEFT + width, y), fill=_GRID)
        label = f"{10**power:,}"
        brush.text((_LEFT - 6 - font.getlength(label), y - 6), label, fill=_INK, font=font)
    for column in range(width):
        uses = float(ordered[column * num_codes // width])
        if uses:
            brush.line((_LEFT + column, level(uses), _LEFT + column, floor), fill=_BAR)
    even = level(total / num_codes)
    brush.line((_LEFT, even, _LEFT + width, even), fill=_EVEN)
    brush.text((_LEFT + width - 70, even - 14), "even use", fill=_EVEN, font=font)
    brush.line((_LEFT, _TOP, _LEFT, floor), fill=_INK)
    brush.line((_LEFT, floor, _LEFT + width, floor), fill=_INK)
    used = int((ordered > 0).sum())
    title = (
        f"{used:,} of {num_codes:,} codes used ({used / num_codes:.1%}) in {total:,} tokens, "
        f"perplexity {code_perplexity(torch.as_tensor(ordered.copy())):,.0f}"
    )
    brush.text((_LEFT, 12), title, fill=_INK, font=font)
    _write_axis(brush, font, floor, width, num_codes)
    return sheet


def _write_axis(
    brush: ImageDraw.ImageDraw, font: Any, floor: int, width: int, num_codes: int
) -> None:
    for part in range(5):
        x, label = _LEFT + width * part / 4, f"{num_codes * part // 4:,}"
        brush.line((x, floor, x, floor + 4), fill=_INK)
        brush.text((x - font.getlength(label) / 2, floor + 6), label, fill=_INK, font=font)
    text = "codes, most used first; uses of each on the left"
    brush.text((_LEFT + (width - font.getlength(text)) / 2, floor + 22), text, fill=_INK, font=font)
