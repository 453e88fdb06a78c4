"""From prompts to pictures with a model folder: text encoder, transformer, VQ-VAE."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.data.transforms import to_pil, to_unit_range, validation_transform
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.clip_scorer import ClipScorer
from lgpt.models.cpu_block import pack_for_decoding
from lgpt.models.latent_gpt import LatentGPT
from lgpt.models.vqvae import VQVAE
from lgpt.sampling.generate import generate_tokens
from lgpt.sampling.layout import fastest_dtype, lay_out_for_drawing

_SAMPLING = {
    "guidance": 1.0,
    "guidance_schedule": "constant",
    "guidance_power": 1.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
# Pictures drawn at a time; guidance doubles it.
_BATCH_PICTURES = 32
# A preview is drawn after every quarter of the rows.
_PREVIEWS = 4

Seeds = Any  # a whole number, or several: a list, a tuple, an array, a tensor
Preview = Callable[[list[Image.Image]], Any]


class TextToImagePipeline:
    """Prompts in, PIL pictures out.

    Args:
        model: The transformer, in eval mode.
        vqvae: The VQ-VAE whose tokens it writes.
        text_encoder: Name or folder of its CLIP, opened at the first prompt; None for an
            unconditional model.
        sampling: Defaults of guidance, guidance_schedule, guidance_power, temperature, top_k and
            top_p.
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
        cls,
        folder: Union[str, Path],
        device: Optional[Union[str, torch.device]] = None,
        dtype: str = "auto",
    ) -> TextToImagePipeline:
        """Open a model folder (`lgpt convert`).

        Args:
            folder: Holds `config.json`, `model.safetensors`, `pipeline.json` and `vqvae/`.
            device: Default: the GPU if there is one.
            dtype: Of the transformer's weights: bf16, fp32, or auto, see `fastest_dtype`; on a CPU
                with a C++ compiler also int8, see `to_int8`. On a CPU they are then packed, so that
                the model can draw and be saved, but no longer be trained or moved. VQ-VAE and text
                encoder stay float32.

        Raises:
            CheckpointError: A part is missing or they do not belong together.
            SettingsError: There is no such dtype, or not here.
        """
        if dtype not in ("auto", *_DTYPES):
            raise SettingsError(f"dtype '{dtype}' is unknown; allowed: auto, {', '.join(_DTYPES)}.")
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
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = fastest_dtype(device) if dtype == "auto" else _DTYPES[dtype]
        model = LatentGPT.from_pretrained(source)
        if not lay_out_for_drawing(model, device, chosen) and dtype == "auto":
            pack_for_decoding(model.float())  # an odd width, which bf16 cannot be packed with
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
        seed: Seeds = 0,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        images_per_prompt: int = 1,
        *,
        guidance_schedule: Optional[str] = None,
        guidance_power: Optional[float] = None,
        given: Optional[Int[Tensor, " given"]] = None,
        best: Optional[int] = None,
        scorer: Optional[ClipScorer] = None,
        preview: Optional[Preview] = None,
    ) -> list[Image.Image]:
        """Pictures of every prompt, in order; None takes the model folder's own default.

        Args:
            prompts: One or several.
            guidance: Scale of classifier-free guidance; 1 = off.
            seed: Picture j of a prompt is drawn with seed + j, whatever else is drawn with it.
                Or several: one a picture, in the order in which they are returned without `best`.
            temperature: See `generate_tokens`.
            top_k: See `generate_tokens`.
            top_p: See `generate_tokens`.
            images_per_prompt: Pictures of each prompt, one after the other.
            guidance_schedule: See `generate_tokens`.
            guidance_power: See `generate_tokens`.
            given: First tokens of every picture, see `beginning_of`.
            best: Return so many of a prompt's pictures, best first, as a CLIP scores them; the
                score is left in `picture.info["clip_score"]`.
            scorer: The CLIP that scores; default: the model's text encoder, if it is a whole CLIP.
            preview: Called during drawing, three times a batch, with its pictures so far: the rows
                that are done, white below.

        Raises:
            SettingsError: The model is unconditional, or a number is out of its range.
            CheckpointError: The text encoder cannot be opened, or has no image tower to score with.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        wanted = list(zip(repeated, _one_a_picture(seed, len(prompts), images_per_prompt)))
        if best is not None:
            if not 1 <= best <= images_per_prompt:
                raise SettingsError(
                    f"best must lie between 1 and images_per_prompt ({images_per_prompt}), got "
                    f"{best}."
                )
            scorer = scorer or self.open_scorer()  # before anything is drawn
        encoder = self.text_encoder
        choices = self._choices(
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        pictures: list[Image.Image] = []
        for start in range(0, len(wanted), _BATCH_PICTURES):
            part = wanted[start : start + _BATCH_PICTURES]
            text, mask = _encoded_alone(encoder, [prompt for prompt, _ in part])
            seeds = [number for _, number in part]
            pictures += self._draw(text, mask, seeds, choices, given, preview)
        if best is None or scorer is None:
            return pictures
        return best_of_each(pictures, repeated, images_per_prompt, best, scorer)

    def unconditional(
        self,
        count: int,
        seed: Seeds = 0,
        temperature: Optional[float] = None,
        top_k: Optional[int] = None,
        top_p: Optional[float] = None,
        *,
        given: Optional[Int[Tensor, " given"]] = None,
        preview: Optional[Preview] = None,
    ) -> list[Image.Image]:
        """Pictures without a prompt, from any model.

        Picture i is drawn with seed + i, or with the i-th of several seeds.
        """
        choices = self._choices(temperature=temperature, top_k=top_k, top_p=top_p)
        choices.update(guidance=1.0, guidance_schedule="constant", guidance_power=1.0)
        seeds = _one_a_picture(seed, 1, count)
        pictures: list[Image.Image] = []
        for start in range(0, count, _BATCH_PICTURES):
            part = seeds[start : start + _BATCH_PICTURES]
            pictures += self._draw(None, None, part, choices, given, preview)
        return pictures

    def open_scorer(self, clip: Optional[str] = None) -> ClipScorer:
        """The CLIP that tells how well pictures fit their prompts.

        Args:
            clip: Hub name or folder; default: the model's own text encoder.

        Raises:
            SettingsError: The model is unconditional, so there are no prompts to score against.
            CheckpointError: It cannot be opened, or has no image tower.
        """
        if self._encoder_name is None:
            raise SettingsError("this model is unconditional: it has no prompts to score against.")
        return ClipScorer.from_pretrained(clip or self._encoder_name).to(self._device)

    def beginning_of(self, picture: Image.Image, keep: float) -> Int[Tensor, " given"]:
        """Tokens of a picture's upper part, for `given`: drawing goes on below it.

        Args:
            picture: Of any size; its middle square is taken.
            keep: Share of its height, rounded to whole rows of tokens.

        Raises:
            SettingsError: Nothing would be kept, or nothing left to draw.
        """
        height, width = self.model.config.grid_height, self.model.config.grid_width
        rows = round(keep * height)
        if not 1 <= rows < height:
            raise SettingsError(
                f"keep {keep} is {rows} of {height} rows of tokens; it must leave some and draw "
                f"some: {1 / height:.4g} to {(height - 1) / height:.4g}."
            )
        assert height == width, "every run's grid is square"
        side = height * self.vqvae.downsample_factor
        pixels = validation_transform(side)(picture.convert("RGB"), index=0, crop=0)
        image = to_unit_range(torch.from_numpy(pixels)).to(self._device)
        return self.vqvae.encode(image.unsqueeze(0))[0, :rows].flatten()

    def _choices(self, **given: Any) -> dict[str, Any]:
        changes = {k: v for k, v in given.items() if v is not None}
        choices = {**self.sampling, **changes}
        if "guidance_schedule" in changes and "guidance_power" not in changes:
            choices["guidance_power"] = 1.0  # the folder's belongs to the folder's schedule
        return choices

    @torch.no_grad()
    def _draw(
        self,
        text: Optional[Tensor],
        mask: Optional[Tensor],
        seeds: list[int],
        choices: dict[str, Any],
        given: Optional[Tensor],
        preview: Optional[Preview],
    ) -> list[Image.Image]:
        height = self.model.config.grid_height
        shown = {height * part // _PREVIEWS for part in range(1, _PREVIEWS)}

        def row_done(rows: Tensor) -> None:
            if preview is not None and rows.shape[1] in shown:
                preview(_on_white(self._pictures(rows), height * self.vqvae.downsample_factor))

        if given is not None:
            given = given.expand(len(seeds), -1)
        # disable=None: a bar in a terminal, nothing in a log file.
        with tqdm(total=self.model.config.num_tokens, desc="tokens", disable=None) as bar:
            tokens = generate_tokens(
                self.model,
                text,
                mask,
                seeds=seeds,
                given=given,
                progress=bar.update,
                row_done=row_done,
                **choices,
            )
        return self._pictures(tokens)

    def _pictures(self, tokens: Tensor) -> list[Image.Image]:
        """One by one, so that none depends on those beside it."""
        alone = [self.vqvae.decode(one).float().cpu() for one in tokens.split(1)]
        return to_pil(torch.cat(alone))


def _one_a_picture(seed: Seeds, prompts: int, pictures: int) -> list[int]:
    """Of so many pictures of each prompt: counted up from one seed, or as they are."""
    try:
        seeds = np.asarray(seed)
        if seeds.dtype.kind not in "iu" or seeds.ndim > 1:
            raise ValueError(f"{seeds.dtype}, {seeds.ndim} axes")
    except (ValueError, TypeError, RuntimeError) as error:
        raise SettingsError(
            f"seed must be a whole number or several, got {seed!r} ({error})."
        ) from None
    if seeds.ndim == 0:
        return [int(seeds) + j for _ in range(prompts) for j in range(pictures)]
    if len(seeds) != prompts * pictures:
        raise SettingsError(
            f"{len(seeds)} seeds for {prompts * pictures} pictures: give one of each, or a single "
            "seed to count up from."
        )
    return [int(each) for each in seeds]


def _encoded_alone(encoder: ClipTextEncoder, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """`encode` of each prompt by itself: in a batch, those beside it would change its last bits."""
    encoded = {prompt: encoder.encode([prompt]) for prompt in dict.fromkeys(prompts)}
    rows = [(text[0], mask[0]) for text, mask in map(encoded.__getitem__, prompts)]
    text, mask = (pad_sequence(list(part), batch_first=True) for part in zip(*rows))
    return text, mask


def best_of_each(
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    images_per_prompt: int,
    best: int,
    scorer: ClipScorer,
) -> list[Image.Image]:
    """Of every `images_per_prompt` pictures the `best` ones, best first, with their scores."""
    scores = scorer.score(pictures, prompts).tolist()
    for picture, score in zip(pictures, scores):
        picture.info["clip_score"] = score
    chosen: list[Image.Image] = []
    for start in range(0, len(pictures), images_per_prompt):
        own = pictures[start : start + images_per_prompt]
        chosen += sorted(own, key=lambda picture: -picture.info["clip_score"])[:best]
    return chosen


def _on_white(pictures: Sequence[Image.Image], height: int) -> list[Image.Image]:
    """Pictures whose lower part is missing, on white of the full height."""
    sheets = []
    for picture in pictures:
        sheet = Image.new("RGB", (picture.width, height), "white")
        sheet.paste(picture)
        sheets.append(sheet)
    return sheets
