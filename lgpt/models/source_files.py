"""Where the files of a VQ-VAE lie: in a folder, beside each other, or on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lgpt.core.errors import CheckpointError
from lgpt.core.hub import hub_folder
from lgpt.models.pytorch_file import read_pytorch_file

FLAX_WEIGHTS = "flax_model.msgpack"
_CHECKPOINTS = ("last.ckpt", "model.ckpt")


def guess_source(checkpoint: str) -> tuple[str, str]:
    """Which source a file, folder or hub name is, and by what it was told.

    Raises:
        CheckpointError: Nothing there looks like a VQ-VAE.
    """
    path = Path(checkpoint)
    if path.is_file():
        return _guess_file(path)
    if path.is_dir():
        if (path / FLAX_WEIGHTS).is_file():
            return "pretrained_hf", f"it holds {FLAX_WEIGHTS}"
        weights = ("model.safetensors", "model.safetensors.index.json")
        for name in (*weights, *(f"model/{name}" for name in weights)):
            if (path / name).is_file():
                return "custom", f"it holds {name}"
        found = [*_checkpoints_in(path), *sorted(path.glob("*.pt"))]
        if found:
            return _guess_file(found[0])
        raise CheckpointError(
            f"{checkpoint} holds no VQ-VAE: no {FLAX_WEIGHTS}, model.safetensors, last.ckpt, "
            "model.ckpt or *.pt is there."
        )
    if checkpoint.startswith(("/", "./", "../")) or checkpoint.count("/") == 0:
        raise CheckpointError(f"{checkpoint} is not there, and is no hub name (owner/name).")
    if "llamagen" in checkpoint.lower() or checkpoint.endswith(".pt"):
        return "pretrained_llamagen", "its hub name"
    return "pretrained_hf", "it is no file or folder, so it is taken for a hub name"


def _guess_file(path: Path) -> tuple[str, str]:
    if path.name == FLAX_WEIGHTS:
        return "pretrained_hf", f"its name {FLAX_WEIGHTS}"
    if path.name in ("config.json", "model.safetensors"):
        return "custom", f"its name {path.name}"
    content = read_pytorch_file(path)
    maps = [content, *content.values()] if isinstance(content, Mapping) else []
    names = [str(name) for values in maps if isinstance(values, Mapping) for name in values]
    if any(name.startswith("encoder.conv_blocks.") for name in names):
        return "pretrained_llamagen", f"the tensors encoder.conv_blocks.* in {path.name}"
    return "pretrained_taming", f"{path.name}, a PyTorch file without encoder.conv_blocks.*"


def _checkpoints_in(folder: Path) -> list[Path]:
    # taming's logs/<run>/ keeps weights and configs in sub folders.
    places = [home / name for home in (folder, folder / "checkpoints") for name in _CHECKPOINTS]
    return [path for path in places if path.is_file()]


def taming_file(checkpoint: Path) -> Path:
    """The .ckpt itself, or the one in a folder or in taming's `logs/<run>`.

    Raises:
        CheckpointError: There is none.
    """
    if checkpoint.is_file():
        return checkpoint
    if found := _checkpoints_in(checkpoint):
        return found[0]
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
            "architecture; put the model's yaml there or name it in vqvae.ddconfig (--ddconfig)."
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
    if path.is_dir():
        return path / _llamagen_name(_names_in(path), ["vq_ds*.pt", "*.pt"], checkpoint)
    repository, name = _split_hub_name(checkpoint)
    patterns = [name or "vq_ds16*.pt"]
    folder = _downloaded(
        repository, lambda files: [_llamagen_name(files, patterns, repository)], "a .pt file"
    )
    return folder / _llamagen_name(_names_in(folder), patterns, str(folder))


def _llamagen_name(files: Sequence[str], patterns: Sequence[str], place: str) -> str:
    for pattern in patterns:
        found = sorted(name for name in files if fnmatchcase(name, pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"{place} holds {len(found)} of {pattern} ({', '.join(found[:8])}); name the one "
                f"to read, as {place}/{found[0]}."
            )
    raise CheckpointError(f"{place} holds no LlamaGen VQ: no {' and no '.join(patterns)} is there.")


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def flax_folder(checkpoint: str) -> Path:
    """A folder as it is, that of a file, or of a hub name from the local hub cache or the hub.

    Raises:
        CheckpointError: It is neither, or the hub's repository holds no Flax VQGAN.
    """
    path = Path(checkpoint)
    if path.is_dir() or path.is_file():
        return path if path.is_dir() else path.parent
    names = ["config.json", FLAX_WEIGHTS]

    def choose(files: Sequence[str]) -> list[str]:
        if missing := [name for name in names if name not in files]:
            raise CheckpointError(
                f"the hub's {checkpoint} is not a Flax VQGAN: it has no {' and no '.join(missing)}."
            )
        return names

    return _downloaded(checkpoint, choose, f"a folder with {' and '.join(names)}")


def _split_hub_name(name: str) -> tuple[str, str]:
    """`owner/repository/file` as (`owner/repository`, `file`); the file may be left out."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]), "".join(parts[2:])


def _downloaded(name: str, choose: Callable[[Sequence[str]], Sequence[str]], instead: str) -> Path:
    try:
        return hub_folder(name, repo_type="model", choose=choose)
    except ConnectionError as error:
        raise CheckpointError(
            f"VQ-VAE {name!r} is neither a folder nor a reachable hub model "
            f"({str(error).rstrip('.')}). Give {instead}."
        ) from error
