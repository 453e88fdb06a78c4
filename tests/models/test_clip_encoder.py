"""The CLIP text tower: equal to stored outputs of transformers; the random one for offline use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lgpt.core.errors import CheckpointError
from lgpt.models import clip_folder
from lgpt.models.clip_encoder import ClipTextEncoder, make_random_clip_text_encoder
from lgpt.models.clip_weights import files_of_clip

FIXTURE = Path(__file__).parents[1] / "fixtures" / "clip_tiny"
EVIL = FIXTURE.parent / "evil"
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


def test_captions_that_are_cut_are_counted(encoder: ClipTextEncoder) -> None:
    texts = json.loads((FIXTURE / "texts.json").read_text())
    assert encoder.count_cut(texts) == 1
    # Where "a" is one token, 75 of them fill the 77 places exactly.
    assert [encoder.count_cut(["a " * words]) for words in (74, 75, 76)] == [0, 0, 1]
    assert encoder.count_cut(["", "猫 ☃ é" * 40]) == 1
    embeddings, mask = encoder.encode(["a " * 76])
    assert mask.sum() == 77
    same, _ = encoder.encode(["a " * 75])
    torch.testing.assert_close(embeddings, same)


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
    with pytest.raises(CheckpointError, match=r"cannot be read: .*config\.json"):
        ClipTextEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CheckpointError, match="is a 't5', not a CLIP"):
        ClipTextEncoder.from_pretrained(tmp_path)


def test_no_side_of_padding_in_a_folder_moves_the_words(
    encoder: ClipTextEncoder, tmp_path: Path
) -> None:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.update(padding_side="left", truncation_side="left")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = ["two birds", "a long tail " * 40]
    for ours, theirs in zip(
        encoder.encode(texts), ClipTextEncoder.from_pretrained(tmp_path).encode(texts)
    ):
        assert torch.equal(ours, theirs)


def test_the_vision_tower_never_comes_into_memory(tmp_path: Path) -> None:
    """A whole CLIP with 400 MB of vision weights is read in a process of its own."""
    program = """
import resource, sys
import transformers.models.clip.modeling_clip
from lgpt.models.clip_encoder import ClipTextEncoder
ClipTextEncoder.from_pretrained(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
encoder = ClipTextEncoder.from_pretrained(sys.argv[2])
assert type(encoder._model).__name__ == "CLIPTextModel"
print(sum(p.numel() for p in encoder._model.parameters()), (peak() - before) * 1024)
"""
    folder = tmp_path / "large"
    shutil.copytree(FIXTURE, folder)
    weights = load_file(FIXTURE / "model.safetensors")
    text_numbers = sum(t.numel() for key, t in weights.items() if key.startswith("text_model."))
    weights["vision_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(100, 1_000_000)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-c", program, str(FIXTURE), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    numbers, peak_bytes = map(int, done.stdout.split())
    assert numbers == text_numbers
    assert peak_bytes < 50e6


@pytest.mark.parametrize("is_old", [False, True])
def test_a_pytorch_bin_is_read_as_data(
    encoder: ClipTextEncoder, tmp_path: Path, is_old: bool
) -> None:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as before 4.31
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=not is_old)
    assert ClipTextEncoder.from_pretrained(tmp_path).digest == encoder.digest
    if not is_old:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"the checksum of .* is wrong"):
            ClipTextEncoder.from_pretrained(tmp_path)


def test_weights_in_pieces_are_read(encoder: ClipTextEncoder, tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    pieces = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, keys in pieces.items():
        save_file({key: weights[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in pieces.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ClipTextEncoder.from_pretrained(tmp_path).digest == encoder.digest


def test_a_bin_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    facts = json.loads((EVIL / "evil.json").read_text())
    for file in sorted(EVIL.glob("evil*.ckpt")):
        folder = tmp_path / file.stem
        shutil.copytree(FIXTURE, folder)
        (folder / "model.safetensors").unlink()
        shutil.copy(file, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="not a file of tensors alone"):
            ClipTextEncoder.from_pretrained(folder)
    assert not [path for path in _touched_by(facts) if path.exists()]


def _touched_by(facts: object) -> list[Path]:
    """Every file that a payload would make, wherever evil.json names it."""
    if isinstance(facts, dict):
        own = [Path(facts["touches"])] if isinstance(facts.get("touches"), str) else []
        return own + [path for value in facts.values() for path in _touched_by(value)]
    return [p for value in facts for p in _touched_by(value)] if isinstance(facts, list) else []


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    faults = {
        "final_layer_norm.weight is \\[3\\] instead of \\[64\\]": ("final_layer_norm.weight", 3),
        "unexpected encoder.layers.7.mlp.fc1.bias": ("encoder.layers.7.mlp.fc1.bias", 128),
    }
    for number, (told, (key, size)) in enumerate(faults.items()):
        folder = tmp_path / str(number)
        shutil.copytree(FIXTURE, folder)
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, f"text_model.{key}": torch.ones(size)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=told):
            ClipTextEncoder.from_pretrained(folder)
    weights["text_model.final_layer_norm.bias"][5] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite, first in final_layer_norm\.bias"):
        ClipTextEncoder.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as data"):
        ClipTextEncoder.from_pretrained(folder)
    torch.save([1, 2], folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it holds no named tensors"):
        ClipTextEncoder.from_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        ClipTextEncoder.from_pretrained(folder)


def test_a_tokenizer_that_is_missing_broken_or_foreign_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    assert len(ClipTextEncoder.from_pretrained(tmp_path).encode(["a cat"])[0]) == 1
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "more": 700}))
    with pytest.raises(CheckpointError, match="tokenizer of 701 tokens and embeddings for 644"):
        ClipTextEncoder.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer that cannot be read"):
        ClipTextEncoder.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        ClipTextEncoder.from_pretrained(tmp_path)


def test_a_hub_name_fetches_the_text_towers_files_in_one_format() -> None:
    files = ["README.md", "config.json", "flax_model.msgpack", "merges.txt", "tf_model.h5"]
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    kept = ["config.json", "merges.txt"]
    assert files_of_clip([*files, *bins]) == [*kept, bins[1], bins[0]]
    assert files_of_clip([*files, *bins, "model.safetensors"]) == [*kept, "model.safetensors"]
    assert files_of_clip(files) == kept


def test_a_hub_name_is_read_from_what_the_hub_gives(
    encoder: ClipTextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_folder, "hub_folder", lambda name, **place: FIXTURE)
    by_name = ClipTextEncoder.from_pretrained("openai/clip-vit-base-patch32")
    assert by_name.name == "openai/clip-vit-base-patch32"
    assert by_name.digest == encoder.digest


def test_loading_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    ClipTextEncoder.from_pretrained(FIXTURE)
    assert torch.equal(torch.get_rng_state(), state)


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
