"""`lgpt evaluate MODEL --memorisation RUN`: are drawn pictures copies of training pictures?

A small set can be learnt by heart. Pictures are drawn for captions of the training split and of the
validation split, and for each the nearest training picture is searched, by tokens (share of equal
ones, over all crops) and by CLIP image embeddings (crop 0). Real validation pictures, which
training never saw, are the yardstick: a model that has learnt to draw comes no nearer than they do.
Source of the test: Somepalli et al. 2023, https://arxiv.org/abs/2212.03860 (copies by embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from lgpt.core.errors import CheckpointError, DataError, SettingsError
from lgpt.core.files import write_json_atomically
from lgpt.core.logging import get_logger
from lgpt.data.captioned import CaptionedDataset
from lgpt.data.image_batches import ImageBatches
from lgpt.data.latent_cache import LatentCache
from lgpt.data.progress import progress
from lgpt.data.transforms import to_pil, to_unit_range
from lgpt.evaluation.nearest import (
    Nearest,
    compared_with_held_out,
    cosines,
    shares_of_equal_tokens,
)
from lgpt.models.clip_scorer import ClipScorer
from lgpt.sampling.generate import generate_tokens
from lgpt.sampling.picture_grid import picture_grid
from lgpt.sampling.pipeline import TextToImagePipeline
from lgpt.settings.phases import TransformerRun
from lgpt.training.components import open_split, transform_of
from lgpt.training.latent_batches import LatentSource
from lgpt.training.latent_sources import open_latents

_log = get_logger(__name__)
_PICTURES_A_PIECE = 64
_SHOWN = 12
_FREE = "without a caption"


@dataclass(frozen=True)
class _Drawn:
    """Pictures of one kind of caption, with their tokens [pictures, L]."""

    captions: list[str]
    tokens: torch.Tensor
    images: list[Image.Image]


def memorisation_report(
    model_folder: Path,
    run: TransformerRun,
    *,
    pictures: int,
    guidance: Optional[float],
    seed: int,
    clip: Optional[str],
) -> dict[str, Any]:
    """Draw, search the training split, and keep the result and a picture page in the model folder.

    Args:
        model_folder: Written by `lgpt convert`.
        run: What it was trained with: its pictures, and its latent cache where there is one.
        pictures: Drawn for each kind of caption; so many validation pictures are the yardstick.
        guidance: None takes the folder's own.
        seed: Of the choice of captions and of the pictures.
        clip: Hub name or folder of a whole CLIP; default: the model's text encoder.

    Returns:
        JSON values: for each kind of caption `tokens` and `clip` (None without an image tower, then
        `clip_problem` says why) as `compared_with_held_out`, and `nearest`, a record a picture.
        Written to `memorisation.json`; the pictures lie in `memorisation.png`.

    Raises:
        DataError: The run's latent cache was made with another VQ-VAE than the model's.
    """
    pipeline = TextToImagePipeline.from_pretrained(model_folder, dtype="fp32")
    train_set, val_set = open_split(run.data, "train"), open_split(run.data, "val")
    device = next(pipeline.model.parameters()).device
    digest = pipeline.vqvae.weights_digest()
    source = open_latents(run, train_set, pipeline.vqvae, digest, None, device)
    scorer, clip_problem = _scorer(pipeline, clip)
    drawn = {
        kind: _draw(pipeline, captions, guidance, seed)
        for kind, captions in _captions(run, train_set, val_set, pictures, seed).items()
    }
    held_out = _held_out(pipeline, run, val_set, pictures)
    groups = [*drawn.values(), held_out]
    by_tokens = _nearest_by_tokens(torch.cat([each.tokens for each in groups]), source)
    by_clip = None
    if scorer is not None:
        everyone = [image for each in groups for image in each.images]
        by_clip = _nearest_by_clip(scorer, everyone, run, train_set)
    items = _items_of_source(source, train_set)
    first_held_out = sum(len(each.images) for each in drawn.values())
    kinds, rows, start = {}, [], 0
    for kind, each in drawn.items():
        places = range(start, start + len(each.images))
        mine = _rows(each, places, by_tokens, by_clip, train_set, items)
        kinds[kind] = {
            "tokens": _figures(by_tokens, places, first_held_out),
            "clip": _figures(by_clip, places, first_held_out),
            "nearest": [row.record for row in mine],
        }
        rows += mine
        start = places.stop
    result = {
        "run": run.name,
        "pictures": pictures,
        "held_out_pictures": len(held_out.images),
        "training_pictures": len(source),
        "seed": seed,
        "guidance": pipeline.sampling["guidance"] if guidance is None else guidance,
        "clip": None if scorer is None else scorer.name,
        "clip_problem": clip_problem,
        "kinds": kinds,
    }
    write_json_atomically(model_folder / "memorisation.json", result)
    _page(rows, run, train_set).save(model_folder / "memorisation.png")
    return result


def _scorer(
    pipeline: TextToImagePipeline, clip: Optional[str]
) -> tuple[Optional[ClipScorer], Optional[str]]:
    """The CLIP that embeds pictures; without one, and without one being named, why."""
    if clip is not None:
        return ClipScorer.from_pretrained(clip), None
    try:
        return pipeline.open_scorer(), None
    except (CheckpointError, SettingsError) as error:
        _log.warning("compared by tokens only: %s --clip names another.", error)
        return None, str(error)


def _captions(
    run: TransformerRun,
    train_set: CaptionedDataset,
    val_set: CaptionedDataset,
    count: int,
    seed: int,
) -> dict[str, list[str]]:
    if run.conditioning == "unconditional":
        return {_FREE: [""] * count}
    return {
        f"captions of {name}": _some_captions(dataset, count, seed)
        for name, dataset in (("training", train_set), ("validation", val_set))
    }


def _some_captions(dataset: CaptionedDataset, count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    items = generator.permutation(len(dataset))[:count]
    return [dataset.captions(int(item))[0] for item in items]


@torch.no_grad()
def _draw(
    pipeline: TextToImagePipeline, captions: list[str], guidance: Optional[float], seed: int
) -> _Drawn:
    sampling = dict(pipeline.sampling)
    if guidance is not None:
        sampling["guidance"] = guidance
    if not any(captions):
        sampling.update(guidance=1.0, guidance_schedule="constant")
    tokens = []
    with progress("drawing", len(captions), unit="pictures", is_shown=True) as advance:
        for start in range(0, len(captions), _PICTURES_A_PIECE):
            part = captions[start : start + _PICTURES_A_PIECE]
            text, mask = pipeline.text_encoder.encode(part) if any(part) else (None, None)
            seeds = [seed + start + number for number in range(len(part))]
            tokens.append(generate_tokens(pipeline.model, text, mask, seeds=seeds, **sampling))
            advance(len(part))
    grids = torch.cat(tokens)
    return _Drawn(captions, grids.flatten(1), _decoded(pipeline, grids))


def _decoded(pipeline: TextToImagePipeline, grids: torch.Tensor) -> list[Image.Image]:
    pieces = grids.split(_PICTURES_A_PIECE)
    return [image for piece in pieces for image in to_pil(pipeline.vqvae.decode(piece).cpu())]


@torch.no_grad()
def _held_out(
    pipeline: TextToImagePipeline, run: TransformerRun, val_set: CaptionedDataset, count: int
) -> _Drawn:
    """Validation pictures as the VQ-VAE gives them back: blurred as drawn ones are."""
    images = _image_batches(run, val_set)
    device = next(pipeline.model.parameters()).device
    grids = []
    for items in _pieces(min(count, len(val_set))):
        pixels = torch.from_numpy(images.items(items, np.zeros_like(items)))
        grids.append(pipeline.vqvae.encode(to_unit_range(pixels).to(device)))
    tokens = torch.cat(grids)
    return _Drawn([""] * len(tokens), tokens.flatten(1), _decoded(pipeline, tokens))


def _image_batches(run: TransformerRun, dataset: CaptionedDataset) -> ImageBatches:
    return ImageBatches(
        dataset,
        transform_of(run.data, dataset.split),
        workers=run.data.workers,
        max_bad_images=run.data.max_bad_images,
    )


def _pieces(count: int) -> list[np.ndarray]:
    return np.split(np.arange(count), range(_PICTURES_A_PIECE, count, _PICTURES_A_PIECE))


def _nearest_by_tokens(tokens: torch.Tensor, source: LatentSource) -> Nearest:
    nearest = Nearest(len(tokens))
    total = len(source) * source.crops
    with progress("comparing tokens", total, unit="crops", is_shown=True) as advance:
        for items in _pieces(len(source)):
            for crop in range(source.crops):
                crops = np.full_like(items, crop)
                theirs = source.batch(items, crops, np.zeros_like(items)).tokens
                nearest.update(
                    shares_of_equal_tokens(tokens, theirs.to(tokens.device)), items, crop
                )
                advance(len(items))
    return nearest


def _nearest_by_clip(
    scorer: ClipScorer,
    pictures: Sequence[Image.Image],
    run: TransformerRun,
    train_set: CaptionedDataset,
) -> Nearest:
    nearest, ours = Nearest(len(pictures)), scorer.embed(pictures)
    images = _image_batches(run, train_set)
    with progress("comparing CLIP", len(train_set), unit="pictures", is_shown=True) as advance:
        for items in _pieces(len(train_set)):
            pixels = images.items(items, np.zeros_like(items))
            theirs = scorer.embed(to_pil(to_unit_range(torch.from_numpy(pixels))))
            nearest.update(cosines(ours, theirs), images.shown(items), 0)
            advance(len(items))
    return nearest


def _items_of_source(source: LatentSource, dataset: CaptionedDataset) -> np.ndarray:
    """Which picture of the dataset each of the source's is: a cache leaves bad ones out."""
    if not isinstance(source, LatentCache):
        return np.arange(len(dataset))
    bad = set(source.manifest["bad_images"])
    good = [item for item in range(len(dataset)) if dataset.image_id(item) not in bad]
    if len(good) != len(source):
        raise DataError(
            f"{source.folder} holds {len(source)} pictures, but {len(good)} of the dataset's "
            f"{len(dataset)} are not among its bad ones: two pictures share a name."
        )
    return np.array(good, dtype=np.int64)


@dataclass(frozen=True)
class _Row:
    """A drawn picture and what it is most like: (item, crop) of the training split."""

    image: Image.Image
    record: dict[str, Any]
    by_tokens: tuple[int, int]
    by_clip: Optional[tuple[int, int]]


def _rows(
    drawn: _Drawn,
    places: range,
    by_tokens: Nearest,
    by_clip: Optional[Nearest],
    train_set: CaptionedDataset,
    items: np.ndarray,
) -> list[_Row]:
    rows = []
    for place, caption, image in zip(places, drawn.captions, drawn.images):
        item = int(items[by_tokens.items[place]])
        record: dict[str, Any] = {
            "caption": caption,
            "equal_tokens": float(by_tokens.scores[place]),
            "by_tokens": train_set.image_id(item),
        }
        like = None
        if by_clip is not None:
            like = (int(by_clip.items[place]), 0)
            record["clip_cosine"] = float(by_clip.scores[place])
            record["by_clip"] = train_set.image_id(like[0])
        rows.append(_Row(image, record, (item, int(by_tokens.crops[place])), like))
    return rows


def _figures(nearest: Optional[Nearest], places: range, first_held_out: int) -> Any:
    if nearest is None:
        return None
    mine = nearest.scores[places.start : places.stop]
    return compared_with_held_out(mine, nearest.scores[first_held_out:])


def _page(rows: list[_Row], run: TransformerRun, train_set: CaptionedDataset) -> Image.Image:
    """The drawn pictures that come nearest, beside what they come near to."""
    images = _image_batches(run, train_set)
    pictures: list[Image.Image] = []
    captions: list[str] = []
    nearest = sorted(rows, key=lambda row: -row.record["equal_tokens"])[:_SHOWN]
    for row in nearest:
        told = row.record
        pictures.append(row.image)
        captions.append(f"drawn: {told['caption']}" if told["caption"] else "drawn")
        shown = [(row.by_tokens, f"{told['equal_tokens']:.0%} of tokens, {told['by_tokens']}")]
        if row.by_clip is not None:
            shown.append((row.by_clip, f"CLIP {told['clip_cosine']:.2f}, {told['by_clip']}"))
        for (item, crop), caption in shown:
            pixels = images.items(np.array([item]), np.array([crop]))
            pictures += to_pil(to_unit_range(torch.from_numpy(pixels)))
            captions.append(caption)
    return picture_grid(pictures, captions, columns=len(pictures) // len(nearest))


def memorisation_table(result: dict[str, Any]) -> Table:
    """The figures as people read them."""
    table = Table(
        title=f"Nearest of {result['training_pictures']:,} training pictures of {result['run']}"
    )
    for heading in (
        "drawn for",
        "measure",
        "median",
        "largest",
        "real held-out: median",
        "largest",
    ):
        table.add_column(
            heading, justify="left" if heading in ("drawn for", "measure") else "right"
        )
    table.add_column("nearer than all held-out", justify="right")
    for kind, figures in result["kinds"].items():
        for measure, found in (("equal tokens", figures["tokens"]), ("CLIP", figures["clip"])):
            if found is None:
                continue
            count = f"{found['nearer_than_held_out']} of {len(figures['nearest'])}"
            names = ("median", "largest", "held_out_median", "held_out_largest")
            table.add_row(kind, measure, *(f"{found[name]:.3f}" for name in names), count)
    return table
