"""The frozen CLIP text tower: captions to embeddings for cross-attention.

Works with transformers 4.57 (keys `text_model.*`) and 5.x (keys without that prefix).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.core.files import write_json_atomically
from lgpt.core.logging import get_logger
from lgpt.models.clip_folder import clip_folder, load_tokenizer
from lgpt.models.clip_weights import PREFIX, read_text_tower
from lgpt.settings.text import RANDOM_ENCODER_WIDTH

_logger = get_logger(__name__)

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_POSITIONS = 77
# What of a CLIP text config decides its output, beside the weights.
_DECISIVE_CONFIG = ("hidden_act", "layer_norm_eps", "num_attention_heads")


class ClipTextEncoder:
    """Any CLIP of transformers, text tower only, float32, eval mode, without gradients.

    Not an nn.Module, so that no model that holds one saves or trains it.

    Attributes:
        name: Hub name or folder it came from.
        is_random: Made by `make_random_clip_text_encoder`: untrained, it knows no language.
        width: Width of an embedding.
        max_tokens: Longest caption in tokens, start and end included.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, is_random: bool) -> None:
        self.name = name
        self.is_random = is_random
        self.width = int(model.config.hidden_size)
        self.max_tokens = int(model.config.max_position_embeddings)
        self._model = model.float().eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._digest: Optional[str] = None

    @classmethod
    def from_pretrained(cls, name_or_folder: Union[str, Path]) -> ClipTextEncoder:
        """Load by hub name or from a folder.

        Raises:
            CheckpointError: It is not there, not a CLIP, or weights are missing in it.
        """
        name = str(name_or_folder)
        folder = clip_folder(name)
        try:
            raw_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            model_type = raw_config.get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"text encoder {name!r} cannot be read: {error}. Give the folder of a CLIP model."
            ) from error
        if model_type not in ("clip", "clip_text_model"):
            raise CheckpointError(
                f"text encoder {name!r} is a {model_type!r}, not a CLIP; give for example "
                "openai/clip-vit-base-patch32."
            )
        model = _load_text_tower(folder, name)
        tokenizer = load_tokenizer(folder, name, int(model.config.vocab_size))
        is_random = bool(raw_config.get("lgpt_random", False))
        if is_random:
            _logger.info("text encoder %s is random: untrained, it knows no language", name)
        return cls(name, model, tokenizer, is_random)

    def to(self, device: Union[str, torch.device]) -> ClipTextEncoder:
        """Move to a device; returns itself."""
        self._model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self._model.parameters()).device

    @property
    def digest(self) -> str:
        """Hex sha256 of everything that decides the embeddings: weights, settings, vocabulary."""
        if self._digest is None:
            config = {key: getattr(self._model.config, key) for key in _DECISIVE_CONFIG}
            vocabulary = self._tokenizer.get_vocab()
            digest = hashlib.sha256(json.dumps([config, vocabulary], sort_keys=True).encode())
            state = {key.removeprefix(PREFIX): t for key, t in self._model.state_dict().items()}
            for key, tensor in sorted(state.items()):
                if tensor.is_floating_point():  # older releases store position_ids too
                    digest.update(f"{key}{tuple(tensor.shape)}".encode())
                    digest.update(tensor.cpu().contiguous().numpy().tobytes())
            self._digest = digest.hexdigest()
        return self._digest

    @torch.no_grad()
    def encode(
        self, captions: Sequence[str], device: Optional[Union[str, torch.device]] = None
    ) -> tuple[Float[Tensor, "batch words width"], Bool[Tensor, "batch words"]]:
        """Last hidden states, cut at the end-of-text token of the longest caption.

        Args:
            captions: Cut at `max_tokens` tokens; an empty one still has start and end.
            device: Move the tower there first.

        Returns:
            Embeddings (0 beyond a caption's end) and a mask that is True up to its end. The mask
            is needed: CLIP pads with the end-of-text token itself.
        """
        if device is not None and torch.device(device) != self.device:
            self.to(device)
        tokens = self._tokenizer(
            list(captions),
            padding="longest",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"].to(self.device)
        hidden = self._model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=mask
        ).last_hidden_state
        return hidden * mask.unsqueeze(-1), mask.bool()

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many of these captions `encode` cuts, because they have more than `max_tokens`."""
        # verbose=False: transformers warns of every one of them otherwise.
        tokens = self._tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        return sum(len(of_caption) > self.max_tokens for of_caption in tokens)

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Write an ordinary CLIP text folder with 4.57's key names, which both releases read."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(target)
        state = {
            PREFIX + key.removeprefix(PREFIX): tensor.cpu().contiguous()
            for key, tensor in self._model.state_dict().items()
        }
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        config = self._model.config.to_dict()
        config.update(architectures=["CLIPTextModel"], lgpt_random=self.is_random)
        write_json_atomically(target / "config.json", config)


def _load_text_tower(folder: Path, name: str) -> Any:
    """The text model with all of its weights, and nothing of the vision model in memory."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_pretrained(folder)
    # The weights drawn here are replaced: whoever draws next must not notice.
    with torch.random.fork_rng(devices=[]):
        model = CLIPTextModel(config)
    expected = {key.removeprefix(PREFIX): t for key, t in model.state_dict().items()}
    expected = {key: t for key, t in expected.items() if not key.endswith("position_ids")}
    state = read_text_tower(folder)
    if missing := sorted(expected.keys() - state.keys()):
        raise CheckpointError(
            f"text encoder {name!r} lacks {len(missing)} weights, first {missing[0]}; they would "
            "be random. Give a complete CLIP."
        )
    problems = [f"unexpected {key}" for key in sorted(state.keys() - expected.keys())]
    problems += [
        f"{key} is {list(state[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if state[key].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"text encoder {name!r} does not fit its config.json: {len(problems)} weights, first "
            f"{problems[0]}. Give the config that belongs to the weights."
        )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(state[key.removeprefix(PREFIX)])
    return model


def make_random_clip_text_encoder(
    folder: Union[str, Path],
    captions: Iterable[str],
    seed: int = 0,
    width: int = RANDOM_ENCODER_WIDTH,
    layers: int = 2,
) -> Path:
    """Write a small CLIP text encoder with random weights and whole-word tokens.

    For machines without a hub. It tells words and their places apart, and that is all: a word is a
    random direction, its neighbours shine through a little. An ordinary CLIP folder, marked
    `lgpt_random` in its config.

    Args:
        folder: Where to write; made if need be. `config.json` comes last.
        captions: Every word in them becomes one token; other words are spelled.
        seed: Decides all weights, whatever the versions installed.
        width: Of an embedding, a multiple of 32.
        layers: Transformer layers.

    Returns:
        The folder.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    merges = _whole_word_merges(_words_of(captions))
    alphabet = _alphabet()
    letters = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    # A set, because two merges may spell the same token; in order of first mention.
    vocabulary = list(dict.fromkeys([*letters, *("".join(pair) for pair in merges), _BOS, _EOS]))
    token_ids = {token: number for number, token in enumerate(vocabulary)}
    (target / "vocab.json").write_text(json.dumps(token_ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {"bos_token": _BOS, "eos_token": _EOS, "unk_token": _EOS, "pad_token": _EOS}
    write_json_atomically(target / "special_tokens_map.json", specials)
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": _POSITIONS, **specials}
    write_json_atomically(target / "tokenizer_config.json", tokenizer)
    state = _random_weights(len(vocabulary), width, layers, seed)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "lgpt_random": True,
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": _POSITIONS,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": width,
        "bos_token_id": token_ids[_BOS],
        "eos_token_id": token_ids[_EOS],
        "pad_token_id": token_ids[_EOS],
    }
    write_json_atomically(target / "config.json", config)
    return target


def _alphabet() -> list[str]:
    """The 256 letters that stand for bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _words_of(captions: Iterable[str]) -> list[str]:
    """Distinct words, cut as CLIP's tokenizer cuts them, in byte letters, sorted."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    # The normalizer and pattern of OpenAI's tokenizer.json.
    normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    cutter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # Most captions share their words with others: cut each space-separated piece once.
    pieces = {piece for caption in captions for piece in re.split(r"\s+", caption) if piece}
    words: set[str] = set()
    for piece in pieces:
        words.update(w for w, _ in cutter.pre_tokenize_str(normalizer.normalize_str(piece)))
    return sorted(words)


def _whole_word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges under which each word becomes one token.

    Word by word: apply the merges so far, then join what is left from the front. Later merges rank
    lower, so they cannot disturb a word that is already whole.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _apply_merges([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = _apply_merges(pieces, ranks)
    return list(ranks)


def _apply_merges(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while len(pieces) > 1:
        pairs = list(zip(pieces, pieces[1:]))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, index = [], 0
        while index < len(pieces):
            width = 2 if tuple(pieces[index : index + 2]) == best else 1
            merged.append("".join(pieces[index : index + width]))
            index += width
        pieces = merged
    return pieces


def _random_weights(tokens: int, width: int, layers: int, seed: int) -> dict[str, Tensor]:
    """Weights by key of transformers 4.57, drawn in a fixed order.

    Words have std 1 and places 0.5, so that after the final norm both can be read off; the layers
    add what stands before a word, scaled down so that they do not drown it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    residual = (2 * layers) ** -0.5
    state = {
        "embeddings.token_embedding.weight": normal(tokens, width, std=1.0),
        "embeddings.position_embedding.weight": normal(_POSITIONS, width, std=0.5),
    }
    matrices = {
        "self_attn.q_proj": (width, width, 1.0),
        "self_attn.k_proj": (width, width, 1.0),
        "self_attn.v_proj": (width, width, 1.0),
        "self_attn.out_proj": (width, width, residual),
        "mlp.fc1": (4 * width, width, 1.0),
        "mlp.fc2": (width, 4 * width, residual),
    }
    for layer in range(layers):
        for name, (rows, columns, gain) in matrices.items():
            key = f"encoder.layers.{layer}.{name}"
            state[f"{key}.weight"] = normal(rows, columns, std=gain * columns**-0.5)
            state[f"{key}.bias"] = torch.zeros(rows)
    norms = [f"encoder.layers.{n}.layer_norm{k}" for n in range(layers) for k in (1, 2)]
    for name in [*norms, "final_layer_norm"]:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(width), torch.zeros(width)
    return {PREFIX + key: tensor for key, tensor in state.items()}
