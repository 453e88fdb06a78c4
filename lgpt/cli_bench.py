"""`lgpt bench ...`: measure this machine with a run's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from lgpt.cli_parts import (
    CONFIG,
    JSON,
    OVERRIDES,
    load_run,
    load_transformer_run,
    load_vqvae_run,
    print_table,
)
from lgpt.core.errors import SettingsError

bench_app = typer.Typer(help="Measure this machine with a run's own code.", no_args_is_help=True)


@bench_app.command("prepare")
def bench_prepare_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    images: int = typer.Option(64, min=1, help="training pictures that are prepared"),
    rounds: int = typer.Option(3, min=1, help="medians over so many rounds are given"),
    random_vqvae: bool = typer.Option(
        False, "--random-vqvae", help="random weights where the run's VQ-VAE is missing"
    ),
    as_json: bool = JSON,
) -> None:
    """Compare `lgpt prepare` with a bare loop over the VQ-VAE's encoder: images a second."""
    run = load_transformer_run(config, overrides)
    from lgpt.training.bench_prepare import bench_prepare, prepare_table

    result = bench_prepare(run, images=images, rounds=rounds, random_vqvae=random_vqvae)
    print_table(prepare_table(result), result, as_json)


@bench_app.command("train")
def bench_train_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    steps: int = typer.Option(3, min=1, help="measured steps a round"),
    rounds: int = typer.Option(5, min=1, help="medians over so many rounds are given"),
    words: int = typer.Option(20, min=1, help="text tokens a picture"),
    peers: bool = typer.Option(
        False, "--peers", help="also LlamaGen's step and transformers' GPT2 with cross-attention"
    ),
    find_micro_batch: bool = typer.Option(
        False, "--find-micro-batch", help="first look for the largest micro batch that fits"
    ),
    memory_gib: Optional[float] = typer.Option(
        None, min=0.1, help="for --find-micro-batch; default on a CPU: 0.9 of what is available"
    ),
    ranks: int = typer.Option(
        1, min=1, help="processes (GPUs) of this machine; then communication is measured too"
    ),
    as_json: bool = JSON,
) -> None:
    """Measure a run's training step: rates, parts, memory, use of the device; needs no data.

    Latents come from the run's `latent_cache` where it is there, else from a random one.
    `batch.micro_batch_images=` says how many pictures. Each measurement is a process of its own.
    """
    run = load_transformer_run(config, overrides)
    from lgpt.training.bench_train import bench_train, train_table

    result = bench_train(
        run,
        steps=steps,
        rounds=rounds,
        words=words,
        with_peers=peers,
        find_micro_batch=find_micro_batch,
        memory_gib=memory_gib,
        ranks=ranks,
    )
    print_table(train_table(result), result, as_json)


@bench_app.command("loader")
def bench_loader_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    batches: int = typer.Option(200, min=1, help="batches a round"),
    rounds: int = typer.Option(5, min=1, help="medians over so many rounds are given"),
    as_json: bool = JSON,
) -> None:
    """Measure random batches from a run's latent cache: rates, opening, memory."""
    run = load_transformer_run(config, overrides)
    from lgpt.training.bench_loader import bench_loader, loader_table

    result = bench_loader(run, batches=batches, rounds=rounds)
    print_table(loader_table(result), result, as_json)


@bench_app.command("save")
def bench_save_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    steps: int = typer.Option(10, min=2, help="steps a measurement, with one save in it"),
    rounds: int = typer.Option(5, min=1, help="medians over so many rounds are given"),
    words: int = typer.Option(20, min=1, help="text tokens a picture"),
    work: Path = typer.Option(
        Path("bench_save"), help="scratch folder on the disk that is meant; removed at the end"
    ),
    as_json: bool = JSON,
) -> None:
    """Measure what a checkpoint costs: waited for, or in the background; needs no data."""
    run = load_transformer_run(config, overrides)
    from lgpt.training.bench_save import bench_save, save_table

    result = bench_save(run, steps=steps, rounds=rounds, words=words, work=work)
    print_table(save_table(result), result, as_json)


@bench_app.command("sample")
def bench_sample_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    batch: list[int] = typer.Option([1, 16], min=1, help="pictures at a time; may be repeated"),
    rounds: int = typer.Option(5, min=1, help="medians over so many rounds are given"),
    tokens: Optional[int] = typer.Option(
        None, min=2, help="draw only a picture's last so many tokens"
    ),
    words: int = typer.Option(20, min=1, max=77, help="text tokens of a prompt"),
    peers: bool = typer.Option(
        True,
        help="also LlamaGen's sampler and transformers' GPT2, at equal parameters; text only",
    ),
    int8: bool = typer.Option(False, "--int8", help="also ours with 8-bit weights (CPU)"),
    as_json: bool = JSON,
) -> None:
    """Measure drawing: tokens a second, beside two others and the memory bound.

    With guidance where the run reads text; an unconditional one alone, without.
    """
    run = load_transformer_run(config, overrides)
    from lgpt.sampling.bench_sample import bench_sample, sample_table

    result = bench_sample(
        run, batches=batch, rounds=rounds, tokens=tokens, words=words, peers=peers, int8=int8
    )
    print_table(sample_table(result), result, as_json)


@bench_app.command("dtypes")
def bench_dtypes_command(
    model: Path = typer.Argument(..., help="a model folder written by `lgpt convert`"),
    prompt: Optional[list[str]] = typer.Option(None, help="a prompt; may be given several times"),
    prompts_file: Optional[Path] = typer.Option(None, help="a text file, one prompt a line"),
    guidance: Optional[float] = typer.Option(None, help="guidance scale; default: the model's"),
    out: Path = typer.Option(Path("dtypes.png"), help="PNG of the pictures side by side"),
    as_json: bool = JSON,
) -> None:
    """Draw a model's pictures with fp32, bf16 and int8 weights: speed, and tokens changed."""
    from lgpt.sampling.bench_dtypes import bench_dtypes, dtypes_table
    from lgpt.sampling.draw_to_file import prompts_of

    result = bench_dtypes(model, prompts_of(prompt or [], prompts_file), out, guidance)
    print_table(dtypes_table(result), result, as_json)


@bench_app.command("vqvae")
def bench_vqvae_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    steps: int = typer.Option(1000, min=2, help="optimizer steps of our recipe"),
    measurements: int = typer.Option(10, min=1, help="so often both are measured on the way"),
    as_json: bool = JSON,
) -> None:
    """Compare phase 2 with LlamaGen's recipe in plain PyTorch, at equal steps and at equal time."""
    run = load_vqvae_run(config, overrides)
    from lgpt.training.bench_recipe import bench_recipe, recipe_table

    result = bench_recipe(run, steps=steps, measurements=measurements)
    print_table(recipe_table(result), result, as_json)


@bench_app.command("quantizers")
def bench_quantizers_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    minutes: float = typer.Option(5.0, min=0.001, help="training time of each quantizer"),
    measurements: int = typer.Option(12, min=1, help="so often each is measured on the way"),
    quantizer: Optional[list[str]] = typer.Option(
        None,
        help="gradient, ema, unit_gradient, unit_gradient_entropy or unit_ema; may be repeated; "
        "default: all",
    ),
    plot: Path = typer.Option(
        Path("quantizers.png"),
        help="PNG of usage and PSNR over time; a .json beside it keeps the figures, also half-way",
    ),
    as_json: bool = JSON,
) -> None:
    """Train a phase 2 config with every quantizer for equal time; the curves in one picture.

    gradient is taming's wide codebook, ema the same as moving averages with restarts of dead codes
    (VQ-VAE-2, Jukebox), unit_gradient LlamaGen's: unit length, 8 wide; unit_gradient_entropy adds
    IBQ's regulariser, unit_ema is ema at unit length. Pictures, order and seed are the same; on a
    CPU their own time counts, so others on the machine disturb nobody. Ctrl-C shows what there is.

        lgpt bench quantizers demo/phase2_openmoji_f8 vqvae.codebook_size=16384 --minutes 6
    """
    run = load_vqvae_run(config, overrides)
    from lgpt.training.bench_quantizers import (
        QUANTIZERS,
        bench_quantizers,
        plot_quantizers,
        quantizer_table,
    )

    result = bench_quantizers(
        run,
        minutes=minutes,
        measurements=measurements,
        names=tuple(quantizer or QUANTIZERS),
        out=plot.with_suffix(".json"),
    )
    plot_quantizers(result, plot)
    print_table(quantizer_table(result), result, as_json)


@bench_app.command("vqvae-step")
def bench_vqvae_step_command(
    config: str = CONFIG,
    overrides: Optional[list[str]] = OVERRIDES,
    rounds: int = typer.Option(9, min=1, help="medians over so many rounds are given"),
    as_json: bool = JSON,
) -> None:
    """Compare phase 2's whole step with its engines alone and its parts in plain PyTorch.

    What the step costs above them is host work: ours above the engines, ZeRO's above the parts.
    """
    run = load_vqvae_run(config, overrides)
    from lgpt.training.bench_vqvae_step import bench_vqvae_step, step_table

    result = bench_vqvae_step(run, rounds=rounds)
    print_table(step_table(result), result, as_json)


@bench_app.command("convert")
def bench_convert_command(
    checkpoint: Optional[Path] = typer.Argument(
        None, help="a checkpoint, as in `lgpt convert`; default: one written for this, with --ranks"
    ),
    config: str = typer.Option(
        "phase3_500m", help="run config whose transformer the written checkpoint holds"
    ),
    ranks: int = typer.Option(8, min=1, help="ranks that seem to have saved it"),
    stage: Optional[list[int]] = typer.Option(
        None, min=2, max=3, help="ZeRO stage of it; may be given twice; default: 2 and 3"
    ),
    rounds: int = typer.Option(3, min=1, help="medians over so many rounds are given"),
    work: Path = typer.Option(
        Path("bench_convert"), help="scratch folder; 22 bytes a parameter, removed at the end"
    ),
    as_json: bool = JSON,
) -> None:
    """Compare `lgpt convert` with DeepSpeed's zero_to_fp32: seconds, peak memory, each tensor.

    The checkpoint that is written holds random numbers in DeepSpeed's format: it needs one rank's
    memory instead of a training on 8 GPUs.
    """
    from lgpt.checkpoint.bench_convert import bench_checkpoint, bench_written, convert_table

    if checkpoint is not None:
        if stage:
            raise SettingsError("--stage is for a checkpoint that is written; one is given.")
        results = [bench_checkpoint(checkpoint, work, rounds=rounds)]
    else:
        run = load_run(config, None, ranks=1)
        results = bench_written(run, stage or [2, 3], ranks=ranks, work=work, rounds=rounds)
    print_table(convert_table(results), {"conversions": results}, as_json)
