"""A flickr30k-shaped parquet file with the hub's columns, and runs of phase 1 on the fixtures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
from PIL import Image

FIXTURES = Path(__file__).parents[1] / "fixtures"


def write_parquet(folder: Path, splits: Sequence[str], texts: Sequence[str]) -> Path:
    """Noise pictures of 40 x 36, five of the texts each, in row groups of 50."""
    rng = np.random.RandomState(0)
    pictures = []
    for _ in splits:
        buffer = io.BytesIO()
        coarse = Image.fromarray(rng.randint(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((40, 36)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    numbers = range(len(splits))
    columns = {
        "image": [{"bytes": data, "path": f"{n}.png"} for n, data in zip(numbers, pictures)],
        "caption": [[texts[(5 * n + k) % len(texts)] for k in range(5)] for n in numbers],
        "sentids": [[str(5 * n + k) for k in range(5)] for n in numbers],
        "split": list(splits),
        "img_id": [str(n) for n in numbers],
        "filename": [f"{1000 + n}.jpg" for n in numbers],
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "0000.parquet", row_group_size=50)
    return folder


def phase1_run(home: Path, flickr: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    """Phase 1 on taming_tiny and clip_tiny, trained in bf16; 32 pixels are 2 x 2 tokens."""
    return tiny.transformer_run(
        home,
        4,
        phase=1,
        name="tiny-phase1",
        training=tiny.training(4, "bf16"),
        data={
            "dataset": "flickr30k",
            "source": str(flickr),
            "resolution": 32,
            "crops": 4,
            "crop_scale_min": 0.7,
            "flip": True,
            "cache_folder": str(home / "hf"),
        },
        vqvae={"source": "pretrained_taming", "checkpoint": str(FIXTURES / "taming_tiny")},
        text={"encoder": str(FIXTURES / "clip_tiny")},
        latent_cache=str(cache),
        **changes,
    )
