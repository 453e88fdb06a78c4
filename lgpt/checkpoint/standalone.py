"""`lgpt export`: one folder that turns prompts into pictures on any machine, without a hub.

What `lgpt convert` writes may name its text encoder by the hub; here its text tower lies beside the
transformer and the VQ-VAE, in the layout that `TextToImagePipeline.from_pretrained` reads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Optional

from lgpt.checkpoint.export import DEFAULT_SHARD_BYTES, convert_run
from lgpt.checkpoint.export_folder import PROVENANCE, refuse_full_disk, staged
from lgpt.checkpoint.manifest import list_files
from lgpt.checkpoint.model_card import with_checksums
from lgpt.checkpoint.model_parts import PIPELINE, copy_named_encoder
from lgpt.core.errors import CheckpointError, SettingsError
from lgpt.core.files import sha256_of_file, write_json_atomically, write_text_atomically
from lgpt.core.logging import get_logger

_CARD = "README.md"

_log = get_logger(__name__)


def export_model(
    source: Path,
    out: Path,
    *,
    dtype: Optional[str] = None,
    tag: Optional[str] = None,
    copy_text_encoder: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ema: Optional[bool] = None,
) -> None:
    """Write a folder with transformer, VQ-VAE and text encoder.

    Args:
        source: A model folder of `lgpt convert`, whose files are copied, or a checkpoint as for
            `convert_run`.
        out: New, empty, or (with `overwrite`) an earlier export.
        dtype: fp32 (default) or bf16; only of a checkpoint.
        tag: Which checkpoint in `source`; only of a checkpoint.
        copy_text_encoder: Copy it in; else a text encoder of the hub stays a name.
        overwrite: Replace an earlier export.
        max_shard_bytes: Most bytes in one safetensors file; only of a checkpoint.
        ema: As for `convert_run`; only of a checkpoint.

    Raises:
        CheckpointError: The source is damaged or no text-to-image model, the text encoder is out
            of reach or another one, or `out` holds something else.
        SettingsError: `dtype`, `tag` or `ema` is given for a model folder.
    """
    if not (source / PROVENANCE).is_file():
        convert_run(
            source,
            out,
            dtype=dtype or "fp32",
            tag=tag,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            copy_text_encoder=copy_text_encoder,
            ema=ema,
        )
        return
    if dtype is not None or tag is not None or ema is not None:
        raise SettingsError(
            f"{source} is a model folder already: --dtype, --tag and --ema are for checkpoints. "
            "Export the run, or leave them out."
        )
    provenance = _checked(source)
    with staged(out, overwrite=overwrite) as staging:
        refuse_full_disk(staging, sum((source / n).stat().st_size for n in provenance["sha256"]))
        for name in (*provenance["sha256"], _CARD):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, staging / name)
        if copy_text_encoder:
            _take_text_encoder_in(source, staging)
        files = [name for name in list_files(staging) if name != _CARD]
        provenance["sha256"] = {name: sha256_of_file(staging / name) for name in files}
        card = with_checksums((staging / _CARD).read_text(), provenance["sha256"])
        write_text_atomically(staging / _CARD, card)
        write_json_atomically(staging / PROVENANCE, provenance)
    _log.info("%s: a copy of %s that stands alone", out, source)


def _checked(folder: Path) -> dict[str, Any]:
    """The export.json of a model folder whose files are all as they were written."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text())
        recorded = dict(provenance["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / PROVENANCE} is damaged: {error}.") from error
    if PIPELINE not in recorded:
        raise CheckpointError(
            f"{folder} is no text-to-image model ({PIPELINE} is missing): export a transformer."
        )
    there = [name for name in recorded if (folder / name).is_file()]
    wrong = [name for name in there if sha256_of_file(folder / name) != recorded[name]]
    wrong += sorted(recorded.keys() - set(there))
    if wrong:
        raise CheckpointError(
            f"{folder} is not what was written: {', '.join(wrong[:5])} changed or gone. Convert "
            "the checkpoint again."
        )
    return dict(provenance)


def _take_text_encoder_in(source: Path, staging: Path) -> None:
    parts = json.loads((staging / PIPELINE).read_text())
    name = parts["text_encoder"]
    if name is None or (source / name).is_dir():
        return
    parts["text_encoder"] = copy_named_encoder(name, parts["text_encoder_digest"], staging)
    write_json_atomically(staging / PIPELINE, parts)
