"""`lgpt vqvae inspect`: what a VQ-VAE's files hold, and how well pictures come back through it.

Weights are fed in one of two ranges, and nothing in the files says which: both are tried, and the
right one gives the better pictures.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from rich.table import Table
from torch import Tensor

from lgpt.core.errors import DataError, SettingsError
from lgpt.core.logging import get_logger
from lgpt.data.captioned import BadImage
from lgpt.data.picture_folder import PictureFolder
from lgpt.data.transforms import to_pil, to_unit_range, validation_transform
from lgpt.models.source_files import guess_source
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import INPUT_RANGES
from lgpt.sampling.picture_grid import picture_grid

_log = get_logger(__name__)

_COLUMNS = 8
_IMAGES_PER_CALL = 4


def open_guessed(
    checkpoint: str, source: Optional[str], ddconfig: Optional[str]
) -> tuple[VQVAE, dict[str, Any]]:
    """Load a VQ-VAE whose source need not be told; and the report as JSON values.

    Raises:
        CheckpointError: The files are unusable, or no VQ-VAE.
        SettingsError: `source` is unknown.
    """
    told_by = "--source"
    if source is None:
        source, told_by = guess_source(checkpoint)
        _log.info("%s is read as %s: told by %s.", checkpoint, source, told_by)
    vqvae = load_vqvae(source, checkpoint, ddconfig=ddconfig)
    assert vqvae.loading is not None
    described = {"checkpoint": checkpoint, "source_told_by": told_by, **vqvae.loading.to_dict()}
    return vqvae, {**described, "weights_digest": vqvae.weights_digest()}


def inspect_vqvae(
    checkpoint: str,
    *,
    source: Optional[str] = None,
    ddconfig: Optional[str] = None,
    images: Optional[Path] = None,
    out: Optional[Path] = None,
    resolution: Optional[int] = None,
    max_images: int = 16,
) -> dict[str, Any]:
    """The loading report and, with pictures, a round trip through the tokens.

    Args:
        checkpoint: Hub name, folder or file.
        source: As in `load_vqvae`; None guesses it from the files.
        ddconfig: The model.yaml of a taming .ckpt.
        images: A picture, or a folder of pictures (its sub folders too).
        out: Where the PNG of inputs above reconstructions goes.
        resolution: Side to which pictures are cut; None takes the config's, rounded down to f.
        max_images: So many pictures are used, the first by name.

    Returns:
        JSON values.

    Raises:
        CheckpointError: The files are unusable, or no VQ-VAE.
        DataError: There is no picture that can be read.
        SettingsError: A setting without effect, or a side that f does not divide.
    """
    if images is None and (out is not None or resolution is not None):
        raise SettingsError("--out and --resolution have no effect without --images.")
    vqvae, result = open_guessed(checkpoint, source, ddconfig)
    if images is None:
        return result
    side = side_of_pictures(resolution, vqvae)
    inputs, found = _read_pictures(images, side, max_images)
    ranges, reconstructions = _both_ranges(vqvae, inputs)
    best = max(ranges, key=lambda name: float(ranges[name]["psnr_db"]))
    picture = out or Path("reconstructions.png")
    _write_picture(picture, inputs, reconstructions)
    result["round_trip"] = {
        "images": len(inputs),
        "images_found": found,
        "resolution": side,
        "tokens": len(inputs) * (side // vqvae.downsample_factor) ** 2,
        "ranges": ranges,
        "input_range": vqvae.config.input_range,
        "better_range": best,
        "picture": str(picture),
    }
    if best != vqvae.config.input_range:
        _log.warning(
            "Pictures come back better when they are fed in %s (%.2f dB) than in %s (%.2f dB): "
            "these weights may have been trained so; set vqvae.input_range.",
            best,
            ranges[best]["psnr_db"],
            vqvae.config.input_range,
            ranges[vqvae.config.input_range]["psnr_db"],
        )
    return result


def side_of_pictures(wanted: Optional[int], vqvae: VQVAE) -> int:
    """Pixels a side that pictures are cut to; None takes the VQ-VAE's own.

    Raises:
        SettingsError: The downsample factor does not divide it.
    """
    factor = vqvae.downsample_factor
    side = wanted or max(factor, vqvae.config.resolution // factor * factor)
    if side % factor:
        raise SettingsError(
            f"--resolution {side} must be a multiple of the downsample factor {factor}; use "
            f"{max(1, side // factor) * factor} or {(side // factor + 1) * factor}."
        )
    return side


def _read_pictures(images: Path, side: int, most: int) -> tuple[Tensor, int]:
    """Up to `most` pictures [n, 3, side, side] in [-1, 1], and how many there are."""
    folder = PictureFolder(images)
    transform, pixels = validation_transform(side), []
    for index in range(len(folder)):
        if len(pixels) == most:
            break
        try:
            picture = folder.load(index)
        except BadImage as error:
            _log.warning("Skipped a bad picture: %s", error)
            continue
        pixels.append(transform(picture, index, 0))
    if not pixels:
        raise DataError(
            f"{images} holds no picture that can be read; give --images a picture or a folder of "
            "pictures."
        )
    return to_unit_range(torch.from_numpy(np.stack(pixels))), len(folder)


@torch.no_grad()
def _both_ranges(vqvae: VQVAE, inputs: Tensor) -> tuple[dict[str, dict[str, Any]], Tensor]:
    """Figures of either range, and the pictures that came back in the VQ-VAE's own."""
    figures: dict[str, dict[str, Any]] = {}
    kept = inputs
    for input_range in INPUT_RANGES:
        view = copy.copy(vqvae)  # the same weights under another config
        view.config = dataclasses.replace(vqvae.config, input_range=input_range)
        tokens = [view.encode(part) for part in inputs.split(_IMAGES_PER_CALL)]
        pictures = torch.cat([view.decode(part) for part in tokens])
        counts = torch.bincount(torch.cat(tokens).flatten(), minlength=vqvae.vocab_size)
        shares = counts[counts > 0].double() / counts.sum()
        figures[input_range] = {
            "psnr_db": psnr(inputs, pictures),
            "codes_used": int((counts > 0).sum()),
            "codes_perplexity": math.exp(float(-(shares * shares.log()).sum())),
        }
        if input_range == vqvae.config.input_range:
            kept = pictures
    return figures, kept


def psnr(inputs: Float[Tensor, "n 3 H W"], pictures: Float[Tensor, "n 3 H W"]) -> float:
    """Mean over pictures of 10 log10(peak^2 / mean squared error) in dB, peak 2.

    Args:
        inputs: In [-1, 1].
        pictures: The same pictures again; values outside are clamped, as on the way to a file.

    Returns:
        100 at most, for pictures that are equal.
    """
    error = (inputs - pictures.clamp(-1, 1)).double().square().mean(dim=(1, 2, 3))
    return float((10 * (4 / error.clamp_min(4e-10)).log10()).mean())


def _write_picture(path: Path, inputs: Tensor, reconstructions: Tensor) -> None:
    columns = min(_COLUMNS, len(inputs))
    rows: list[Image.Image] = []
    blank = Image.new("RGB", (inputs.shape[-1], inputs.shape[-2]), (255, 255, 255))
    for start in range(0, len(inputs), columns):
        for images in (inputs, reconstructions):
            row = to_pil(images[start : start + columns])
            rows += [*row, *[blank] * (columns - len(row))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(rows, columns=columns).save(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--out {path} cannot be written: {error}.") from error


def inspection_table(result: dict[str, Any]) -> Table:
    """The result for people."""
    table = Table(show_header=False, box=None)
    told_by = "" if result["source_told_by"] == "--source" else f" ({result['source_told_by']})"
    table.add_row("source", f"{result['source']}{told_by}")
    table.add_row("weights", f"{result['weights']}, shape by {result['architecture_from']}")
    changes = [
        f"{result[name]} {name}"
        for name in ("matched", "renamed", "transposed", "reshaped")
        if result[name] or name == "matched"
    ]
    table.add_row("tensors", ", ".join(changes))
    for why, count in result["ignored"].items():
        table.add_row("ignored", f"{count}: {why}")
    table.add_row("parameters", f"{result['parameters']:,}")
    unit = " at unit length" if result["l2_normalized_codes"] else ""
    table.add_row(
        "codebook", f"{result['codebook_size']} codes of width {result['code_dim']}{unit}"
    )
    table.add_row("f", str(result["downsample_factor"]))
    table.add_row("input range", result["input_range"])
    table.add_row("digest", result["weights_digest"])
    trip = result.get("round_trip")
    if trip is not None:
        used = f"{trip['images']} of {trip['images_found']} pictures"
        table.add_row("round trip", f"{used} at {trip['resolution']}, {trip['tokens']} tokens")
        for name, figures in trip["ranges"].items():
            codes = f"{figures['codes_used']} of {result['codebook_size']} codes used"
            perplexity = f"perplexity {figures['codes_perplexity']:.1f}"
            better = ", the better one" if name == trip["better_range"] else ""
            text = f"PSNR {figures['psnr_db']:.2f} dB, {codes}, {perplexity}{better}"
            table.add_row(f"  fed in {name}", text)
        table.add_row("  picture", f"{trip['picture']} (inputs above reconstructions)")
    return table
