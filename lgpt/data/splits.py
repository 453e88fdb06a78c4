"""Names of splits as people write them, and splits by hash for datasets that bring none."""

from __future__ import annotations

import hashlib

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


def hashed_split(image_id: str, val_fraction: float, test_fraction: float = 0.0) -> str:
    """train, val or test, by the id alone: adding pictures does not move the others."""
    word = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")
    if word < val_fraction * 2**64:
        return "val"
    return "test" if word < (val_fraction + test_fraction) * 2**64 else "train"
