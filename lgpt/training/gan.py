"""The second player of phase 2: a discriminator in a DeepSpeed engine of its own.

What goes wrong between two engines, and how it is kept out (deepspeed 0.19.8, test_gan.py):
- The VQ-VAE's adversarial term through the discriminator's engine, or through its bare module
  with gradients on: the discriminator learns from it too, or DeepSpeed stops. So its bare module
  is called with gradients off.
- `torch.autograd.grad` on the output of the VQ-VAE's engine, for the adaptive weight: refused. So
  all picture losses are differentiated by a detached copy of the reconstruction, and the engine
  goes backward once, from the sum of reconstruction x gradient. That also takes the backward
  passes of perceptual loss and discriminator once, where taming's code takes them twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from lgpt.core.distributed import world_size
from lgpt.engine.build import build_engine, gradient_norm, parameter_dtype, set_learning_rate
from lgpt.engine.ranks import sum_over_ranks
from lgpt.models.discriminator import PatchDiscriminator
from lgpt.models.vqvae import VQVAE
from lgpt.settings.discriminator import DiscriminatorSettings
from lgpt.settings.training import OptimizerSettings
from lgpt.training.gan_losses import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    last_kernel_gradient,
    lecam_penalty,
)

_LECAM_DECAY = 0.99


class PictureGradient(NamedTuple):
    """What the reconstruction is to change by, with the balance of its two sources.

    Attributes:
        gradient: Of picture losses plus weighted adversarial term, float32.
        metrics: Scalars for the log, detached.
    """

    gradient: Tensor
    metrics: dict[str, Tensor]


class Adversary:
    """The discriminator: what it tells the VQ-VAE, and how it learns.

    Attributes:
        model: The discriminator, the same on every rank.
        engine: None until `build_engine`.
    """

    finite_losses = ("adversarial_loss", "discriminator_loss")

    def __init__(self, settings: DiscriminatorSettings, vqvae: VQVAE) -> None:
        self.settings = settings
        self.model = PatchDiscriminator(settings.layers, settings.channels)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())  # before ZeRO-3
        self.engine: Any = None
        self._last_features: Optional[Tensor] = None
        if settings.adaptive_weight:
            vqvae.decoder.conv_out.register_forward_pre_hook(self._keep_last_features)

    def _keep_last_features(self, kernel: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if kernel.training:
            self._last_features = inputs[0].detach()

    def build_engine(self, optimizer: OptimizerSettings, ds_config: dict[str, Any]) -> None:
        """An engine with the same settings as the VQ-VAE's and its own copy of the config."""
        self.engine = build_engine(self.model, optimizer, ds_config)

    def counts_at(self, step: int) -> bool:
        """Whether the VQ-VAE's loss has the adversarial term in this step (0 is the first)."""
        return step >= self.settings.start_step

    def learns_at(self, step: int) -> bool:
        """Whether the discriminator takes this step."""
        return step >= self.settings.start_step - self.settings.warmup_steps

    def picture_gradient(
        self, picture_loss: Tensor, reconstruction: Tensor, step: int
    ) -> PictureGradient:
        """The gradient of everything that is measured on the reconstruction.

        Args:
            picture_loss: Scalar, of `reconstruction`; its graph is used up.
            reconstruction: A float32 leaf: detached from the VQ-VAE, requires a gradient.
            step: Optimizer steps done before this one.
        """
        (gradient,) = torch.autograd.grad(picture_loss, reconstruction)
        if not self.counts_at(step):
            return PictureGradient(gradient, {})
        with _gradients_off(self.engine.module):
            logits = self.engine.module(reconstruction.to(parameter_dtype(self.engine)))
            loss = hinge_generator_loss(logits.float())
            (adversarial,) = torch.autograd.grad(loss, reconstruction)
        weight = self._weight(gradient, adversarial)
        metrics = {
            "adversarial_loss": loss.detach(),
            "adversarial_weight": weight,
            "adversarial_gradient_ratio": weight * adversarial.norm() / gradient.norm(),
        }
        return PictureGradient(gradient + weight * adversarial, metrics)

    def _weight(self, gradient: Tensor, adversarial: Tensor) -> Tensor:
        if not self.settings.adaptive_weight:
            return gradient.new_tensor(self.settings.weight)
        assert self._last_features is not None, "the VQ-VAE ran no forward"
        both = torch.stack(
            [last_kernel_gradient(self._last_features, each) for each in (gradient, adversarial)]
        )
        self._last_features = None
        # Of all ranks' pictures: the weight must not depend on how a batch is cut.
        mean = sum_over_ranks(both) / world_size()
        return self.settings.weight * adaptive_weight(mean[0], mean[1])

    def learn(
        self, images: Tensor, reconstruction: Tensor, learning_rate: float
    ) -> dict[str, Tensor]:
        """One micro step on real pictures and their reconstructions; returns scalars for the log.

        Args:
            images: Real pictures in [-1, 1], in the engine's type.
            reconstruction: Detached.
            learning_rate: The VQ-VAE's at this step.
        """
        self.engine.train()
        set_learning_rate(self.engine, learning_rate * self.settings.learning_rate_ratio)
        fakes = reconstruction.to(images.dtype)
        logits = self.engine(torch.cat([images, fakes])).float()
        real, fake = logits.chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        total = loss
        if self.settings.lecam_weight:
            module = self.engine.module
            self._follow(module.lecam_real, module.lecam_fake, real, fake)
            penalty = lecam_penalty(real, fake, module.lecam_real, module.lecam_fake)
            total = loss + self.settings.lecam_weight * penalty
        self.engine.backward(total)
        self.engine.step()
        return {"discriminator_loss": total.detach(), **_opinion(real, fake)}

    @torch.no_grad()
    def rest(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """A micro step in which it learns nothing and is only asked; returns scalars for the log.

        Args:
            images: Real pictures in [-1, 1], in the engine's type.
            reconstruction: Of the same pictures.
        """
        both = torch.cat([images, reconstruction.to(images.dtype)])
        return _opinion(*self.engine.module(both).float().chunk(2))

    def trial(self, images: Tensor, reconstruction: Tensor) -> None:
        """Forward and backward as large as `learn`'s, to the pictures alone; changes nothing."""
        both = torch.cat([images.detach(), reconstruction.to(images.dtype)]).requires_grad_()
        torch.autograd.grad(self.engine.module(both).float().mean(), both)

    def forget_features(self) -> None:
        """Let go of what the VQ-VAE's last forward left for the adaptive weight."""
        self._last_features = None

    def gradient_norm(self) -> float:
        """Global norm of the discriminator's last step before clipping; inf when it was skipped."""
        return gradient_norm(self.engine)

    @torch.no_grad()
    def _follow(
        self, average_real: Tensor, average_fake: Tensor, real: Tensor, fake: Tensor
    ) -> None:
        """Move LeCAM's averages towards the mean logits of all ranks."""
        means = sum_over_ranks(torch.stack([real.mean(), fake.mean()])) / world_size()
        average_real.lerp_(means[0].to(average_real.dtype), 1 - _LECAM_DECAY)
        average_fake.lerp_(means[1].to(average_fake.dtype), 1 - _LECAM_DECAY)


def _opinion(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """What logits say of how well the discriminator tells the two, without any regulariser."""
    real, fake = real.detach(), fake.detach()
    return {
        "hinge_loss": hinge_discriminator_loss(real, fake),
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
    }


@contextmanager
def _gradients_off(module: nn.Module) -> Iterator[None]:
    """The module's parameters are constants, for forward and backward."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
