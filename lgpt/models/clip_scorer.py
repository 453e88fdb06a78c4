"""How well pictures fit captions, by a whole CLIP: both towers and their projections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lgpt.core.errors import CheckpointError
from lgpt.models.clip_folder import clip_folder, load_tokenizer
from lgpt.models.clip_weights import read_whole_clip

# OpenAI's, for a folder without a preprocessor_config.json.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32


class ClipScorer:
    """Cosine similarity of pictures and captions, float32, without gradients.

    Source: Radford et al. 2021 (CLIP), https://arxiv.org/abs/2103.00020; as a score of generated
    pictures Hessel et al. 2021, https://arxiv.org/abs/2104.08718.

    Attributes:
        name: Hub name or folder it came from.
        side: Pixels of a side of what the image tower sees.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, mean: Any, std: Any) -> None:
        self.name = name
        self.side = int(model.config.vision_config.image_size)
        self._model = model.float().eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._mean, self._std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))

    @classmethod
    def from_pretrained(cls, name_or_folder: Union[str, Path]) -> ClipScorer:
        """Load by hub name or from a folder; weights are read as data.

        Raises:
            CheckpointError: It is not there, has no image tower, or weights are missing in it.
        """
        from transformers import CLIPConfig

        name = str(name_or_folder)
        folder = clip_folder(name)
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"CLIP {name!r} cannot be read: {error}.") from error
        if kind != "clip":
            raise CheckpointError(
                f"{name!r} is a {kind!r} without an image tower, so it cannot tell how well a "
                "picture fits its prompt; give a whole CLIP, for example "
                "openai/clip-vit-base-patch32."
            )
        config = CLIPConfig.from_pretrained(folder)
        model = _load(config, folder, name)
        tokenizer = load_tokenizer(folder, name, int(config.text_config.vocab_size))
        described = folder / "preprocessor_config.json"
        values = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        mean, std = values.get("image_mean", _MEAN), values.get("image_std", _STD)
        return cls(name, model, tokenizer, mean, std)

    def to(self, device: Union[str, torch.device]) -> ClipScorer:
        """Move to a device; returns itself."""
        self._model.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.no_grad()
    def score(
        self, pictures: Sequence[Image.Image], captions: Sequence[str]
    ) -> Float[Tensor, " pictures"]:
        """Cosine similarity, between -1 and 1, of every picture with its own caption; on the CPU.

        Args:
            pictures: Of any size; the middle square is seen.
            captions: One a picture; cut at CLIP's number of tokens.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"{len(captions)} captions for {len(pictures)} pictures")
        parts = [torch.empty(0)]
        for start in range(0, len(pictures), _BATCH):
            part = slice(start, start + _BATCH)
            images = functional.normalize(self._image_features(pictures[part]), dim=1)
            texts = functional.normalize(self._text_features(captions[part]), dim=1)
            parts.append((images * texts).sum(dim=1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "pictures width"]:
        """Image embeddings of unit length; on the CPU."""
        parts = [
            functional.normalize(self._image_features(pictures[start : start + _BATCH]), dim=1)
            for start in range(0, len(pictures), _BATCH)
        ]
        return torch.cat(parts).cpu()

    def _image_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = np.stack([_middle_square(picture, self.side) for picture in pictures])
        scaled = torch.from_numpy(pixels).to(self._mean.device).permute(0, 3, 1, 2).float() / 255
        seen = self._model.vision_model(pixel_values=(scaled - self._mean) / self._std)
        return self._model.visual_projection(seen.pooler_output)

    def _text_features(self, captions: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(captions),
            padding="longest",
            truncation=True,
            max_length=int(self._model.config.text_config.max_position_embeddings),
            return_tensors="pt",
        ).to(self._mean.device)
        read = self._model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return self._model.text_projection(read.pooler_output)


def _load(config: Any, folder: Path, name: str) -> Any:
    from transformers import CLIPModel

    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        model = CLIPModel(config)
    expected = {k: t for k, t in model.state_dict().items() if not k.endswith("position_ids")}
    state = read_whole_clip(folder)
    problems = [f"{key} is missing" for key in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
    problems += [
        f"{key} is {list(state[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"CLIP {name!r} does not fit its config.json: {len(problems)} weights, first "
            f"{problems[0]}. Give a complete CLIP with the config that belongs to it."
        )
    own = model.state_dict()
    with torch.no_grad():
        for key in expected:
            own[key].copy_(state[key])
    return model


def _middle_square(picture: Image.Image, side: int) -> np.ndarray:
    """As CLIP's own preprocessing: the shorter side to `side`, bicubic, and the middle cut out."""
    picture = picture.convert("RGB")
    scale = side / min(picture.size)
    width, height = (max(side, int(length * scale)) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, upper = (width - side) // 2, (height - side) // 2
    return np.asarray(picture.crop((left, upper, left + side, upper + side)))
