"""First weights of a run out of a model folder or a checkpoint: `init_from`.

DeepSpeed (0.19.8) has no safe way for it: a ZeRO-3 load of a tag without the optimizer takes the
weights of `latest`, whatever the tag. Here the shards of the checkpoint that is named are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from torch import Tensor, nn

from lgpt.checkpoint.average_files import takes_average
from lgpt.checkpoint.convert import merged_weights
from lgpt.checkpoint.export_folder import PROVENANCE
from lgpt.checkpoint.folders import verify
from lgpt.checkpoint.manifest import read_manifest
from lgpt.checkpoint.sources import find_checkpoint
from lgpt.core.distributed import is_rank_zero
from lgpt.core.errors import CheckpointError
from lgpt.core.logging import get_logger
from lgpt.engine.ranks import broadcast_from_rank_zero
from lgpt.models.model_folder import CONFIG_FILE, read_weights
from lgpt.models.strict_loading import check_strictly
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE, inference_state
from lgpt.models.vqvae_start import fitted_codes, refuse_another_architecture
from lgpt.settings.vqvae import FinetuningSettings

_KINDS = {"lgpt_latent_gpt": "latent_gpt", "lgpt_vqvae": "vqvae"}

_log = get_logger(__name__)


@dataclass(frozen=True)
class WarmStart:
    """Where the first weights of a run come from.

    Attributes:
        source: The model folder, or the folder of the checkpoint's shards.
        kind: model_folder or checkpoint; or who made the VQ-VAE, as in `finetuning.source`.
        step: Of the checkpoint; None otherwise.
        tensors: How many were taken: all of the model's.
        elements: Numbers in them.
        differences: Fields of the two model configs that differ, as [there, here]; none of them
            changes a tensor's shape.
        is_same_vqvae: Whether a transformer's weights were trained on the tokens of this run's
            VQ-VAE; None where nothing tells.
        weights: The moving `average`, which is taken of a checkpoint that has one, or those of the
            `last` step; None where nothing tells.
    """

    source: str
    kind: str
    step: Optional[int]
    tensors: int
    elements: int
    differences: dict[str, list[Any]]
    is_same_vqvae: Optional[bool]
    weights: Optional[str]


@dataclass(frozen=True)
class _Found:
    """What rank 0 saw; `model` is the model_config.json of the source, as far as it is known."""

    folder: Path
    kind: str
    step: Optional[int]
    model: Mapping[str, Any]
    weights: Optional[str] = None


def load_first_weights(
    model: nn.Module, source: Path, description: Mapping[str, Any]
) -> tuple[dict[str, Tensor], WarmStart]:
    """Put the weights of a model folder or a checkpoint into a fresh model. All ranks call it.

    Args:
        model: Whole and in float32 or on the meta device, before its engine is built.
        source: A model folder, a run folder (its newest whole checkpoint), a step folder, or a
            folder that DeepSpeed alone saved.
        description: What the run's `model_config.json` says of `model`.

    Returns:
        The weights (DeepSpeed will round its masters to bf16: `engine.build.set_masters`), and a
        report.

    Raises:
        CheckpointError: On every rank: there is nothing whole, or kind, names or shapes differ; it
            names them.
    """
    found = _look_on_rank_zero(source)
    kind = found.model.get("kind", description["kind"])
    if kind != description["kind"]:
        raise CheckpointError(
            f"init_from {source} holds a {kind}, this run trains a {description['kind']}: name "
            "another folder."
        )
    state: Mapping[str, Tensor]
    if found.kind == "model_folder":
        state = read_weights(found.folder)[0]
    else:
        state = merged_weights(found.folder, of_average=found.weights == "average")
    return _take(model, state, found, description, source)


def load_foreign_vqvae(
    model: VQVAE, source: str, finetuning: FinetuningSettings, description: Mapping[str, Any]
) -> tuple[dict[str, Tensor], WarmStart]:
    """Put the weights of a VQ-VAE that others trained into a fresh model. All ranks call it.

    Args:
        model: Whole and in float32, before its engine is built.
        source: Hub name, folder or file.
        finetuning: Says who made it.
        description: What the run's `model_config.json` says of `model`.

    Returns:
        As `load_first_weights`.

    Raises:
        CheckpointError: Its files are unusable, or its architecture is not the run's.
    """
    opened = load_vqvae(finetuning.source, source, ddconfig=finetuning.ddconfig)
    described = {"kind": "vqvae", "config": opened.config.to_dict()}
    found = _Found(Path(source), finetuning.source, None, described)
    return _take(model, inference_state(opened), found, description, Path(source))


def _take(
    model: nn.Module,
    state: Mapping[str, Tensor],
    found: _Found,
    description: Mapping[str, Any],
    source: Path,
) -> tuple[dict[str, Tensor], WarmStart]:
    differences = _differences(found.model.get("config", {}), description["config"])
    if isinstance(model, VQVAE):
        if "config" in found.model:
            there, here = found.model["config"], description["config"]
            refuse_another_architecture(there, here, f"init_from {source}")
        state = fitted_codes(state, model)
    try:
        check_strictly(model.state_dict(), state, f"init_from {source}")
    except CheckpointError as error:
        told = [f"{name} {there} there, {here} here" for name, (there, here) in differences.items()]
        raise CheckpointError(
            f"{error} The models differ in: {', '.join(told) or 'nothing that is written down'}. "
            "Only weights of the same shape can be taken."
        ) from error
    # A model that has shapes only takes the tensors themselves, with their dtype: a model folder
    # may be in bf16, and DeepSpeed would train a float32 run in it.
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    own = model.state_dict()
    state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=is_empty)
    report = WarmStart(
        source=str(found.folder.resolve() if found.folder.exists() else found.folder),
        kind=found.kind,
        step=found.step,
        tensors=len(state),
        elements=sum(tensor.numel() for tensor in state.values()),
        differences=differences,
        is_same_vqvae=_is_same_vqvae(found.model.get("vqvae"), description.get("vqvae")),
        weights=found.weights,
    )
    _tell(report)
    return dict(state), report


def _look_on_rank_zero(source: Path) -> _Found:
    """What every rank will read; a network file system may show ranks different things."""
    found: Optional[Union[_Found, str]] = None
    if is_rank_zero():
        try:
            found = _look_at(source)
        except CheckpointError as error:
            found = str(error)
    found = broadcast_from_rank_zero(found)
    if isinstance(found, str):
        raise CheckpointError(f"init_from: {found}")
    assert found is not None
    return found


def _look_at(source: Path) -> _Found:
    if (source / CONFIG_FILE).is_file():
        config = _read_json(source / CONFIG_FILE)
        kind = _KINDS.get(str(config.pop("model_type", None)))
        if kind is None:
            raise CheckpointError(
                f"{source / CONFIG_FILE} describes no model of lgpt (model_type)."
            )
        model: dict[str, Any] = {"kind": kind, "config": config}
        if (source / "pipeline.json").is_file():
            model["vqvae"] = {"digest": _read_json(source / "pipeline.json").get("vqvae_digest")}
        exported = source / PROVENANCE
        told = _read_json(exported).get("weights") if exported.is_file() else None
        return _Found(source, "model_folder", None, model, told)
    place = find_checkpoint(source)
    step_folder = place.step_folder
    weights = "average" if takes_average(place.engine_folder) else "last"
    if step_folder is None:
        return _Found(place.engine_folder, "checkpoint", None, {}, weights)
    if problems := verify(step_folder, deep=True):
        raise CheckpointError(f"{step_folder} is damaged: {'; '.join(problems[:3])}.")
    step = read_manifest(step_folder).step
    # Checkpoints of other makers of step folders need not hold one.
    described = step_folder / "model_config.json"
    model = _read_json(described) if described.is_file() else {}
    return _Found(place.engine_folder, "checkpoint", step, model, weights)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return values


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [there.get(name), here.get(name)]
        for name in sorted(there.keys() | here.keys())
        # The attention kernel is the machine's affair.
        if there and name != "attention" and there.get(name) != here.get(name)
    }


def _is_same_vqvae(
    there: Optional[Mapping[str, Any]], here: Optional[Mapping[str, Any]]
) -> Optional[bool]:
    digests = [None if each is None else each.get("digest") for each in (there, here)]
    return None if None in digests else digests[0] == digests[1]


def _tell(report: WarmStart) -> None:
    step = "" if report.step is None else f", step {report.step}"
    if report.weights == "average":
        step += ", the moving average of its weights"
    _log.info(
        "First weights from %s%s: all %d tensors, %s numbers",
        report.source,
        step,
        report.tensors,
        f"{report.elements:,}",
    )
    for name, (there, here) in report.differences.items():
        _log.info("  %s was %s there and is %s here", name, there, here)
    if report.is_same_vqvae is False:
        _log.warning(
            "They were trained on tokens of another VQ-VAE: the codes mean other things here, and "
            "the first loss will show it."
        )
