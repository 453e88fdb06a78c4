"""PatchGAN in taming's grammar and sizes."""

from __future__ import annotations

import pytest
import torch

from lgpt.models.discriminator import PatchDiscriminator

# taming's keys (its f16-16384 release has two layers), without BatchNorm's running statistics.
TWO_LAYERS = {
    "main.0.weight": [64, 3, 4, 4],
    "main.0.bias": [64],
    "main.2.weight": [128, 64, 4, 4],
    "main.3.weight": [128],
    "main.3.bias": [128],
    "main.5.weight": [256, 128, 4, 4],
    "main.6.weight": [256],
    "main.6.bias": [256],
    "main.8.weight": [1, 256, 4, 4],
    "main.8.bias": [1],
}


@pytest.mark.parametrize(("layers", "count", "side"), [(2, 663_361, 62), (3, 2_765_633, 30)])
def test_taming_s_sizes(layers: int, count: int, side: int) -> None:
    with torch.device("meta"):
        model = PatchDiscriminator(layers, 64)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 1, side, side)


def test_taming_s_keys() -> None:
    with torch.device("meta"):
        model = PatchDiscriminator(2, 64)
    assert {name: list(p.shape) for name, p in model.named_parameters()} == TWO_LAYERS


def test_six_layers_stop_growing_at_8_times_the_width() -> None:
    with torch.device("meta"):
        model = PatchDiscriminator(6, 16)
    widths = [part.out_channels for part in model.main if isinstance(part, torch.nn.Conv2d)]
    assert widths == [16, 32, 64, 128, 128, 128, 128, 1]


def test_a_picture_is_judged_the_same_whoever_stands_beside_it() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(2, 16).train()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone)


def test_it_runs_in_bf16_on_a_cpu() -> None:
    model = PatchDiscriminator(1, 16).bfloat16()
    assert model(torch.zeros(1, 3, 16, 16).bfloat16()).dtype == torch.bfloat16
    assert model.lecam_real.dtype == torch.float32, "a decay of 0.99 stands still in bf16"
