"""Episodes of bad health: when they begin and end, and what a checkpoint must hold of them."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
import tiny

from lgpt.settings.run import load_run_settings
from lgpt.training.health import DiscriminatorWatch, Event, UsageWatch
from lgpt.training.health_monitor import HealthMonitor


def usage_watch(**changes: Any) -> UsageWatch:
    numbers = {"window_steps": 4, "warmup_steps": 3, "least_usage": 0.5, **changes}
    return UsageWatch(8, **numbers)


def counts_of(*codes: int) -> np.ndarray:
    return np.bincount(np.array(codes, dtype=int), minlength=8)


def test_usage_is_that_of_the_last_window_by_counting_it_again():
    generator = np.random.default_rng(0)
    steps = [generator.integers(0, 8, size=generator.integers(0, 4)) for _ in range(200)]
    watch, is_low, changes = usage_watch(), False, 0
    for step, codes in enumerate(steps):
        watch.take(step, counts_of(*codes))
        event = watch.judge(step)
        if step < 3 + 4 - 1:  # the first whole window after the warm-up
            assert event is None
            continue
        window = steps[step - 3 : step + 1]
        usage = len(set(np.concatenate(window).tolist())) / 8
        assert watch.usage(step) == pytest.approx(usage)
        expected = (
            Event("codebook_collapse", usage < 0.5, usage) if is_low != (usage < 0.5) else None
        )
        assert event == expected
        is_low, changes = usage < 0.5, changes + (event is not None)
        assert set(watch.unused(step)) == set(range(8)) - set(np.concatenate(window).tolist())
        assert watch.is_collapsed == watch.is_restart_due == is_low
    assert changes > 4, "the numbers must have shown both"


def test_after_a_restart_a_whole_window_passes_before_the_next():
    watch, due, events = usage_watch(), [], []
    for step in range(20):
        watch.take(step, counts_of(0))
        if watch.is_restart_due:
            watch.restarted(step)
            due.append(step)
        events.append(watch.judge(step))
    assert due == [7, 12, 17]  # seen at 6, 11 and 16
    assert [event for event in events if event] == [Event("codebook_collapse", True, 1 / 8)]
    assert watch.is_collapsed, "it is one episode, however often codes restart"


def test_a_discriminator_wins_by_the_mean_of_a_window_and_rests_until_twice_the_bound():
    watch = DiscriminatorWatch(window_steps=20, least_loss=0.1)
    assert [watch.judge(0.0) for _ in range(19)] == [None] * 19, "not before a whole window"
    assert watch.judge(0.9) == Event("discriminator_wins", True, 0.9 / 20)
    assert watch.judge(0.15) is None
    assert watch.judge(0.15) is None
    assert watch.is_winning, "above the bound, but not twice"
    over = watch.judge(0.3)  # the mean of the last two: a tenth of a window
    assert over == Event("discriminator_wins", False, (0.15 + 0.3) / 2)
    assert [watch.judge(0.12) for _ in range(40)] == [None] * 40


def test_a_loss_that_is_not_finite_or_a_bound_of_zero_is_no_episode():
    watch = DiscriminatorWatch(window_steps=1, least_loss=0.1)
    assert watch.judge(float("nan")) is None
    assert DiscriminatorWatch(window_steps=1, least_loss=0.0).judge(0.0) is None
    codes = usage_watch(least_usage=0.0)
    assert [codes.judge(step) for step in range(20)] == [None] * 20


@pytest.mark.parametrize("cut", [2, 6, 7, 8, 13])
def test_watches_that_were_saved_anywhere_decide_as_those_that_went_on(cut):
    generator = np.random.default_rng(1)
    straight, first = (
        (usage_watch(), DiscriminatorWatch(window_steps=3, least_loss=0.1)) for _ in range(2)
    )
    watches = first
    for step in range(40):
        if step == cut:  # as JSON, into new ones
            saved = [json.loads(json.dumps(watch.state())) for watch in first]
            watches = (usage_watch(), DiscriminatorWatch(window_steps=3, least_loss=0.1))
            for watch, state in zip(watches, saved):
                watch.load_state(state)
        codes = counts_of(*generator.integers(0, 8, size=2))
        loss = float(generator.choice([0.0, 0.3]))
        for usage, _ in (straight, watches):
            usage.take(step, codes)
            if usage.is_restart_due:
                usage.restarted(step)
        assert straight[0].judge(step) == watches[0].judge(step)
        assert straight[1].judge(loss) == watches[1].judge(loss)
        assert straight[0].is_restart_due == watches[0].is_restart_due
    assert [watch.state() for watch in straight] == [watch.state() for watch in watches]


def monitor_of(folder: Any, **health: Any) -> HealthMonitor:
    config = tiny.vqvae_run(
        folder,
        400,
        loss={"adversarial": "hinge"},
        discriminator={"start_step": 3, "warmup_steps": 0, "layers": 1},
        health={"codebook_window_tokens": 256, "discriminator_window_steps": 2, **health},
    )
    return HealthMonitor(load_run_settings(tiny.write(folder / "run.yaml", config), environ={}))


@pytest.mark.parametrize("respond", [True, False])
def test_each_episode_is_warned_of_once_with_its_numbers_and_what_to_do(tmp_path, caplog, respond):
    monitor = monitor_of(tmp_path, respond=respond)
    caplog.set_level(logging.INFO)
    for step in range(
        12
    ):  # 8 pictures of 16 tokens a step: a window is 2 steps, after 2 of warm-up
        monitor.take_codes(step, np.eye(32, dtype=int)[0])
        assert monitor.restart_is_due == (respond and step in (4, 7, 10))
        assert monitor.discriminator_rests == (respond and step >= 5)
        if monitor.restart_is_due:
            assert len(monitor.unused_codes(step)) == 31
            monitor.restarted(step, 31)
        monitor.judge(step, 0.05 if step >= 3 else None)
        window = {} if step == 0 else {"window_usage": pytest.approx(1 / 32)}
        assert monitor.metrics(step) == {
            **window,
            "health_codebook_collapse": float(step >= 3),
            "health_discriminator_wins": float(step >= 4),
        }
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    collapse, win = warnings
    assert collapse.startswith(
        "codebook_collapse at step 4: the last 256 tokens used only 3.1% of 32"
    )
    assert "health.least_codebook_usage 20%" in collapse
    assert "loss.entropy_weight=0.05" in collapse
    assert "codebook_update" not in collapse, "the run has moving averages already"
    assert win.startswith("discriminator_wins at step 5: the discriminator's hinge loss was 0.050")
    assert "discriminator.learning_rate_ratio (now 1)" in win
    assert all(("health.respond: false" in text) != respond for text in warnings)

    monitor.take_codes(12, np.ones(32, dtype=int))
    monitor.judge(12, 0.2)
    told = monitor.metrics(12)
    assert told.pop("window_usage") == 1.0
    assert set(told.values()) == {0.0}
    assert "codebook_collapse is over at step 13: usage 100.0%" in caplog.text
    assert "discriminator_wins is over at step 13: hinge loss 0.200" in caplog.text


def test_what_nobody_learns_is_not_watched(tmp_path):
    run = tiny.vqvae_run(tmp_path, 400, init_from=str(tmp_path), finetuning={"trains": "decoder"})
    run["vqvae"] = {key: v for key, v in tiny.VQVAE.items() if key != "codebook_update"}
    monitor = HealthMonitor(load_run_settings(tiny.write(tmp_path / "run.yaml", run), environ={}))
    monitor.take_codes(0, np.zeros(32, dtype=int))
    monitor.judge(0, None)
    assert monitor.metrics(0) == monitor.state() == {}
    assert not monitor.restart_is_due
    assert not monitor.discriminator_rests
