"""How blocks are run in training: what is kept, what is compiled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lgpt.settings.section import Section


class BlockSettings(Section):
    """They trade time for memory, or a slow start for faster steps; checkpointing changes nothing
    else. Compiled blocks draw other dropout masks than plain ones.
    """

    checkpointing: Literal["none", "full", "every_n", "selective"] = Field(
        "none",
        description="activations computed again in the backward pass instead of being kept: of "
        "every block, of every n-th block, or all but the outputs of products and attention",
    )
    every: int = Field(2, ge=2, description="n of every_n")
    checkpointed_by: Literal["torch", "deepspeed"] = Field(
        "torch", description="whose function does it; only torch's can be selective"
    )
    compile: bool = Field(
        False,
        description="torch.compile; needs a C++ compiler on CPUs, minutes at the start; not with "
        "selective, which cannot keep products in compiled code",
    )


class VqvaeBlockSettings(Section):
    """Trades time for memory in phase 2; it changes nothing else."""

    checkpointing: Literal["none", "full"] = Field(
        "none",
        description="full: what residual blocks, attention and resampling make inside is computed "
        "again in the backward pass instead of being kept",
    )
