"""Phase 2: the VQ-VAE, from scratch or from a trained one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image

from lgpt.core.distributed import is_rank_zero, rank, world_size
from lgpt.data.image_batches import ImageBatches
from lgpt.data.order import SampleOrder
from lgpt.data.transforms import to_pil, to_unit_range
from lgpt.engine.average import WeightAverage
from lgpt.engine.blocks import apply_vqvae_block_settings
from lgpt.engine.build import build_engine, forget_gradients, parameter_dtype
from lgpt.engine.ranks import mean_over_ranks, sum_over_ranks
from lgpt.engine.rows import set_rows
from lgpt.evaluation.code_histogram import usage_histogram
from lgpt.evaluation.picture_metrics import code_perplexity, code_usage
from lgpt.models.perceptual import Lpips, load_lpips
from lgpt.models.vqvae import VQVAE, VQVAEConfig, VQVAEOutput
from lgpt.sampling.picture_grid import picture_grid
from lgpt.settings.phases import Phase2
from lgpt.training.components import open_split, transform_of
from lgpt.training.gan import Adversary
from lgpt.training.health_monitor import HealthMonitor
from lgpt.training.losses import reconstruction_loss
from lgpt.training.places import crops_of, micro_batches_of
from lgpt.training.vqvae_validation import VqvaeValidation

_GRID_IMAGES = 8


class VqvaeTask:
    """The step functions of a phase 2 run."""

    main_loss = "recon_loss"
    finite_losses: tuple[str, ...] = (main_loss,)

    def __init__(self, run: Phase2, device: torch.device) -> None:
        """Open the pictures and make the model; `build_engines` makes the engine."""
        self.run, self.device = run, device
        self.train_images = self._images("train")
        self.val_images = self._images("val")
        self.code_counts: Optional[torch.Tensor] = None  # over the last validation
        self.validation = VqvaeValidation(run, self.val_images, device)
        self.training_images = len(self.train_images)
        self.order = SampleOrder(len(self.train_images), run.seed)
        self.model_config = VQVAEConfig.from_settings(run.vqvae)
        if run.finetuning.trains == "decoder":  # codes that stay have no averages to keep
            self.model_config = replace(self.model_config, codebook_update="gradient")
        self.tokens_per_image = (run.data.resolution // run.vqvae.downsample_factor) ** 2
        self.model = VQVAE(
            self.model_config,
            entropy_temperature=run.loss.entropy_temperature if run.loss.entropy_weight else None,
        )
        if run.finetuning.trains == "decoder":
            self.model.freeze_tokens()
        apply_vqvae_block_settings(self.model, run.blocks)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())  # ZeRO-3 empties them
        self.engine: Any = None
        self.average: Optional[WeightAverage] = None  # of the engine's weights, where there is one
        self.perceptual: Optional[Lpips] = None
        if run.loss.perceptual != "none":
            dtype = torch.bfloat16 if run.training.precision == "bf16" else torch.float32
            lpips = load_lpips(run.loss.vgg16_weights, run.loss.lpips_weights)
            self.perceptual = lpips.to(device, dtype)
            self.finite_losses += ("perceptual_loss",)
        self.adversary: Optional[Adversary] = None
        if run.loss.adversarial != "none":
            self.adversary = Adversary(run.discriminator, self.model)
            self.finite_losses += Adversary.finite_losses
        self.health = HealthMonitor(run)

    def _images(self, split: str) -> ImageBatches:
        data = self.run.data
        return ImageBatches(
            open_split(data, split),
            transform_of(data, split),
            workers=data.workers,
            max_bad_images=data.max_bad_images,
        )

    def description(self) -> dict[str, Any]:
        """What `model_config.json` holds."""
        return {
            "kind": "vqvae",
            "config": self.model_config.to_dict(),
            "vqvae": None,
            "text_encoder": None,
        }

    def parameters_to_log(self) -> dict[str, object]:
        """Facts of the architecture."""
        return {
            "codebook_size": self.run.vqvae.codebook_size,
            "downsample_factor": self.run.vqvae.downsample_factor,
            "vqvae_params": self.num_parameters,
        }

    def content(self) -> dict[str, Optional[str]]:
        """The digest of the training pictures."""
        return {"training_pictures": self.train_images.dataset.fingerprint}

    def build_engines(self, ds_config: dict[str, Any]) -> None:
        """An engine around the model, and one around the discriminator where there is one."""
        self.engine = build_engine(self.model, self.run.optimizer, ds_config)
        if self.adversary is not None:
            self.adversary.build_engine(self.run.optimizer, ds_config)

    def engines(self) -> dict[str, Any]:
        """The engines of both players."""
        if self.adversary is None:
            return {"model": self.engine}
        return {"model": self.engine, "discriminator": self.adversary.engine}

    def state(self) -> dict[str, Any]:
        """What the health monitor has seen."""
        return self.health.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on watching from there."""
        self.health.load_state(state)

    def train_step(self, step: int) -> Mapping[str, float]:
        """One optimizer step of each player on the same pictures."""
        self.engine.train()
        self.model.quantize.begin_step(notes_latents=self.health.restart_is_due)
        run, batch = self.run, self.run.batch
        parts: list[dict[str, torch.Tensor]] = []
        counts = torch.zeros(run.vqvae.codebook_size, dtype=torch.int64, device=self.device)
        for places in micro_batches_of(
            step,
            global_batch=batch.global_batch_images,
            micro_batch=batch.micro_batch_images,
            rank=rank(),
            world=world_size(),
        ):
            images = self._training_images(places)
            tokens, losses = self.micro_step(images, step)
            parts.append(losses)
            counts += torch.bincount(tokens.flatten(), minlength=len(counts))
        counts = sum_over_ranks(counts).cpu()
        self.health.take_codes(step, counts.numpy())
        metrics = _means(parts)
        if self._discriminator_learns(step):
            metrics["discriminator_gradient_norm"] = self.adversary.gradient_norm()
        revived, restarted = self._move_codes(step)
        if self.model_config.codebook_update == "ema" and run.vqvae.revive_dead_codes:
            metrics["revived_codes"] = float(revived)
        if restarted:
            metrics["restarted_codes"] = float(restarted)
        metrics["codebook_usage"] = code_usage(counts)
        metrics["perplexity"] = code_perplexity(counts)
        self.health.judge(step, self._hinge_loss_over_ranks(step, metrics))
        return {**metrics, **self.health.metrics(step)}

    def _move_codes(self, step: int) -> tuple[int, int]:
        """Moving averages, then what the health monitor asks for; codes revived and restarted."""
        quantize, seed = self.model.quantize, self.run.seed
        unused, rows = None, None
        if self.health.restart_is_due:
            unused = torch.from_numpy(self.health.unused_codes(step)).to(self.device)
            rows = quantize.drawn_latents(len(unused), seed=seed, step=step)
        revived = quantize.finish_step(seed=seed, step=step)
        # A latent that is not finite comes from a loss that is not: the loop ends, or goes on.
        if unused is None or rows is None or not bool(torch.isfinite(rows).all()):
            return revived, 0
        if quantize.uses_moving_averages:
            quantize.place(unused, rows)
        else:
            set_rows(self.engine, quantize.embedding.weight, unused, rows)
            if self.average is not None:
                self.average.set_rows(quantize.embedding.weight, unused, rows)
        self.health.restarted(step, len(unused))
        return revived, len(unused)

    def _discriminator_learns(self, step: int) -> bool:
        learns = self.adversary is not None and self.adversary.learns_at(step)
        return learns and not self.health.discriminator_rests

    def _hinge_loss_over_ranks(self, step: int, metrics: Mapping[str, float]) -> Optional[float]:
        if self.adversary is None or not self.adversary.counts_at(step):
            return None
        mine = {"hinge_loss": metrics["hinge_loss"]}
        return mean_over_ranks(mine, self.device)["hinge_loss"]

    def micro_step(
        self, images: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward, backward and step of the VQ-VAE, then of the discriminator.

        Returns:
            The pictures' tokens, and losses for the log.
        """
        output = self.engine(images)
        loss, seen, parts = self._vqvae_loss(images, output, step)
        self.engine.backward(loss)
        learning_rate = self.engine.optimizer.param_groups[0]["lr"]
        self.engine.step()
        if self.adversary is not None and self.adversary.learns_at(step):
            if self._discriminator_learns(step):
                parts.update(self.adversary.learn(images, seen.detach(), learning_rate))
            else:
                parts.update(self.adversary.rest(images, seen.detach()))
        return output.tokens, {name: part.detach().float() for name, part in parts.items()}

    def _vqvae_loss(
        self, images: torch.Tensor, output: VQVAEOutput, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What the VQ-VAE goes backward from, the reconstruction, and losses for the log."""
        loss, adversary = self.run.loss, self.adversary
        seen = output.reconstruction
        if adversary is not None:
            seen = seen.detach().float().requires_grad_()  # see gan.py
        recon = reconstruction_loss(seen, images, loss.reconstruction)
        codebook, commitment = output.codebook_loss, output.commitment_loss
        latent_loss = loss.codebook_weight * codebook + loss.commitment_weight * commitment
        parts = {"recon_loss": recon, "codebook_loss": codebook, "commitment_loss": commitment}
        picture_loss = recon
        if self.perceptual is not None:
            parts["perceptual_loss"] = self.perceptual(seen, images).mean()
            picture_loss = recon + loss.perceptual_weight * parts["perceptual_loss"]
        if loss.entropy_weight:
            latent_loss = latent_loss + loss.entropy_weight * output.entropy_loss
            parts["entropy_loss"] = output.entropy_loss
        if adversary is None:
            return picture_loss + latent_loss, seen, parts
        gradient, balance = adversary.picture_gradient(picture_loss, seen, step)
        parts.update(balance)
        return (output.reconstruction.float() * gradient).sum() + latent_loss, seen, parts

    def trial_batch(self, images: int) -> None:
        """One micro batch of noise through both players and back to the pictures.

        The bare modules are called, and no parameter gets a gradient, so that nothing of it is left
        in the engines; room is taken for the gradients that a real step keeps.
        """
        try:
            self._try(images)
        finally:  # also of one for which there was no room: a smaller one may be tried next
            for engine in self.engines().values():
                forget_gradients(engine)
            if self.adversary is not None:
                self.adversary.forget_features()
            self.model.quantize.begin_step()

    def _try(self, images: int) -> None:
        self.engine.train()
        side, dtype = self.run.data.resolution, parameter_dtype(self.engine)
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):  # dropout draws
            pictures = torch.rand(images, 3, side, side, device=self.device) * 2 - 1
            pictures = pictures.to(dtype).requires_grad_()
            # Gradients in bf16, and the float32 sums of this rank's share.
            learned = self.num_parameters
            if self.adversary is not None:
                learned += self.adversary.num_parameters
            byte_count = 2 * learned + 4 * learned // world_size()
            room = torch.empty(byte_count, dtype=torch.uint8, device=self.device)
            with _decoder_inputs(self.model) as decoder_inputs:
                output = self.engine.module(pictures)
            loss, seen, _ = self._vqvae_loss(pictures.detach(), output, self.run.training.max_steps)
            is_whole = not self.model.tokens_are_frozen
            torch.autograd.grad(loss, pictures if is_whole else decoder_inputs)
            del output, loss, decoder_inputs
            if self.adversary is not None:
                self.adversary.trial(pictures, seen.detach())
            del room

    def _training_images(self, places: np.ndarray) -> torch.Tensor:
        images = self._to_device(self.train_images.items(*self.items_and_crops(places)))
        next_step = places + self.run.batch.global_batch_images
        self.train_images.prefetch(*self.items_and_crops(next_step))
        return images

    def items_and_crops(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which crop of which picture stands at consecutive places of the training sequence."""
        items = self.order.indices(int(places[0]), len(places))
        epochs = places // len(self.train_images)
        return items, crops_of(items, epochs, self.run.data.crops)

    def _to_device(self, pictures: np.ndarray) -> torch.Tensor:
        images = to_unit_range(torch.from_numpy(pictures).to(self.device, non_blocking=True))
        return images.to(parameter_dtype(self.engine))

    def probe(self) -> Mapping[str, torch.Tensor]:
        """Nothing: a VQ-VAE has no logits."""
        return {}

    def validate(self) -> Mapping[str, float]:
        """How well validation pictures come back, over all of them and all ranks."""
        self.engine.eval()
        figures, self.code_counts = self.validation.scores_of(self._reconstruct)
        return figures

    def _reconstruct(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.engine(images.to(parameter_dtype(self.engine)))
        return output.reconstruction, output.tokens

    @torch.no_grad()
    def draw(self, step: int) -> Mapping[str, Image.Image]:
        """Validation pictures above their reconstructions; codes by use in the last validation."""
        self.engine.eval()
        items = np.arange(min(_GRID_IMAGES, len(self.val_images)))
        images = self._to_device(self.val_images.items(items, np.zeros_like(items)))
        reconstruction = self.engine(images).reconstruction
        if not is_rank_zero():
            return {}
        pictures = to_pil(images.float().cpu()) + to_pil(reconstruction.float().cpu())
        captions = ["original"] * len(items) + ["reconstruction"] * len(items)
        grid = picture_grid(pictures, captions, columns=len(items))
        if self.code_counts is None:
            return {"reconstructions": grid}
        return {"reconstructions": grid, "codebook_usage": usage_histogram(self.code_counts)}


@contextmanager
def _decoder_inputs(model: VQVAE) -> Iterator[list[torch.Tensor]]:
    """What the decoder is given, as leaves of the graph where nothing before it learns."""
    inputs: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].requires_grad_())

    hook = model.post_quant_conv.register_forward_pre_hook(note)
    try:
        yield inputs
    finally:
        hook.remove()


def _means(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Each scalar's mean over the micro steps, in one copy from the device."""
    stacked = torch.stack([torch.stack(list(part.values())) for part in parts])
    return dict(zip(parts[0], stacked.mean(0).tolist()))
