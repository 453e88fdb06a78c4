"""LPIPS with VGG16: how different two pictures look.

VGG16's convolutions are built here, so torchvision need not be installed; only its weights are
wanted, and nothing is downloaded. `distance = sum over 5 layers of mean over positions of
w . (f/|f| - g/|g|)^2`, with f, g the features after relu1_2, 2_2, 3_3, 4_3, 5_3 and w learned
non-negative weights of the channels.
Source: Zhang et al. 2018, eq. 1, https://arxiv.org/abs/1801.03924; constants as in taming.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.models.pytorch_file import read_pytorch_file, tensors_within
from lgpt.models.strict_loading import load_strictly

# Numbers of the convolutions in torchvision's `vgg16().features`, by layer; the last of a layer is
# the one that is compared, and a 2x2 maximum stands before each layer but the first.
_LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_WIDTHS = (64, 128, 256, 512, 512)
# ImageNet's mean and deviation, for pictures in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

# Four maxima halve a picture, and something must be left.
LEAST_SIDE = 16

_VGG16_FILE = "vgg16-397923af.pth"
_VGG16_ADDRESS = f"https://download.pytorch.org/models/{_VGG16_FILE}"
_LINEAR_ADDRESS = (
    "https://github.com/richzhang/PerceptualSimilarity/blob/master/lpips/weights/v0.1/vgg.pth"
)
# Installed packages that bring the channel weights, with the file's place in them.
_LINEAR_PACKAGES = {
    "lpips": "weights/v0.1/vgg.pth",
    "torchmetrics": "functional/image/lpips_models/vgg.pth",
}


class Lpips(nn.Module):
    """The distance, with frozen weights; made by `load_lpips`.

    Keys are torchvision's (`features.0.weight`, ...) and LPIPS's (`lin0.model.1.weight`, ...).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        width_in = 3
        for numbers, width in zip(_LAYERS, _WIDTHS):
            for number in numbers:
                self.features[str(number)] = nn.Conv2d(width_in, width, 3, padding=1)
                width_in = width
        for index, width in enumerate(_WIDTHS):
            # `model.0` is a dropout of LPIPS's own training.
            linear = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{index}", nn.ModuleDict({"model": nn.ModuleDict({"1": linear})}))
        self.requires_grad_(False)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], others: Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, " b"]:
        """Distance of each pair, in float32, for pictures in [-1, 1] with sides of at least 16.

        Features are computed in the weights' type. A gradient reaches whichever wants one.
        """
        distance = images.new_zeros(len(images), dtype=torch.float32)
        pairs = zip(self._layers(images), self._layers(others))
        for index, (mine, theirs) in enumerate(pairs):
            weight = self.get_submodule(f"lin{index}.model.1").weight.float()
            difference = (_unit_length(mine) - _unit_length(theirs)).square()
            distance = distance + functional.conv2d(difference, weight).mean((1, 2, 3))
        return distance

    def _layers(self, images: Tensor) -> list[Tensor]:
        hidden = (images.float() - _constant(_SHIFT, images)) / _constant(_SCALE, images)
        hidden = hidden.to(self.features["0"].weight.dtype)
        found = []
        for index, numbers in enumerate(_LAYERS):
            if index:
                hidden = functional.max_pool2d(hidden, 2)
            for number in numbers:
                hidden = functional.relu(self.features[str(number)](hidden))
            found.append(hidden)
        return found


def _constant(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device).view(1, 3, 1, 1)


def _unit_length(features: Tensor) -> Tensor:
    """Each position's channels at length 1, in float32.

    The least square length keeps the root's slope finite where all channels are 0; the eps is
    LPIPS's.
    """
    features = features.float()
    length = features.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
    return features / (length + 1e-10)


def missing_lpips_weights(
    vgg16_weights: Optional[Path], lpips_weights: Optional[Path]
) -> Optional[str]:
    """Which file `load_lpips` would not find, and where it is to be had; None: all is there."""
    vgg16_places = _vgg16_places(vgg16_weights)
    vgg16 = _first_file(vgg16_places)
    if vgg16 is None:
        return _not_there(vgg16_places, "loss.vgg16_weights (--vgg16-weights)", _VGG16_ADDRESS)
    linear_places = _linear_places(lpips_weights, vgg16)
    if _first_file(linear_places) is None:
        return _not_there(linear_places, "loss.lpips_weights (--lpips-weights)", _LINEAR_ADDRESS)
    return None


def load_lpips(vgg16_weights: Optional[Path], lpips_weights: Optional[Path]) -> Lpips:
    """LPIPS in eval mode, frozen, in float32 on the CPU.

    Args:
        vgg16_weights: torchvision's `vgg16-397923af.pth`; default: where torchvision caches it.
        lpips_weights: LPIPS's `vgg.pth`; default: beside the VGG16, or in the packages lpips or
            torchmetrics where they are installed.

    Raises:
        SettingsError: A file is not there; places and ways out are told.
        CheckpointError: A file does not hold what it should.
    """
    if missing := missing_lpips_weights(vgg16_weights, lpips_weights):
        raise SettingsError(
            f"loss.perceptual: lpips needs weights: {missing}, or train without them: "
            "loss.perceptual: none."
        )
    vgg16 = _first_file(_vgg16_places(vgg16_weights))
    assert vgg16 is not None
    linear = _first_file(_linear_places(lpips_weights, vgg16))
    assert linear is not None
    state = {
        name: tensor
        for name, tensor in _tensors_of(vgg16).items()
        if name.startswith("features.")  # the classifier behind them is not needed
    }
    state.update(_tensors_of(linear))
    model = Lpips()
    load_strictly(model, state, f"{vgg16} with {linear}")
    for name, tensor in model.state_dict().items():
        if name.startswith("lin") and bool((tensor < 0).any()):
            raise CheckpointError(
                f"{linear}: {name} holds negative numbers, so it would not measure a distance; "
                f"these are not LPIPS's weights. Take {_LINEAR_ADDRESS}"
            )
    return model.eval()


def _vgg16_places(named: Optional[Path]) -> list[Path]:
    return [named] if named else [Path(torch.hub.get_dir()) / "checkpoints" / _VGG16_FILE]


def _linear_places(named: Optional[Path], vgg16: Path) -> list[Path]:
    if named:
        return [named]
    places = [vgg16.with_name("vgg.pth"), vgg16.with_name("lpips_vgg.pth")]
    for package, inside in _LINEAR_PACKAGES.items():
        found = find_spec(package)
        if found is not None and found.origin is not None:
            places.append(Path(found.origin).with_name("") / inside)
    return places


def _first_file(places: list[Path]) -> Optional[Path]:
    return next((place for place in places if os.path.isfile(place)), None)


def _not_there(places: list[Path], setting: str, address: str) -> str:
    return (
        f"{' or '.join(map(str, places))} is not there; fetch {address} on a machine with internet "
        f"and name the file in {setting}"
    )


def _tensors_of(path: Path) -> dict[str, Tensor]:
    return tensors_within(read_pytorch_file(path), path)
