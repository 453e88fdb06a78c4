"""From a run config and a DeepSpeed JSON to the one config that DeepSpeed gets, without "auto".

The run config owns batch, accumulation, clipping, optimizer, schedule and precision; the JSON owns
stage, offload, buckets and communication. What the run config owns is "auto" in the JSON, absent,
or the same. DeepSpeed itself takes `zero_optimisation` or `"stage": "auto"` and trains something
else without a word; this module refuses both, with everything else that is wrong, in one message.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Optional

from lgpt.core.errors import SettingsError
from lgpt.settings.deepspeed_check import AUTO, misfits
from lgpt.settings.deepspeed_file import load_deepspeed_json
from lgpt.settings.explain import located, shown
from lgpt.settings.phases import Phase2, RunSettings
from lgpt.settings.problems import Problem
from lgpt.settings.sources import KeyPath, Sources

# Settings that own values of the JSON, or must go with them.
_DEEPSPEED: KeyPath = ("deepspeed",)
_GLOBAL: KeyPath = ("batch", "global_batch_images")
_MICRO: KeyPath = ("batch", "micro_batch_images")
_PRECISION: KeyPath = ("training", "precision")

_SHORT_DTYPES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
}

_NVME_ONLY = (
    "nvme_path",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "fast_init",
    "pipeline_read",
    "pipeline_write",
)


@dataclass(frozen=True)
class _Owned:
    """A DeepSpeed value that the run config decides, with the settings it comes from."""

    value: Any
    origin: str
    owners: tuple[KeyPath, ...]


def resolve_deepspeed_config(
    run: RunSettings, world_size: int, raw: Optional[Mapping[str, Any]] = None
) -> dict[str, Any]:
    """The complete DeepSpeed config of a run on a number of ranks.

    Args:
        run: The run; `run.deepspeed_config` names the JSON.
        world_size: Ranks that train.
        raw: The JSON's content, when it does not come from `run.deepspeed_config`.

    Returns:
        A new dict without "auto", with everything that the run config owns written out.

    Raises:
        SettingsError: All problems at once.
    """
    config, problems = _resolve(run, world_size, raw, None)
    if problems:
        raise SettingsError([text for _, text in problems], heading=run.deepspeed_config)
    return config


def deepspeed_problems(
    run: RunSettings, world_size: int, sources: Optional[Sources] = None
) -> list[Problem]:
    """What `resolve_deepspeed_config` would refuse, each with the run settings it depends on."""
    try:
        return _resolve(run, world_size, None, sources)[1]
    except SettingsError as error:
        named = sources is not None and sources.place(_DEEPSPEED) is not None
        start = f"{located(_DEEPSPEED, sources)}: " if named and sources is not None else ""
        found: list[Problem] = [([_DEEPSPEED], start + problem) for problem in error.problems]
        return _batch_problems(run, world_size, sources) + found


def _resolve(
    run: RunSettings,
    world_size: int,
    raw: Optional[Mapping[str, Any]],
    sources: Optional[Sources],
) -> tuple[dict[str, Any], list[Problem]]:
    name = run.deepspeed_config
    source: Mapping[str, Any] = load_deepspeed_json(name) if raw is None else raw
    config: dict[str, Any] = copy.deepcopy(dict(source))
    problems = _batch_problems(run, world_size, sources)
    zero = config.get("zero_optimization")
    stage = _stage_of(zero)
    owned = _owned_values(run, world_size)
    defaults = _fillable_values(run)
    fillable = frozenset([*owned, *defaults])
    reported: list[KeyPath] = []

    def report(path: KeyPath, rest: str, owners: Sequence[KeyPath] = ()) -> None:
        if path in reported:
            return
        reported.append(path)
        value = _get(config, path)
        is_leaf = not isinstance(value, (dict, list)) and value is not None
        start = f"{'.'.join(path)} = {shown(value)}" if is_leaf else ".".join(path)
        problems.append(([_DEEPSPEED, *owners], f"{start} ({name}) {rest}"))

    if "zero_optimization" not in config or (isinstance(zero, dict) and "stage" not in zero):
        text = f"zero_optimization.stage ({name}) is missing, so DeepSpeed would not use ZeRO"
        problems.append(([_DEEPSPEED], f"{text}; write 1, 2 or 3."))
    for path, rest in misfits(config, fillable, stage, _installed_version()):
        report(path, rest)
    for path, decided in owned.items():
        value = _get(config, path, AUTO)
        if value != AUTO and _is_scalar(value) and value != decided.value:
            report(path, f'contradicts {decided.origin}; write "auto".', decided.owners)
    for path, rest in _precision_combinations(config, run):
        report(path, rest, [_PRECISION])
    if text := _stage_1_problem(config, run, stage):
        report(("zero_optimization", "stage"), text, [_PRECISION])
    for path, rest in _offload_combinations(config, stage, run.training.ema_decay > 0):
        report(path, rest)
    if not problems:
        _fill(config, {path: decided.value for path, decided in owned.items()}, defaults)
        _settle_precision(config, run)
        _settle_offload(config)
        _write_whole_numbers(config)
    return config, problems


def _installed_version() -> str:
    """The installed DeepSpeed's version, without importing it (it would import torch)."""
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return ""


def _batch_problems(run: RunSettings, world_size: int, sources: Optional[Sources]) -> list[Problem]:
    batch = run.batch
    images_per_micro_step = batch.micro_batch_images * world_size
    if batch.global_batch_images % images_per_micro_step == 0:
        return []
    lower = batch.global_batch_images // images_per_micro_step * images_per_micro_step
    higher = lower + images_per_micro_step
    place = sources.place(_GLOBAL) if sources else None
    text = (
        f"batch.global_batch_images ({batch.global_batch_images}"
        f"{', ' + place.text if place else ''}) must be a multiple of "
        f"micro_batch_images x world_size ({batch.micro_batch_images} x {world_size} = "
        f"{images_per_micro_step}); set it to {f'{lower} or ' if lower else ''}{higher}, or "
        f"keep it {_way_to_keep(batch.global_batch_images, batch.micro_batch_images, world_size)}."
    )
    return [([_GLOBAL, _MICRO], text)]


def _way_to_keep(global_batch: int, micro_batch: int, world_size: int) -> str:
    """What else can change so that a global batch divides; a run that goes on wants the old one."""
    share, rest = divmod(global_batch, world_size)
    if rest == 0:
        fitting = max(size for size in range(1, micro_batch + 1) if share % size == 0)
        return f"with batch.micro_batch_images={fitting}"
    fewer = max(ranks for ranks in range(1, world_size) if global_batch % ranks == 0)
    return f"on {fewer} rank{'s' if fewer > 1 else ''}"


def _owned_values(run: RunSettings, world_size: int) -> dict[KeyPath, _Owned]:
    batch, precision = run.batch, run.training.precision
    images, micro = batch.global_batch_images, batch.micro_batch_images
    steps = max(1, images // (micro * world_size))
    clipping = run.optimizer.gradient_clipping
    accumulation = (
        f"batch.global_batch_images / (micro_batch_images x {world_size} ranks) = {steps}"
    )
    return {
        ("train_batch_size",): _Owned(images, f"batch.global_batch_images = {images}", (_GLOBAL,)),
        ("train_micro_batch_size_per_gpu",): _Owned(
            micro, f"batch.micro_batch_images = {micro}", (_MICRO,)
        ),
        ("gradient_accumulation_steps",): _Owned(steps, accumulation, (_GLOBAL, _MICRO)),
        ("gradient_clipping",): _Owned(
            clipping,
            f"optimizer.gradient_clipping = {clipping}",
            (("optimizer", "gradient_clipping"),),
        ),
        ("bf16", "enabled"): _Owned(
            precision == "bf16", f"training.precision = {precision}", (_PRECISION,)
        ),
    }


def _fillable_values(run: RunSettings) -> dict[KeyPath, Any]:
    """What "auto" means where the JSON decides, but the model's size suggests.

    Buckets of 64 x width^2 elements: 67M (134 MB in bf16) at width 1024, so that a model of 24
    layers is reduced in about eight messages; DeepSpeed's 5e8 would be one bucket larger than the
    model. ZeRO-3 prefetches one layer (about 20 x width^2). Of the VQ-VAE it keeps vectors whole
    (10 x width, as transformers does); the transformer's come with their block (engine/build.py),
    while each one kept whole would be gathered by itself after every step.
    """
    if isinstance(run, Phase2):
        width = run.vqvae.ch * max(run.vqvae.ch_mult)
        kept_whole = 10 * width
    else:
        width = run.transformer.hidden
        kept_whole = 0
    zero = "zero_optimization"
    values: dict[KeyPath, Any] = {
        (zero, "reduce_bucket_size"): 64 * width**2,
        (zero, "allgather_bucket_size"): 64 * width**2,
        ("data_types", "grad_accum_dtype"): "fp32",
        ("zero_force_ds_cpu_optimizer",): False,
    }
    for prefix in ("", "stage3_"):
        values[zero, f"{prefix}prefetch_bucket_size"] = 20 * width**2
        values[zero, f"{prefix}param_persistence_threshold"] = kept_whole
    return values


def _precision_combinations(
    config: Mapping[str, Any], run: RunSettings
) -> list[tuple[KeyPath, str]]:
    """Values that are fine alone, but not with training.precision."""
    found: list[tuple[KeyPath, str]] = []
    precision = run.training.precision
    for name in ("grad_accum_dtype", "param_dtype"):
        path = ("data_types", name)
        dtype = _get(config, path, AUTO)
        allowed = [precision] if name == "param_dtype" else list(dict.fromkeys(["fp32", precision]))
        if (
            isinstance(dtype, str)
            and dtype != AUTO
            and _SHORT_DTYPES.get(dtype, dtype) not in allowed
        ):
            text = f"contradicts training.precision = {precision}; write {' or '.join(allowed)}."
            found.append((path, text))
    dtype = _get(config, ("communication_data_type",))
    if isinstance(dtype, str) and dtype not in ("fp32", precision):
        text = f"contradicts training.precision = {precision}; remove it."
        found.append((("communication_data_type",), text))
    return found


def _stage_1_problem(config: Mapping[str, Any], run: RunSettings, stage: Optional[int]) -> str:
    """What is wrong with BF16_Optimizer, DeepSpeed's own for stage 1 in bf16 with float32 sums."""
    dtype = _get(config, ("data_types", "grad_accum_dtype"), AUTO)
    sums = "fp32" if dtype in (None, AUTO) else _SHORT_DTYPES.get(str(dtype), dtype)
    is_it = stage == 1 and run.training.precision == "bf16" and sums == "fp32"
    version = _installed_version()
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    if not is_it or _offload_device(config) != "none" or not numbers or numbers >= [0, 19, 8]:
        return ""
    return (
        f"does not go with training.precision = bf16 and the installed DeepSpeed {version}, which "
        "ends at a gradient that is not finite instead of leaving the step out; write 2 or 3, or "
        "upgrade to 0.19.8."
    )


def _offload_combinations(
    config: Mapping[str, Any], stage: Optional[int], averages_weights: bool
) -> list[tuple[KeyPath, str]]:
    found: list[tuple[KeyPath, str]] = []
    uses_nvme = False
    for block in ("offload_optimizer", "offload_param"):
        path: KeyPath = ("zero_optimization", block)
        offload = _get(config, path)
        if not isinstance(offload, dict):
            continue
        device = offload.get("device", "none")
        uses_nvme |= device == "nvme"
        if device == "nvme" and not offload.get("nvme_path"):
            found.append(((*path, "device"), "needs nvme_path beside it."))
        if device == "nvme" and stage != 3:
            found.append(((*path, "device"), "works at ZeRO stage 3 only; use cpu."))
        if device == "nvme" and averages_weights:
            text = "keeps weights where no moving average follows them; use cpu, or set "
            found.append(((*path, "device"), f"{text}training.ema_decay to 0."))
        for name in offload:
            if name in _NVME_ONLY and device != "nvme":
                text = f"has no effect with device: {device}, only with nvme; remove it."
                found.append(((*path, name), text))
    if "aio" in config and not uses_nvme:
        found.append((("aio",), "has no effect without offload to nvme; remove it."))
    if config.get("zero_force_ds_cpu_optimizer") is True and _offload_device(config) != "none":
        text = "refuses the torch AdamW that lgpt hands to DeepSpeed; write false or remove it."
        found.append((("zero_force_ds_cpu_optimizer",), text))
    return found


def _offload_device(config: Mapping[str, Any]) -> Any:
    return _get(config, ("zero_optimization", "offload_optimizer", "device"), "none")


def _fill(
    config: dict[str, Any], owned: Mapping[KeyPath, Any], defaults: Mapping[KeyPath, Any]
) -> None:
    for path, value in owned.items():
        _set(config, path, value)
    for path, value in defaults.items():
        if _get(config, path) == AUTO:
            _set(config, path, value)


def _settle_precision(config: dict[str, Any], run: RunSettings) -> None:
    """Gradients accumulate in float32; DeepSpeed's default is bf16, whose sums lose bits."""
    path = ("data_types", "grad_accum_dtype")
    if run.training.precision == "bf16" and _get(config, path) is None:
        _set(config, path, "fp32")


def _settle_offload(config: dict[str, Any]) -> None:
    """DeepSpeed refuses a torch optimizer with offload unless it is told that this is meant."""
    if _offload_device(config) == "none":
        config.pop("zero_force_ds_cpu_optimizer", None)
    else:
        config["zero_force_ds_cpu_optimizer"] = False


def _write_whole_numbers(config: dict[str, Any]) -> None:
    """5e8 is a float to JSON; sizes are written as integers."""
    for key, value in config.items():
        if isinstance(value, dict):
            _write_whole_numbers(value)
        elif isinstance(value, float) and value.is_integer() and key != "gradient_clipping":
            config[key] = int(value)


def _stage_of(zero: Any) -> Optional[int]:
    stage = zero.get("stage") if isinstance(zero, dict) else None
    return stage if stage in (1, 2, 3) and not isinstance(stage, bool) else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _get(config: Any, path: KeyPath, default: Any = None) -> Any:
    for key in path:
        if not isinstance(config, Mapping) or key not in config:
            return default
        config = config[key]
    return config


def _set(config: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value
