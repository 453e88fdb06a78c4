"""`lgpt prepare`: captioned images to VQ tokens and text embeddings in the latent cache."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lgpt.core.distributed import barrier, is_rank_zero, rank, world_size
from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.data.latent_cache import CaptionEncoder, ImageEncoder, LatentCache, build_latent_cache
from lgpt.engine.memory import keep_freed_memory
from lgpt.engine.start import device_of_this_rank, start_process_group
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.vqvae import VQVAE
from lgpt.settings.phases import TransformerRun
from lgpt.training.components import (
    cache_fingerprint,
    load_text_encoder_of,
    load_vqvae_of,
    open_split,
    transform_of,
)

_log = get_logger(__name__)


def image_encoder(vqvae: VQVAE, device: torch.device) -> ImageEncoder:
    """`vqvae.encode` on a device, without gradients."""

    @torch.no_grad()
    def encode(images: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b h w"]:
        return vqvae.encode(images.to(device)).cpu()

    return encode


def caption_encoder(encoder: ClipTextEncoder, device: torch.device) -> CaptionEncoder:
    """`encoder.encode` on a device, results on the CPU."""

    def encode(
        captions: list[str],
    ) -> tuple[Float[Tensor, "b tokens width"], Bool[Tensor, "b tokens"]]:
        embeddings, mask = encoder.encode(captions, device=device)
        return embeddings.cpu(), mask.cpu()

    return encode


def prepare_latent_cache(run: TransformerRun) -> list[dict[str, Any]]:
    """Write or complete `run.latent_cache` for the splits train and val; every rank does its share.

    A cache that is whole and has the run's fingerprint is left alone; chunks of a killed
    preparation are kept. Pictures are encoded in float32, whatever `training.precision` is.

    Returns:
        What is in the cache, a report a split, see `_report`; on rank 0, others get none.

    Raises:
        SettingsError: The run has no latent cache, or its folder cannot be made.
        DataError, CheckpointError: Pictures, VQ-VAE or text encoder cannot be used.
    """
    if run.latent_cache is None:
        raise SettingsError(
            "latent_cache is not set, so there is nothing to prepare; give it a folder, "
            f"for example latent_cache=runs/{run.name}-latents."
        )
    try:
        run.latent_cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"latent_cache {run.latent_cache} cannot be made: {error}. Give it a folder that can "
            "be written."
        ) from error
    device = start_process_group() if world_size() > 1 else device_of_this_rank()
    keep_freed_memory(device)
    vqvae = load_vqvae_of(run.vqvae).to(device)
    vqvae_digest = vqvae.weights_digest()
    train = open_split(run.data, "train")
    encoder: Optional[ClipTextEncoder] = None
    if run.conditioning == "text_conditional":
        encoder = load_text_encoder_of(run, train).to(device)
    reports = []
    for split in ("train", "val"):
        dataset = train if split == "train" else open_split(run.data, split)
        build_latent_cache(
            run.latent_cache / split,
            dataset,
            transform_of(run.data, split),
            encode_images=image_encoder(vqvae, device),
            encode_captions=None if encoder is None else caption_encoder(encoder, device),
            count_cut_captions=(lambda _: 0) if encoder is None else encoder.count_cut,
            fingerprint=cache_fingerprint(run, dataset, vqvae_digest, encoder),
            codebook_size=vqvae.vocab_size,
            downsample_factor=vqvae.downsample_factor,
            text_dtype=run.text.cache_dtype,
            max_bad_images=run.data.max_bad_images,
            workers=run.data.workers,
            rank=rank(),
            world=world_size(),
            barrier=barrier,
        )
        if is_rank_zero():
            reports.append(_report(LatentCache.open(run.latent_cache / split)))
            _tell(reports[-1])
    return reports


def _report(cache: LatentCache) -> dict[str, Any]:
    """Facts about a finished cache. Entropy in nats; what tells of text is None without it."""
    statistics, manifest = cache.token_statistics(), cache.manifest
    has_text = cache.text_width is not None
    return {
        "folder": str(cache.folder),
        "split": manifest["split"],
        "pictures": len(cache),
        "crops": cache.crops,
        "bad_images": len(manifest["bad_images"]),
        "tokens": statistics.tokens,
        "codebook_size": cache.codebook_size,
        "used_codes": statistics.used_codes,
        "usage": statistics.usage,
        "entropy": statistics.entropy,
        "largest_entropy": math.log(cache.codebook_size),
        "text_dtype": manifest["text_dtype"],
        "different_captions": manifest["different_captions"] if has_text else None,
        "cut_captions": manifest["cut_captions"] if has_text else None,
        "bytes": sum(manifest["files"].values()),
    }


def _tell(report: dict[str, Any]) -> None:
    _log.info(
        "%s: %d pictures x %d crop(s), %d bad ones left out; %d of %d codes used (%.1f%%), entropy "
        "%.2f of %.2f nats; %.1f MB",
        report["folder"],
        report["pictures"],
        report["crops"],
        report["bad_images"],
        report["used_codes"],
        report["codebook_size"],
        100 * report["usage"],
        report["entropy"],
        report["largest_entropy"],
        report["bytes"] / 1e6,
    )
    if report["text_dtype"] is not None:
        _log.info(
            "%s: %d different captions, embeddings in %s; %d captions were longer than the text "
            "encoder reads and were cut",
            report["folder"],
            report["different_captions"],
            report["text_dtype"],
            report["cut_captions"],
        )
