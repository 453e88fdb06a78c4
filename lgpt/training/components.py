"""The frozen parts under a transformer run: VQ-VAE, text encoder, and a cache's fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from lgpt.core.distributed import is_rank_zero
from lgpt.core.errors import CheckpointError, DataError
from lgpt.core.logging import get_logger
from lgpt.data.captioned import CaptionedDataset, open_dataset
from lgpt.data.transforms import ImageTransform, validation_transform
from lgpt.engine.ranks import broadcast_from_rank_zero
from lgpt.models.clip_encoder import ClipTextEncoder, make_random_clip_text_encoder
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.settings.data import DataSettings
from lgpt.settings.phases import TransformerRun
from lgpt.settings.text import RANDOM_ENCODER
from lgpt.settings.vqvae import VqvaeSourceSettings

_log = get_logger(__name__)


def load_vqvae_of(settings: VqvaeSourceSettings) -> VQVAE:
    """The run's VQ-VAE, frozen, in float32 and eval mode.

    Raises:
        CheckpointError: Its files are unusable, or it is not the one that the run config expects.
    """
    vqvae = load_vqvae(
        settings.source,
        settings.checkpoint,
        ddconfig=settings.ddconfig,
        input_range=settings.input_range,
    ).requires_grad_(False)
    for key, expected, found in (
        ("codebook_size", settings.codebook_size, vqvae.vocab_size),
        ("downsample_factor", settings.downsample_factor, vqvae.downsample_factor),
    ):
        if expected is not None and expected != found:
            raise CheckpointError(
                f"vqvae.{key} expects {expected}, but {settings.checkpoint} has {found}; name "
                "another vqvae.checkpoint or correct the number (it may also be left out)."
            )
    return vqvae


def text_encoder_name(run: TransformerRun) -> str:
    """Hub name or folder of the text encoder; the random one lies beside the latents it made."""
    if run.text.encoder != RANDOM_ENCODER:
        return run.text.encoder
    home = run.latent_cache if run.latent_cache is not None else run.run_folder
    return str(Path(home) / "text_encoder")


def load_text_encoder_of(
    run: TransformerRun, train_captions: Optional[CaptionedDataset] = None
) -> ClipTextEncoder:
    """The run's frozen text encoder; a `random` one is made first from the training captions.

    Args:
        train_captions: Needed only to make a random encoder that is not there yet.

    Raises:
        DataError: On every rank: a random encoder is missing and cannot be made.
    """
    name = text_encoder_name(run)
    if run.text.encoder == RANDOM_ENCODER:
        _make_random_encoder(Path(name), run.data.seed, train_captions)
    return ClipTextEncoder.from_pretrained(name)


def _make_random_encoder(
    folder: Path, seed: int, train_captions: Optional[CaptionedDataset]
) -> None:
    """Rank 0 looks and makes it; all ranks meet here whether it was there or not.

    Each rank looking for itself would not do: one that comes late finds it made, and the others
    wait for it.
    """
    problem: Optional[str] = None
    if is_rank_zero() and not (folder / "config.json").exists():
        if train_captions is None:
            problem = (
                f"text.encoder is 'random' and its folder {folder} is missing; run `lgpt "
                "prepare` first."
            )
        else:
            problem = _write_random_encoder(folder, seed, train_captions)
    if problem := broadcast_from_rank_zero(problem):
        raise DataError(problem)


def _write_random_encoder(folder: Path, seed: int, dataset: CaptionedDataset) -> Optional[str]:
    """Make it from the captions; returns what went wrong."""
    captions = (text for index in range(len(dataset)) for text in dataset.captions(index))
    try:
        make_random_clip_text_encoder(folder, captions, seed=seed)
    except OSError as error:
        return f"The random text encoder cannot be written to {folder}: {error}."
    _log.info(
        "Made a random CLIP text encoder in %s: frozen, untrained, it tells "
        "captions apart but knows no language.",
        folder,
    )
    return None


def transform_of(data: DataSettings, split: str) -> ImageTransform:
    """How pictures of a split are cut: crops and flips for training, one centre crop otherwise."""
    if split != "train":
        return validation_transform(data.resolution)
    return ImageTransform(
        resolution=data.resolution,
        crops=data.crops,
        crop_scale_min=data.crop_scale_min,
        flip=data.flip,
        seed=data.seed,
    )


def cache_fingerprint(
    run: TransformerRun,
    dataset: CaptionedDataset,
    vqvae_digest: str,
    text_encoder: Optional[ClipTextEncoder],
) -> dict[str, Any]:
    """Everything that decides what a latent cache holds, as named parts that can be compared."""
    return {
        "dataset": dataset.name,
        "dataset_content": dataset.fingerprint,
        "split": dataset.split,
        "transform": transform_of(run.data, dataset.split).describe(),
        "vqvae_source": run.vqvae.source,
        "vqvae_weights": vqvae_digest,
        "vqvae_input_range": run.vqvae.input_range,
        "text_encoder": "none" if text_encoder is None else text_encoder.digest,
        "text_dtype": "none" if text_encoder is None else run.text.cache_dtype,
    }


def open_split(data: DataSettings, split: str) -> CaptionedDataset:
    """A split of the run's dataset; an empty one is an error."""
    dataset = open_dataset(data, split)
    if len(dataset) == 0:
        raise DataError(f"data.dataset '{data.dataset}' has no pictures in its split '{split}'.")
    return dataset
