"""PatchGAN: one logit for every patch of a picture, high where it looks real.

Layers and key grammar (`main.0`, `main.2`, ...) of taming-transformers' `NLayerDiscriminator`
(taming/modules/discriminator/model.py, CompVis 3ba01b24; Isola et al. 2017,
https://arxiv.org/abs/1611.07004), with GroupNorm in place of its BatchNorm, under the same keys
`weight` and `bias`:

- BatchNorm's statistics are those of one rank's micro batch, so that 2 ranks train another
  discriminator than 1, and accumulation another than a large batch. GroupNorm sees one picture.
- Real and reconstructed pictures can then go through in one forward without knowing of each other;
  DeepSpeed wants one forward a backward.
- BatchNorm's running statistics stay float32 beside bf16 weights, which torch refuses on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lgpt.models.codebook import apply_keeping_float32_buffers

_CHANNELS_A_GROUP = 8  # with one channel a group, how bright a channel is would be lost
_MOST_GROUPS = 32
_MOST_MULTIPLE = 8


class PatchDiscriminator(nn.Module):
    """Pictures to logits of patches.

    Args:
        layers: Convolutions with stride 2 (taming: n_layers).
        channels: Width of the first one (taming: ndf); each further one doubles it, up to 8 times.

    Attributes:
        lecam_real: Moving average of the logits of real pictures, for `gan_losses.lecam_penalty`.
        lecam_fake: The same of reconstructions.
    """

    lecam_real: Tensor
    lecam_fake: Tensor
    # No zero3_leaf_modules: DeepSpeed 0.19.8 releases a leaf before its gradient is made when the
    # leaf's input is a picture, which needs no gradient ("size of tensor a (0) must match").

    def __init__(self, layers: int, channels: int) -> None:
        super().__init__()
        widths = [channels * min(2**level, _MOST_MULTIPLE) for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), _leaky_relu()]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            # No bias: the norm takes the mean away again and has a bias of its own.
            parts += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride, padding=1, bias=False),
                nn.GroupNorm(
                    min(_MOST_GROUPS, widths[level] // _CHANNELS_A_GROUP), widths[level], eps=1e-6
                ),
                _leaky_relu(),
            ]
        parts.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*parts)
        self.apply(_initialise)
        self.register_buffer("lecam_real", torch.zeros(()))
        self.register_buffer("lecam_fake", torch.zeros(()))

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 1 h w"]:
        """Logits, for pictures in [-1, 1]; h = H / 2^layers - 2."""
        return self.main(images)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return apply_keeping_float32_buffers(self, fn, recurse)


def _leaky_relu() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.2)


def _initialise(module: nn.Module) -> None:
    """As DCGAN and taming: kernels N(0, 0.02), norms N(1, 0.02)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
