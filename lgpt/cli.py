"""`lgpt ...`: one typed function a command; it wires, it decides nothing.

Heavy imports stand inside the commands, so that `--help` and a wrong config need no torch.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import typer

from lgpt.cli_bench import bench_app
from lgpt.cli_checkpoint import checkpoint_app
from lgpt.cli_evaluate import evaluate
from lgpt.cli_models import convert, export
from lgpt.cli_parts import (
    CONFIG,
    DDCONFIG,
    JSON,
    LARGEST_SEED,
    OVERRIDES,
    SOURCE_OPTION,
    load_run,
    load_transformer_run,
    print_table,
)
from lgpt.core.distributed import leave_process_group, rank, world_size
from lgpt.core.errors import LgptError, SettingsError
from lgpt.core.logging import configure_logging

app = typer.Typer(
    name="lgpt",
    help="Train a GPT-style transformer that writes images as VQ-VAE tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(
    help="Look at a run config before it costs anything.", no_args_is_help=True
)
vqvae_app = typer.Typer(help="Work with a VQ-VAE on its own.", no_args_is_help=True)
mlflow_app = typer.Typer(help="Keep MLflow in step with run folders.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(config_app, name="config")
app.add_typer(mlflow_app, name="mlflow")
app.add_typer(vqvae_app, name="vqvae")

_TEXT_ENCODER = typer.Option(
    None, help="hub name or folder of a CLIP model: short for text.encoder=..."
)
_RANKS = typer.Option(1, help="ranks that the DeepSpeed config is resolved for", min=1)


def main() -> None:
    """Entry point; an LgptError is printed without a traceback and decides the exit code."""
    # DeepSpeed's launcher puts --local_rank=N before the command; the environment says the same.
    argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    try:
        configure_logging()
        app(args=argv, prog_name="lgpt", standalone_mode=True)
    except LgptError as error:
        _tell(error)
        sys.exit(error.exit_code)


def _tell(error: LgptError) -> None:
    try:
        number = rank()
    except SettingsError:  # this is what is being told
        number = 0
    if number == 0:
        print(f"lgpt: {error}", file=sys.stderr, flush=True)
        return
    # The launcher ends all ranks as soon as one exits: rank 0 gets time to print what all ranks
    # found.
    time.sleep(2)
    if not isinstance(error, SettingsError):
        print(f"lgpt: [rank {number}] {error}", file=sys.stderr, flush=True)


@app.command()
def train(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    text_encoder: Optional[str] = _TEXT_ENCODER,
) -> None:
    """Train a run, or go on with it from its newest checkpoint.

    By hand it is one process; on N GPUs (or N CPU processes):

        deepspeed --num_gpus N --module lgpt train CONFIG [section.key=value ...]

    Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and exit with 75; the same command goes on.
    """
    from lgpt.settings.deepspeed import resolve_deepspeed_config

    run = load_run(config, overrides, text_encoder)
    ds_config = resolve_deepspeed_config(run, world_size())
    from lgpt.training.train import train as train_run

    train_run(run, ds_config)
    leave_process_group()


@app.command()
def prepare(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    text_encoder: Optional[str] = _TEXT_ENCODER,
    as_json: bool = JSON,
) -> None:
    """Encode a run's pictures and captions once into its latent cache.

    It ends with a report: pictures, bad ones left out, use and entropy of the codes, captions cut.
    Killed, the same command goes on where it was; on several GPUs each rank does its share:

        deepspeed --num_gpus N --module lgpt prepare CONFIG
    """
    run = load_transformer_run(config, overrides, text_encoder)
    from lgpt.training.encode_latents import prepare_latent_cache

    reports = prepare_latent_cache(run)
    leave_process_group()
    if as_json and reports:
        print(json.dumps({"caches": reports}))


app.command()(convert)
app.command()(export)


@app.command()
def sample(
    model: Path = typer.Argument(..., help="a model folder written by `lgpt convert`"),
    prompt: Optional[list[str]] = typer.Option(None, help="a prompt; may be given several times"),
    prompts_file: Optional[Path] = typer.Option(None, help="a text file, one prompt a line"),
    out: Path = typer.Option(Path("samples.png"), help="PNG: one grid; a folder: one PNG each"),
    images_per_prompt: int = typer.Option(
        1, min=1, help="the first with --seed, the next with --seed + 1, ..."
    ),
    best: Optional[int] = typer.Option(
        None, min=1, help="keep so many of a prompt's pictures, best first, as CLIP scores them"
    ),
    clip: Optional[str] = typer.Option(
        None, help="hub name or folder of that CLIP; default: the model's text encoder"
    ),
    unconditional: int = typer.Option(0, min=0, help="draw this many pictures without a prompt"),
    complete: Optional[Path] = typer.Option(
        None, help="a picture: its upper part is kept, what is below it is drawn"
    ),
    keep: Optional[float] = typer.Option(
        None, help="share of --complete that is kept; default: 0.5"
    ),
    guidance: Optional[float] = typer.Option(None, help="guidance scale; default: the model's"),
    guidance_schedule: Optional[str] = typer.Option(
        None, help="constant, or rising from the first token to the last: linear, cosine"
    ),
    guidance_power: Optional[float] = typer.Option(
        None, help="above 1 guidance comes later; cosine with 2.5 is RAR's power-cosine"
    ),
    temperature: Optional[float] = typer.Option(None, help="below 1 prefers likely tokens"),
    top_k: Optional[int] = typer.Option(None, help="draw among so many likeliest; 0 = all"),
    top_p: Optional[float] = typer.Option(None, help="draw among this much probability; 1 = all"),
    seed: int = typer.Option(
        0, min=0, max=LARGEST_SEED, help="the same prompt and seed give the same picture"
    ),
    preview: Optional[Path] = typer.Option(
        None, help="a PNG, written anew after every quarter of the rows"
    ),
    dtype: str = typer.Option(
        "auto",
        help="of the weights: auto (bf16 where it is fast, else fp32), bf16, fp32, or int8, with "
        "which CPUs that have AVX-512 draw one picture faster and which changes pictures; `lgpt "
        "bench dtypes` shows both",
    ),
) -> None:
    """Draw pictures from prompts."""
    from lgpt.sampling.draw_to_file import Choices, draw_to_file, prompts_from

    prompts = prompts_from(prompt or [], prompts_file, unconditional)
    draw_to_file(
        model,
        prompts,
        out,
        unconditional=unconditional,
        images_per_prompt=images_per_prompt,
        choices=Choices(guidance, guidance_schedule, guidance_power, temperature, top_k, top_p),
        seed=seed,
        best=best,
        clip=clip,
        complete=complete,
        keep=keep,
        preview=preview,
        dtype=dtype,
    )


app.command()(evaluate)


@app.command()
def report(
    runs: list[Path] = typer.Argument(..., help="run folders"), as_json: bool = JSON
) -> None:
    """Steps, time, losses and measured accuracy of runs, side by side."""
    from lgpt.evaluation.report import report_table, run_report

    reports = [run_report(folder) for folder in runs]
    print_table(report_table(reports), {"runs": reports}, as_json)


@vqvae_app.command("inspect")
def inspect_command(
    source: str = typer.Argument(..., help="hub name, folder or file of a VQ-VAE"),
    kind: Optional[str] = SOURCE_OPTION,
    ddconfig: Optional[str] = DDCONFIG,
    images: Optional[Path] = typer.Option(None, help="a picture or a folder of pictures"),
    out: Optional[Path] = typer.Option(
        None, help="PNG of inputs above reconstructions; default: reconstructions.png"
    ),
    resolution: Optional[int] = typer.Option(
        None, min=1, help="side that pictures are cut to; default: the one of its config"
    ),
    max_images: int = typer.Option(16, min=1, help="so many pictures are used"),
    as_json: bool = JSON,
) -> None:
    """Say what a VQ-VAE's files hold; with --images, send pictures through it and back."""
    from lgpt.evaluation.vqvae_inspection import inspect_vqvae, inspection_table

    result = inspect_vqvae(
        source,
        source=kind,
        ddconfig=ddconfig,
        images=images,
        out=out,
        resolution=resolution,
        max_images=max_images,
    )
    print_table(inspection_table(result), result, as_json)


@vqvae_app.command("convert")
def convert_vqvae_command(
    source: str = typer.Argument(..., help="hub name, folder or file of a VQ-VAE"),
    out: Path = typer.Argument(..., help="the folder to write"),
    kind: Optional[str] = SOURCE_OPTION,
    ddconfig: Optional[str] = DDCONFIG,
    to: str = typer.Option("lgpt", help="lgpt (safetensors), or taming (last.ckpt + model.yaml)"),
    overwrite: bool = typer.Option(False, help="replace these files in a folder that holds some"),
) -> None:
    """Write a VQ-VAE from anywhere as our own folder, or in the layout of taming-transformers."""
    from lgpt.evaluation.vqvae_inspection import open_guessed
    from lgpt.models.vqgan_import import check_conversion, convert_vqvae

    check_conversion(out, to=to, overwrite=overwrite)
    vqvae, _ = open_guessed(source, kind, ddconfig)
    files = convert_vqvae(vqvae, out, to=to, overwrite=overwrite)
    print(f"Wrote {' and '.join(str(file) for file in files)}.")


@vqvae_app.command("export-taming")
def export_taming_command(
    source: Path = typer.Argument(..., help="a phase 2 run folder or a VQ-VAE model folder"),
    out: Path = typer.Argument(..., help="folder for last.ckpt and model.yaml"),
) -> None:
    """Write a VQ-VAE in the layout of taming-transformers (last.ckpt + model.yaml)."""
    from lgpt.models.vqgan_import import export_taming, load_vqvae

    export_taming(load_vqvae("custom", str(source)), out)
    print(f"Wrote {out / 'last.ckpt'} and {out / 'model.yaml'}.")


@mlflow_app.command("sync")
def mlflow_sync(run: Path = typer.Argument(..., help="a run folder")) -> None:
    """Send MLflow what it missed of a run's metrics.jsonl while it was away."""
    from lgpt.tracking.run_tracker import replay

    print(f"MLflow run {replay(run)} now holds every line of {run / 'metrics.jsonl'}.")


@config_app.command("show")
def config_show(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    text_encoder: Optional[str] = _TEXT_ENCODER,
    ranks: int = _RANKS,
    as_json: bool = JSON,
) -> None:
    """Print the resolved run config and the resolved DeepSpeed JSON."""
    from lgpt.settings.deepspeed import resolve_deepspeed_config
    from lgpt.settings.show import as_json_object, render

    run = load_run(config, overrides, text_encoder, ranks)
    ds_config = resolve_deepspeed_config(run, ranks)
    print(f"# {_counted_parameters(run)}")
    print(render(run, ds_config))
    if as_json:
        print(json.dumps(as_json_object(run, ds_config)))


@config_app.command("options")
def config_options(
    config: str = CONFIG,
    wanted: Optional[list[str]] = typer.Argument(
        None, help="sections or settings, such as transformer, data.crops or dropout; default: all"
    ),
    as_json: bool = JSON,
) -> None:
    """List a run config's settings: value, what is allowed, what it does.

    lgpt config options phase3_500m transformer blocks
    """
    from lgpt.settings.options import options_of, options_table

    options = options_of(load_run(config, None, ranks=1), wanted or [])
    result = {"settings": [asdict(option) for option in options]}
    print_table(options_table(options, config), result, as_json)


@config_app.command("validate")
def config_validate(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    text_encoder: Optional[str] = _TEXT_ENCODER,
    ranks: int = _RANKS,
) -> None:
    """Say whether a run config and its DeepSpeed config fit together; all problems at once."""
    from lgpt.settings.deepspeed import resolve_deepspeed_config

    run = load_run(config, overrides, text_encoder, ranks)
    resolve_deepspeed_config(run, ranks)
    print(
        f"{config}: right for {ranks} rank(s); phase {run.phase} trains the {run.trains}, "
        f"{_counted_parameters(run)}."
    )


def _counted_parameters(run: Any) -> str:
    from lgpt.planning.parameters import discriminator_parameters, run_parameters
    from lgpt.settings.phases import Phase2

    try:
        counted = f"{run_parameters(run):,} parameters"
        if isinstance(run, Phase2) and run.loss.adversarial != "none":
            return f"{counted}, discriminator {discriminator_parameters(run.discriminator):,}"
        return counted
    except SettingsError as error:
        return f"parameters not counted: {error}"
