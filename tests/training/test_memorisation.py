"""A model that has learnt eight pictures by heart draws them token by token, and is found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from tiny_clip import write_tiny_clip

from lgpt.__main__ import main
from lgpt.core.errors import DataError
from lgpt.data.transforms import to_unit_range
from lgpt.models.clip_encoder import ClipTextEncoder, make_random_clip_text_encoder
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.sampling.generate import generate_tokens
from lgpt.settings.run import load_run_settings
from lgpt.settings.vqvae import VqvaeSettings
from lgpt.training.components import open_split, transform_of
from lgpt.training.encode_latents import prepare_latent_cache
from lgpt.training.memorisation import memorisation_report

PICTURES = 8


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """The model's folder, its run's config, and the tokens of the eight training pictures."""
    home = tmp_path_factory.mktemp("by-heart")
    torch.manual_seed(0)
    model_folder = home / "model"
    vqvae = VQVAE(VQVAEConfig.from_settings(VqvaeSettings(**tiny.VQVAE))).eval()
    vqvae.save_pretrained(model_folder / "vqvae")
    config = tiny.transformer_run(
        home,
        8,
        data={**tiny.COMMON["data"], "shapes": {"train_images": PICTURES, "val_images": 16}},
        vqvae={"source": "custom", "checkpoint": str(model_folder / "vqvae")},
        text={"encoder": str(model_folder / "text_encoder")},
        latent_cache=None,
    )
    path = tiny.write(home / "run.yaml", config)
    run = load_run_settings(path, environ={})
    train_set = open_split(run.data, "train")
    captions = [train_set.captions(item)[0] for item in range(PICTURES)]
    make_random_clip_text_encoder(model_folder / "text_encoder", captions, width=32, layers=1)
    transform = transform_of(run.data, "train")
    pixels = torch.stack(
        [
            to_unit_range(torch.from_numpy(transform(train_set.load(item), item, 0)))
            for item in range(PICTURES)
        ]
    )
    tokens = vqvae.encode(pixels).flatten(1)
    text, mask = ClipTextEncoder.from_pretrained(model_folder / "text_encoder").encode(captions)
    shape = {"layers": 2, "hidden": 64, "heads": 2, "cond_drop": 0.0}
    model = LatentGPT(LatentGPTConfig(32, 4, 4, text_width=32, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(600):
        loss = model(tokens, text, mask, targets=tokens)
        loss.backward()
        if loss < 0.003:
            break
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(model_folder)
    parts = {
        "vqvae": "vqvae",
        "text_encoder": "text_encoder",
        "sampling": {"guidance": 1.0, "top_k": 1},
    }
    (model_folder / "pipeline.json").write_text(json.dumps(parts))
    return model_folder, path, tokens


def test_a_tiny_model_learns_eight_pictures_to_the_token(learnt):
    model_folder, path, tokens = learnt
    train_set = open_split(load_run_settings(path, environ={}).data, "train")
    captions = [train_set.captions(item)[0] for item in range(PICTURES)]
    text, mask = ClipTextEncoder.from_pretrained(model_folder / "text_encoder").encode(captions)
    model = LatentGPT.from_pretrained(model_folder)
    drawn = generate_tokens(model, text, mask, seeds=range(PICTURES), top_k=1, guidance=1.0)
    assert torch.equal(drawn.flatten(1), tokens)


def test_pictures_learnt_by_heart_are_found_and_named(learnt, tmp_path):
    model_folder, path, tokens = learnt
    write_tiny_clip(tmp_path / "clip")
    run = load_run_settings(path, environ={})
    result = memorisation_report(
        model_folder, run, pictures=PICTURES, guidance=None, seed=0, clip=str(tmp_path / "clip")
    )
    train_set = open_split(run.data, "train")
    ids = [train_set.image_id(item) for item in range(PICTURES)]
    learnt_kind = result["kinds"]["captions of training"]
    assert learnt_kind["tokens"]["median"] == 1.0
    by_caption = {record["caption"]: record for record in learnt_kind["nearest"]}
    assert len(by_caption) == PICTURES
    for item in range(PICTURES):
        record = by_caption[train_set.captions(item)[0]]
        assert record["equal_tokens"] == 1.0
        assert torch.equal(tokens[ids.index(record["by_tokens"])], tokens[item])
        assert -1 <= record["clip_cosine"] <= 1
    assert result["kinds"]["captions of validation"]["tokens"]["held_out_largest"] < 1
    assert learnt_kind["tokens"]["nearer_than_held_out"] == PICTURES
    assert json.loads((model_folder / "memorisation.json").read_text()) == result
    with Image.open(model_folder / "memorisation.png") as page:
        assert page.width > 3 * 128


def test_a_cache_gives_the_same_answer_and_one_of_another_vqvae_is_refused(learnt, tmp_path):
    model_folder, path, _ = learnt
    plain = load_run_settings(path, environ={})
    cached = load_run_settings(path, [f"latent_cache={tmp_path / 'cache'}"], environ={})
    prepare_latent_cache(cached)
    arguments = {"pictures": 4, "guidance": None, "seed": 1, "clip": None}
    encoded = memorisation_report(model_folder, plain, **arguments)
    assert encoded["clip"] is None
    assert "image tower" in encoded["clip_problem"]
    assert memorisation_report(model_folder, cached, **arguments) == encoded
    other = tmp_path / "other"
    (other / "vqvae").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pipeline.json", "text_encoder"):
        (other / name).symlink_to(model_folder / name)
    torch.manual_seed(1)
    VQVAE(VQVAE.from_pretrained(model_folder / "vqvae").config).save_pretrained(other / "vqvae")
    with pytest.raises(DataError, match="vqvae_weights"):
        memorisation_report(other, cached, **arguments)


def test_the_command_prints_the_table(learnt, capsys, monkeypatch):
    model_folder, path, _ = learnt
    words = ["lgpt", "evaluate", str(model_folder), "--memorisation", str(path), "--pictures", "4"]
    monkeypatch.setattr("sys.argv", [*words, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    out = capsys.readouterr().out
    assert "nearer than all held-out" in out
    assert json.loads(out.splitlines()[-1])["kinds"]["captions of training"]["tokens"]
