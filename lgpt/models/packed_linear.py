"""Matrices laid out once for oneDNN: what sampling multiplies with on a CPU without a compiler.

A product with few rows waits for the matrix to come from memory. PyTorch's own `linear` lays the
matrix out anew at every call and reads at 40% of what the memory gives; laid out once, oneDNN reads
at 75% (torch 2.13, one core of an EPYC with AVX-512 bf16 units, bf16, 4 rows: 14 of 19 GB/s).
"""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor, nn

from lgpt.core.logging import get_logger
from lgpt.models.token_head import TokenHead

_logger = get_logger(__name__)

# oneDNN's products of 1 and 2 rows take longer than its products of 4.
_LEAST_ROWS = 4
# For so many rows the layout is chosen; it matters little.
_TYPICAL_ROWS = 16


class PackedLinear(nn.Module):
    """`x W^T` without a bias, W in oneDNN's own layout.

    A row's result does not depend on how many other rows there are, bit for bit (tried in
    tests/models/test_packed_linear.py); PyTorch's float32 product of 1 to 3 rows differs.

    Args:
        weight: [outputs, inputs], float32 or bf16, on the CPU.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.outputs = weight.shape[0]
        # The operators with which torch.compile freezes linear layers on CPUs, torch 2.4 to 2.13.
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), _TYPICAL_ROWS
        )

    def forward(self, x: Tensor, targets: None = None) -> Tensor:
        """[.., inputs] to [.., outputs]. There is no loss: `targets` stands where the head's do."""
        assert targets is None, "a packed model computes no loss"
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        if rows < _LEAST_ROWS:
            flat = torch.cat([flat] * -(-_LEAST_ROWS // rows))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            flat, self._packed, None, "none", [], ""
        )
        return product[:rows].view(*x.shape[:-1], self.outputs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The plain matrix under its old name, so that a packed model is saved whole."""
        destination[prefix + "weight"] = self._packed.to_dense()


def pack_linear_layers(model: nn.Module) -> bool:
    """Replace the linear layers of a model on a CPU, in place, one after the other.

    What `pack_for_decoding` does where `cpu_decoding.cpp` cannot be compiled. For sampling alone:
    packed layers have no parameters, so they can neither be trained nor moved to another device.

    Returns:
        False, and nothing done, where this build of PyTorch has no oneDNN, or oneDNN no bf16
        products for this CPU and the model is in bf16.
    """
    if not (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        _logger.info("sampling: this PyTorch has no oneDNN, so its products stay as they are")
        return False
    is_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if is_bf16 and not onednn_multiplies_bf16():
        _logger.info(
            "sampling: oneDNN has no bf16 products for this CPU, so they stay as they are; float32 "
            "is much faster here (dtype fp32)"
        )
        return False
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, TokenHead)):
                setattr(module, name, _packed(child))
    return True


def onednn_multiplies_bf16() -> bool:
    """Whether oneDNN has bf16 products for this CPU (AVX-512 or AVX-NE-CONVERT on x86).

    True also where this build of PyTorch does not tell.
    """
    tells = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return tells is None or bool(tells())


def _packed(layer: Union[nn.Linear, TokenHead]) -> PackedLinear:
    assert getattr(layer, "bias", None) is None, "no layer of LatentGPT has a bias"
    assert layer.weight.device.type == "cpu", layer.weight.device
    return PackedLinear(layer.weight)
