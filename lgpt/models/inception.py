"""Inception-v3 as FID means it: TensorFlow's network of 2015-12-05, down to its mean features.

Not torchvision's ImageNet weights: FID's published numbers are of this network, which counts no
padding in its mean pools, has a maximum in its last block, and resizes pictures as TensorFlow 1
did. Nothing is downloaded; pytorch-fid's and torch-fidelity's files are taken, which hold the same
numbers. Each normalization is folded into its kernel.
Source: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567; Heusel et al. 2017,
https://arxiv.org/abs/1706.08500; names and the patched blocks as in pytorch-fid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lgpt.core.errors import CheckpointError
from lgpt.models.pytorch_file import read_pytorch_file, tensors_within
from lgpt.models.strict_loading import load_strictly, refuse_not_finite

FEATURES = 2048
_SIDE = 299
_NORM_EPS = 1e-3
_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_FILES[0]}"
_NORM = ("weight", "bias", "running_mean", "running_var")

_Size = Union[int, tuple[int, int]]


class _Conv(nn.Conv2d):
    """A kernel with its normalization folded in, and the ReLU behind it."""

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(super().forward(images), inplace=True)


class _Block(nn.Module):
    """Branches side by side; a kernel is named by its branch and its number in it."""

    def add(self, branch: str, width_in: int, *kernels: tuple[int, _Size], stride: int = 1) -> None:
        """Kernels (width, size) one after the other; a `stride` above 1 is the last one's."""
        for number, (width, size) in enumerate(kernels, 1):
            name = f"{branch}_{number}" if len(kernels) > 1 else branch
            is_strided = stride > 1 and number == len(kernels)
            height, across = (size, size) if isinstance(size, int) else size
            padding = 0 if is_strided else (height // 2, across // 2)
            step = stride if is_strided else 1
            self.add_module(name, _Conv(width_in, width, size, stride=step, padding=padding))
            width_in = width

    def run(self, branch: str, hidden: Tensor) -> Tensor:
        for name, kernel in self.named_children():
            if name == branch or name.startswith(f"{branch}_"):
                hidden = kernel(hidden)
        return hidden


class _BlockA(_Block):
    def __init__(self, width_in: int, pooled: int) -> None:
        super().__init__()
        self.add("branch1x1", width_in, (64, 1))
        self.add("branch5x5", width_in, (48, 1), (64, 5))
        self.add("branch3x3dbl", width_in, (64, 1), (96, 3), (96, 3))
        self.add("branch_pool", width_in, (pooled, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        names = ("branch1x1", "branch5x5", "branch3x3dbl")
        parts = [self.run(name, hidden) for name in names]
        return torch.cat([*parts, self.run("branch_pool", _mean_pool(hidden))], 1)


class _BlockB(_Block):
    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.add("branch3x3", width_in, (384, 3), stride=2)
        self.add("branch3x3dbl", width_in, (64, 1), (96, 3), (96, 3), stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [self.run(name, hidden) for name in ("branch3x3", "branch3x3dbl")]
        return torch.cat([*parts, functional.max_pool2d(hidden, 3, 2)], 1)


class _BlockC(_Block):
    def __init__(self, width_in: int, inner: int) -> None:
        super().__init__()
        lying, standing = (1, 7), (7, 1)
        self.add("branch1x1", width_in, (192, 1))
        self.add("branch7x7", width_in, (inner, 1), (inner, lying), (192, standing))
        pairs = [(inner, standing), (inner, lying), (inner, standing), (192, lying)]
        self.add("branch7x7dbl", width_in, (inner, 1), *pairs)
        self.add("branch_pool", width_in, (192, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        names = ("branch1x1", "branch7x7", "branch7x7dbl")
        parts = [self.run(name, hidden) for name in names]
        return torch.cat([*parts, self.run("branch_pool", _mean_pool(hidden))], 1)


class _BlockD(_Block):
    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.add("branch3x3", width_in, (192, 1), (320, 3), stride=2)
        kernels: list[tuple[int, _Size]] = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        self.add("branch7x7x3", width_in, *kernels, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [self.run(name, hidden) for name in ("branch3x3", "branch7x7x3")]
        return torch.cat([*parts, functional.max_pool2d(hidden, 3, 2)], 1)


class _BlockE(_Block):
    def __init__(self, width_in: int, *, pools_maximum: bool) -> None:
        super().__init__()
        self.pools_maximum = pools_maximum
        self.add("branch1x1", width_in, (320, 1))
        for branch, first in (("branch3x3", [(384, 1)]), ("branch3x3dbl", [(448, 1), (384, 3)])):
            for number, (width, size) in enumerate(first, 1):
                self.add(f"{branch}_{number}", width_in if number == 1 else first[0][0],
                         (width, size))  # fmt: skip
            last = len(first) + 1
            self.add(f"{branch}_{last}a", 384, (384, (1, 3)))
            self.add(f"{branch}_{last}b", 384, (384, (3, 1)))
        self.add("branch_pool", width_in, (192, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [self.run("branch1x1", hidden)]
        for branch, last in (("branch3x3", 2), ("branch3x3dbl", 3)):
            inner = hidden
            for number in range(1, last):
                inner = self.run(f"{branch}_{number}", inner)
            parts += [self.run(f"{branch}_{last}{side}", inner) for side in "ab"]
        pooled = (
            functional.max_pool2d(hidden, 3, 1, 1) if self.pools_maximum else _mean_pool(hidden)
        )
        return torch.cat([*parts, self.run("branch_pool", pooled)], 1)


def _mean_pool(hidden: Tensor) -> Tensor:
    return functional.avg_pool2d(hidden, 3, 1, 1, count_include_pad=False)


class InceptionFeatures(nn.Module):
    """Pictures to the 2048 mean features of the last block; frozen, made by `load_inception`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        for letter, inner in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            self.add_module(f"Mixed_6{letter}", _BlockC(768, inner))
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, pools_maximum=False)
        self.Mixed_7c = _BlockE(2048, pools_maximum=True)
        self.requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 2048"]:
        """Features of pictures in [-1, 1], rounded to the 8 bits that a file would hold."""
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
        hidden = (_resized_as_tensorflow_1(pixels) - 128) / 128
        for name, part in self.named_children():
            hidden = part(hidden)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                hidden = functional.max_pool2d(hidden, 3, 2)
        return hidden.mean((2, 3))


def _resized_as_tensorflow_1(pixels: Tensor) -> Tensor:
    """Bilinear to 299x299, corners of first pixels (not centres) on each other, not antialiased."""
    for dim in (2, 3):
        length = pixels.shape[dim]
        places = torch.arange(_SIDE, device=pixels.device) * (length / _SIDE)
        lower = places.long()
        share = (places - lower).view(-1, 1) if dim == 2 else places - lower
        below, above = (
            pixels.index_select(dim, index) for index in (lower, (lower + 1).clamp_max(length - 1))
        )
        pixels = below + (above - below) * share
    return pixels


def missing_inception_weights(named: Optional[Path]) -> Optional[str]:
    """Which file is not there, and where it is to be had; None where it is there."""
    if _found(named) is not None:
        return None
    places = " or ".join(map(str, _places(named)))
    return (
        f"{places} is not there; fetch {_ADDRESS} on a machine with internet (torchvision's "
        "inception_v3 is another network) and name the file in metrics.inception_weights "
        "(--inception-weights)"
    )


def load_inception(named: Optional[Path]) -> InceptionFeatures:
    """The network in eval mode, frozen, in float32 on the CPU.

    Args:
        named: pytorch-fid's or torch-fidelity's file; default: in torch's cache, where they put it.

    Raises:
        CheckpointError: The file is not there, or does not hold this network.
    """
    path = _found(named)
    if path is None:
        raise CheckpointError(f"{missing_inception_weights(named)}.")
    model = InceptionFeatures()
    tensors = {
        name: tensor.float()
        for name, tensor in tensors_within(read_pytorch_file(path), path).items()
        # The classifier behind the features, and counters of training.
        if not name.startswith(("fc.", "AuxLogits.")) and not name.endswith("num_batches_tracked")
    }
    load_strictly(model, _folded(tensors, model), str(path))
    refuse_not_finite(model.state_dict(), str(path))
    return model.eval()


def _folded(tensors: dict[str, Tensor], model: InceptionFeatures) -> dict[str, Tensor]:
    """Kernels and biases that do what each kernel and its normalization did.

    Tensors that belong to no kernel of ours stay, so that strict loading names them.
    """
    left, state = dict(tensors), {}
    for name, module in model.named_modules():
        names = [f"{name}.conv.weight", *(f"{name}.bn.{part}" for part in _NORM)]
        if not isinstance(module, _Conv) or any(each not in left for each in names):
            continue
        kernel, weight, bias, mean, variance = (left.pop(each) for each in names)
        scale = weight * (variance + _NORM_EPS).rsqrt()
        state[f"{name}.weight"] = kernel * scale.view(-1, 1, 1, 1)
        state[f"{name}.bias"] = bias - mean * scale
    return {**state, **left}


def _places(named: Optional[Path]) -> list[Path]:
    if named is not None:
        return [named]
    return [Path(torch.hub.get_dir()) / "checkpoints" / name for name in _FILES]


def _found(named: Optional[Path]) -> Optional[Path]:
    return next((place for place in _places(named) if place.is_file()), None)
