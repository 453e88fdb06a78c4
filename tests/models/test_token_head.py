"""The chunked loss against plain cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lgpt.models.token_head import TokenHead


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgpt.models.token_head._MAX_LOGITS", 50 * 4)  # 4 rows of 24


@pytest.mark.usefixtures("_small_chunks")
def test_loss_and_gradients_match_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    head = TokenHead(width=6, codes=50)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, 11, 6, requires_grad=True)
    targets = torch.randint(50, (2, 11))
    loss = head(hidden, targets)
    plain = functional.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, plain)
    ours = torch.autograd.grad(3 * loss, [hidden, head.weight])
    theirs = torch.autograd.grad(3 * plain, [hidden, head.weight])
    for found, expected in zip(ours, theirs):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("_small_chunks")
def test_bf16_loss_is_float32_and_gradients_have_the_weights_type() -> None:
    torch.manual_seed(0)
    head = TokenHead(width=6, codes=50).bfloat16()
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, 11, 6).bfloat16().requires_grad_()
    targets = torch.randint(50, (2, 11))
    loss = head(hidden, targets)
    assert loss.dtype == torch.float32
    plain = functional.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, plain)
    ours = torch.autograd.grad(loss, [hidden, head.weight])
    theirs = torch.autograd.grad(plain, [hidden, head.weight])
    for found, expected in zip(ours, theirs):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-2)


def test_loss_without_gradients_and_with_a_frozen_trunk() -> None:
    torch.manual_seed(0)
    head = TokenHead(width=6, codes=50)
    hidden, targets = torch.randn(1, 3, 6), torch.randint(50, (1, 3))
    with torch.no_grad():
        assert float(head(hidden, targets)) == pytest.approx(math.log(50))
    head(hidden, targets).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.any()


class _LargestFloat(TorchDispatchMode):
    """Notes the most elements of any float32 tensor that an operation gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    rows, codes = 6000, 4096
    head = TokenHead(width=2, codes=codes)
    hidden = torch.randn(1, rows, 2, requires_grad=True)
    with _LargestFloat() as largest:
        head(hidden, torch.zeros(1, rows, dtype=torch.long)).backward()
    assert largest.elements <= 1 << 24 < rows * codes
