"""The discriminator of phase 2: its shape, and when and how much it counts."""

from __future__ import annotations

from pydantic import Field

from lgpt.settings.section import Section


class DiscriminatorSettings(Section):
    """A PatchGAN that judges reconstructions (only with loss.adversarial: hinge)."""

    layers: int = Field(3, ge=1, le=6, description="convolutions that halve the picture")
    channels: int = Field(
        64, ge=16, multiple_of=16, description="width of the first, doubled in each up to 8 times"
    )
    weight: float = Field(
        0.5, gt=0, description="of the adversarial term in the VQ-VAE's loss; LlamaGen 0.5, IBQ 0.1"
    )
    adaptive_weight: bool = Field(
        False,
        description="VQGAN's: `weight` times the ratio of the picture loss's to the adversarial "
        "term's gradient at the decoder's last kernel, at most 10,000",
    )
    start_step: int = Field(20000, ge=0, description="first step whose VQ-VAE loss has the term")
    warmup_steps: int = Field(
        1000,
        ge=0,
        description="steps before start_step in which it already learns; it should know something "
        "when it begins to count",
    )
    learning_rate_ratio: float = Field(
        1.0, gt=0, description="its learning rate over the VQ-VAE's, which follows the schedule"
    )
    lecam_weight: float = Field(
        0.0, ge=0, description="LeCAM regulariser against overfitting on little data; IBQ 0.05"
    )
