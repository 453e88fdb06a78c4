"""From a ZeRO checkpoint to a folder that stands alone: `lgpt convert CHECKPOINT OUT`.

transformer run                         phase 2 run            saved by DeepSpeed alone
config.json   model*.safetensors        config.json            model*.safetensors
model.safetensors.index.json            model*.safetensors     model.safetensors.index.json
pipeline.json  how to draw with it      model...index.json     README.md
vqvae/         config and weights       README.md              export.json
text_encoder/  when it is a folder      export.json
README.md      the model card
export.json    where it came from, sha256 of each file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch

from lgpt import __version__
from lgpt.checkpoint.average_files import takes_average
from lgpt.checkpoint.export_folder import PROVENANCE, refuse_full_disk, staged
from lgpt.checkpoint.folders import verify as problems_of_checkpoint
from lgpt.checkpoint.logits_check import LogitsCheck, check_logits
from lgpt.checkpoint.manifest import Manifest, list_files, read_manifest
from lgpt.checkpoint.model_card import Export, model_card, source_commit, weights_card
from lgpt.checkpoint.model_parts import save_parts
from lgpt.checkpoint.safetensors_writer import bytes_of, write_safetensors
from lgpt.checkpoint.sources import CheckpointPlace, find_checkpoint
from lgpt.checkpoint.zero_shards import ZeroShards
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.core.files import sha256_of_file, write_json_atomically, write_text_atomically
from lgpt.core.logging import get_logger
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.strict_loading import check_strictly
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.phases import Phase2, RunSettings
from lgpt.settings.run import load_run_settings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_SHARD_BYTES = 5 * 10**9

_log = get_logger(__name__)


@dataclass(frozen=True)
class _Trained:
    """What lies beside the weights in a step folder: manifest, run config, model_config.json."""

    manifest: Manifest
    run: RunSettings
    described: dict[str, Any]


def convert_run(
    source: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    overwrite: bool = False,
    tag: Optional[str] = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    copy_text_encoder: bool = False,
    verify: bool = False,
    ema: Optional[bool] = None,
) -> Export:
    """Make a model folder from a checkpoint, reading one rank's shard after the other.

    In memory are never more than the float32 part of one rank's shard and a few MiB of buffers,
    whatever the model's size. Built beside `out` and renamed at the end: `out` is whole or absent.

    Args:
        source: A run folder (its newest whole checkpoint), a step folder, or a folder that
            DeepSpeed alone saved; of that one only the weights can be written.
        out: New, empty, or (with `overwrite`) an earlier export.
        dtype: fp32 or bf16, of the trained model's weights; the VQ-VAE of a transformer run stays
            float32.
        overwrite: Replace an earlier export.
        tag: Which checkpoint in `source`.
        max_shard_bytes: Most bytes in one safetensors file.
        copy_text_encoder: Copy a text encoder of the hub too, instead of naming it.
        verify: Run the written model on inputs that the checkpoint keeps, and compare its logits
            with those of the training. This holds the whole model in memory.
        ema: The moving average of the weights, or those of the step itself; by default the average
            where the checkpoint has one.

    Raises:
        CheckpointError: There is no whole checkpoint, its parts do not fit, the VQ-VAE is no longer
            the one it was trained on, or `out` holds something else.
        SettingsError: `dtype` is neither fp32 nor bf16, or the run config no longer loads.
    """
    if dtype not in _DTYPES:
        raise SettingsError(f"dtype '{dtype}' is unknown; allowed: {', '.join(_DTYPES)}.")
    with staged(out, overwrite=overwrite) as staging:
        place = find_checkpoint(source, tag)
        trained = _open(place.step_folder) if place.step_folder is not None else None
        of_average = takes_average(place.engine_folder, ema)
        shards = ZeroShards(place.engine_folder, of_average=of_average)
        kind = "weights"
        if trained is not None:
            kind = trained.described["kind"]
            model = _model_without_weights(trained.described)
            check_strictly(model.state_dict(), _shapes(shards), str(place.engine_folder))
            model.save_config(staging)
            if not isinstance(trained.run, Phase2):
                save_parts(
                    trained.run, trained.described, staging, copy_text_encoder=copy_text_encoder
                )
        refuse_full_disk(staging, bytes_of(shards, _DTYPES[dtype]))
        write_safetensors(shards, staging, dtype=_DTYPES[dtype], max_shard_bytes=max_shard_bytes)
        files = {name: sha256_of_file(staging / name) for name in list_files(staging)}
        step = trained.manifest.step if trained is not None else shards.global_steps
        check = _check_logits(staging, place, trained, shards.is_average) if verify else None
        count = shards.num_parameters
        export = Export(out, kind, step, count, dtype, files, check, shards.is_average)
        _write_descriptions(export, place, trained, shards, staging)
    what = "the averaged weights" if export.is_average else "the weights"
    _log.info("%s: %s of step %d, %s, %s", out, export.kind, export.step, what, dtype)
    return export


def _check_logits(
    staging: Path, place: CheckpointPlace, trained: Optional[_Trained], of_average: bool
) -> LogitsCheck:
    if trained is None or place.step_folder is None or trained.described["kind"] != "latent_gpt":
        raise CheckpointError(
            f"{place.engine_folder} keeps no logits to compare with: only the checkpoints of "
            "transformer runs do; convert it without --verify."
        )
    precision = trained.manifest.engines[place.engine_folder.name].precision
    check = check_logits(staging, place.step_folder, precision, of_average=of_average)
    _log.info(
        "largest difference of %d logits from those of the training: %.3g (largest logit %.3g, %s)",
        check.count,
        check.largest_difference,
        check.largest_logit,
        precision,
    )
    return check


def _open(step_folder: Path) -> _Trained:
    if problems := problems_of_checkpoint(step_folder, deep=True):
        raise CheckpointError(f"{step_folder} is damaged: {'; '.join(problems)}.")
    run = load_run_settings(step_folder / "config.yaml", environ={}, check_deepspeed=False)
    described = json.loads((step_folder / "model_config.json").read_text())
    return _Trained(read_manifest(step_folder), run, described)


def _model_without_weights(described: Mapping[str, Any]) -> Union[LatentGPT, VQVAE]:
    """The model's names and shapes, without memory for its weights."""
    with torch.device("meta"):
        if described["kind"] == "latent_gpt":
            # The kernel of the training machine need not be there.
            config = {**described["config"], "attention": "auto"}
            return LatentGPT(LatentGPTConfig.from_dict(config))
        return VQVAE(VQVAEConfig.from_dict(described["config"]))


def _shapes(shards: ZeroShards) -> dict[str, torch.Tensor]:
    """Every name, aliases too, with a tensor of its shape that holds nothing."""
    return {
        name: torch.empty(shards.tensors[shards.aliases.get(name, name)].shape, device="meta")
        for name in shards.names
    }


def _write_descriptions(
    export: Export,
    place: CheckpointPlace,
    trained: Optional[_Trained],
    shards: ZeroShards,
    staging: Path,
) -> None:
    """README.md for people, export.json for programs."""
    card = (
        model_card(export, trained.run, trained.described, place.name)
        if trained is not None
        else weights_card(export, place.name, shards.stage, shards.ranks)
    )
    write_text_atomically(staging / "README.md", card)
    provenance = {
        "made_by": f"lgpt {__version__}",
        "source_commit": source_commit(),
        "run": trained.run.name if trained is not None else None,
        "checkpoint": str((place.step_folder or place.engine_folder).resolve()),
        "checkpoint_saved_with": (
            trained.manifest.versions
            if trained is not None
            else {"deepspeed": shards.deepspeed_version}
        ),
        "checkpoint_was_verified": trained is not None,
        "zero_stage": shards.stage,
        "ranks": shards.ranks,
        "step": export.step,
        "kind": export.kind,
        "dtype": export.dtype,
        "weights": "average" if export.is_average else "last",
        "num_parameters": export.num_parameters,
        "tied": dict(shards.aliases),
        "logits_check": None if export.logits_check is None else asdict(export.logits_check),
        "sha256": export.files,
    }
    write_json_atomically(staging / PROVENANCE, provenance)
