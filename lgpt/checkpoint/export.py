"""From a run to a folder that stands alone: `lgpt convert RUN OUT`.

transformer run                         phase 2 run
config.json   model.safetensors         config.json   model.safetensors
pipeline.json  how to draw with it      README.md
vqvae/         config and weights       export.json
text_encoder/  when it is a folder
README.md      the model card
export.json    where it came from, sha256 of each file
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from lgpt import __version__
from lgpt.checkpoint.convert import merged_weights
from lgpt.checkpoint.folders import newest_checkpoint, verify
from lgpt.checkpoint.manifest import FILE_NAME as MANIFEST
from lgpt.checkpoint.manifest import Manifest, list_files, read_manifest
from lgpt.checkpoint.model_card import Export, model_card, source_commit
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.core.files import (
    sha256_of_file,
    sync_folder,
    write_json_atomically,
    write_text_atomically,
)
from lgpt.core.logging import get_logger
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.models.strict_loading import load_strictly
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig
from lgpt.settings.phases import Phase2, RunSettings
from lgpt.settings.run import load_run_settings

_PROVENANCE = "export.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_log = get_logger(__name__)


@dataclass(frozen=True)
class _Trained:
    """A checkpoint and what lies in its folder: run config and model_config.json."""

    step_folder: Path
    manifest: Manifest
    run: RunSettings
    described: dict[str, Any]


def convert_run(source: Path, out: Path, *, dtype: str = "fp32", overwrite: bool = False) -> Export:
    """Make a model folder from a run's newest whole checkpoint, or from one step folder.

    Built beside `out` and renamed at the end, so `out` is whole or absent.

    Args:
        source: `runs/<name>` or `runs/<name>/checkpoints/step_<n>`.
        out: New, empty, or (with `overwrite`) an earlier export.
        dtype: fp32 or bf16, of the trained model's weights; the VQ-VAE of a transformer run stays
            float32.
        overwrite: Replace an earlier export.

    Raises:
        CheckpointError: There is no whole checkpoint, its parts do not fit, the VQ-VAE is no longer
            the one it was trained on, or `out` holds something else.
        SettingsError: `dtype` is neither fp32 nor bf16, or the run config no longer loads.
    """
    if dtype not in _DTYPES:
        raise SettingsError(f"dtype '{dtype}' is unknown; allowed: {', '.join(_DTYPES)}.")
    _refuse_foreign(out, overwrite)
    trained = _open(_step_folder(source))
    staging = out.with_name(f".{out.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        export = _build(trained, staging, out, dtype)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _log.info("%s: %s of step %d, %s", out, export.kind, export.step, dtype)
    return export


def _step_folder(source: Path) -> Path:
    step_folder = source if (source / MANIFEST).is_file() else newest_checkpoint(source)
    if step_folder is None:
        raise CheckpointError(
            f"{source} holds no whole checkpoint: give a run folder (runs/<name>) or a step folder "
            "(runs/<name>/checkpoints/step_<n>)."
        )
    if problems := verify(step_folder, deep=True):
        raise CheckpointError(f"{step_folder} is damaged: {'; '.join(problems)}.")
    return step_folder


def _open(step_folder: Path) -> _Trained:
    manifest = read_manifest(step_folder)
    run = load_run_settings(step_folder / "config.yaml", environ={}, check_deepspeed=False)
    described = json.loads((step_folder / "model_config.json").read_text())
    return _Trained(step_folder, manifest, run, described)


def _build(trained: _Trained, staging: Path, out: Path, dtype: str) -> Export:
    """Write the whole model folder into `staging`."""
    run, described = trained.run, trained.described
    weights = merged_weights(trained.step_folder)
    model = _save_trained_model(described, weights, staging, _DTYPES[dtype])
    if not isinstance(run, Phase2):
        _save_vqvae(described["vqvae"], staging / "vqvae")
        encoder = _save_text_encoder(described["text_encoder"], staging)
        _write_pipeline(run, described["text_encoder"], encoder, staging)
    files = {name: sha256_of_file(staging / name) for name in list_files(staging)}
    count = sum(parameter.numel() for parameter in model.parameters())
    export = Export(out, described["kind"], trained.manifest.step, count, dtype, files)
    card = model_card(export, run, described, trained.step_folder.name)
    write_text_atomically(staging / "README.md", card)
    _write_provenance(export, trained, staging)
    return export


def _save_trained_model(
    described: Mapping[str, Any], weights: dict[str, Tensor], folder: Path, dtype: torch.dtype
) -> nn.Module:
    model: Union[LatentGPT, VQVAE]
    if described["kind"] == "latent_gpt":
        # The kernel of the training machine need not be there.
        config = {**described["config"], "attention": "auto"}
        model = LatentGPT(LatentGPTConfig.from_dict(config))
    else:
        model = VQVAE(VQVAEConfig.from_dict(described["config"]))
    load_strictly(model, weights, "The checkpoint")
    model.to(dtype).save_pretrained(folder)
    return model


def _save_vqvae(described: Mapping[str, Any], folder: Path) -> None:
    """Put the VQ-VAE beside the transformer; it must still be the one whose tokens were learned."""
    vqvae = load_vqvae(
        described["source"],
        described["checkpoint"],
        ddconfig=described["ddconfig"],
        input_range=described["input_range"],
    )
    digest = vqvae.weights_digest()
    if digest != described["digest"]:
        raise CheckpointError(
            f"The VQ-VAE in {described['checkpoint']} has changed since the transformer was "
            f"trained on its tokens (weights digest {described['digest'][:12]} then, {digest[:12]} "
            "now): bring the old one back, or train again."
        )
    vqvae.save_pretrained(folder)


def _save_text_encoder(described: Optional[Mapping[str, Any]], staging: Path) -> Optional[str]:
    """Copy a local text encoder; returns what pipeline.json calls it.

    It must still be the one that was trained with. One of the hub is compared by its digest when
    the pipeline opens it.
    """
    if described is None:
        return None
    name = str(described["name"])
    if not Path(name).is_dir():
        if described["is_random"]:
            raise CheckpointError(
                f"The random text encoder {name} that the transformer was trained with is gone, "
                "and no hub has it: bring its folder back, or run from the folder in which the "
                "training was started."
            )
        return name
    digest = ClipTextEncoder.from_pretrained(name).digest
    if described.get("digest", digest) != digest:  # older checkpoints hold none
        raise CheckpointError(
            f"The text encoder in {name} has changed since the transformer was trained with it "
            f"(digest {described['digest'][:12]} then, {digest[:12]} now): bring the old one back, "
            "or train again."
        )
    shutil.copytree(name, staging / "text_encoder")
    return "text_encoder"


def _write_pipeline(
    run: RunSettings, described: Optional[Mapping[str, Any]], encoder: Optional[str], staging: Path
) -> None:
    assert not isinstance(run, Phase2)
    sampling = run.sampling.model_dump(include={"guidance", "temperature", "top_k", "top_p"})
    pipeline = {
        "vqvae": "vqvae",
        "text_encoder": encoder,
        "text_encoder_is_random": bool(described and described["is_random"]),
        "text_encoder_digest": None if described is None else described.get("digest"),
        "sampling": sampling,
    }
    write_json_atomically(staging / "pipeline.json", pipeline)


def _write_provenance(export: Export, trained: _Trained, staging: Path) -> None:
    provenance = {
        "made_by": f"lgpt {__version__}",
        "source_commit": source_commit(),
        "run": trained.run.name,
        "checkpoint": str(trained.step_folder.resolve()),
        "checkpoint_saved_with": trained.manifest.versions,
        "step": export.step,
        "kind": export.kind,
        "dtype": export.dtype,
        "num_parameters": export.num_parameters,
        "sha256": export.files,
    }
    write_json_atomically(staging / _PROVENANCE, provenance)


def _refuse_foreign(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / _PROVENANCE).is_file():
        raise CheckpointError(
            f"{out} holds something that is no export of lgpt: give another folder."
        )
    if not overwrite:
        raise CheckpointError(
            f"{out} holds an earlier export: give another folder, or --overwrite to replace it."
        )


def _publish(staging: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)
