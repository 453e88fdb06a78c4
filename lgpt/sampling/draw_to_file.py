"""`lgpt sample`: pictures from a model folder into files."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from PIL import Image, ImageOps
from torch import Tensor

from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.sampling.picture_grid import picture_grid
from lgpt.sampling.pipeline import TextToImagePipeline

_logger = get_logger(__name__)


def prompts_from(
    prompts: Sequence[str], prompts_file: Optional[Path], unconditional: int
) -> list[str]:
    """The prompts of a command line, or none where pictures without a prompt are wanted.

    Raises:
        SettingsError: There is nothing to draw, both kinds are wanted, or the file is missing or
            no text.
    """
    wanted = prompts_of(prompts, prompts_file)
    if wanted and unconditional:
        raise SettingsError(
            f"--unconditional {unconditional} draws without prompts, but {len(wanted)} prompts "
            "were given; run the command twice."
        )
    if not wanted and not unconditional:
        raise SettingsError("nothing to draw: give --prompt, --prompts-file or --unconditional N.")
    return wanted


def prompts_of(prompts: Sequence[str], prompts_file: Optional[Path]) -> list[str]:
    """Given prompts, then a file's lines that are not empty.

    Raises:
        SettingsError: The file is missing or no text.
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
    return wanted


@dataclasses.dataclass(frozen=True)
class Choices:
    """How to draw; None takes the model folder's own default. See `generate_tokens`."""

    guidance: Optional[float] = None
    guidance_schedule: Optional[str] = None
    guidance_power: Optional[float] = None
    temperature: Optional[float] = None
    top_k: Optional[int] = None
    top_p: Optional[float] = None


def draw_to_file(
    model: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    unconditional: int = 0,
    images_per_prompt: int = 1,
    choices: Choices = Choices(),
    seed: int = 0,
    best: Optional[int] = None,
    clip: Optional[str] = None,
    complete: Optional[Path] = None,
    keep: Optional[float] = None,
    preview: Optional[Path] = None,
    dtype: str = "auto",
) -> None:
    """Draw with a model folder into one PNG grid (`out` ends in .png) or a folder of PNGs.

    Args:
        model: The model folder.
        prompts: What to draw; empty with `unconditional`.
        out: A file that ends in .png, or a folder.
        unconditional: Pictures without a prompt.
        images_per_prompt: Pictures of every prompt.
        choices: How to draw.
        seed: Of the first picture of every prompt.
        best: Keep so many of every prompt's pictures, as a CLIP scores them.
        clip: Hub name or folder of that CLIP; default: the model's text encoder.
        complete: A picture whose upper part every picture begins with.
        keep: How much of it; default: half.
        preview: A PNG that is written anew after every quarter of the rows.
        dtype: auto, bf16, fp32 or int8.

    Raises:
        CheckpointError: The model folder or the CLIP is unusable.
        SettingsError: `out` cannot be written, or choices contradict each other or what they are
            for; found before anything is drawn.
    """
    if keep is not None and complete is None:
        raise SettingsError(f"--keep {keep:g} has no effect without --complete PICTURE.")
    _refuse_without_effect(choices, unconditional, best, clip)
    pipeline = TextToImagePipeline.from_pretrained(model, dtype=dtype)
    _make_place_for(out, "--out")
    if preview is not None:
        check_png(preview, "--preview")
    scorer = None if best is None else pipeline.open_scorer(clip)
    given = None if complete is None else _beginning(pipeline, complete, keep)
    show = None if preview is None else lambda pictures: _save_grid(pictures, None, preview)
    if unconditional:
        pictures = pipeline.unconditional(
            unconditional,
            seed,
            choices.temperature,
            choices.top_k,
            choices.top_p,
            given=given,
            preview=show,
        )
        captions = [f"seed {seed + number}" for number in range(unconditional)]
    else:
        pictures = pipeline(
            prompts,
            seed=seed,
            images_per_prompt=images_per_prompt,
            given=given,
            best=best,
            scorer=scorer,
            preview=show,
            **dataclasses.asdict(choices),
        )
        captions = [prompt for prompt in prompts for _ in range(best or images_per_prompt)]
    _write(pictures, captions, out)


def _write(pictures: Sequence[Image.Image], captions: Sequence[str], out: Path) -> None:
    scores = [picture.info.get("clip_score") for picture in pictures]
    if _is_grid(out):
        lines = [c if s is None else f"{s:.3f} {c}" for c, s in zip(captions, scores)]
        _save_grid(pictures, lines, out)
    else:
        for number, picture in enumerate(pictures):
            picture.save(out / f"{number:04d}.png")
        lines = [
            f"{number:04d}.png\t{caption}" + ("" if score is None else f"\t{score:.4f}")
            for number, (caption, score) in enumerate(zip(captions, scores))
        ]
        (out / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _logger.info("Wrote %d pictures to %s.", len(pictures), out)


def _save_grid(
    pictures: Sequence[Image.Image], captions: Optional[Sequence[str]], out: Path
) -> None:
    """Whole or not at all: somebody may be looking at the file."""
    staged = out.with_name(f".{out.name}.new.png")
    picture_grid(pictures, captions).save(staged)
    os.replace(staged, out)


def _refuse_without_effect(
    choices: Choices, unconditional: int, best: Optional[int], clip: Optional[str]
) -> None:
    if clip is not None and best is None:
        raise SettingsError(f"--clip {clip} has no effect without --best N.")
    if not unconditional:
        return
    names = ("guidance", "guidance_schedule", "guidance_power")
    given = {f"--{name.replace('_', '-')}": getattr(choices, name) for name in names}
    given["--best"] = best
    if void := [f"{name} {value}" for name, value in given.items() if value is not None]:
        raise SettingsError(f"{', '.join(void)} has no effect with --unconditional; remove it.")


def _beginning(pipeline: TextToImagePipeline, complete: Path, keep: Optional[float]) -> Tensor:
    return pipeline.beginning_of(_open(complete), 0.5 if keep is None else keep)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(f"--complete {path} is no picture that can be read: {error}.") from None


def check_png(path: Path, option: str) -> None:
    """Make the folder of a picture that will be written.

    Raises:
        SettingsError: The name does not end in .png, or it cannot be written.
    """
    if not _is_grid(path):
        raise SettingsError(f"{option} {path} must end in .png.")
    _make_place_for(path, option)


def _is_grid(out: Path) -> bool:
    return out.suffix.lower() == ".png"


def _make_place_for(out: Path, option: str) -> None:
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
            f"{option} {out} cannot be written ({error.strerror}); give another file that ends in "
            ".png, or another folder."
        ) from None
