"""The resume diff: what the config says, what the checkpoint would impose, what will hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lgpt.settings.phases import RunSettings

Choice = Literal["config", "checkpoint"]

# What a checkpoint can give back: numbers of the steps, not what they are taken on.
_IMPOSABLE = ("optimizer", "schedule", "batch")
_READ_ONLY = ("seed", "data")
_OF_THE_MODEL = ("conditioning", "transformer", "loss", "discriminator")
# Every kernel gives the same, and so do the same weights in another place; how a head's first
# weights were drawn is past.
_WITHOUT_EFFECT = (
    *("transformer.attention", "transformer.zero_head"),
    *("loss.vgg16_weights", "loss.lpips_weights"),
)


@dataclass(frozen=True)
class Row:
    """One value of the three.

    Attributes:
        is_content: It decides which pictures the steps see; no choice brings the old one back.
        is_model: The same of the model and its loss, where another value leaves every shape.
    """

    name: str
    config: Any
    checkpoint: Any
    effective: Any
    is_content: bool = False
    is_model: bool = False

    @property
    def differs(self) -> bool:
        return bool(self.config != self.checkpoint)


def settled(run: RunSettings, saved: RunSettings, choice: Choice) -> RunSettings:
    """The run that will train: the config's, or with the checkpoint's numbers in it."""
    if choice == "config":
        return run
    return run.model_copy(update={name: getattr(saved, name) for name in _IMPOSABLE})


def settings_rows(run: RunSettings, saved: RunSettings, effective: RunSettings) -> list[Row]:
    """Every number of optimizer, schedule and batch; what differs in seed, data and model."""
    rows = []
    for section in _IMPOSABLE:
        for name in type(getattr(run, section)).model_fields:
            values = [getattr(getattr(each, section), name) for each in (run, saved, effective)]
            rows.append(Row(f"{section}.{name}", *values))
    steps = run.training.max_steps
    rows.append(Row("training.max_steps", steps, saved.training.max_steps, steps))
    decay = run.training.ema_decay
    rows.append(Row("training.ema_decay", decay, saved.training.ema_decay, decay))
    for section in _READ_ONLY:
        for name, ours, theirs in _differing(section, run, saved):
            rows.append(Row(name, ours, theirs, ours, is_content=True))
    # The VQ-VAE of the other phases is told by the digest of its weights.
    for section in (*_OF_THE_MODEL, *(["vqvae"] if run.trains == "vqvae" else [])):
        for name, ours, theirs in _differing(section, run, saved):
            rows.append(Row(name, ours, theirs, ours, is_model=True))
    return rows


def _differing(
    section: str, run: RunSettings, saved: RunSettings
) -> Iterator[tuple[str, Any, Any]]:
    """Name, value now and value of the save of every field of a section that differs."""
    ours, theirs = (_flat(section, getattr(each, section, None)) for each in (run, saved))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name) and name not in _WITHOUT_EFFECT:
            yield name, ours.get(name), theirs.get(name)


def facts_rows(
    run: RunSettings,
    facts: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    content: Mapping[str, Any],
    code: Mapping[str, Any],
) -> list[Row]:
    """Weight decay of every parameter group, digests of what is read, and the code's version.

    Args:
        facts: Of the checkpoint's manifest; empty for one of format 1.
        engines: `hyperparameters` of each engine as it was built, before anything is loaded.
        content: The task's own digests.
        code: This start's version and commit.
    """
    rows = []
    for engine, numbers in engines.items():
        saved = facts.get("hyperparameters", {}).get(engine, {}).get("groups", [])
        for index, group in enumerate(numbers["groups"]):
            now = group["weight_decay"]
            # The first of two groups is the decayed one (engine/build.py).
            is_decayed = index == 0 and (len(numbers["groups"]) > 1 or now > 0)
            says = run.optimizer.weight_decay if is_decayed else now
            was = saved[index]["weight_decay"] if index < len(saved) else None
            rows.append(Row(f"{engine}: weight decay of group {index}", says, was, now))
    old = facts.get("content", {})
    for name, digest in content.items():
        values = [_short(digest), _short(old.get(name)), _short(digest)]
        if digest is not None or old.get(name) is not None:
            rows.append(Row(f"content of {name}", *values, is_content=True))
    now, was = _version(code), _version(facts.get("code", {}))
    rows.append(Row("code", now, was, now))
    return rows


def world_row(
    run: RunSettings, saved: RunSettings, effective: RunSettings, ranks: int, saved_ranks: int
) -> Row:
    """The global batch as a product over the ranks."""
    return Row(
        "images a step = micro x ranks x accumulation",
        _product(run, ranks),
        _product(saved, saved_ranks),
        _product(effective, ranks),
    )


def shape_rows(
    engines: Mapping[str, int], ranks: int, saved_engines: Mapping[str, int], saved_ranks: int
) -> list[Row]:
    """How the state is cut: over how many ranks, and at which ZeRO stage each engine.

    Always as this start has it; where a row differs, the state is cut anew (elastic.py).
    """
    rows = [Row("ranks", ranks, saved_ranks, ranks)]
    for name, stage in engines.items():
        rows.append(Row(f"{name}: ZeRO stage", stage, saved_engines.get(name), stage))
    return rows


def table_of(rows: Sequence[Row]) -> str:
    """The rows under a heading, aligned; those that differ are marked."""
    lines = [("", "", "config says", "checkpoint would impose", "effective")]
    for row in rows:
        values = (_shown(row.config), _shown(row.checkpoint), _shown(row.effective))
        lines.append(("*" if row.differs else "", row.name, *values))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines
    )


def _product(run: RunSettings, ranks: int) -> str:
    total, micro = run.batch.global_batch_images, run.batch.micro_batch_images
    return f"{total} = {micro} x {ranks} x {total / (micro * ranks):g}"


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not hasattr(value, "model_dump"):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name in type(value).model_fields:
        flat.update(_flat(f"{prefix}.{name}", getattr(value, name)))
    return flat


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(digest: Any) -> Any:
    return None if digest is None else str(digest)[:12]


def _version(code: Mapping[str, Any]) -> str:
    if not code:
        return "unknown"
    commit = code.get("commit")
    return str(code["lgpt"]) + ("" if commit is None else f" ({str(commit)[:12]})")
