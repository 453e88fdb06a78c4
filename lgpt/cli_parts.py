"""What several files of commands share: options, loading a run config, printing a table."""

from __future__ import annotations

import json
import sys
from typing import Any, Optional

import typer

from lgpt.core.distributed import world_size
from lgpt.core.errors import SettingsError

CONFIG = typer.Argument(..., help="a YAML file, or a shipped name such as demo/phase3_shapes")
OVERRIDES = typer.Argument(None, help="section.key=value ..., wins over the file")
SOURCE_OPTION = typer.Option(
    None,
    "--source",
    help="pretrained_hf, pretrained_taming, pretrained_llamagen or custom; default: told by the "
    "files",
)
DDCONFIG = typer.Option(
    None, help="the model.yaml of a taming .ckpt, when it does not lie beside it"
)
LARGEST_SEED = 2**62  # as in run configs
JSON = typer.Option(False, "--json", help="also print one JSON object on the last line")


def load_run(
    config: str,
    overrides: Optional[list[str]],
    text_encoder: Optional[str] = None,
    ranks: Optional[int] = None,
) -> Any:
    from lgpt.settings.run import load_run_settings

    words = list(overrides or [])
    if text_encoder is not None:
        words.append(f"text.encoder={text_encoder}")
    return load_run_settings(config, words, world_size=ranks or world_size())


def load_transformer_run(
    config: str, overrides: Optional[list[str]], text_encoder: Optional[str] = None
) -> Any:
    # Ranks that prepare share pictures, not a batch: any number of them fits.
    run = load_run(config, overrides, text_encoder, ranks=1)
    if run.trains != "transformer":
        raise SettingsError(
            f"Phase {run.phase} trains the VQ-VAE on pictures; only phases 1 and 3 have "
            "latents to prepare."
        )
    return run


def load_vqvae_run(config: str, overrides: Optional[list[str]]) -> Any:
    run = load_run(config, overrides, ranks=1)
    if run.trains != "vqvae":
        raise SettingsError(
            f"Phase {run.phase} trains a transformer; only phase 2 trains a VQ-VAE, such as "
            "demo/phase2_openmoji_f8."
        )
    return run


def print_table(table: Any, result: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console

    # Not a terminal: wide enough that no row is broken in a log file.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if as_json:
        print(json.dumps(result))
