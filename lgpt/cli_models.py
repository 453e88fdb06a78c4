"""Commands that make model folders out of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from lgpt.core.errors import SettingsError


def convert(
    checkpoint: Path = typer.Argument(
        ...,
        help="a run folder (its newest checkpoint), one of its checkpoints/step_<n>, or a folder "
        "that DeepSpeed alone saved (then only the weights are written)",
    ),
    out: Path = typer.Argument(..., help="the model folder to write"),
    tag: Optional[str] = typer.Option(
        None,
        help="which checkpoint in CHECKPOINT: a step, latest, best (lowest validation loss), or "
        "DeepSpeed's tag",
    ),
    dtype: str = typer.Option("fp32", help="fp32 or bf16"),
    max_shard_size: str = typer.Option("5GB", help="most bytes in one safetensors file"),
    verify: bool = typer.Option(
        False,
        help="compare the written model's logits with those that training kept with the checkpoint",
    ),
    ema: Optional[bool] = typer.Option(
        None,
        "--ema/--no-ema",
        help="the moving average of the weights (training.ema_decay), or the weights of the step "
        "itself; default: the average where the checkpoint has one",
    ),
    overwrite: bool = typer.Option(False, help="replace a model folder that is there"),
) -> None:
    """Turn a ZeRO checkpoint into a model folder: safetensors, index, config, model card.

    The shards are read one after the other: memory for one rank's float32 weights is enough for
    any model. No file is unpickled into code.
    """
    from lgpt.checkpoint.export import convert_run
    from lgpt.checkpoint.safetensors_writer import parse_size

    export = convert_run(
        checkpoint,
        out,
        dtype=dtype,
        overwrite=overwrite,
        tag=tag,
        max_shard_bytes=parse_size(max_shard_size),
        verify=verify,
        ema=ema,
    )
    if export.logits_check is not None:
        print(f"largest difference of logits: {export.logits_check.largest_difference:.6g}")


def export(
    source: Path = typer.Argument(
        ..., help="a model folder written by `lgpt convert`, or a checkpoint as it takes them"
    ),
    out: Path = typer.Argument(..., help="the folder to write"),
    text_encoder: str = typer.Option(
        "copy", help="copy it in, or leave one of the hub as a name: reference"
    ),
    tag: Optional[str] = typer.Option(None, help="which checkpoint in SOURCE, as `lgpt convert`"),
    dtype: Optional[str] = typer.Option(None, help="fp32 (default) or bf16, of a checkpoint"),
    ema: Optional[bool] = typer.Option(
        None,
        "--ema/--no-ema",
        help="the moving average of the weights (training.ema_decay), or the weights of the step "
        "itself; default: the average where the checkpoint has one",
    ),
    overwrite: bool = typer.Option(False, help="replace a model folder that is there"),
) -> None:
    """Write one folder that is a text-to-image model on any machine, without a hub.

    Transformer, VQ-VAE and text encoder lie in it; TextToImagePipeline.from_pretrained opens it.
    """
    from lgpt.checkpoint.standalone import export_model

    if text_encoder not in ("copy", "reference"):
        raise SettingsError(
            f"--text-encoder '{text_encoder}' is unknown; allowed: copy, reference."
        )
    export_model(
        source,
        out,
        dtype=dtype,
        tag=tag,
        copy_text_encoder=text_encoder == "copy",
        overwrite=overwrite,
        ema=ema,
    )
