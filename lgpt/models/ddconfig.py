"""taming's description of a VQGAN, `ddconfig` with `n_embed` and `embed_dim`, as our config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lgpt.core.errors import CheckpointError
from lgpt.models.vqvae_config import VQVAEConfig

FIXED_DDCONFIG = {"double_z": False, "in_channels": 3, "out_ch": 3, "resamp_with_conv": True}
SHAPING_DDCONFIG = (
    "z_channels",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "resolution",
)


def config_from_yaml(path: Path, input_range: str) -> VQVAEConfig:
    """The architecture in a model.yaml, of a VQGAN or of a second-stage model around one.

    Raises:
        CheckpointError: It cannot be read, or describes something else.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        params = document["model"]["params"]
        if "first_stage_config" in params:  # the yaml of a second-stage (Net2Net) model
            params = params["first_stage_config"]["params"]
        values, codes, width = params["ddconfig"], params["n_embed"], params["embed_dim"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the yaml of a taming VQGAN: model.params needs ddconfig, n_embed and "
            "embed_dim."
        ) from error
    return config_from_ddconfig(values, codes, width, path, input_range)


def config_from_ddconfig(
    values: Mapping[str, Any], codes: Any, width: Any, path: Path, input_range: str
) -> VQVAEConfig:
    """The architecture that a `ddconfig` describes.

    Args:
        codes: taming's n_embed.
        width: taming's embed_dim.
        path: Where it was read, for messages.

    Raises:
        CheckpointError: A field is missing, or asks for what our VQ-VAE cannot be.
    """
    given = {**values, "n_embed": codes, "embed_dim": width}
    needed = (*SHAPING_DDCONFIG, "n_embed", "embed_dim")
    problems = [f"{key} is missing" for key in needed if given.get(key) is None]
    problems += [
        f"{key} is {values[key]}, only {expected} is supported"
        for key, expected in FIXED_DDCONFIG.items()
        if key in values and values[key] != expected
    ]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}.")
    shape = {key: values[key] for key in SHAPING_DDCONFIG}
    return VQVAEConfig.from_dict(
        {"codebook_size": codes, "code_dim": width, "input_range": input_range, **shape}
    )
