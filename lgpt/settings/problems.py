"""What a check of the settings finds, and the words for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lgpt.settings.explain import located
from lgpt.settings.phases import RunSettings
from lgpt.settings.sources import KeyPath, Sources

Problem = tuple[Sequence[KeyPath], str]
At = Callable[[str], str]
AddInert = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Void:
    """Why a setting does nothing: the setting that switches it off, and the words for it."""

    switch: KeyPath
    text: str


class Located:
    """`at("batch.micro_batch_images")` -> `batch.micro_batch_images = 32 (phase1.yaml:9)`."""

    def __init__(self, run: RunSettings, sources: Sources) -> None:
        self._run, self._sources = run, sources

    def __call__(self, name: str) -> str:
        path = tuple(name.split("."))
        value: Any = self._run
        for key in path:
            value = getattr(value, key)
        return located(path, self._sources, value)


def problem(text: str, *names: str) -> Problem:
    """A text about the settings of these dotted names."""
    return [tuple(name.split(".")) for name in names], text


def neighbours(value: int, step: int) -> str:
    """`use 96 or 128`: the multiples of `step` on both sides of `value`."""
    lower = value - value % step
    return f"use {lower} or {lower + step}" if lower else f"use {step}"
