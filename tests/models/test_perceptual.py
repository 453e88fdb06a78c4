"""LPIPS against its formula, written down once more on plain tensors, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lgpt.core.errors import LgptError
from lgpt.models.perceptual import load_lpips

# torchvision's "D" configuration: numbers are convolutions, each with a ReLU; M is a 2x2 maximum.
CONFIGURATION = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
COMPARED = (2, 4, 7, 10, 13)  # relu1_2, relu2_2, ...: after so many convolutions


def random_vgg16() -> dict[str, Tensor]:
    """Named and numbered as torchvision does: a ReLU and a maximum take a number each."""
    generator = torch.Generator().manual_seed(0)
    state, number, width_in = {}, 0, 3
    for width in CONFIGURATION:
        if width == "M":
            number += 1
            continue
        scale = (2 / (9 * width_in)) ** 0.5
        kernel = torch.randn(width, width_in, 3, 3, generator=generator) * scale
        state[f"features.{number}.weight"] = kernel
        state[f"features.{number}.bias"] = torch.randn(width, generator=generator) * 0.1
        number, width_in = number + 2, width
    return state


def random_linear() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    widths = (64, 128, 256, 512, 512)
    return {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate(widths)
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lpips")
    vgg16 = {**random_vgg16(), "classifier.0.weight": torch.zeros(2, 2)}
    torch.save(vgg16, folder / "vgg16.pth")
    torch.save(random_linear(), folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


def lpips_by_hand(images: Tensor, others: Tensor) -> np.ndarray:
    """Position by position in numpy, from the paper's formula."""
    kernels = list(random_vgg16().items())
    linear = [tensor.flatten().double().numpy() for tensor in random_linear().values()]
    features = []
    for pictures in (images, others):
        shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
        hidden, done, found = ((pictures - shift) / scale).double(), 0, []
        for width in CONFIGURATION:
            if width == "M":
                hidden = functional.max_pool2d(hidden, 2)
                continue
            (_, kernel), (_, bias) = kernels[2 * done : 2 * done + 2]
            hidden = functional.conv2d(hidden, kernel.double(), bias.double(), padding=1)
            hidden, done = hidden.clamp_min(0), done + 1
            if done in COMPARED:
                found.append(hidden.numpy())
        features.append(found)
    distances = np.zeros(len(images))
    for weights, mine, theirs in zip(linear, *features):
        batch, _, height, width = mine.shape
        for b, y, x in np.ndindex(batch, height, width):
            f, g = mine[b, :, y, x], theirs[b, :, y, x]
            gap = f / (np.linalg.norm(f) + 1e-10) - g / (np.linalg.norm(g) + 1e-10)
            distances[b] += (weights * gap**2).sum() / (height * width)
    return distances


def test_the_distance_is_the_formula_s(files):
    torch.manual_seed(2)
    images, others = torch.rand(2, 2, 3, 24, 32)
    got = load_lpips(*files)(images * 2 - 1, others * 2 - 1)
    wanted = lpips_by_hand(images * 2 - 1, others * 2 - 1)
    assert wanted.min() > 0.01
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4)


def test_only_the_reconstruction_gets_a_gradient_and_equal_pictures_are_at_0(files):
    lpips = load_lpips(*files)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    # Black, then equal: where features are all 0 or alike, a root's slope must not make NaN.
    image = torch.full((1, 3, 16, 16), -1.0)
    made = image.clone().requires_grad_()
    distance = lpips(made, image)
    assert distance.item() == 0
    distance.sum().backward()
    assert torch.equal(made.grad, torch.zeros_like(made))
    made = torch.rand(1, 3, 16, 16, requires_grad=True)
    lpips(made, image).sum().backward()
    assert made.grad.isfinite().all()
    assert made.grad.abs().max() > 0


def test_features_that_are_all_0_give_a_finite_gradient(files, tmp_path):
    state = {name: torch.zeros_like(tensor) for name, tensor in random_vgg16().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    made = torch.rand(1, 3, 16, 16, requires_grad=True)
    load_lpips(tmp_path / "vgg16.pth", files[1])(made, torch.rand(1, 3, 16, 16)).sum().backward()
    assert made.grad.isfinite().all()


def test_missing_weights_name_the_places_and_the_way_without_them(tmp_path, monkeypatch, files):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(LgptError, match=r"checkpoints/vgg16-397923af.pth.*loss.perceptual: none"):
        load_lpips(None, None)
    monkeypatch.setattr("lgpt.models.perceptual._LINEAR_PACKAGES", {})
    alone = tmp_path / "vgg16.pth"
    alone.symlink_to(files[0])
    with pytest.raises(LgptError, match=r"vgg\.pth.*loss.lpips_weights.*loss.perceptual: none"):
        load_lpips(alone, None)


def test_torchvision_s_cache_is_found(tmp_path, monkeypatch, files):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "vgg16-397923af.pth").symlink_to(files[0])
    (cache / "vgg.pth").symlink_to(files[1])
    assert load_lpips(None, None)(torch.ones(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).item() > 0


def test_weights_that_are_no_lpips_are_refused(tmp_path, files):
    torch.save({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(LgptError, match="features"):
        load_lpips(tmp_path / "other.pth", files[1])
    negative = {name: -tensor for name, tensor in random_linear().items()}
    torch.save(negative, tmp_path / "negative.pth")
    with pytest.raises(LgptError, match=r"lin0\.model\.1\.weight holds negative"):
        load_lpips(files[0], tmp_path / "negative.pth")
