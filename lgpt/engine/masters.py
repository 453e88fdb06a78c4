"""The float32 masters that DeepSpeed keeps on this rank: where they are, and what follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# deepspeed 0.18 to 0.19.8: stage 1 and 2; stage 1 in bf16 with float32 gradients, which is another
# optimizer (BF16_Optimizer); stage 3.
_NAMES = (
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat",
)


def master_vectors(engine: Any) -> Sequence[Tensor]:
    """This rank's part of the masters, as the flat vectors that its optimizer steps."""
    name = next(name for name in _NAMES if hasattr(engine.optimizer, name))
    vectors: Sequence[Tensor] = getattr(engine.optimizer, name)
    return vectors


def write_masters_through(engine: Any) -> None:
    """Make the module's weights those of the masters, as a step does at its end, on all ranks."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    # Stage 3 has no function of its own for it (0.19.8): these are the parts of its `step`.
    optimizer._partition_all_parameters()
    for number in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()  # gathers the small parameters that stay whole
