"""What stands beside the transformer in a model folder: VQ-VAE, text encoder, pipeline.json."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lgpt.core.errors import CheckpointError
from lgpt.core.files import write_json_atomically
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.vqgan_import import load_vqvae
from lgpt.settings.phases import TransformerRun

PIPELINE = "pipeline.json"


def save_parts(
    run: TransformerRun, described: Mapping[str, Any], folder: Path, *, copy_text_encoder: bool
) -> None:
    """Write `vqvae/`, `text_encoder/` and `pipeline.json` of a transformer run.

    Args:
        run: Its run config.
        described: Its model_config.json.
        folder: The model folder.
        copy_text_encoder: Also copy one that is named by the hub; else the name is kept.

    Raises:
        CheckpointError: A part is gone, or is no longer the one that was trained with.
    """
    _save_vqvae(described["vqvae"], folder / "vqvae")
    text = described["text_encoder"]
    encoder = None if text is None else _save_text_encoder(text, folder, copy_text_encoder)
    pipeline = {
        "vqvae": "vqvae",
        "vqvae_digest": described["vqvae"]["digest"],
        "text_encoder": encoder,
        "text_encoder_is_random": bool(text and text["is_random"]),
        "text_encoder_digest": None if text is None else text.get("digest"),
        "sampling": run.sampling.model_dump(exclude={"prompts", "images"}),
    }
    write_json_atomically(folder / PIPELINE, pipeline)


def copy_named_encoder(name: str, digest: Optional[str], folder: Path) -> str:
    """Copy the text tower of a hub name or folder into a model folder; returns its place there.

    Raises:
        CheckpointError: It is out of reach, or not the one with this digest.
    """
    encoder = ClipTextEncoder.from_pretrained(name)
    _refuse_other_encoder(name, digest, encoder.digest)
    encoder.save_pretrained(folder / "text_encoder")
    return "text_encoder"


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


def _save_text_encoder(described: Mapping[str, Any], folder: Path, copy_named: bool) -> str:
    """Copy a local text encoder; returns what pipeline.json calls it.

    It must still be the one that was trained with. One of the hub that is not copied is compared
    by its digest when the pipeline opens it.
    """
    name, digest = str(described["name"]), described.get("digest")  # older checkpoints hold none
    if Path(name).is_dir():
        _refuse_other_encoder(name, digest, ClipTextEncoder.from_pretrained(name).digest)
        shutil.copytree(name, folder / "text_encoder")
        return "text_encoder"
    if described["is_random"]:
        raise CheckpointError(
            f"The random text encoder {name} that the transformer was trained with is gone, and no "
            "hub has it: bring its folder back, or run from the folder in which the training was "
            "started."
        )
    return copy_named_encoder(name, digest, folder) if copy_named else name


def _refuse_other_encoder(name: str, expected: Optional[str], found: str) -> None:
    if expected not in (None, found):
        raise CheckpointError(
            f"The text encoder in {name} has changed since the transformer was trained with it "
            f"(digest {expected[:12]} then, {found[:12]} now): bring the old one back, or train "
            "again."
        )
