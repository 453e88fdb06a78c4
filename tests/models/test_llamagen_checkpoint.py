"""LlamaGen's VQ: its shape from its tensors alone. Its numbers are in test_vqgan_import.py."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.models.llamagen_checkpoint import LlamagenLayout, config_from_tensors
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig

FOLDER = Path(__file__).parents[1] / "fixtures" / "llamagen_vq_tiny"


def stored() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(FOLDER / "vq_ds16_tiny.pt", weights_only=True)["model"]
    return state


@pytest.mark.parametrize(
    ("multiples", "factor", "attended", "parameters"),
    [((1, 1, 2, 2, 4), 16, 16, 71_883_403), ((1, 2, 2, 4), 8, 32, None)],
)
def test_real_sizes_are_told_by_the_tensors(
    multiples: tuple[int, ...], factor: int, attended: int, parameters: object
) -> None:
    """VQ_16 and VQ_8 of LlamaGen: 16384 codes of width 8, attention at the lowest level only."""
    config = VQVAEConfig(
        codebook_size=16384,
        code_dim=8,
        ch_mult=multiples,
        attn_resolutions=(attended,),
        l2_normalized_codes=True,
    )
    with torch.device("meta"):
        vqvae = VQVAE(config)
    layout = LlamagenLayout(len(multiples))
    state = {layout.name(key): tensor for key, tensor in vqvae.state_dict().items()}
    assert len(state) == len(vqvae.state_dict())
    found = config_from_tensors(state, Path("vq.pt"), "-1..1")
    assert found == config
    assert found.downsample_factor == factor
    if parameters is not None:  # the 72M of LlamaGen's README
        assert sum(p.numel() for p in vqvae.parameters()) == parameters


def test_decoder_levels_are_counted_from_the_lowest_resolution() -> None:
    names = {key: LlamagenLayout(5).name(key) for key in LAYOUT_CASES}
    assert names == LAYOUT_CASES


LAYOUT_CASES = {
    "encoder.down.4.block.1.conv1.weight": "encoder.conv_blocks.4.res.1.conv1.weight",
    "encoder.down.0.downsample.conv.bias": "encoder.conv_blocks.0.downsample.conv.bias",
    "encoder.mid.attn_1.q.weight": "encoder.mid.1.q.weight",
    "decoder.up.4.attn.2.k.bias": "decoder.conv_blocks.0.attn.2.k.bias",
    "decoder.up.0.block.2.norm1.weight": "decoder.conv_blocks.4.res.2.norm1.weight",
    "decoder.mid.block_2.conv2.bias": "decoder.mid.2.conv2.bias",
    "quantize.embedding.weight": "quantize.embedding.weight",
    "post_quant_conv.bias": "post_quant_conv.bias",
}


def test_file_folder_and_bare_state_dict_read_the_same(tmp_path: Path) -> None:
    usual = load_vqvae("pretrained_llamagen", FOLDER)
    assert usual.config.l2_normalized_codes
    assert any("quantize.codebook_used" in line for line in usual.report)
    digest = usual.weights_digest()
    file = load_vqvae("pretrained_llamagen", FOLDER / "vq_ds16_tiny.pt")
    assert file.weights_digest() == digest
    training = argparse.Namespace(lr=1e-4, dataset="x")
    torch.save({"model": stored(), "steps": 3, "args": training}, tmp_path / "trained.pt")
    assert load_vqvae("pretrained_llamagen", tmp_path).weights_digest() == digest
    without = {name: tensor for name, tensor in stored().items() if "codebook_used" not in name}
    torch.save(without, tmp_path / "trained.pt")
    assert load_vqvae("pretrained_llamagen", tmp_path).weights_digest() == digest


def test_averaged_weights_go_before_the_raw_ones_as_in_llamagen(tmp_path: Path) -> None:
    raw = {name: tensor + 1 for name, tensor in stored().items()}
    torch.save({"model": raw, "ema": stored()}, tmp_path / "vq.pt")
    vqvae = load_vqvae("pretrained_llamagen", tmp_path)
    assert vqvae.weights_digest() == load_vqvae("pretrained_llamagen", FOLDER).weights_digest()
    assert any("(ema)" in line for line in vqvae.report)


def test_folder_with_several_files_asks_which_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no vq_ds\*\.pt and no \*\.pt is there"):
        load_vqvae("pretrained_llamagen", tmp_path)
    for name in ("vq_ds16_c2i.pt", "vq_ds8_c2i.pt", "c2i_B_256.pt"):
        shutil.copy(FOLDER / "vq_ds16_tiny.pt", tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2 of .*name the one to read, as .*vq_ds16_c2i\.pt"):
        load_vqvae("pretrained_llamagen", tmp_path)
    (tmp_path / "vq_ds8_c2i.pt").unlink()  # the transformers beside it are not meant
    assert load_vqvae("pretrained_llamagen", tmp_path).vocab_size == 64


HUB = ["README.md", "c2i_B_256.pt", "vq_ds16_c2i.pt", "vq_ds8_c2i.pt"]


def test_hub_name_is_asked_for_the_right_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, *, repo_type: str, choose: Callable[[list[str]], list[str]]) -> Path:
        asked.append((name, repo_type, choose(HUB)))
        for file in HUB[1:]:  # the cache holds what was fetched before, too
            shutil.copy(FOLDER / "vq_ds16_tiny.pt", tmp_path / file)
        return tmp_path

    monkeypatch.setattr("lgpt.models.source_files.hub_folder", download)
    load_vqvae("pretrained_llamagen", "FoundationVision/LlamaGen")
    load_vqvae("pretrained_llamagen", "FoundationVision/LlamaGen/vq_ds8_c2i.pt")
    place = ("FoundationVision/LlamaGen", "model")
    assert asked == [(*place, ["vq_ds16_c2i.pt"]), (*place, ["vq_ds8_c2i.pt"])]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (HUB[:2], r"o/r holds no LlamaGen VQ: no vq_ds16\*\.pt is there"),
        ([*HUB, "vq_ds16_t2i.pt"], r"2 of .*name the one to read, as o/r/vq_ds16_c2i\.pt"),
    ],
)
def test_nothing_is_fetched_of_a_repository_that_lacks_it_or_leaves_a_choice(
    monkeypatch: pytest.MonkeyPatch, files: list[str], message: str
) -> None:
    def download(name: str, *, repo_type: str, choose: Callable[[list[str]], list[str]]) -> Path:
        raise AssertionError(f"{choose(files)} would be fetched")

    monkeypatch.setattr("lgpt.models.source_files.hub_folder", download)
    with pytest.raises(CheckpointError, match=message):
        load_vqvae("pretrained_llamagen", "o/r")


def test_unreachable_hub_name_says_what_to_give_instead() -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor .* Give a \.pt file"):
        load_vqvae("pretrained_llamagen", "nobody/no-such-vq")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("decoder.mid.1.q.bias"),
            r"missing decoder\.mid\.1\.q\.bias \(here decoder\.mid\.attn_1\.q\.bias\)",
        ),
        (lambda s: s.update({"encoder.more": torch.zeros(1)}), r"unexpected encoder\.more"),
        (
            lambda s: s.update({"decoder.conv_blocks.0.res.0.conv1.bias": torch.zeros(31)}),
            r"decoder\.conv_blocks\.0\.res\.0\.conv1\.bias .* is \[31\]",
        ),
        (
            lambda s: s["encoder.conv_in.bias"].fill_(float("nan")),
            r"not finite, in: encoder\.conv_in\.bias",
        ),
        (lambda s: s.pop("encoder.conv_in.weight"), r"encoder\.conv_in\.weight is missing, so"),
        (
            lambda s: s.update({"quantize.embedding.weight": torch.zeros(8)}),
            r"quantize\.embedding\.weight is \[8\], so the architecture is not known",
        ),
        (
            lambda s: s.update(
                {"encoder.conv_blocks.1.res.0.conv1.weight": torch.zeros(33, 32, 3, 3)}
            ),
            r"the widths \[32, 33, 32, 32, 32\] are no multiples of 32",
        ),
        (
            lambda s: s.update({"encoder.conv_blocks.999.res.0.x": torch.zeros(1)}),
            r"1000 resolutions, at most 12",
        ),
    ],
)
def test_tensor_that_is_wrong_is_refused_by_llamagen_s_name(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    state = stored()
    change(state)
    torch.save({"model": state}, tmp_path / "vq.pt")
    with pytest.raises(CheckpointError, match=message):
        load_vqvae("pretrained_llamagen", tmp_path)


def test_taming_and_llamagen_files_are_told_apart() -> None:
    taming = FOLDER.parent / "taming_tiny"
    with pytest.raises(CheckpointError, match=r"but encoder\..* its source is pretrained_taming"):
        load_vqvae("pretrained_llamagen", taming / "last.ckpt")
    with pytest.raises(CheckpointError, match="its source is pretrained_llamagen"):
        load_vqvae("pretrained_taming", FOLDER / "vq_ds16_tiny.pt", ddconfig=taming / "model.yaml")
