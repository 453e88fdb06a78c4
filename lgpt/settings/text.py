"""The frozen text encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lgpt.settings.section import NameOrPath, Section

# The encoder of `text.encoder: random`, and the width of its embeddings.
RANDOM_ENCODER = "random"
RANDOM_ENCODER_WIDTH = 128


class TextSettings(Section):
    """Which CLIP text tower reads the captions, and how its output is kept."""

    encoder: NameOrPath = Field(
        "openai/clip-vit-base-patch32",
        description="hub name or folder of a CLIP model, or 'random': a small frozen CLIP made "
        "locally with a fixed seed from the captions' own words",
    )
    cache_dtype: Literal["float16", "bfloat16"] = Field(
        "float16",
        description="type of the cached embeddings: float16 loses 0.02% (CLIP's lie within +-40, "
        "it holds +-65504), bfloat16 0.17% of what the text encoder gave in float32",
    )
