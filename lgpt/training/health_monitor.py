"""The health of a phase 2 run: its watches, their warnings in words, and what is to be done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from jaxtyping import Int

from lgpt.core.distributed import is_rank_zero
from lgpt.core.logging import get_logger
from lgpt.settings.phases import Phase2
from lgpt.training.health import (
    CODEBOOK_COLLAPSE,
    DISCRIMINATOR_WINS,
    DiscriminatorWatch,
    Event,
    UsageWatch,
)

_log = get_logger(__name__)


class HealthMonitor:
    """What applies to a run of `health.py`, by its settings; the same on every rank.

    Warnings are logged once an episode, and `metrics` tell at every step whether one lasts.
    """

    def __init__(self, run: Phase2) -> None:
        settings = run.health
        self._run = run
        self._usage: Optional[UsageWatch] = None
        self._discriminator: Optional[DiscriminatorWatch] = None
        if run.finetuning.trains == "all":
            side = run.data.resolution // run.vqvae.downsample_factor
            tokens_a_step = run.batch.global_batch_images * side * side
            self._usage = UsageWatch(
                run.vqvae.codebook_size,
                window_steps=math.ceil(settings.codebook_window_tokens / tokens_a_step),
                warmup_steps=run.schedule.warmup_steps,
                least_usage=settings.least_codebook_usage,
            )
        if run.loss.adversarial != "none":
            self._discriminator = DiscriminatorWatch(
                window_steps=settings.discriminator_window_steps,
                least_loss=settings.least_discriminator_loss,
            )

    @property
    def restart_is_due(self) -> bool:
        """The next step is to restart the unused codes."""
        is_due = self._usage is not None and self._usage.is_restart_due
        return is_due and self._run.health.respond

    @property
    def discriminator_rests(self) -> bool:
        """The discriminator is not to learn from the next step."""
        is_winning = self._discriminator is not None and self._discriminator.is_winning
        return is_winning and self._run.health.respond

    def take_codes(self, step: int, counts: Int[np.ndarray, " codes"]) -> None:
        """How often the global batch of this step took each code."""
        if self._usage is not None:
            self._usage.take(step, counts)

    def unused_codes(self, step: int) -> Int[np.ndarray, " unused"]:
        """What a restart after this step moves."""
        assert self._usage is not None, "no restart is due where encoder and codes are frozen"
        return self._usage.unused(step)

    def restarted(self, step: int, count: int) -> None:
        """That many unused codes restarted after this step."""
        assert self._usage is not None, "no restart is due where encoder and codes are frozen"
        self._usage.restarted(step)
        if is_rank_zero():
            _log.info("step %d: %d unused codes restarted at latents of this step", step + 1, count)

    def judge(self, step: int, hinge_loss: Optional[float]) -> None:
        """After all else of a step: whether an episode begins or ends with it.

        Args:
            step: Optimizer steps done before this one.
            hinge_loss: The discriminator's, over all ranks; None while it does not count.
        """
        if self._usage is not None:
            self._tell(step, self._usage.judge(step))
        if self._discriminator is not None and hinge_loss is not None:
            self._tell(step, self._discriminator.judge(hinge_loss))

    def metrics(self, step: int) -> dict[str, float]:
        """For each warning 1.0 while its episode lasts, else 0.0; and the use of a whole window."""
        lasts = {}
        if self._usage is not None:
            if step + 1 >= self._usage.window_steps:
                lasts["window_usage"] = self._usage.usage(step)
            lasts[f"health_{CODEBOOK_COLLAPSE}"] = float(self._usage.is_collapsed)
        if self._discriminator is not None:
            lasts[f"health_{DISCRIMINATOR_WINS}"] = float(self._discriminator.is_winning)
        return lasts

    def state(self) -> dict[str, Any]:
        """JSON values of all that the next decision depends on."""
        watches = {"usage": self._usage, "discriminator": self._discriminator}
        return {name: watch.state() for name, watch in watches.items() if watch is not None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken; what a checkpoint of an older version lacks begins anew."""
        if self._usage is not None and "usage" in state:
            self._usage.load_state(state["usage"])
        if self._discriminator is not None and "discriminator" in state:
            self._discriminator.load_state(state["discriminator"])

    def _tell(self, step: int, event: Optional[Event]) -> None:
        if event is None or not is_rank_zero():
            return
        collapse = event.name == CODEBOOK_COLLAPSE
        if not event.is_beginning:
            value = f"usage {event.value:.1%}" if collapse else f"hinge loss {event.value:.3f}"
            _log.info("%s is over at step %d: %s", event.name, step + 1, value)
            return
        words = self._collapse_words(event) if collapse else self._win_words(event)
        _log.warning("%s at step %d: %s", event.name, step + 1, words)

    def _collapse_words(self, event: Event) -> str:
        settings, vqvae = self._run.health, self._run.vqvae
        done = (
            "The others restart at latents of the next step (health.respond)."
            if settings.respond
            else "Nothing is done about it (health.respond: false)."
        )
        return (
            f"the last {settings.codebook_window_tokens:,} tokens used only {event.value:.1%} of "
            f"{vqvae.codebook_size} codes (health.least_codebook_usage "
            f"{settings.least_codebook_usage:.0%}). {done} If it comes back: "
            f"{self._remedies()}."
        )

    def _remedies(self) -> str:
        """What keeps codes in use, of that which the run does not have yet."""
        vqvae, loss = self._run.vqvae, self._run.loss
        wanted = [
            ("vqvae.codebook_update=ema", vqvae.codebook_update != "ema"),
            (
                "vqvae.revive_dead_codes=true",
                vqvae.codebook_update == "ema" and not vqvae.revive_dead_codes,
            ),
            (
                "vqvae.l2_normalized_codes=true with vqvae.code_dim=8",
                not vqvae.l2_normalized_codes,
            ),
            ("loss.entropy_weight=0.05", loss.entropy_weight == 0),
            ("a smaller vqvae.codebook_size", True),
        ]
        return ", ".join(text for text, is_lacking in wanted if is_lacking)

    def _win_words(self, event: Event) -> str:
        settings, player = self._run.health, self._run.discriminator
        done = (
            f"It rests until its loss is {2 * settings.least_discriminator_loss:g} again "
            "(health.respond)."
            if settings.respond
            else "Nothing is done about it (health.respond: false)."
        )
        return (
            f"the discriminator's hinge loss was {event.value:.3f} over "
            f"{settings.discriminator_window_steps} steps (health.least_discriminator_loss "
            f"{settings.least_discriminator_loss:g}): it tells every reconstruction, so it teaches "
            f"nothing. {done} If it comes back: a lower discriminator.learning_rate_ratio (now "
            f"{player.learning_rate_ratio:g}), discriminator.lecam_weight=0.05 (now "
            f"{player.lecam_weight:g}), or fewer discriminator.layers."
        )
