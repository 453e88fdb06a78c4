"""The VQ-VAE's architecture as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import ValidationError

from lgpt.core.errors import CheckpointError
from lgpt.models.model_folder import check_fields
from lgpt.settings.vqvae import VqvaeSettings

INPUT_RANGES = ("-1..1", "0..1")
# Far above what anybody trains; they keep a damaged config from asking for terabytes.
_MOST = {
    "codebook_size": 1 << 24,
    "code_dim": 1 << 14,
    "z_channels": 1 << 14,
    "ch": 1 << 12,
    "num_res_blocks": 32,
    "resolution": 1 << 16,
}
_MOST_LEVELS, _MOST_MULTIPLE = 12, 64


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
        """Back from `to_dict`.

        A field that is missing has the value that it has here, not the default of run configs: that
        one may change, and files that say nothing mean taming's quantizer.

        Raises:
            CheckpointError: Unknown or missing fields, or values that describe no VQ-VAE.
        """
        check_fields(cls, values, ("codebook_size", "code_dim"), "VQ-VAE")
        input_range = values.get("input_range", INPUT_RANGES[0])
        try:
            known = {k: v for k, v in values.items() if k != "input_range"}
            settings = VqvaeSettings.model_validate({**_when_missing(), **known})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            found = shown(values.get(str(first["loc"][0])))
            raise CheckpointError(
                f"VQ-VAE config: {place} is not allowed ({first['msg']}), it reads {found}."
            ) from None
        problems = [
            f"{name} is {shown(getattr(settings, name))}, at most {most} is possible"
            for name, most in _MOST.items()
            if getattr(settings, name) > most
        ]
        levels = settings.ch_mult
        if len(levels) > _MOST_LEVELS or not all(1 <= n <= _MOST_MULTIPLE for n in levels):
            problems.append(
                f"ch_mult is {shown(list(levels))}, possible are up to {_MOST_LEVELS} numbers from "
                f"1 to {_MOST_MULTIPLE}"
            )
        if input_range not in INPUT_RANGES:
            problems.append(f"input_range is {shown(input_range)}, possible are {INPUT_RANGES}")
        if problems:
            raise CheckpointError(f"VQ-VAE config: {'; '.join(problems)}.")
        return cls(**settings.model_dump(), input_range=input_range)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def downsample_factor(self) -> int:
        """Pixels a side of one token: f = 2^(levels - 1)."""
        return int(2 ** (len(self.ch_mult) - 1))


def _when_missing() -> dict[str, Any]:
    """The fields that have defaults, but for the one that run configs do not have."""
    fields = dataclasses.fields(VQVAEConfig)
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    del defaults["input_range"]
    return defaults


def shown(value: object) -> str:
    """A value from elsewhere for a message: short, whatever it is.

    YAML's references make a few lines into a list that would print as gigabytes, and Python
    refuses to print numbers of more than 4,300 digits.
    """
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return f"[{', '.join(_shown_plain(item) for item in value)}]"
    return _shown_plain(value)


def _shown_plain(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, str):
        return repr(value[:40]) + ("..." if len(value) > 40 else "")
    return f"a {type(value).__name__}"
