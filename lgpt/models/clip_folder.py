"""Where a CLIP lies, in a folder or on the hub, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lgpt.core.errors import CheckpointError
from lgpt.core.hub import hub_folder
from lgpt.models.clip_weights import files_of_clip


def clip_folder(name: str) -> Path:
    """The folder of a CLIP that is named by its hub name or folder.

    Raises:
        CheckpointError: It is not there, and the hub cannot be asked.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return hub_folder(name, repo_type="model", choose=files_of_clip)
    except ConnectionError as error:
        raise CheckpointError(
            f"text encoder {name!r} cannot be read: {str(error).rstrip('.')}. Give the folder of a "
            "CLIP model, a hub name that is reachable or already downloaded, or "
            "text.encoder=random."
        ) from error


def load_tokenizer(folder: Path, name: str, vocabulary_size: int) -> Any:
    """CLIP's tokenizer, padding and cutting at the right.

    Raises:
        CheckpointError: Its files are missing or damaged, or it has more tokens than the weights.
    """
    from transformers import CLIPTokenizerFast

    # Without its files transformers 5 makes one that knows no word, and says nothing.
    is_there = [
        (folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "merges.txt")
    ]
    if not (is_there[0] or all(is_there[1:])):
        raise CheckpointError(
            f"text encoder {name!r} has no tokenizer: it needs tokenizer.json, or vocab.json and "
            "merges.txt."
        )
    try:
        # Both sides are settled here: the mask must cover a caption's first tokens.
        tokenizer = CLIPTokenizerFast.from_pretrained(
            folder, padding_side="right", truncation_side="right"
        )
    except Exception as error:  # tokenizers raises no narrower class
        raise CheckpointError(
            f"text encoder {name!r} has a tokenizer that cannot be read: {_first_line(error)}. "
            "Copy or download it again."
        ) from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary_size:
        raise CheckpointError(
            f"text encoder {name!r} has a tokenizer of {largest + 1} tokens and embeddings for "
            f"{vocabulary_size}; give the tokenizer that belongs to the weights."
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
