"""Pictures beside their reconstructions as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from lgpt.core.errors import SettingsError
from lgpt.core.files import write_text_atomically
from lgpt.data.transforms import to_pil
from lgpt.evaluation.code_histogram import usage_histogram

_ERROR_IS_SHOWN_TIMES = 4
_LEAST_SIDE = 128

# Values of a picture under it: name, key, format.
_UNDER_A_PICTURE = (
    ("PSNR", "psnr_db", "{:.1f} dB"),
    ("SSIM", "ssim", "{:.3f}"),
    ("LPIPS", "lpips", "{:.3f}"),
)

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
       max-width: 1240px; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
td:first-child { color: #666; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { margin: 0; } figure .row { display: flex; gap: 4px; }
figure img { display: block; image-rendering: pixelated; }
figcaption { font-size: .8rem; color: #444; max-width: 400px; overflow-wrap: anywhere; }
.histogram { max-width: 100%; }
"""


@dataclass(frozen=True)
class Shown:
    """One picture of the page.

    Attributes:
        name: What it is called in its dataset.
        original: In [-1, 1].
        reconstruction: Of the same size, not clamped.
        values: Its own figures, by the names of the metrics.
    """

    name: str
    original: Float[Tensor, "3 H W"]
    reconstruction: Float[Tensor, "3 H W"]
    values: Mapping[str, float]


def write_picture_page(
    path: Path,
    *,
    title: str,
    rows: Sequence[tuple[str, str]],
    result: Mapping[str, Any],
    counts: Int[Tensor, " codes"],
    shown: Mapping[str, Sequence[Shown]],
) -> None:
    """Write the page; it is whole or absent.

    Args:
        path: The HTML file.
        title: What was measured.
        rows: The table: names and values.
        result: Kept in the page as JSON, for programs.
        counts: How often each code was used.
        shown: Pictures under headings.

    Raises:
        SettingsError: It cannot be written there.
    """
    table = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>\n" for a, b in rows)
    parts = [
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>",
        '<meta name=viewport content="width=device-width">',
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n<table>{table}</table>",
        "<h2>Codes by use</h2>",
        f"<img class=histogram alt='codes by use' src='{_source(usage_histogram(counts))}'>",
    ]
    for heading, pictures in shown.items():
        parts.append(
            f"<h2>{escape(heading)}</h2>\n<p>Original, reconstruction, and their difference from "
            f"grey, {_ERROR_IS_SHOWN_TIMES} times as strong.</p>\n<div class=pictures>"
        )
        parts += [_figure(picture) for picture in pictures]
        parts.append("</div>")
    values = json.dumps(result).replace("</", "<\\/")
    parts.append(f'<script type="application/json" id="result">{values}</script>')
    parts.append("</body></html>\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, "\n".join(parts))
    except OSError as error:
        raise SettingsError(f"--page {path} cannot be written: {error}.") from error


def _figure(shown: Shown) -> str:
    difference = _ERROR_IS_SHOWN_TIMES * (shown.reconstruction.clamp(-1, 1) - shown.original)
    pictures = to_pil(torch.stack([shown.original, shown.reconstruction, difference]))
    # Small pictures are enlarged by a whole number, pixel by pixel, so that nothing is smoothed.
    scale = max(1, -(-_LEAST_SIDE // pictures[0].width))
    images = "".join(
        f"<img alt='{what}' width={picture.width * scale} height={picture.height * scale} "
        f"src='{_source(picture)}'>"
        for what, picture in zip(("original", "reconstruction", "difference"), pictures)
    )
    values = ", ".join(
        f"{name} {form.format(shown.values[key])}"
        for name, key, form in _UNDER_A_PICTURE
        if key in shown.values
    )
    return (
        f"<figure><div class=row>{images}</div>"
        f"<figcaption>{escape(shown.name)}<br>{escape(values)}</figcaption></figure>"
    )


def _source(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
