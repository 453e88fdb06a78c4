"""`lgpt vqvae inspect` and `convert`: the guess, the round trip, and every bit kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lgpt.cli import app
from lgpt.core.errors import CheckpointError, DataError, LgptError, SettingsError
from lgpt.evaluation.vqvae_inspection import inspect_vqvae, psnr
from lgpt.models.source_files import guess_source
from lgpt.models.vqgan_import import convert_vqvae, load_vqvae
from lgpt.models.vqvae import inference_state

FIXTURES = Path(__file__).parents[1] / "fixtures"
EVIL = FIXTURES / "evil"
SOURCES = {
    "taming_tiny": "pretrained_taming",
    "taming_f8_tiny": "pretrained_taming",
    "flax_tiny": "pretrained_hf",
    "llamagen_vq_tiny": "pretrained_llamagen",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden set's own inputs as PNGs, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(np.load(FIXTURES / "taming_tiny" / "images.npy")):
        pixels = np.rint((image.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def command(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["vqvae", *map(str, words)])
    if isinstance(done.exception, LgptError):
        return done.exception.exit_code, done.stdout, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, ""


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_told_by_the_files_and_said(name: str) -> None:
    files = [*(FIXTURES / name).glob("*.ckpt"), *(FIXTURES / name).glob("*.pt")]
    files += (FIXTURES / name).glob("*.msgpack")
    for place in (FIXTURES / name, files[0]):
        code, out, _ = command("inspect", place, "--json")
        assert code == 0
        result = json.loads(out.splitlines()[-1])
        assert result["source"] == SOURCES[name]
        assert result["source_told_by"] != "--source"
        assert SOURCES[name] in out.splitlines()[0]
        vqvae = load_vqvae(SOURCES[name], place)
        assert result["weights_digest"] == vqvae.weights_digest()
        assert result["matched"] == len(vqvae.state_dict())
        for figure in (f"{result['parameters']:,}", "codes of width", result["input_range"]):
            assert figure in out


def test_our_own_folder_and_run_are_told_too(tmp_path: Path) -> None:
    load_vqvae("pretrained_taming", FIXTURES / "taming_tiny").save_pretrained(tmp_path / "model")
    places = (tmp_path, tmp_path / "model", tmp_path / "model" / "model.safetensors")
    for place in places:
        assert guess_source(str(place))[0] == "custom"
        assert load_vqvae("custom", place).vocab_size == 64


def test_hub_names_are_guessed_by_name_and_strangers_refused(tmp_path: Path) -> None:
    assert guess_source("dalle-mini/vqgan_imagenet_f16_16384")[0] == "pretrained_hf"
    assert guess_source("FoundationVision/LlamaGen")[0] == "pretrained_llamagen"
    assert guess_source("some/vq/file.pt")[0] == "pretrained_llamagen"
    with pytest.raises(CheckpointError, match="holds no VQ-VAE: no flax_model"):
        guess_source(str(tmp_path))
    for name in (str(tmp_path / "nothing"), "nothing.ckpt", "./a/b"):
        with pytest.raises(CheckpointError, match="is not there, and is no hub name"):
            guess_source(name)


def test_round_trip_is_the_reference_s_own_and_tells_the_range(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "deep" / "sheet.png"
    result = inspect_vqvae(str(FIXTURES / "taming_tiny"), images=pictures, out=out, resolution=64)
    assert result["source"] == "pretrained_taming"
    trip = result["round_trip"]
    stored = {
        name: torch.from_numpy(np.load(FIXTURES / "taming_tiny" / f"{name}.npy"))
        for name in ("images", "decoded", "indices")
    }
    own = trip["ranges"]["-1..1"]
    assert own["codes_used"] == len(stored["indices"].unique())
    assert own["psnr_db"] == pytest.approx(psnr(stored["images"], stored["decoded"]), abs=1e-3)
    assert (trip["images"], trip["images_found"], trip["tokens"]) == (2, 3, 32)
    assert "Skipped a bad picture" in caplog.text
    other = load_vqvae("pretrained_taming", FIXTURES / "taming_tiny", input_range="0..1")
    with torch.no_grad():
        again = other.decode(other.encode(stored["images"]))
    found = trip["ranges"]["0..1"]["psnr_db"]
    assert found == pytest.approx(psnr(stored["images"], again), abs=1e-3)
    better = max(trip["ranges"], key=lambda name: trip["ranges"][name]["psnr_db"])
    assert trip["better_range"] == better
    assert ("set vqvae.input_range" in caplog.text) == (better == "0..1")
    with Image.open(out) as sheet:  # two columns; inputs in the first row, each pixel doubled
        assert sheet.size == (2 * (128 + 8) + 8, 2 * (128 + 8) + 8)
        first = np.asarray(sheet)[8:136:2, 8:136:2]
    with Image.open(pictures / "0.png") as picture:
        assert np.array_equal(first, np.asarray(picture))


def test_psnr_is_the_formula_on_pixels() -> None:
    inputs = torch.zeros(2, 3, 4, 4)
    off = torch.full_like(inputs, 0.5)
    assert psnr(inputs, off) == pytest.approx(20 * math.log10(2 / 0.5))
    assert psnr(inputs, inputs) == pytest.approx(100)
    assert psnr(inputs + 1, inputs + 9) == pytest.approx(100)  # clamped
    noisy = torch.randn(2, 3, 4, 4).clamp(-1, 1)
    pixels = [
        20 * math.log10(255 / float((noisy[i] * 127.5).square().mean().sqrt())) for i in (0, 1)
    ]
    assert psnr(inputs, noisy) == pytest.approx(sum(pixels) / 2, rel=1e-5)


def test_inspect_command_writes_the_sheet_and_prints_both_ranges(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(
        "inspect", FIXTURES / "llamagen_vq_tiny", "--images", pictures, "--resolution", 48
    )
    assert code == 0
    assert out.count("PSNR") == 2
    assert "fed in 0..1" in out
    assert (tmp_path / "reconstructions.png").is_file()


def test_settings_without_effect_and_without_pictures_are_refused(
    pictures: Path, tmp_path: Path
) -> None:
    source = str(FIXTURES / "taming_tiny")
    with pytest.raises(SettingsError, match="no effect without --images"):
        inspect_vqvae(source, out=tmp_path / "x.png")
    with pytest.raises(SettingsError, match=r"--resolution 40 .*use 32 or 48"):
        inspect_vqvae(source, images=pictures, resolution=40)
    with pytest.raises(DataError, match="holds no picture that can be read"):
        inspect_vqvae(source, images=tmp_path, resolution=64)
    with pytest.raises(SettingsError, match=r"--out .*sheet\.what cannot be written"):
        inspect_vqvae(source, images=pictures, resolution=16, out=tmp_path / "sheet.what")
    with pytest.raises(SettingsError, match="'moon' is not known"):
        inspect_vqvae(source, source="moon")


@pytest.mark.parametrize("name", SOURCES)
def test_conversion_to_our_folder_keeps_every_bit(name: str, tmp_path: Path) -> None:
    code, out, _ = command("convert", FIXTURES / name, tmp_path / "ours")
    assert code == 0
    assert "model.safetensors" in out
    theirs, ours = (
        load_vqvae(SOURCES[name], FIXTURES / name),
        load_vqvae("custom", tmp_path / "ours"),
    )
    assert ours.config == theirs.config
    assert ours.weights_digest() == theirs.weights_digest()


@pytest.mark.parametrize("name", ["taming_tiny", "taming_f8_tiny"])
def test_taming_to_ours_to_taming_is_bit_exact(name: str, tmp_path: Path) -> None:
    assert command("convert", FIXTURES / name, tmp_path / "ours")[0] == 0
    assert command("convert", tmp_path / "ours", tmp_path / "back", "--to", "taming")[0] == 0
    first, last = (
        torch.load(folder / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
        if folder != FIXTURES / name
        else inference_state(load_vqvae("pretrained_taming", folder))
        for folder in (FIXTURES / name, tmp_path / "back")
    )
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_conversion_does_not_write_over_what_is_there(tmp_path: Path) -> None:
    vqvae = load_vqvae("pretrained_taming", FIXTURES / "taming_tiny")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds something already.*--overwrite"):
        convert_vqvae(vqvae, tmp_path)
    for _ in range(2):
        convert_vqvae(vqvae, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="holds something already"):
        convert_vqvae(vqvae, tmp_path / "notes.txt", overwrite=True)
    with pytest.raises(SettingsError, match="'onnx' is not known"):
        convert_vqvae(vqvae, tmp_path, to="onnx", overwrite=True)


def test_conversion_that_cannot_be_written_is_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("mine")
    for target, to in (("/proc/none", "lgpt"), (tmp_path / "file" / "below", "taming")):
        code, _, sentence = command("convert", FIXTURES / "taming_tiny", target, "--to", to)
        assert code == 3
        assert f"{target} cannot be written: " in sentence
    # What the folder and --to already tell is said without a VQ-VAE.
    code, _, sentence = command("convert", tmp_path / "nowhere", tmp_path)
    assert (code, "holds something already" in sentence) == (3, True)
    code, _, sentence = command("convert", tmp_path / "nowhere", tmp_path / "new", "--to", "onnx")
    assert (code, "'onnx' is not known" in sentence) == (2, True)


def bitflipped(folder: Path) -> Path:
    """evil/bitflipped_last.ckpt, made by its recipe: the file itself has 2.9 MB."""
    damage = json.loads((EVIL / "evil.json").read_text())["damaged"]["bitflipped_last.ckpt"]
    content = bytearray((FIXTURES / "taming_tiny" / "last.ckpt").read_bytes())
    for flip in damage["flips"]:
        content[flip["offset"]] ^= flip["xor"]
    path = folder / "bitflipped_last.ckpt"
    path.write_bytes(bytes(content))
    return path


HOSTILE = sorted(path.name for path in EVIL.glob("*.ckpt"))


@pytest.mark.parametrize("source", [None, "pretrained_taming", "pretrained_llamagen"])
@pytest.mark.parametrize("name", [*HOSTILE, "bitflipped_last.ckpt"])
def test_hostile_and_damaged_files_are_refused_with_one_sentence_and_3(
    name: str, source: str, tmp_path: Path
) -> None:
    path = bitflipped(tmp_path) if name == "bitflipped_last.ckpt" else EVIL / name
    payloads = json.loads((EVIL / "evil.json").read_text())["evil"]
    traces = [Path(payload["touches"]) for payload in payloads.values()]
    for trace in traces:
        trace.unlink(missing_ok=True)
    words = [] if source is None else ["--source", source]
    for action in (["inspect", path], ["convert", path, tmp_path / "out"]):
        code, _, sentence = command(*action, *words)
        assert code == 3
        assert name in sentence
        assert "\n" not in sentence
    assert not any(trace.exists() for trace in traces)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_hostile_file_ends_the_process_with_3_and_no_traceback(tmp_path: Path) -> None:
    shutil.copy(EVIL / "evil.ckpt", tmp_path / "last.ckpt")
    done = subprocess.run(
        [sys.executable, "-m", "lgpt", "vqvae", "inspect", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "asks for posix.system when it is opened" in done.stderr
    assert "Traceback" not in done.stderr
