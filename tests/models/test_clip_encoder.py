"""The CLIP text tower: equal to stored outputs of transformers; the random one for offline use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lgpt.core.errors import CheckpointError
from lgpt.models.clip_encoder import ClipTextEncoder, make_random_clip_text_encoder

FIXTURE = Path(__file__).parents[1] / "fixtures" / "clip_tiny"
CAPTIONS = [
    "A small red circle on a blue background.",
    "tree three threes reed rereed",
    "don't stop: 12 cafés & a 猫 ☃",
]


@pytest.fixture(scope="module")
def encoder() -> ClipTextEncoder:
    return ClipTextEncoder.from_pretrained(FIXTURE)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_clip_text_encoder(tmp_path_factory.mktemp("random_clip"), CAPTIONS, seed=3)


def test_stored_outputs_of_transformers_come_out(encoder: ClipTextEncoder) -> None:
    texts = json.loads((FIXTURE / "texts.json").read_text())
    embeddings, mask = encoder.encode(texts)
    stored_mask = torch.from_numpy(np.load(FIXTURE / "attention_mask.npy")).bool()
    assert torch.equal(mask, stored_mask)
    assert embeddings.shape == (8, encoder.max_tokens, encoder.width) == (8, 77, 64)
    stored = torch.from_numpy(np.load(FIXTURE / "text_last_hidden_state_first3x16.npy"))
    stored = stored * stored_mask[:3, :16, None]
    torch.testing.assert_close(embeddings[:3, :16], stored, atol=1e-5, rtol=0)
    # pooler_output is the hidden state at the first end-of-text token: the last one of the mask.
    pooled = embeddings[torch.arange(8), mask.sum(dim=1) - 1]
    expected = torch.from_numpy(np.load(FIXTURE / "text_pooler_output.npy"))
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)


def test_embedding_does_not_depend_on_longer_neighbours(encoder: ClipTextEncoder) -> None:
    alone, alone_mask = encoder.encode(["two birds"])
    batch, batch_mask = encoder.encode(["two birds", "a " * 200])
    assert batch.shape[1] == 77
    length = int(alone_mask.sum())
    assert int(batch_mask[0].sum()) == length == alone.shape[1]
    torch.testing.assert_close(batch[0, :length], alone[0], atol=1e-5, rtol=1e-5)
    assert not batch[0, length:].any()


def test_it_is_frozen_float32_and_in_eval_mode(encoder: ClipTextEncoder) -> None:
    embeddings, mask = encoder.encode(["", "a cat"])
    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad
    assert mask.sum(dim=1).tolist() == [2, mask.shape[1]]
    assert torch.equal(embeddings, encoder.encode(["", "a cat"])[0])
    assert not encoder.is_random


def test_saved_folder_has_the_keys_both_transformers_read(
    encoder: ClipTextEncoder, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    assert all(key.startswith("text_model.") for key in load_file(tmp_path / "model.safetensors"))
    again = ClipTextEncoder.from_pretrained(tmp_path)
    assert again.digest == encoder.digest
    assert torch.equal(again.encode(["a cat"])[0], encoder.encode(["a cat"])[0])


def test_folder_written_by_transformers_5_is_read_by_4_and_5(
    encoder: ClipTextEncoder, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    newer = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    save_file(newer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert ClipTextEncoder.from_pretrained(tmp_path).digest == encoder.digest


def test_incomplete_weights_are_refused_instead_of_left_random(
    encoder: ClipTextEncoder, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights.*layers\.1\.mlp\.fc1\.weight"):
        ClipTextEncoder.from_pretrained(tmp_path)


def test_what_is_not_there_or_no_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'nobody/no-clip' cannot be read.*encoder=random"):
        ClipTextEncoder.from_pretrained("nobody/no-clip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="is a 't5', not a CLIP"):
        ClipTextEncoder.from_pretrained(tmp_path)


def test_random_encoder_gives_every_word_one_token_and_spells_the_others(
    random_folder: Path,
) -> None:
    encoder = ClipTextEncoder.from_pretrained(random_folder)
    assert encoder.is_random
    _, mask = encoder.encode(
        ["tree three threes reed rereed", "A RED circle .", "cafés 猫 ☃", "xy"]
    )
    assert mask.sum(dim=1).tolist() == [5 + 2, 4 + 2, 3 + 2, 2 + 2]


def test_random_encoder_is_an_ordinary_clip_folder(random_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizerFast

    model, info = CLIPTextModel.from_pretrained(random_folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = CLIPTokenizerFast.from_pretrained(random_folder)(CAPTIONS[:1], return_tensors="pt")
    hidden = model(**tokens).last_hidden_state
    ours, _ = ClipTextEncoder.from_pretrained(random_folder).encode(CAPTIONS[:1])
    torch.testing.assert_close(hidden, ours, atol=1e-5, rtol=1e-5)
    moved = tmp_path / "moved"
    shutil.copytree(random_folder, moved)
    again = ClipTextEncoder.from_pretrained(moved)
    assert again.digest == ClipTextEncoder.from_pretrained(random_folder).digest


def test_random_encoder_follows_from_captions_and_seed_alone(
    random_folder: Path, tmp_path: Path
) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    reference = content(random_folder)
    turned = make_random_clip_text_encoder(tmp_path / "same", CAPTIONS[::-1], seed=3)
    assert content(turned) == reference
    other = make_random_clip_text_encoder(tmp_path / "other", CAPTIONS, seed=4)
    differing = [name for name in reference if content(other)[name] != reference[name]]
    assert differing == ["model.safetensors"]


def test_random_encoder_tells_words_and_their_places_apart(random_folder: Path) -> None:
    encoder = ClipTextEncoder.from_pretrained(random_folder)
    texts = ["red circle", "blue circle", "circle red"]
    embeddings, _ = encoder.encode(texts)
    words = embeddings[:, 1:3]

    def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.cosine_similarity(a, b, dim=0))

    assert likeness(words[0, 1], words[1, 1]) > 0.7, "a word is still itself behind another one"
    assert likeness(words[0, 1], words[1, 1]) < 0.999, "and shows what stands before it"
    assert likeness(words[0, 0], words[1, 0]) < 0.5, "words differ"
    assert 0.5 < likeness(words[0, 0], words[2, 1]) < 0.95, "places show"
