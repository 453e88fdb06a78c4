"""Where a run's latents come from: its latent cache, or without one its frozen encoders."""

from __future__ import annotations

from typing import Optional

import torch

from lgpt.data.captioned import CaptionedDataset
from lgpt.data.image_batches import ImageBatches
from lgpt.data.latent_cache import LatentCache
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.vqvae import VQVAE
from lgpt.settings.phases import TransformerRun
from lgpt.training.components import cache_fingerprint, transform_of
from lgpt.training.encode_latents import caption_encoder, image_encoder
from lgpt.training.latent_batches import EncodedLatents, LatentSource


def open_latents(
    run: TransformerRun,
    dataset: CaptionedDataset,
    vqvae: VQVAE,
    vqvae_digest: str,
    text_encoder: Optional[ClipTextEncoder],
    device: torch.device,
) -> LatentSource:
    """Latents of one split.

    Args:
        dataset: The split.
        vqvae: On `device`.
        vqvae_digest: `vqvae.weights_digest()`, which reads every weight.
        text_encoder: None leaves text out, also that of a cache that holds some.

    Raises:
        DataError: The latent cache is missing or was made from something else.
    """
    if run.latent_cache is not None:
        expected = cache_fingerprint(run, dataset, vqvae_digest, text_encoder)
        # An unconditional run may use a cache that holds text.
        return LatentCache.open(
            run.latent_cache / dataset.split, expected, text_encoder is not None
        )
    transform = transform_of(run.data, dataset.split)
    return EncodedLatents(
        dataset,
        ImageBatches(
            dataset,
            transform,
            workers=run.data.workers,
            max_bad_images=run.data.max_bad_images,
        ),
        transform.crops,
        image_encoder(vqvae, device),
        None if text_encoder is None else caption_encoder(text_encoder, device),
    )
