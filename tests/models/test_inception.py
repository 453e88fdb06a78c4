"""Inception-v3 of FID against torch-fidelity's, on weights that a seed makes."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lgpt.core.errors import CheckpointError
from lgpt.models.inception import (
    InceptionFeatures,
    load_inception,
    missing_inception_weights,
)

# Features that torch-fidelity 0.4.0's FeatureExtractorInceptionV3 gives for `pixels()` when its
# state dict is `random_weights()`.
REFERENCE = Path(__file__).parents[1] / "fixtures" / "inception_fid" / "features.npy"


def numbers(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def random_weights() -> dict[str, Tensor]:
    """Under the names of pytorch-fid's and torch-fidelity's files, with their classifier."""
    state = {}
    for name, kernel in InceptionFeatures().state_dict().items():
        module, kind = name.rsplit(".", 1)
        if kind == "bias":
            continue
        scale = (2 / np.prod(kernel.shape[1:])) ** 0.5
        state[f"{module}.conv.weight"] = (
            numbers(f"{module}.conv.weight").standard_normal(kernel.shape) * scale
        )
        for part in ("weight", "running_var"):
            state[f"{module}.bn.{part}"] = 0.5 + numbers(f"{module}.bn.{part}").random(len(kernel))
        for part in ("bias", "running_mean"):
            drawn = numbers(f"{module}.bn.{part}").standard_normal(len(kernel))
            state[f"{module}.bn.{part}"] = drawn * 0.1
        state[f"{module}.bn.num_batches_tracked"] = np.zeros(())
    state["fc.weight"], state["fc.bias"] = np.zeros((1008, 2)), np.zeros(1008)
    return {name: torch.from_numpy(value).float() for name, value in state.items()}


def pixels() -> Tensor:
    drawn = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 24), dtype=np.uint8)
    return torch.from_numpy(drawn)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_weights(), path)
    return path


def test_features_are_torch_fidelity_s(weights):
    wanted = np.load(REFERENCE)
    images = pixels().float() / 127.5 - 1
    got = load_inception(weights)(images + 1e-3).numpy()  # rounded to the 8 bits again
    assert got.shape == wanted.shape == (2, 2048)
    assert np.abs(wanted).mean() > 1
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_file_in_torch_s_cache_is_found_and_a_missing_one_told(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    told = missing_inception_weights(None)
    assert "checkpoints/pt_inception-2015-12-05-6726825d.pth or " in told
    assert "fetch https://" in told
    with pytest.raises(CheckpointError, match=r"nowhere\.pth is not there; fetch"):
        load_inception(tmp_path / "nowhere.pth")
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weights)
    assert missing_inception_weights(None) is None
    load_inception(None)


def test_other_weights_are_refused_by_name(tmp_path, weights):
    state = torch.load(weights, weights_only=True)
    for change, named in (
        ({"Mixed_7c.branch_pool.conv.weight": None}, r"Mixed_7c\.branch_pool"),
        ({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}, r"Conv2d_1a_3x3\.weight is"),
        ({"Mixed_9.conv.weight": torch.zeros(1)}, r"unexpected Mixed_9"),
        ({"Mixed_5b.branch1x1.bn.bias": torch.full((64,), torch.nan)}, "not finite"),
    ):
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        torch.save(changed, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=named):
            load_inception(tmp_path / "other.pth")
