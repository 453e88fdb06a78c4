"""Hidden states to logits, or straight to the loss without logits in memory.

Shapes: B batch, L image tokens, D width, V codes, M = B*L rows.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

# Logits are made in float32 for so many (row, code) pairs at a time: 2^24 are 64 MiB.
_MAX_LOGITS = 1 << 24


class TokenHead(nn.Module):
    """The untied output matrix, and the loss in the same forward so that ZeRO-3 gathers it once.

    Made at zero, where the first loss is exactly ln V.

    Args:
        width: D.
        codes: V.
    """

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codes, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero."""
        nn.init.zeros_(self.weight)

    def forward(
        self,
        hidden: Float[Tensor, "batch length width"],
        targets: Optional[Int[Tensor, "batch length"]] = None,
    ) -> Union[Float[Tensor, "batch length codes"], Float[Tensor, ""]]:
        """Logits [B, L, V], or with targets the mean cross-entropy in nats (float32 scalar)."""
        if targets is None:
            return functional.linear(hidden, self.weight)
        loss: Tensor = _ChunkedCrossEntropy.apply(
            hidden.flatten(0, 1), self.weight, targets.flatten()
        )
        return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, a few rows at a time.

    Forward makes the gradients too, while a chunk's logits are there, and backward only scales
    them: nothing is computed twice and no [B, L, V] tensor lives. Between the two it costs a
    float32 [V, D].
    """

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
        rows = hidden_MD.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_MD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        step = max(1, _MAX_LOGITS // weight_VD.shape[0])
        for start in range(0, rows, step):
            part = slice(start, start + step)
            logits = functional.linear(hidden_MD[part], weight_VD).float()
            log_norm = logits.logsumexp(dim=1, keepdim=True)
            chosen = targets_M[part].unsqueeze(1)
            loss += (log_norm - logits.gather(1, chosen)).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d loss / d logits = (softmax - one_hot) / rows
            slope = logits.sub_(log_norm).exp_()
            slope.scatter_add_(1, chosen, slope.new_full((), -1.0).expand_as(chosen))
            slope = slope.div_(rows).to(hidden_MD.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight_VD, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.t() @ hidden_MD[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss / rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Optional[Tensor], Optional[Tensor], None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype),
            None,
        )
