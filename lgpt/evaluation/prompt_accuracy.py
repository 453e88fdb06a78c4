"""How often pictures show what their prompts say, measured on the drawn shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from PIL import Image
from rich.table import Table

from lgpt.core.errors import DataError
from lgpt.core.files import write_json_atomically
from lgpt.data.shapes import Scene, held_out_prompts, seen_prompts
from lgpt.data.shapes_check import check
from lgpt.data.transforms import to_pil
from lgpt.sampling.generate import generate_tokens
from lgpt.sampling.pipeline import TextToImagePipeline

_BATCH_PICTURES = 64
_ATTRIBUTES = ("colour", "shape", "size", "position")


def score_pictures(images: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, Any]:
    """Share of right attributes, each between 0 and 1.

    Args:
        images: Pictures of any size.
        scenes: What each should show.

    Returns:
        `all` (every attribute of a picture together, and no object more or less), `colour`,
        `shape`, `size` and `position` (over all objects), `background`, and `pictures`, their
        number.
    """
    if not images or len(images) != len(scenes):
        raise DataError(
            f"prompt accuracy needs one scene a picture and at least one, got {len(images)} "
            f"pictures and {len(scenes)} scenes."
        )
    checks = [check(image, scene) for image, scene in zip(images, scenes)]
    objects = [thing for one in checks for thing in one.objects]
    shares: dict[str, Any] = {"all": _share([one.all_right for one in checks])}
    for attribute in _ATTRIBUTES:
        shares[attribute] = _share([getattr(thing, attribute) for thing in objects])
    shares["background"] = _share([one.background for one in checks])
    shares["pictures"] = len(images)
    return shares


def _share(claims: Sequence[bool]) -> float:
    return sum(claims) / len(claims)


def evaluate_model(
    model_folder: Union[str, Path],
    count: int = 256,
    guidance: Optional[float] = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw from prompts with a model folder, score the pictures, and keep the result in the folder.

    Prompts: `count` of one object whose shape, colour and place training never showed together,
    half as many of two such objects, and half as many of one object that it did show.

    Args:
        model_folder: Written by `lgpt convert`, trained on shapes.
        count: Number of held-out prompts of one object.
        guidance: None takes the folder's own.
        seed: Of prompts and pictures; picture i is drawn with seed + i.

    Returns:
        `guidance`, `seed`, and `prompt_accuracy`: what was asked -> `score_pictures`. The same is
        written to `evaluation.json` in the folder.
    """
    pipeline = TextToImagePipeline.from_pretrained(model_folder, dtype="fp32")
    if guidance is not None:
        pipeline.sampling["guidance"] = guidance
    half = (count + 1) // 2
    asked = {
        "one object, held out": held_out_prompts(count, objects=1, seed=seed),
        "two objects, held out": held_out_prompts(half, objects=2, seed=seed),
        "one object, seen": seen_prompts(half, objects=1, seed=seed),
    }
    result: dict[str, Any] = {
        "guidance": pipeline.sampling["guidance"],
        "seed": seed,
        "prompt_accuracy": {
            name: score_pictures(
                _draw(pipeline, [text for text, _ in prompts], seed),
                [scene for _, scene in prompts],
            )
            for name, prompts in asked.items()
        },
    }
    write_json_atomically(Path(model_folder) / "evaluation.json", result)
    return result


@torch.no_grad()
def _draw(pipeline: TextToImagePipeline, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """One picture a prompt, each with a seed of its own: one for all would repeat its luck."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH_PICTURES):
        part = prompts[start : start + _BATCH_PICTURES]
        text, mask = pipeline.text_encoder.encode(part)
        seeds = range(seed + start, seed + start + len(part))
        tokens = generate_tokens(pipeline.model, text, mask, seeds=seeds, **pipeline.sampling)
        pictures += to_pil(pipeline.vqvae.decode(tokens).float().cpu())
    return pictures


def accuracy_table(result: dict[str, Any]) -> Table:
    """The result of `evaluate_model`, one row for each kind of prompt."""
    columns = ("all", *_ATTRIBUTES, "background")
    table = Table(title=f"Prompt accuracy, guidance {result['guidance']:g}")
    table.add_column("prompts")
    for name in (*columns, "pictures"):
        table.add_column(name, justify="right")
    for name, shares in result["prompt_accuracy"].items():
        percents = [f"{100 * shares[column]:.1f}%" for column in columns]
        table.add_row(name, *percents, str(shares["pictures"]))
    return table
