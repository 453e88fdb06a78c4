"""Phases 1 and 3: LatentGPT on VQ tokens, conditioned on frozen text embeddings or on nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image

from lgpt.core.distributed import rank, world_size
from lgpt.core.files import sha256_of_json
from lgpt.data.latent_cache import CachedBatch
from lgpt.data.transforms import to_pil
from lgpt.engine.blocks import apply_block_settings
from lgpt.engine.build import build_engine, parameter_dtype
from lgpt.engine.ranks import gather_to_rank_zero, mean_over_ranks
from lgpt.models.attention import choose_kernel
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.sampling.generate import generate_tokens
from lgpt.sampling.picture_grid import picture_grid
from lgpt.settings.phases import TransformerRun
from lgpt.training.components import (
    cache_fingerprint,
    load_text_encoder_of,
    load_vqvae_of,
    open_split,
    text_encoder_name,
)
from lgpt.training.latent_batches import (
    LatentBatch,
    TrainingLatents,
    validation_batch,
)
from lgpt.training.latent_sources import open_latents
from lgpt.training.places import micro_batches_of, validation_batches_of

# Kept with every checkpoint: 1 MiB of logits at 16,384 codes.
_PROBE_IMAGES, _PROBE_POSITIONS = 2, 8


class TransformerTask:
    """The step functions of a transformer run."""

    main_loss = "ce_loss"
    finite_losses = ("ce_loss",)

    def __init__(self, run: TransformerRun, device: torch.device) -> None:
        """Open data and frozen parts and make the model; `build_engines` makes the engine.

        Raises:
            DataError: The latent cache is missing or was made from something else.
        """
        self.run, self.device = run, device
        self.vqvae: VQVAE = load_vqvae_of(run.vqvae).to(device)
        self.vqvae_digest = self.vqvae.weights_digest()  # reads every weight: once
        train_set, val_set = open_split(run.data, "train"), open_split(run.data, "val")
        self.text_encoder: Optional[ClipTextEncoder] = None
        if run.conditioning == "text_conditional":
            self.text_encoder = load_text_encoder_of(run, train_set).to(device)
        self.train_set = train_set
        parts = (self.vqvae, self.vqvae_digest, self.text_encoder, device)
        self.train_source = open_latents(run, train_set, *parts)
        self.training_images = len(self.train_source)
        self.val_source = open_latents(run, val_set, *parts)
        side = run.data.resolution // self.vqvae.downsample_factor
        self.model_config = LatentGPTConfig.from_settings(
            run.transformer,
            codebook_size=self.vqvae.vocab_size,
            grid=(side, side),
            text_width=None if self.text_encoder is None else self.text_encoder.width,
        )
        self.tokens_per_image = side * side
        dtype = torch.bfloat16 if run.training.precision == "bf16" else torch.float32
        # Only to refuse a flash kernel that is asked for and not there before anything is built.
        choose_kernel(run.transformer.attention, device.type, dtype, self.model_config.head_width)
        with torch.device("meta"):  # no rank holds more than its share: build_engine fills it
            self.model = LatentGPT(self.model_config)
        apply_block_settings(self.model, run.blocks)
        self.latents = TrainingLatents(self.train_source, run.seed, run.transformer.cond_drop)
        captions = [val_set.captions(i)[0] for i in range(min(run.sampling.images, len(val_set)))]
        self.prompts = list(run.sampling.prompts or captions)[: run.sampling.images]
        self.engine: Any = None
        self._probe: Optional[CachedBatch] = None

    def description(self) -> dict[str, Any]:
        """What `model_config.json` holds: enough to rebuild the model and its pipeline."""
        run, encoder = self.run, self.text_encoder
        text = None
        if encoder is not None:
            text = {
                "name": text_encoder_name(run),
                "is_random": encoder.is_random,
                "digest": encoder.digest,
            }
        return {
            "kind": "latent_gpt",
            "config": self.model_config.to_dict(),
            "vqvae": {**run.vqvae.model_dump(), "digest": self.vqvae_digest},
            "text_encoder": text,
        }

    def parameters_to_log(self) -> dict[str, object]:
        """Facts that only the opened parts know."""
        return {
            "codebook_size": self.vqvae.vocab_size,
            "downsample_factor": self.vqvae.downsample_factor,
            "vqvae_digest": self.vqvae_digest,
            "ln_codebook_size": math.log(self.vqvae.vocab_size),
            "transformer_params": self.model.num_parameters(),
            "text_encoder_is_random": self.text_encoder is not None and self.text_encoder.is_random,
        }

    def content(self) -> dict[str, Optional[str]]:
        """Digests of pictures, VQ-VAE, text encoder and latent cache."""
        run, encoder = self.run, self.text_encoder
        cache = None
        if run.latent_cache is not None:
            cache = sha256_of_json(
                cache_fingerprint(run, self.train_set, self.vqvae_digest, encoder)
            )
        return {
            "training_pictures": self.train_set.fingerprint,
            "vqvae": self.vqvae_digest,
            "text_encoder": None if encoder is None else encoder.digest,
            "latent_cache": cache,
        }

    def build_engines(self, ds_config: dict[str, Any]) -> None:
        """One engine, around the model."""
        self.engine = build_engine(self.model, self.run.optimizer, ds_config)

    def engines(self) -> dict[str, Any]:
        """The model's engine."""
        return {"model": self.engine}

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def train_step(self, step: int) -> Mapping[str, float]:
        """One optimizer step; cross-entropy in nats a token."""
        self.engine.train()
        batch = self.run.batch
        losses = []
        for places in micro_batches_of(
            step,
            global_batch=batch.global_batch_images,
            micro_batch=batch.micro_batch_images,
            rank=rank(),
            world=world_size(),
        ):
            loss = self._loss(self.latents.at(places))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return self._metrics(float(torch.stack(losses).float().mean()))

    def _loss(self, batch: LatentBatch) -> torch.Tensor:
        batch = batch.to(self.device, parameter_dtype(self.engine))
        tokens, text, mask = batch.latents.tokens, batch.latents.text, batch.latents.text_mask
        return self.engine(tokens, text, mask, targets=tokens, null_text=batch.null_text)

    def _metrics(self, ce_loss: float) -> dict[str, float]:
        return {
            "ce_loss": ce_loss,
            "perplexity": math.exp(min(ce_loss, 80.0)),
            # What guessing would score: 7.1 beside 9.70 does not look alarming.
            "ln_codebook_size": math.log(self.vqvae.vocab_size),
        }

    @torch.no_grad()
    def probe(self) -> Mapping[str, torch.Tensor]:
        """Two validation images, the second without its caption, and logits at a few positions."""
        self.engine.eval()
        if self._probe is None:
            items = np.arange(min(_PROBE_IMAGES, len(self.val_source)))
            self._probe = validation_batch(self.val_source, items).latents
        tokens, text, mask = self._probe.tokens, self._probe.text, self._probe.text_mask
        null_text = torch.arange(len(tokens)) > 0
        if text is not None:
            text = text.to(parameter_dtype(self.engine))
        length = tokens.shape[1]
        positions = torch.linspace(0, length - 1, min(_PROBE_POSITIONS, length)).long()
        logits = self.engine(
            *(None if each is None else each.to(self.device) for each in (tokens, text, mask)),
            null_text=null_text.to(self.device),
            positions=positions.to(self.device),
        )
        probe = {"tokens": tokens, "null_text": null_text, "positions": positions}
        probe["logits"] = logits.float()
        if text is not None and mask is not None:
            probe.update(text=text, text_mask=mask)
        return probe

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Cross-entropy of the first validation images, with their captions."""
        self.engine.eval()
        batches = validation_batches_of(
            len(self.val_source),
            wanted=self.run.training.validation_images,
            micro_batch=self.run.batch.micro_batch_images,
            rank=rank(),
            world=world_size(),
        )
        losses = [float(self._loss(validation_batch(self.val_source, items))) for items in batches]
        mean = mean_over_ranks({"ce_loss": float(np.mean(losses))}, self.device)["ce_loss"]
        return self._metrics(mean)

    @torch.no_grad()
    def draw(self, step: int) -> Mapping[str, Image.Image]:
        """A grid of the prompts (or of unconditional pictures); every rank draws its share."""
        self.engine.eval()
        run, world = self.run, world_size()
        share = math.ceil(run.sampling.images / world)
        numbers = [rank() * share + i for i in range(share)]
        text = mask = None
        captions = ["" for _ in numbers]
        if self.text_encoder is not None:
            captions = [self.prompts[n % len(self.prompts)] for n in numbers]
            text, mask = self.text_encoder.encode(captions, device=self.device)
            text = text.to(parameter_dtype(self.engine))
        tokens = generate_tokens(
            self.engine.module,
            text,
            mask,
            guidance=run.sampling.guidance if text is not None else 1.0,
            guidance_schedule=run.sampling.guidance_schedule,
            guidance_power=run.sampling.guidance_power,
            temperature=run.sampling.temperature,
            top_k=run.sampling.top_k,
            top_p=run.sampling.top_p,
            seeds=[run.seed + n for n in numbers],
            # After a blow-up the next loss says so, on all ranks; here one alone might raise.
            must_be_finite=False,
        )
        images = self.vqvae.decode(tokens).cpu()
        pairs = gather_to_rank_zero(list(zip(to_pil(images), captions)))
        flat = [pair for part in pairs for pair in part][: run.sampling.images]
        if not flat:
            return {}
        return {"samples": picture_grid([p for p, _ in flat], [c for _, c in flat])}
