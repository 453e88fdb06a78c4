"""The VQ-VAE: its architecture (phase 2) or where a trained one lies (phases 1 and 3)."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import Field

from lgpt.settings.section import FolderOrFile, NameOrPath, Section

VqvaeSource = Literal["pretrained_hf", "pretrained_taming", "pretrained_llamagen", "custom"]


class VqvaeSettings(Section):
    """Architecture in taming-transformers' grammar (`ddconfig`, `params`), plus the quantizer."""

    codebook_size: int = Field(16384, ge=2, description="codes to choose a token from")
    code_dim: int = Field(256, ge=2, description="width of a code vector (taming: embed_dim)")
    l2_normalized_codes: bool = Field(
        False, description="unit-length codes and latents (LlamaGen: code_dim 8)"
    )
    codebook_update: Literal["gradient", "ema"] = Field(
        "ema",
        description="how codes learn: by the codebook loss, or as moving averages of their latents "
        "(better on openmoji, README.md has the table)",
    )
    ema_decay: float = Field(0.99, gt=0, lt=1, description="only with codebook_update: ema")
    revive_dead_codes: bool = Field(
        True,
        description="only with codebook_update: ema; a code that is hardly used restarts at a "
        "random latent of the batch",
    )
    z_channels: int = Field(256, ge=1, description="channels of what the encoder gives")
    ch: int = Field(128, ge=32, multiple_of=32, description="base width; GroupNorm has 32 groups")
    ch_mult: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4),
        min_length=1,
        description="width of each level in multiples of ch; a token's side is 2^(levels - 1)",
    )
    num_res_blocks: int = Field(2, ge=0, description="residual blocks a level")
    attn_resolutions: tuple[int, ...] = Field(
        (16,), description="levels of this many pixels a side have attention"
    )
    resolution: int = Field(256, ge=8, description="nominal side that attn_resolutions refers to")
    dropout: float = Field(0.0, ge=0, lt=1, description="in residual blocks")

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one token: f = 2^(levels - 1)."""
        return int(2 ** (len(self.ch_mult) - 1))


class VqvaeLossSettings(Section):
    """What phase 2 minimises."""

    reconstruction: Literal["l1", "l2"] = Field("l1", description="distance of pixels")
    codebook_weight: float = Field(
        1.0, ge=0, description="of the codes' distance to latents; unused with ema"
    )
    commitment_weight: float = Field(0.25, ge=0, description="beta, on the encoder's side")
    entropy_weight: float = Field(
        0.0, ge=0, description="pulls latents to one code each and all codes into use; IBQ: 0.05"
    )
    entropy_temperature: float = Field(0.01, gt=0, description="of its soft choice of codes")
    perceptual: Literal["none", "lpips"] = Field(
        "none", description="lpips: how different pictures look to VGG16, beside the pixels"
    )
    perceptual_weight: float = Field(1.0, gt=0, description="of lpips beside the pixels")
    vgg16_weights: Optional[FolderOrFile] = Field(
        None, description="vgg16-397923af.pth; default: torchvision's cache; never downloaded"
    )
    lpips_weights: Optional[FolderOrFile] = Field(
        None,
        description="LPIPS's vgg.pth; default: beside the VGG16, or in the packages lpips or "
        "torchmetrics",
    )
    adversarial: Literal["none", "hinge"] = Field(
        "none", description="hinge: a PatchGAN learns beside it, see `discriminator`"
    )


class MetricSettings(Section):
    """What validation of phase 2 measures beside pixels and codes, by networks from elsewhere."""

    lpips: Literal["auto", "none"] = Field(
        "auto",
        description="auto: where its weights are found (loss.vgg16_weights, loss.lpips_weights)",
    )
    rfid: Literal["auto", "none"] = Field(
        "auto",
        description="the Frechet distance between pictures and their reconstructions; auto: where "
        "Inception's weights are found",
    )
    inception_weights: Optional[FolderOrFile] = Field(
        None,
        description="pt_inception-2015-12-05-6726825d.pth of pytorch-fid; default: torch's cache; "
        "never downloaded",
    )


class FinetuningSettings(Section):
    """What phase 2 makes of the trained VQ-VAE that `init_from` names (only with init_from)."""

    source: VqvaeSource = Field(
        "custom",
        description="who made it; custom: a model folder, run or checkpoint of lgpt. The others "
        "are found as vqvae.checkpoint of phases 1 and 3",
    )
    trains: Literal["all", "decoder"] = Field(
        "all",
        description="decoder: encoder and codebook stay as they are, bit for bit, so every picture "
        "keeps its tokens",
    )
    ddconfig: Optional[NameOrPath] = Field(
        None, description="the model.yaml of a taming .ckpt, when it does not lie beside it"
    )


class VqvaeSourceSettings(Section):
    """A trained VQ-VAE, and who made it."""

    source: VqvaeSource = Field(
        "pretrained_hf", description="whose layout the files have; custom is our own"
    )
    checkpoint: NameOrPath = Field(
        "dalle-mini/vqgan_imagenet_f16_16384",
        description="hub name, folder or file; for custom a model folder or a phase 2 run folder",
    )
    codebook_size: Optional[int] = Field(
        None,
        ge=2,
        description="what it is expected to have: planning counts with it, loading refuses another",
    )
    downsample_factor: Optional[int] = Field(
        None, ge=1, description="pixels a side of one token; as codebook_size"
    )
    ddconfig: Optional[NameOrPath] = Field(
        None, description="the model.yaml of a taming .ckpt, when it does not lie beside it"
    )
    input_range: Literal["-1..1", "0..1"] = Field(
        "-1..1", description="0..1 only to match token dumps made by dalle-mini's notebooks"
    )
