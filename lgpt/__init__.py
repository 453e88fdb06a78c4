"""lgpt: a GPT-style transformer that writes images as VQ-VAE tokens, trained with DeepSpeed.

    from lgpt import LatentGPT, TextToImagePipeline, load_run_settings, load_vqvae

Names are imported on first use, so that `lgpt --help` and settings errors need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["LatentGPT", "TextToImagePipeline", "load_run_settings", "load_vqvae"]

_HOMES = {
    "LatentGPT": "lgpt.models.latent_gpt",
    "TextToImagePipeline": "lgpt.sampling.pipeline",
    "load_run_settings": "lgpt.settings.run",
    "load_vqvae": "lgpt.models.vqgan_import",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lgpt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
