"""The VQ-VAE's architecture as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from lgpt.models.model_folder import check_fields
from lgpt.settings.vqvae import VqvaeSettings


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """The architecture; names as in `VqvaeSettings`.

    Attributes:
        input_range: Range of the pictures the weights expect; callers always use [-1, 1].
    """

    codebook_size: int
    code_dim: int
    z_channels: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    resolution: int = 256
    dropout: float = 0.0
    l2_normalized_codes: bool = False
    codebook_update: str = "gradient"
    ema_decay: float = 0.99
    revive_dead_codes: bool = True
    input_range: str = "-1..1"

    @classmethod
    def from_settings(cls, settings: VqvaeSettings) -> VQVAEConfig:
        """The architecture that a run config describes."""
        return cls(**settings.model_dump())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VQVAEConfig:
        """Back from `to_dict`; CheckpointError for unknown or missing fields."""
        check_fields(cls, values, ("codebook_size", "code_dim"), "VQ-VAE")
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one token: f = 2^(levels - 1)."""
        return int(2 ** (len(self.ch_mult) - 1))
