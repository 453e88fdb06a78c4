"""The transformer that a run config describes, before its VQ-VAE and text encoder are opened."""

from __future__ import annotations

from lgpt.models.latent_gpt import LatentGPTConfig
from lgpt.planning.parameters import transformer_surroundings
from lgpt.settings.phases import TransformerRun


def planned_config(run: TransformerRun) -> LatentGPTConfig:
    """Its shape.

    Raises:
        SettingsError: The settings do not tell, see `transformer_surroundings`.
    """
    codes, side, text_width = transformer_surroundings(run)
    return LatentGPTConfig.from_settings(run.transformer, codes, (side, side), text_width)
