"""The README.md of a model folder: what it is, what it was trained on, what it can't do."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lgpt import __version__
from lgpt.checkpoint.logits_check import LogitsCheck
from lgpt.settings.phases import Phase2, RunSettings

_CHECKSUMS_HEADING = "## sha256"


@dataclass(frozen=True)
class Export:
    """What an export is: facts for the card and for export.json.

    Attributes:
        folder: The model folder.
        kind: What config.json describes: latent_gpt or vqvae; `weights` where there is none.
        step: Optimizer steps of the checkpoint.
        num_parameters: Counted on the model.
        dtype: fp32 or bf16.
        files: sha256 of every file but export.json and README.md.
        logits_check: Result of `--verify`.
        is_average: It is the moving average of the weights, not those of the step itself.
    """

    folder: Path
    kind: str
    step: int
    num_parameters: int
    dtype: str
    files: dict[str, str]
    logits_check: Optional[LogitsCheck] = None
    is_average: bool = False


def model_card(
    export: Export, run: RunSettings, described: Mapping[str, Any], checkpoint: str
) -> str:
    """Markdown for people; the same facts for programs are in export.json."""
    if isinstance(run, Phase2):
        title, body = _vqvae(described)
    else:
        title, body = _transformer(described)
    data = run.data
    commit = source_commit()
    batch = run.batch.global_batch_images
    facts = [
        f"- parameters: {export.num_parameters:,}, stored as {export.dtype}",
        f"- trained on: `{data.dataset}`"
        + (f" (`{data.source}`)" if data.source else "")
        + f", {data.resolution}x{data.resolution} pixels",
        _about_weights(export),
        f"- steps: {export.step:,} of {batch:,} images ({export.step * batch:,} images seen)",
        f"- run: `{run.name}`, phase {run.phase}, seed {run.seed}; checkpoint `{checkpoint}`",
        f"- made by: lgpt {__version__}" + (f", commit {commit}" if commit else ""),
    ]
    parts = [f"# {run.name}: {title}", *body, "\n".join(facts)]
    return with_checksums("\n\n".join(parts), export.files)


def weights_card(export: Export, checkpoint: str, stage: int, ranks: int) -> str:
    """Markdown for weights of a checkpoint that tells nothing of the model around them."""
    facts = [
        f"- parameters: {export.num_parameters:,}, stored as {export.dtype}",
        f"- from: DeepSpeed checkpoint `{checkpoint}` of step {export.step:,}, ZeRO-{stage}, "
        f"{ranks} rank(s)",
        _about_weights(export),
        f"- made by: lgpt {__version__}",
    ]
    use = (
        "    from safetensors.torch import load_file\n\n"
        '    weights = load_file("model.safetensors")    # or each file that the index names'
    )
    parts = [f"# Weights of {checkpoint}", "\n".join(facts), use]
    return with_checksums("\n\n".join(parts), export.files)


def with_checksums(card: str, files: Mapping[str, str]) -> str:
    """A card with the sha256 of each file at its end, in place of earlier ones."""
    lines = [f"    {digest}  {name}" for name, digest in sorted(files.items())]
    body = card.split(_CHECKSUMS_HEADING)[0].rstrip()
    return "\n\n".join([body, _CHECKSUMS_HEADING, "\n".join(lines)]) + "\n"


def source_commit() -> Optional[str]:
    """The git commit of a checkout that lgpt runs from; None when it is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def _about_weights(export: Export) -> str:
    if export.is_average:
        return "- weights: the moving average over the steps (`training.ema_decay`)"
    return "- weights: those of the step itself, no moving average"


def _vqvae(described: Mapping[str, Any]) -> tuple[str, list[str]]:
    config = described["config"]
    factor = 2 ** (len(config["ch_mult"]) - 1)
    return "a VQ-VAE", [
        f"Turns pictures into tokens and back: {config['codebook_size']:,} codes, one token for "
        f"{factor}x{factor} pixels, in the architecture of taming-transformers' VQGAN.",
        "    from lgpt import load_vqvae\n\n"
        '    vqvae = load_vqvae("custom", "this-folder")\n'
        "    tokens = vqvae.encode(images)    # [B, 3, H, W] in [-1, 1] -> [B, h, w]\n"
        "    images = vqvae.decode(tokens)",
    ]


def _transformer(described: Mapping[str, Any]) -> tuple[str, list[str]]:
    config, vqvae, text = described["config"], described["vqvae"], described["text_encoder"]
    rows, columns = config["grid_height"], config["grid_width"]
    prompt = '["a red circle"]' if text is not None else "..."
    use = (
        f"    pictures = pipeline({prompt}, guidance=4.0, seed=0)"
        if text is not None
        else "    pictures = pipeline.unconditional(16, seed=0)"
    )
    body = [
        f"A transformer ({config['layers']} layers, hidden size {config['hidden']}) that writes a "
        f"picture as {rows}x{columns} tokens out of {config['codebook_size']:,}; the VQ-VAE in "
        "`vqvae/` turns them into pixels.",
        "    from lgpt import TextToImagePipeline\n\n"
        '    pipeline = TextToImagePipeline.from_pretrained("this-folder")\n' + use,
        f"VQ-VAE: source `{vqvae['source']}`, `{vqvae['checkpoint']}`, weights digest "
        f"`{vqvae['digest']}`.",
        _about_text(text),
    ]
    return "pictures from text" if text is not None else "pictures without text", body


def _about_text(text: Optional[Mapping[str, Any]]) -> str:
    if text is None:
        return "It was trained without text: there is nothing to prompt."
    if text["is_random"]:
        return (
            "**The text encoder is RANDOM**: a small CLIP text tower with random, untrained "
            "weights, made for machines without a hub. It tells captions apart by their words but "
            "knows no language: only words of the training captions mean anything, synonyms mean "
            "nothing."
        )
    return f"Text encoder: `{text['name']}`, a CLIP text tower, frozen in training."
