"""From prompts to pictures with a model folder: text encoder, transformer, VQ-VAE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.data.transforms import to_pil
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.latent_gpt import LatentGPT
from lgpt.models.vqvae import VQVAE
from lgpt.sampling.generate import generate_tokens

_SAMPLING = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
# Pictures drawn at a time; guidance doubles it.
_BATCH_PICTURES = 32


class TextToImagePipeline:
    """Prompts in, PIL pictures out.

    Args:
        model: The transformer, in eval mode.
        vqvae: The VQ-VAE whose tokens it writes.
        text_encoder: Name or folder of its CLIP, opened at the first prompt; None for an
            unconditional model.
        sampling: Defaults of guidance, temperature, top_k and top_p.
        text_encoder_digest: Of the text encoder it was trained with; None takes any that fits.
    """

    def __init__(
        self,
        model: LatentGPT,
        vqvae: VQVAE,
        text_encoder: Optional[Union[str, Path]],
        sampling: Optional[dict[str, Any]] = None,
        text_encoder_digest: Optional[str] = None,
    ) -> None:
        if vqvae.vocab_size != model.config.codebook_size:
            raise CheckpointError(
                f"the transformer writes {model.config.codebook_size} codes, the VQ-VAE has "
                f"{vqvae.vocab_size}: they do not belong together."
            )
        self.model, self.vqvae = model, vqvae
        self._encoder_name, self._encoder_digest = text_encoder, text_encoder_digest
        self._encoder: Optional[ClipTextEncoder] = None
        self.sampling = {**_SAMPLING, **(sampling or {})}

    @classmethod
    def from_pretrained(
        cls, folder: Union[str, Path], device: Optional[Union[str, torch.device]] = None
    ) -> TextToImagePipeline:
        """Open a model folder (`lgpt convert`).

        Args:
            folder: Holds `config.json`, `model.safetensors`, `pipeline.json` and `vqvae/`.
            device: Default: the GPU if there is one.

        Raises:
            CheckpointError: A part is missing or they do not belong together.
        """
        source = Path(folder)
        description = source / "pipeline.json"
        if not description.is_file():
            raise CheckpointError(
                f"{source} is not a model folder of lgpt: pipeline.json is missing. "
                "`lgpt convert RUN FOLDER` writes one."
            )
        parts = json.loads(description.read_text())
        name = parts.get("text_encoder")
        if name is not None and (source / name).is_dir():
            name = source / name
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = LatentGPT.from_pretrained(source).to(device)
        vqvae = VQVAE.from_pretrained(source / parts.get("vqvae", "vqvae")).to(device)
        digest = parts.get("text_encoder_digest")
        return cls(model, vqvae, name, parts.get("sampling"), digest)

    @property
    def text_encoder(self) -> ClipTextEncoder:
        """The CLIP text tower, opened at first use.

        Raises:
            SettingsError: The model is unconditional.
            CheckpointError: The encoder cannot be opened, or is not the one that was trained with.
        """
        if self._encoder_name is None or self.model.config.text_width is None:
            raise SettingsError(
                "this model is unconditional: it takes no prompts. Draw with "
                "`pipeline.unconditional(count)` or `lgpt sample MODEL --unconditional COUNT`."
            )
        if self._encoder is None:
            encoder = ClipTextEncoder.from_pretrained(self._encoder_name)
            if encoder.width != self.model.config.text_width:
                raise CheckpointError(
                    f"text encoder {encoder.name} has width {encoder.width}, the transformer was "
                    f"trained with {self.model.config.text_width}."
                )
            if self._encoder_digest not in (None, encoder.digest):
                raise CheckpointError(
                    f"text encoder {encoder.name} is not the one that the transformer was trained "
                    f"with (digest {self._encoder_digest[:12]} then, {encoder.digest[:12]} now): "
                    "put that one where pipeline.json names it."
                )
            self._encoder = encoder.to(self._device)
        return self._encoder

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __call__(
        self,
        prompts: Union[str, Sequence[str]],
        guidance: Optional[float] = None,
        seed: int = 0,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        images_per_prompt: int = 1,
    ) -> list[Image.Image]:
        """Pictures of every prompt, in order; None takes the model folder's own default.

        Args:
            prompts: One or several.
            guidance: Scale of classifier-free guidance; 1 = off.
            seed: Picture j of a prompt is drawn with seed + j, whatever else is drawn with it.
            temperature: See `generate_tokens`.
            top_k: See `generate_tokens`.
            top_p: See `generate_tokens`.
            images_per_prompt: Pictures of each prompt, one after the other.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoder = self.text_encoder
        choices = self._choices(
            guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p
        )
        wanted = [(p, seed + j) for p in prompts for j in range(images_per_prompt)]
        pictures: list[Image.Image] = []
        for start in range(0, len(wanted), _BATCH_PICTURES):
            part = wanted[start : start + _BATCH_PICTURES]
            text, mask = encoder.encode([prompt for prompt, _ in part])
            pictures += self._draw(text, mask, [number for _, number in part], choices)
        return pictures

    def unconditional(
        self,
        count: int,
        seed: int = 0,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
    ) -> list[Image.Image]:
        """Pictures without a prompt, from any model; picture i is drawn with seed + i."""
        choices = self._choices(guidance=1.0, temperature=temperature, top_k=top_k, top_p=top_p)
        pictures: list[Image.Image] = []
        for start in range(0, count, _BATCH_PICTURES):
            numbers = range(start, min(start + _BATCH_PICTURES, count))
            pictures += self._draw(None, None, [seed + n for n in numbers], choices)
        return pictures

    def _choices(self, **given: Any) -> dict[str, Any]:
        return {**self.sampling, **{k: v for k, v in given.items() if v is not None}}

    @torch.no_grad()
    def _draw(
        self,
        text: Optional[Tensor],
        mask: Optional[Tensor],
        seeds: list[int],
        choices: dict[str, Any],
    ) -> list[Image.Image]:
        # disable=None: a bar in a terminal, nothing in a log file.
        with tqdm(total=self.model.config.num_tokens, desc="tokens", disable=None) as bar:
            tokens = generate_tokens(
                self.model, text, mask, seeds=seeds, progress=bar.update, **choices
            )
        return to_pil(self.vqvae.decode(tokens).float().cpu())
