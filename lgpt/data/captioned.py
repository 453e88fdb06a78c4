"""The one schema of every dataset: picture, captions, id; and what happens to bad pictures."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Literal, Protocol, Union, runtime_checkable

import numpy as np
from PIL import Image, ImageOps

from lgpt.core.errors import DataError
from lgpt.core.logging import get_logger
from lgpt.settings.data import DataSettings

_log = get_logger(__name__)

Split = Literal["train", "val", "test"]

_NAMED_IN_ERRORS = 20


class BadImage(DataError):  # noqa: N818 - a thing to skip, an error only in numbers
    """One picture that is corrupt or missing; `BadImages` decides whether to go on without it."""


@runtime_checkable
class CaptionedDataset(Protocol):
    """One split of pictures with captions, in a fixed order.

    `fingerprint` is a hex digest of all that decides content and order of this split: two machines
    that see the same pictures and captions get the same one.
    """

    @property
    def name(self) -> str:
        """What the dataset is called in settings and logs."""
        ...

    @property
    def split(self) -> str:
        """train, val or test."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of content and order."""
        ...

    def __len__(self) -> int: ...

    def image_id(self, index: int) -> str:
        """A name for people: a file name, a code point, a number."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of a picture, at least one. Does not read the picture."""
        ...

    def load(self, index: int) -> Image.Image:
        """The picture in RGB at its own size.

        Raises:
            BadImage: The picture is corrupt or missing.
        """
        ...


def open_dataset(settings: DataSettings, split: Split) -> CaptionedDataset:
    """Open one split of the dataset that `data.dataset` names.

    Raises:
        DataError: The dataset, or this split of it, cannot be had; with the ways out.
    """
    if settings.dataset == "shapes":
        from lgpt.data.shapes import ShapesDataset

        return ShapesDataset(split, settings)
    if settings.dataset == "openmoji":
        from lgpt.data.openmoji import OpenmojiDataset

        return OpenmojiDataset(split, settings)
    if settings.dataset == "folder":
        from lgpt.data.folder import FolderDataset

        return FolderDataset(split, settings)
    from lgpt.data.flickr30k import Flickr30kDataset

    return Flickr30kDataset(split, settings)


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB, upright by its EXIF orientation, transparent parts on white."""
    # Greys of 16 bits; older versions of Pillow call those of a PNG I.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if is_16_bit:  # Pillow's conversion would make all above 255 of 65,535 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode_image(source: Union[Path, bytes], image_id: str) -> Image.Image:
    """Read a picture completely, as `as_rgb`.

    Args:
        source: A file, or a file's bytes.
        image_id: Its name in the error.

    Raises:
        BadImage: Missing, truncated, not a picture, or so large that PIL takes it for an attack.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return as_rgb(image)
    # PIL's decoders tell of broken files by all of these.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"{image_id}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return str(error) or type(error).__name__


class BadImages:
    """Counts, names and limits the pictures that are skipped. Safe to use from several threads.

    Args:
        limit: How many may be bad (`data.max_bad_images`).
        dataset: Its name in messages.
    """

    def __init__(self, limit: int, dataset: str) -> None:
        self._limit, self._dataset = limit, dataset
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def skip(self, image_id: str, reason: str) -> None:
        """Log one bad picture and count it; the same one counts once.

        Raises:
            DataError: More than the limit are bad; names them.
        """
        if image_id not in self._reasons:
            _log.warning("Skipped a bad picture of %s: %s", self._dataset, reason)
        self.count(image_id, reason)

    def count(self, image_id: str, reason: str) -> None:
        """`skip` without a log line, for what another rank or an earlier start has told."""
        with self._lock:
            self._reasons.setdefault(image_id, reason)
            is_over = len(self._reasons) > self._limit
        if is_over:
            raise DataError(
                f"{self.summary()}\nThat is more than data.max_bad_images ({self._limit}). Mend or "
                "remove these pictures, or raise the limit."
            )

    def summary(self) -> str:
        """How many and which pictures were skipped, and why."""
        with self._lock:
            reasons = list(self._reasons.values())
        if not reasons:
            return f"No bad pictures in {self._dataset}."
        lines = [f"{len(reasons)} corrupt or missing pictures in {self._dataset}:"]
        lines += [f"  {reason}" for reason in reasons[:_NAMED_IN_ERRORS]]
        if len(reasons) > _NAMED_IN_ERRORS:
            lines.append(f"  and {len(reasons) - _NAMED_IN_ERRORS} more")
        return "\n".join(lines)
