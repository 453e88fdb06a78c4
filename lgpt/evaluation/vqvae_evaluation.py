"""`lgpt evaluate VQVAE`: figures of any VQ-VAE over a set of pictures, and a page to look at."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, get_args

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from lgpt.checkpoint.export import convert_run
from lgpt.core.errors import DataError, SettingsError
from lgpt.core.logging import get_logger
from lgpt.data.captioned import CaptionedDataset, Split, open_dataset
from lgpt.data.image_batches import ImageBatches
from lgpt.data.picture_folder import PictureFolder
from lgpt.data.progress import progress
from lgpt.data.transforms import to_unit_range, validation_transform
from lgpt.engine.clock import seconds_when_done
from lgpt.engine.memory import keep_freed_memory
from lgpt.engine.start import device_of_this_rank
from lgpt.evaluation.judges import Judges, find_judges
from lgpt.evaluation.picture_page import Shown, write_picture_page
from lgpt.evaluation.reconstruction_scores import ReconstructionScores
from lgpt.evaluation.vqvae_inspection import open_guessed, side_of_pictures
from lgpt.models.vqvae import VQVAE
from lgpt.settings.data import DataSettings
from lgpt.settings.run import load_run_settings

_log = get_logger(__name__)

_READERS = 2
_SHOWN_OF_EACH_KIND = 8
_FIGURES = (
    ("PSNR", "psnr_db", "{:.2f} dB"),
    ("SSIM", "ssim", "{:.4f}"),
    ("LPIPS", "lpips", "{:.4f}"),
    ("rFID", "rfid", "{:.2f}"),
    ("L1", "l1", "{:.4f}"),
    ("codes used", "codebook_usage", "{:.1%}"),
    ("perplexity", "perplexity", "{:,.1f}"),
)
_DATASETS = get_args(DataSettings.model_fields["dataset"].annotation)


@dataclass(frozen=True)
class Pictures:
    """Which pictures a VQ-VAE is measured on.

    Attributes:
        images: A picture or a folder of pictures; or
        data: a run config or the name of a dataset, of which
        split: train, val (default) or test is taken.
        resolution: Side to which pictures are cut; None takes the config's, or the VQ-VAE's own.
        max_images: So many are used, the first ones; None takes all.
        batch_images: Pictures a call.
    """

    images: Optional[Path] = None
    data: Optional[str] = None
    split: Optional[str] = None
    resolution: Optional[int] = None
    max_images: Optional[int] = None
    batch_images: int = 16


@dataclass(frozen=True)
class JudgeFiles:
    """Weights of the networks that judge; None: where they are usually found."""

    vgg16_weights: Optional[Path] = None
    lpips_weights: Optional[Path] = None
    inception_weights: Optional[Path] = None


def evaluate_vqvae(
    checkpoint: str,
    *,
    source: Optional[str] = None,
    ddconfig: Optional[str] = None,
    pictures: Pictures = Pictures(),
    judge_files: JudgeFiles = JudgeFiles(),
    page: Path,
) -> dict[str, Any]:
    """Send pictures through the tokens and back, in float32, and measure what comes back.

    Args:
        checkpoint: What `open_guessed` takes, or a run folder or checkpoint of phase 2.
        source: As in `load_vqvae`; None guesses it from the files.
        ddconfig: The model.yaml of a taming .ckpt.
        pictures: Of a run folder or one of its checkpoints, its validation split where nothing is
            named.
        judge_files: Weights of LPIPS and Inception.
        page: HTML that is written: pictures beside their reconstructions, the worst and the best.

    Returns:
        JSON values: the loading report, `data`, `images`, `bad_images`, `resolution`, `tokens`,
        `l1` (of values in [-1, 1]), `psnr_db`, `ssim`, `lpips`, `rfid` (None where not measured),
        `codebook_usage` (0..1), `perplexity`, `dead_codes`, `images_per_second`, `device`, `page`.

    Raises:
        CheckpointError: The files are unusable, or no VQ-VAE.
        DataError: There is no picture that can be read.
        SettingsError: Nothing tells which pictures, or a side that f does not divide.
    """
    dataset, configured_side, told = _open_pictures(checkpoint, pictures)
    vqvae, result = open_vqvae(checkpoint, source, ddconfig)
    side = side_of_pictures(pictures.resolution or configured_side, vqvae)
    device = device_of_this_rank()
    keep_freed_memory(device)
    judges = find_judges(
        device,
        side=side,
        vgg16_weights=judge_files.vgg16_weights,
        lpips_weights=judge_files.lpips_weights,
        inception_weights=judge_files.inception_weights,
    )
    batches = ImageBatches(
        dataset, validation_transform(side), workers=_READERS, max_bad_images=len(dataset)
    )
    run = _Evaluation(vqvae.to(device), batches, device, pictures)
    result.update(data=told, resolution=side, device=str(device), **run.measure(judges))
    result["page"] = str(page)
    write_picture_page(
        page,
        title=_title(result),
        rows=figure_rows(result),
        result=result,
        counts=run.counts,
        shown=run.shown(),
    )
    return result


def is_transformer(place: str) -> bool:
    """Whether a folder is a model folder of ours that draws, or a run that trains one."""
    folder = Path(place)
    if (folder / "pipeline.json").is_file():
        return True
    names = ("config.json", "model_config.json")  # of a model folder; of a run or a checkpoint
    described = next((folder / name for name in names if (folder / name).is_file()), None)
    try:
        values = json.loads(described.read_text()) if described is not None else {}
    except (OSError, ValueError):
        return False  # whoever reads it next says what is wrong
    kinds = ("lgpt_latent_gpt", "latent_gpt")
    return isinstance(values, dict) and (
        values.get("model_type") in kinds or values.get("kind") in kinds
    )


def open_vqvae(
    checkpoint: str, source: Optional[str], ddconfig: Optional[str]
) -> tuple[VQVAE, dict[str, Any]]:
    """As `open_guessed`; also a run folder of phase 2 without `model/`, or one of its checkpoints.

    Of a checkpoint it takes what `lgpt convert` would: the average of the weights where there is
    one.

    Raises:
        CheckpointError: The files are unusable, or no VQ-VAE.
        SettingsError: `source` is unknown.
    """
    place = Path(checkpoint)
    is_training = (place / "model_config.json").is_file()
    is_finished = (place / "model" / "config.json").is_file()
    if source not in (None, "custom") or is_finished or not is_training:
        return open_guessed(checkpoint, source, ddconfig)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "model"
        export = convert_run(place, converted)
        vqvae, result = open_guessed(str(converted), "custom", ddconfig)
    average = ", the average of the weights" if export.is_average else ""
    told = f"a checkpoint of lgpt, step {export.step}{average}"
    return vqvae, {**result, "checkpoint": checkpoint, "source_told_by": told, "weights": told}


def _open_pictures(
    checkpoint: str, pictures: Pictures
) -> tuple[CaptionedDataset, Optional[int], dict[str, Any]]:
    """The pictures, the side that their config has for them, and what they are called."""
    if pictures.images is not None:
        if pictures.data is not None or pictures.split is not None:
            raise SettingsError("--images names the pictures: leave --data and --split out.")
        return PictureFolder(pictures.images), None, {"images": str(pictures.images)}
    split = _split(pictures.split)
    name = pictures.data or _config_of_run(Path(checkpoint))
    if name is None:
        absent = "" if Path(checkpoint).exists() else f"{checkpoint} is no file or folder here. "
        raise SettingsError(
            f"{absent}Which pictures? --images FOLDER, or --data with a run config "
            f"(demo/phase2_openmoji) or a dataset ({', '.join(_DATASETS)})."
        )
    if name in _DATASETS:
        settings, side = DataSettings(dataset=name), None
    else:
        settings = load_run_settings(name, environ={}, check_deepspeed=False).data
        side = settings.resolution
    dataset = open_dataset(settings, split)
    if len(dataset) == 0:
        raise DataError(f"{settings.dataset} has no pictures in its split '{split}'.")
    told = {"dataset": dataset.name, "split": split, "fingerprint": dataset.fingerprint}
    return dataset, side, told


def _split(name: Optional[str]) -> Split:
    for split in get_args(Split):
        if split == (name or "val"):
            return split  # type: ignore[no-any-return]
    raise SettingsError(f"--split {name!r} is unknown; allowed: {', '.join(get_args(Split))}.")


def _config_of_run(place: Path) -> Optional[str]:
    """The config.yaml of the run that a folder is, or lies in."""
    folders = [place, *place.parents] if place.exists() else []
    for folder in folders[:4]:  # runs/<name>/checkpoints/step_<n>/model
        if (folder / "config.yaml").is_file() and (folder / "model_config.json").is_file():
            return str(folder / "config.yaml")
    return None


class _Evaluation:
    """One VQ-VAE on one set of pictures."""

    def __init__(
        self, vqvae: VQVAE, batches: ImageBatches, device: torch.device, pictures: Pictures
    ) -> None:
        self._vqvae, self._batches, self._device = vqvae, batches, device
        count = min(pictures.max_images or len(batches), len(batches))
        self._items = np.arange(count)
        self._size = pictures.batch_images
        self._of_pictures: dict[str, np.ndarray] = {}
        self._measured = self._items
        self.counts = torch.zeros(vqvae.vocab_size, dtype=torch.int64)

    def measure(self, judges: Judges) -> dict[str, Any]:
        """All figures."""
        scores = ReconstructionScores(
            self._vqvae.vocab_size, self._device, loss="l1", judges=judges
        )
        values: dict[str, list[Tensor]] = {}
        is_measured, seconds = [], []
        total = len(self._items)
        with progress("evaluate", total, unit="pictures", is_shown=True) as advance:
            for items in np.split(self._items, range(self._size, total, self._size)):
                images = self._read(items)
                self._read_ahead(int(items[-1]) + 1)
                started_at = seconds_when_done(self._device)
                back, tokens = self._reconstruct(images)
                seconds.append(seconds_when_done(self._device) - started_at)
                # A bad picture was replaced by the next one, which has its own turn.
                is_good = self._batches.shown(items) == items
                is_measured.append(is_good)
                is_counted = torch.from_numpy(is_good).to(self._device)
                for name, of_batch in scores.add(images, back, tokens, is_counted).items():
                    values.setdefault(name, []).append(of_batch)
                advance(len(items))
        good = np.concatenate(is_measured)
        self._measured = self._items[good]
        self._of_pictures = {
            name: torch.cat(parts).cpu().numpy()[good] for name, parts in values.items()
        }
        figures = scores.over_ranks()
        self.counts = scores.code_counts.cpu()
        # The first batch also warms up, unless it is the only one.
        timed = list(zip(seconds, is_measured))[1:] or list(zip(seconds, is_measured))
        return {
            "images": len(self._measured),
            "bad_images": len(self._batches.bad_images),
            "tokens": int(self.counts.sum()),
            "l1": figures.pop("recon_loss"),
            **{name: figures.get(name) for name in ("psnr_db", "ssim", "lpips", "rfid")},
            **{name: figures[name] for name in ("codebook_usage", "perplexity")},
            "dead_codes": int(figures["dead_codes"]),
            "images_per_second": sum(len(part) for _, part in timed) / sum(s for s, _ in timed),
        }

    def shown(self) -> dict[str, list[Shown]]:
        """The worst and the best pictures by PSNR, and some as they come."""
        order = np.argsort(self._of_pictures["psnr_db"], kind="stable")
        most = _SHOWN_OF_EACH_KIND
        kinds = {"Worst": order[:most], "Best": order[::-1][:most]}
        spread = np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)
        kinds["Some others, evenly spaced"] = np.unique(spread)
        pairs = self._pairs(np.unique(np.concatenate(list(kinds.values()))))
        return {kind: [pairs[int(place)] for place in places] for kind, places in kinds.items()}

    def _pairs(self, places: np.ndarray) -> dict[int, Shown]:
        """The pictures at these places of the measured ones, each reconstructed once more."""
        pairs = {}
        for part in np.split(places, range(self._size, len(places), self._size)):
            items = self._measured[part]
            images = self._read(items)
            for place, item, image, back in zip(part, items, images, self._reconstruct(images)[0]):
                values = {name: float(of_all[place]) for name, of_all in self._of_pictures.items()}
                name = self._batches.dataset.image_id(int(item))
                pairs[int(place)] = Shown(name, image.cpu(), back.cpu(), values)
        return pairs

    def _read(self, items: np.ndarray) -> Tensor:
        pixels = self._batches.items(items, np.zeros_like(items))
        return to_unit_range(torch.from_numpy(pixels).to(self._device))

    def _read_ahead(self, first: int) -> None:
        items = self._items[first : first + self._size]
        self._batches.prefetch(items, np.zeros_like(items))

    @torch.no_grad()
    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._vqvae.encode(images)
        return self._vqvae.decode(tokens), tokens


def _title(result: dict[str, Any]) -> str:
    return f"{result['checkpoint']} ({result['source']})"


def vqvae_table(result: dict[str, Any]) -> Table:
    """The result of `evaluate_vqvae` for people."""
    table = Table(title=_title(result), show_header=False)
    for name, text in [*figure_rows(result), ("page", result["page"])]:
        table.add_row(name, text)
    return table


def figure_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values as the table and the page show them."""
    data = result["data"]
    pictures = data.get("images") or f"{data['dataset']}, split {data['split']}"
    side, factor = result["resolution"], result["downsample_factor"]
    grid = f"{side // factor} x {side // factor}"
    bad = f", {result['bad_images']} bad ones left out" if result["bad_images"] else ""
    codes = result["codebook_size"]
    return [
        ("pictures", f"{result['images']:,} of {pictures}{bad}"),
        ("tokens", f"{side} x {side} pixels to {grid}, {result['tokens']:,} in all"),
        *(
            (name, "not measured" if result[key] is None else form.format(result[key]))
            for name, key, form in _FIGURES
        ),
        ("dead codes", f"{result['dead_codes']:,} of {codes:,} never used here"),
        ("speed", f"{result['images_per_second']:.1f} images/s on {result['device']}"),
    ]
