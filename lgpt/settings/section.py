"""The base class of every settings section, and the kinds of value that several of them hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Frozen, and an unknown key is an error (its nearest known key is named by `run.py`)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def _refuse_empty(value: Any) -> Any:
    # Path("") would be the folder in which the command was started.
    if value == "":
        raise ValueError("must not be empty")
    return value


def _in_home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


Text = Annotated[str, Field(min_length=1)]
# The shell opens `~/x` only where it begins a word: not in latent_cache=~/x.
FolderOrFile = Annotated[Path, BeforeValidator(_refuse_empty), AfterValidator(_in_home)]
# Also a name on the hub, or of a file that lgpt ships.
NameOrPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
# numpy, torch and DeepSpeed take 64 bits; ranks and pictures add their numbers to it.
Seed = Annotated[int, Field(ge=0, le=2**62)]
