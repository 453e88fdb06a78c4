"""Pictures in rows and columns with their captions, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

from PIL import Image, ImageDraw, ImageFont

_LEAST_SIDE = 128
_GAP = 8
_LINE = 14
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def picture_grid(
    images: Sequence[Image.Image],
    captions: Optional[Sequence[str]] = None,
    columns: Optional[int] = None,
) -> Image.Image:
    """Lay pictures out on white, row by row, each over its caption.

    Small pictures are enlarged by a whole number, pixel by pixel, so that nothing is smoothed.

    Args:
        images: At least one; all of the first one's size.
        captions: One a picture; wrapped to its width.
        columns: Pictures a row; default: about a square.
    """
    if not images:
        raise ValueError("picture_grid needs at least one picture")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} pictures")
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = math.ceil(_LEAST_SIDE / min(images[0].size))
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default()
    texts = [_wrap(caption, width, font) for caption in captions or [""] * len(images)]
    rows = [
        range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)
    ]
    text_heights = [_LINE * max(len(texts[index]) for index in row) for row in rows]
    total_height = sum(height + text_height + _GAP for text_height in text_heights) + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, total_height), _PAPER)
    brush = ImageDraw.Draw(sheet)
    top = _GAP
    for row, text_height in zip(rows, text_heights):
        for column, index in enumerate(row):
            left = _GAP + column * (width + _GAP)
            enlarged = (
                images[index].convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            )
            sheet.paste(enlarged, (left, top))
            for number, line in enumerate(texts[index]):
                brush.text((left, top + height + 1 + number * _LINE), line, fill=_INK, font=font)
        top += height + text_height + _GAP
    return sheet


def _wrap(caption: str, width: int, font: Any) -> list[str]:
    """Lines that fit; Pillow's built-in font knows Latin-1 only."""
    words = caption.encode("latin-1", "replace").decode("latin-1").split()
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
