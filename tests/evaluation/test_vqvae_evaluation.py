"""`lgpt evaluate VQVAE`: any source, its figures picture by picture, and the page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lgpt.cli import app
from lgpt.core.errors import LgptError
from lgpt.evaluation.picture_metrics import ssim
from lgpt.models.vqgan_import import load_vqvae

FIXTURES = Path(__file__).parents[1] / "fixtures"
SOURCES = {
    "taming_tiny": "pretrained_taming",
    "flax_tiny": "pretrained_hf",
    "llamagen_vq_tiny": "pretrained_llamagen",
    "ours": "custom",
}
SIDE = 32


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, one with a name that HTML must not take for a tag, and a broken one."""
    home = tmp_path_factory.mktemp("evaluation")
    (home / "pictures").mkdir()
    for number, name in enumerate(("0", "1", "2", "3", "<b>&4")):
        drawn = np.random.default_rng(number).random((2 + 3 * number, 4, 3))
        picture = Image.fromarray((drawn * 255).astype(np.uint8)).resize((SIDE, SIDE))
        picture.save(home / "pictures" / f"{name}.png")
    (home / "pictures" / "2b.png").write_bytes(b"no picture")
    load_vqvae("pretrained_taming", FIXTURES / "taming_tiny").save_pretrained(home / "ours")
    return home


@pytest.fixture(autouse=True)
def no_weights_of_judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the machine's cache holds must not decide what is measured here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def evaluate(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    if isinstance(done.exception, LgptError):
        return done.exception.exit_code, done.stdout, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.output


def result_of(home: Path, place: object, *words: object) -> dict[str, Any]:
    page = home / "page.html"
    code, out, _ = evaluate(place, "--page", page, "--json", *words)
    assert code == 0
    return json.loads(out.splitlines()[-1])


def pictures_of(home: Path) -> list[np.ndarray]:
    """The readable ones as the network sees them, in [-1, 1]."""
    paths = [path for path in sorted((home / "pictures").iterdir()) if path.stem != "2b"]
    assert len(paths) == 5
    return [np.asarray(Image.open(path)).transpose(2, 0, 1) / 127.5 - 1 for path in paths]


@pytest.mark.parametrize("name", SOURCES)
def test_figures_of_every_source_are_those_of_one_picture_at_a_time(name, home):
    place = home / "ours" if name == "ours" else FIXTURES / name
    got = result_of(home, place, "--images", home / "pictures", "--resolution", SIDE, "--batch", 2)
    vqvae = load_vqvae(SOURCES[name], place)
    decibels, likeness, codes = [], [], []
    for picture in pictures_of(home):
        image = torch.from_numpy(picture).float().unsqueeze(0)
        tokens = vqvae.encode(image)
        with torch.no_grad():
            back = vqvae.decode(tokens).clamp(-1, 1)
        decibels.append(10 * np.log10(4 / float((back - image).square().mean())))
        likeness.append(float(ssim(back, image)))
        codes.append(tokens.flatten().numpy())
    used = np.unique(np.concatenate(codes))
    assert got["source"] == SOURCES[name]
    assert got["weights_digest"] == vqvae.weights_digest()
    assert (got["images"], got["bad_images"], got["resolution"]) == (5, 1, SIDE)
    assert got["psnr_db"] == pytest.approx(np.mean(decibels), rel=1e-4)
    assert got["ssim"] == pytest.approx(np.mean(likeness), rel=1e-4)
    assert got["tokens"] == 5 * (SIDE // vqvae.downsample_factor) ** 2
    assert got["codebook_usage"] == pytest.approx(len(used) / vqvae.vocab_size)
    assert got["dead_codes"] == vqvae.vocab_size - len(used)
    assert got["images_per_second"] > 0


def test_the_page_needs_no_other_file_and_begins_with_the_worst(home):
    words = ["--images", home / "pictures", "--resolution", SIDE]
    result = result_of(home, FIXTURES / "taming_tiny", *words)
    page = (home / "page.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    kept = re.search(r'<script type="application/json" id="result">(.*?)</script>', page, re.S)
    assert json.loads(kept[1]) == result
    assert f"{result['psnr_db']:.2f} dB" in page
    assert "&lt;b&gt;&amp;4.png" in page
    assert "<b>&4" not in page
    worst, best, others = re.findall(r"<h2>(?:Worst|Best|Some).*?(?=<h2>|<script)", page, re.S)
    decibels = [float(text) for text in re.findall(r"PSNR ([\d.]+) dB", worst)]
    assert decibels == sorted(decibels)
    assert np.mean(decibels) == pytest.approx(result["psnr_db"], abs=0.06)
    assert [float(text) for text in re.findall(r"PSNR ([\d.]+) dB", best)] == decibels[::-1]
    originals = re.findall(r"alt='original'[^>]*base64,([^']+)'", others)
    assert len(originals) == 5
    for text, picture in zip(originals, pictures_of(home)):
        with Image.open(io.BytesIO(base64.b64decode(text))) as shown:
            assert np.array_equal(np.asarray(shown).transpose(2, 0, 1) / 127.5 - 1, picture)


@pytest.mark.parametrize("data", ["shapes", "demo/phase2_shapes"])
def test_pictures_come_from_a_dataset_or_a_run_config(data, home, monkeypatch):
    monkeypatch.chdir(home)
    words = [home / "ours", "--data", data, "--max-images", 3, "--json", "--split", "val"]
    if data == "shapes":
        words += ["--resolution", 32]
    code, out, _ = evaluate(*words)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert (result["images"], result["resolution"]) == (3, 32)
    assert result["data"]["dataset"] == "shapes"
    assert (home / "vqvae-evaluation.html").is_file()
    assert "not measured" in out  # LPIPS and rFID, whose weights are not in this cache


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], r"Which pictures\? --images FOLDER, or --data"),
        (["--images", "PICTURES", "--split", "val"], "--images names the pictures"),
        (["--data", "shapes", "--split", "all"], "--split 'all' is unknown; allowed: train, val"),
        (["--images", "PICTURES", "--resolution", 40], r"--resolution 40 .*; use 32 or 48"),
        (["--images", "PICTURES", "--seed", 1], r"is a VQ-VAE.*: --seed would have no effect"),
        (["--images", "PICTURES", "--inception-weights", "x"], "rFID cannot be measured: x is not"),
        (["--images", "PICTURES", "--page", "/proc/none/page.html"], "--page .* cannot be written"),
    ],
)
def test_mistakes_are_told_with_the_way_out(words, text, home):
    words = [home / "pictures" if word == "PICTURES" else word for word in words]
    if "--resolution" not in words:
        words += ["--resolution", 32]
    code, _, sentence = evaluate(home / "ours", *words)
    assert code == 2
    assert re.search(text, sentence), sentence


def test_a_run_that_is_not_there_is_told_before_its_pictures_are_missed():
    code, _, sentence = evaluate("runs/mistyped")
    assert code == 2
    assert sentence.startswith("runs/mistyped is no file or folder here. Which pictures?")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"model_type": "lgpt_latent_gpt"}'),
        ("model_config.json", '{"kind": "latent_gpt"}'),
        ("pipeline.json", "{}"),
    ],
)
def test_a_transformer_is_told_from_a_vqvae(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    code, _, sentence = evaluate(tmp_path, "--images", tmp_path, "--split", "val")
    assert code == 2
    assert "is a transformer: --images, --split would have no effect" in sentence
    code, _, sentence = evaluate(tmp_path / "nowhere", "--images", tmp_path)
    assert code == 3
    assert "holds no picture" in sentence
