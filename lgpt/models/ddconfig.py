"""taming's description of a VQGAN, `ddconfig` with `n_embed` and `embed_dim`, as our config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lgpt.core.errors import CheckpointError
from lgpt.models.vqvae_config import VQVAEConfig, shown

# PyYAML's time grows with the text, and with the square of open brackets; real ones have a few KB.
_MAX_BYTES, _MAX_BRACKETS = 32_000, 500
FIXED_DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "in_channels": 3,
    "out_ch": 3,
    "resamp_with_conv": True,
}
# latent-diffusion's options of the same networks; the first two leave no trace in the weights.
FIXED_DDCONFIG.update(tanh_out=False, give_pre_end=False)
FIXED_DDCONFIG.update(use_linear_attn=False, attn_type="vanilla")
SHAPING_DDCONFIG = (
    "z_channels",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "resolution",
)


class _Loader(yaml.SafeLoader):
    """Plain values, and no `<<`: a few lines of merges in merges fill any memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(problem="merge keys (<<) are not read here")


def config_from_yaml(path: Path, input_range: str) -> VQVAEConfig:
    """The architecture in a model.yaml, of a VQGAN or of a second-stage model around one.

    Raises:
        CheckpointError: It cannot be read, or describes something else.
    """
    document = _read(path, lambda text: yaml.load(text, Loader=_Loader))
    try:
        params = document["model"]["params"]
        if "first_stage_config" in params:  # the yaml of a second-stage (Net2Net) model
            params = params["first_stage_config"]["params"]
        values, codes, width = params["ddconfig"], params["n_embed"], params["embed_dim"]
    except (LookupError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not the yaml of a taming VQGAN: model.params needs ddconfig, n_embed and "
            "embed_dim."
        ) from error
    return _config(values, codes, width, path, input_range)


def config_from_json(path: Path, input_range: str) -> VQVAEConfig:
    """The architecture in the config.json of a Flax VQGAN, which is a ddconfig and the rest.

    Raises:
        CheckpointError: It cannot be read, or describes something else.
    """
    values = _read(path, json.loads)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} is not the config of a Flax VQGAN: it holds no fields.")
    return _config(values, values.get("n_embed"), values.get("embed_dim"), path, input_range)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; a model's config has at most "
                f"{_MAX_BYTES:,}, so this is something else."
            )
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > _MAX_BRACKETS:
            raise CheckpointError(
                f"{path} opens more than {_MAX_BRACKETS} brackets; a model's config does not."
            )
        return parse(text)
    except CheckpointError:
        raise
    except Exception as error:  # PyYAML's constructors fail as whatever they happen to ask for
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read: {words}.") from error


def _config(values: Any, codes: Any, width: Any, path: Path, input_range: str) -> VQVAEConfig:
    """taming's n_embed is `codes`, its embed_dim is `width`."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path}: ddconfig holds no fields.")
    given = {**values, "n_embed": codes, "embed_dim": width}
    needed = (*SHAPING_DDCONFIG, "n_embed", "embed_dim")
    problems = [f"{key} is missing" for key in needed if given.get(key) is None]
    problems += [
        f"{key} is {shown(values[key])}, only {expected} is supported"
        for key, expected in FIXED_DDCONFIG.items()
        if key in values and values[key] != expected
    ]
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}.")
    shape = {key: values[key] for key in SHAPING_DDCONFIG}
    try:
        return VQVAEConfig.from_dict(
            {"codebook_size": codes, "code_dim": width, "input_range": input_range, **shape}
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
