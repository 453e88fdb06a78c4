"""What phase 2 watches while it trains, and whether it does something about it."""

from __future__ import annotations

from pydantic import Field

from lgpt.settings.section import Section


class HealthSettings(Section):
    """Bounds of the warnings codebook_collapse and discriminator_wins."""

    respond: bool = Field(
        True,
        description="codebook_collapse: codes that the window did not use restart at latents of "
        "the next step; discriminator_wins: it rests until it errs again. false: warn only",
    )
    codebook_window_tokens: int = Field(
        65536, ge=1, description="training tokens over which codebook usage is judged"
    )
    least_codebook_usage: float = Field(
        0.2, ge=0, le=1, description="share of the codes; below it is a collapse; 0: never"
    )
    discriminator_window_steps: int = Field(
        100, ge=1, description="steps over which the discriminator's hinge loss is judged"
    )
    least_discriminator_loss: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="mean hinge loss below which it wins; over again at twice that; 1 is guessing, "
        "0: never",
    )
