"""Where the files of a VQ-VAE lie: in a folder, beside each other, or on the hub."""

from __future__ import annotations

from pathlib import Path

from lgpt.core.errors import CheckpointError


def taming_file(checkpoint: Path) -> Path:
    """The .ckpt itself, or the one in a folder or in taming's `logs/<run>`.

    Raises:
        CheckpointError: There is none.
    """
    if checkpoint.is_file():
        return checkpoint
    # taming's logs/<run>/ keeps weights and configs in sub folders.
    for folder in (checkpoint, checkpoint / "checkpoints"):
        for name in ("last.ckpt", "model.ckpt"):
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(
        f"{checkpoint} is neither a .ckpt file nor a folder with last.ckpt or model.ckpt in it."
    )


def yaml_beside(weights: Path) -> Path:
    """The yaml that tells a .ckpt's architecture.

    Raises:
        CheckpointError: None lies beside it.
    """
    beside = (weights.parent / "model.yaml", weights.with_suffix(".yaml"))
    found = [path for path in beside if path.is_file()]
    # taming's training writes configs/<time>-project.yaml beside checkpoints/.
    found += sorted((weights.parent.parent / "configs").glob("*project.yaml"))
    if not found:
        raise CheckpointError(
            f"{weights} has no model.yaml beside it, and a taming .ckpt does not hold its own "
            "architecture; put the model's yaml there or name it in vqvae.ddconfig."
        )
    return found[0]


def llamagen_file(checkpoint: str) -> Path:
    """The .pt of a LlamaGen VQ: a file, the one in a folder, or on the hub.

    A hub name means the repository's vq_ds16 file; `owner/repository/vq_ds8_c2i.pt` names another.

    Raises:
        CheckpointError: There is none, or there are several to choose from.
    """
    path = Path(checkpoint)
    if path.is_file():
        return path
    patterns = ["vq_ds*.pt", "*.pt"]
    if not path.is_dir():
        repository, name = _split_hub_name(checkpoint)
        patterns = [name or "vq_ds16*.pt"]
        path = _downloaded(repository, patterns, "a .pt file")
    for pattern in patterns:
        found = sorted(file for file in path.glob(pattern) if file.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found[:8])
            raise CheckpointError(
                f"{checkpoint} holds {len(found)} of {pattern} ({names}); name the one to read, as "
                f"{checkpoint}/{found[0].name}."
            )
    raise CheckpointError(
        f"{checkpoint} holds no LlamaGen VQ: no {' and no '.join(patterns)} is there."
    )


def flax_folder(checkpoint: str) -> Path:
    """A folder as it is; otherwise a hub name, from the local hub cache or the hub.

    Raises:
        CheckpointError: It is neither.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    names = ["config.json", "flax_model.msgpack"]
    return _downloaded(checkpoint, names, f"a folder with {' and '.join(names)}")


def _split_hub_name(name: str) -> tuple[str, str]:
    """`owner/repository/file` as (`owner/repository`, `file`); the file may be left out."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]), "".join(parts[2:])


def _downloaded(name: str, patterns: list[str], instead: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        # The hub client has its own tree of errors, over http, file and value errors.
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(
            f"VQ-VAE {name!r} is neither a folder nor a reachable hub model ({reason}). Give "
            f"{instead}."
        ) from error
