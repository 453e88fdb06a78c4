"""`lgpt sample`: pictures from a model folder into files."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.sampling.picture_grid import picture_grid
from lgpt.sampling.pipeline import TextToImagePipeline

_logger = get_logger(__name__)


def prompts_from(
    prompts: Sequence[str], prompts_file: Optional[Path], unconditional: int
) -> list[str]:
    """The prompts of a command line: given ones, then the file's lines that are not empty.

    Raises:
        SettingsError: There is nothing to draw, both kinds are wanted, or the file is missing or
            no text.
    """
    wanted = list(prompts)
    if prompts_file is not None:
        if not os.path.isfile(prompts_file):
            raise SettingsError(f"--prompts-file {prompts_file} does not exist.")
        try:
            lines = prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"--prompts-file {prompts_file} cannot be read ({error}); it must be text in "
                "UTF-8, one prompt a line."
            ) from None
        wanted += [line.strip() for line in lines if line.strip()]
    if wanted and unconditional:
        raise SettingsError(
            f"--unconditional {unconditional} draws without prompts, but {len(wanted)} prompts "
            "were given; run the command twice."
        )
    if not wanted and not unconditional:
        raise SettingsError("nothing to draw: give --prompt, --prompts-file or --unconditional N.")
    return wanted


def draw_to_file(
    model: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    unconditional: int = 0,
    images_per_prompt: int = 1,
    guidance: Optional[float] = None,
    temperature: Optional[float] = None,
    top_k: Optional[int] = None,
    top_p: Optional[float] = None,
    seed: int = 0,
) -> None:
    """Draw with a model folder into one PNG grid (`out` ends in .png) or a folder of PNGs.

    Raises:
        CheckpointError: The model folder is unusable.
        SettingsError: `out` cannot be written; found before anything is drawn.
    """
    pipeline = TextToImagePipeline.from_pretrained(model)
    _make_place_for(out)
    if unconditional:
        pictures = pipeline.unconditional(unconditional, seed, temperature, top_k, top_p)
        captions = [f"seed {seed + number}" for number in range(unconditional)]
    else:
        pictures = pipeline(
            prompts, guidance, seed, temperature, top_k, top_p, images_per_prompt=images_per_prompt
        )
        captions = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    if _is_grid(out):
        picture_grid(pictures, captions).save(out)
    else:
        for number, picture in enumerate(pictures):
            picture.save(out / f"{number:04d}.png")
        lines = [f"{number:04d}.png\t{caption}" for number, caption in enumerate(captions)]
        (out / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _logger.info("Wrote %d pictures to %s.", len(pictures), out)


def _is_grid(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def _make_place_for(out: Path) -> None:
    """Make the folder of the pictures, and try to write there: drawing takes minutes."""
    folder = out.parent if _is_grid(out) else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _is_grid(out) and out.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(
            f"--out {out} cannot be written ({error.strerror}); give another file that ends in "
            ".png, or another folder."
        ) from None
