"""Networks that judge pictures where their weights are found: LPIPS's VGG16, FID's Inception."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

import torch

from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.engine.ranks import max_over_ranks
from lgpt.models.inception import InceptionFeatures, load_inception, missing_inception_weights
from lgpt.models.perceptual import LEAST_SIDE, Lpips, load_lpips, missing_lpips_weights

_log = get_logger(__name__)


class Judges(NamedTuple):
    """In float32 on the device; None where one is not wanted or its weights are not there."""

    lpips: Optional[Lpips] = None
    inception: Optional[InceptionFeatures] = None


NO_JUDGES = Judges()


def find_judges(
    device: torch.device,
    *,
    side: int,
    wants_lpips: bool = True,
    wants_rfid: bool = True,
    vgg16_weights: Optional[Path] = None,
    lpips_weights: Optional[Path] = None,
    inception_weights: Optional[Path] = None,
) -> Judges:
    """Load what is wanted and there; what is wanted and not there is told once, with the way to it.

    All ranks call it. A network that one of them lacks is used by none: sums must match.

    Args:
        side: Of the pictures, in pixels.
        vgg16_weights: As in `load_lpips`.
        lpips_weights: As in `load_lpips`.
        inception_weights: As in `load_inception`.

    Raises:
        SettingsError: A file that was named is not there.
        CheckpointError: A file does not hold what it should.
    """
    lacks: dict[str, str] = {}
    if wants_lpips:
        missing = missing_lpips_weights(vgg16_weights, lpips_weights)
        if missing is not None and (vgg16_weights or lpips_weights):
            raise SettingsError(f"LPIPS cannot be measured: {missing}.")
        if side < LEAST_SIDE:
            missing = f"pictures of {side} pixels a side are too small for it ({LEAST_SIDE})"
        lacks["lpips"] = missing or ""
    if wants_rfid:
        missing = missing_inception_weights(inception_weights)
        if missing is not None and inception_weights:
            raise SettingsError(f"rFID cannot be measured: {missing}.")
        lacks["rfid"] = missing or ""
    measured = [name for name in lacks if not _is_lacking_anywhere(name, lacks[name], device)]
    return Judges(
        load_lpips(vgg16_weights, lpips_weights).to(device) if "lpips" in measured else None,
        load_inception(inception_weights).to(device) if "rfid" in measured else None,
    )


def _is_lacking_anywhere(name: str, why: str, device: torch.device) -> bool:
    if not max_over_ranks({name: float(bool(why))}, device)[name]:
        return False
    _log.info("%s is not measured: %s.", name, why or "another rank lacks its weights")
    return True
