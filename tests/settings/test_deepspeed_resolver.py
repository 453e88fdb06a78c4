"""The DeepSpeed config that a run trains with: complete, without "auto", or refused."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from typing import Any

import pytest

from lgpt.core.errors import SettingsError
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.deepspeed_file import load_deepspeed_json, shipped_deepspeed_configs
from lgpt.settings.run import load_run_settings

RUN = load_run_settings("phase3_500m", environ={})
FP32_RUN = load_run_settings("phase3_500m", ["training.precision=fp32"], {})


def has_auto(config: Any) -> bool:
    if isinstance(config, dict):
        return any(has_auto(value) for value in config.values())
    return config == "auto"


def problems_of(raw: dict[str, Any], run: Any = RUN, world_size: int = 8) -> tuple[str, ...]:
    before = copy.deepcopy(raw)
    with pytest.raises(SettingsError) as caught:
        resolve_deepspeed_config(run, world_size, raw)
    assert raw == before, "the caller's dict was changed"
    return caught.value.problems


def zero(stage: int = 2, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **keys}}


@pytest.mark.parametrize("name", ["zero2_bf16", "zero3_bf16", "zero3_offload_bf16"])
def test_shipped_configs_resolve_without_auto(name):
    assert name in shipped_deepspeed_configs()
    run = load_run_settings("phase3_500m", [f"deepspeed={name}"], {})
    config = resolve_deepspeed_config(run, 8)
    assert not has_auto(config)
    assert config["train_batch_size"] == 256
    assert config["train_micro_batch_size_per_gpu"] == 32
    assert config["gradient_accumulation_steps"] == 1
    assert resolve_deepspeed_config(run, 2)["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"]["enabled"] is True
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["zero_optimization"]["reduce_bucket_size"] == 64 * 1024**2
    assert "optimizer" not in config
    assert "scheduler" not in config
    assert resolve_deepspeed_config(run, 8, config) == config


def test_everything_the_run_owns_is_written_even_when_the_json_is_silent():
    config = resolve_deepspeed_config(RUN, 8, zero(2))
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_run_config_owns_precision():
    config = resolve_deepspeed_config(FP32_RUN, 8)
    assert config["bf16"]["enabled"] is False
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    (problem,) = problems_of({**zero(2), "bf16": {"enabled": True}}, FP32_RUN)
    assert "bf16.enabled = true" in problem
    assert 'training.precision = fp32; write "auto"' in problem
    problems = problems_of({**zero(2), "data_types": {"grad_accum_dtype": "bf16"}}, FP32_RUN)
    assert "write fp32" in problems[0]


def test_what_could_not_be_converted_is_not_trained():
    (problem,) = problems_of(zero(0))
    assert problem == (
        "zero_optimization.stage = 0 (zero3_bf16) must be a whole number from 1 to 3: without ZeRO "
        "there are no shards to convert."
    )
    assert resolve_deepspeed_config(RUN, 8, zero(1))["zero_optimization"]["stage"] == 1
    assert resolve_deepspeed_config(FP32_RUN, 8, zero(1))["zero_optimization"]["stage"] == 1


def test_cpu_offload_takes_the_torch_optimizer():
    raw = zero(3, offload_optimizer={"device": "cpu"})
    assert resolve_deepspeed_config(RUN, 8, raw)["zero_force_ds_cpu_optimizer"] is False
    (problem,) = problems_of({**raw, "zero_force_ds_cpu_optimizer": True})
    assert "torch AdamW" in problem
    assert "zero_force_ds_cpu_optimizer" not in resolve_deepspeed_config(RUN, 8, zero(3))


def test_indivisible_batch_names_all_numbers_and_the_fix():
    run = load_run_settings(
        "phase3_500m", ["batch.global_batch_images=100", "batch.micro_batch_images=25"], {}
    )
    with pytest.raises(SettingsError) as caught:
        resolve_deepspeed_config(run, 8)
    assert caught.value.problems == (
        "batch.global_batch_images (100) must be a multiple of micro_batch_images x world_size "
        "(25 x 8 = 200); set it to 200, or keep it on 5 ranks.",
    )
    with pytest.raises(SettingsError, match=r"set it to 75 or 150, or keep it on 2 ranks\."):
        resolve_deepspeed_config(run, 3)


def test_the_way_to_keep_a_global_batch_works():
    """A run that goes on with other ranks wants the batch that it had."""
    for global_batch, micro, ranks in ((256, 32, 3), (256, 32, 16), (100, 32, 1), (96, 40, 4)):
        words = [f"batch.global_batch_images={global_batch}", f"batch.micro_batch_images={micro}"]
        run = load_run_settings("phase3_500m", words, {}, check_deepspeed=False)
        with pytest.raises(SettingsError) as caught:
            resolve_deepspeed_config(run, ranks)
        told = caught.value.problems[0].partition("or keep it ")[2].rstrip(".")
        if told.startswith("with "):
            words[1] = told[len("with ") :]
        else:
            ranks = int(told.split()[1])
            words[1] = "batch.micro_batch_images=1"
        run = load_run_settings("phase3_500m", words, {}, check_deepspeed=False)
        config = resolve_deepspeed_config(run, ranks)
        assert config["train_batch_size"] == global_batch


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (zero(2, overlap_com=True), "did you mean zero_optimization.overlap_comm?"),
        (zero("auto"), 'zero_optimization.stage = "auto"'),
        (zero(4), "zero_optimization.stage = 4"),
        (zero(2, reduce_bucket_size=5.5), "must be a whole number above 0"),
        (zero(2, reduce_bucket_size=0), "must be a whole number above 0"),
        (zero(2, overlap_comm="true"), "must be true or false"),
        (zero(2, stage3_prefetch_bucket_size=1), "has no effect at ZeRO stage 2, only at 3"),
        (zero(2, prefetch_bucket_size=1), "has no effect at ZeRO stage 2, only at 3"),
        (zero(2, offload_param={"device": "cpu"}), "has no effect at ZeRO stage 2, only at 3"),
        (zero(0, offload_optimizer={"device": "cpu"}), "zero_optimization.stage = 0"),
        (zero(3, prefetch_bucket_size=1, stage3_prefetch_bucket_size=2), "also as stage3_prefetch"),
        (zero(3, leaf_module={"classes": [1, 2]}), "must be a list of texts"),
        (zero(2, reduce_bucket_size=-(10**400)), "must be a whole number above 0"),
        ({"zero_optimization": None}, "zero_optimization (zero3_bf16) must be a block"),
        ({**zero(2), "data_types": {"buffer_dtype": "bf16"}}, 'must be "fp32" or absent: the VQ'),
        ({**zero(2), "data_types": {"grad_accum_dtype": "float99"}}, "must be one of fp32"),
        ({**zero(2), "communication_data_type": "bfloat16"}, "Did you mean bf16?"),
        ({**zero(2), "gradient_clipping": -1}, "must be a number of at least 0"),
        ({**zero(2), "fp16": {"enabled": "auto"}}, "must be false or absent: training.precision"),
        ({**zero(2), "fp16": {"enabled": 0}}, "must be false or absent: training.precision"),
        ({**zero(2), "fp16": {"enabled": False, "hysteresis": 2}}, "nothing reads hysteresis in"),
        (
            {**zero(2), "tensorboard": {"job_name": "a"}},
            'remove the block or write "enabled": true',
        ),
        (zero(3, round_robin_gradients=True), "has no effect at ZeRO stage 3, only at 1 or 2"),
        (zero(2, cpu_offload=True), '"offload_optimizer": {"device": "cpu"}'),
        (zero(3, mics_shard_size=2), "removed from DeepSpeed"),
        (zero(3, offload_optimizer={"device": "gpu"}), "must be one of none, cpu, nvme"),
        (zero(3, offload_optimizer={"device": "nvme"}), "needs nvme_path"),
        (zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/n"}), "stage 3 only"),
        (zero(3, offload_optimizer={"device": "cpu", "buffer_count": 4}), "only with nvme"),
        (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "DeepSpeedCPUAdam"),
        (zero(3, zenflow={"topk_ratio": 0.1}), "DeepSpeedCPUAdam"),
        ({**zero(2), "aio": {"block_size": 4096}}, "has no effect without offload to nvme"),
        ({"zero_optimization": True}, "must be a block"),
        ({}, "zero_optimization.stage (zero3_bf16) is missing"),
        ({"zero_optimization": {}}, "zero_optimization.stage (zero3_bf16) is missing"),
        ({**zero(2), "train_batch_size": 64}, "contradicts batch.global_batch_images = 256"),
        ({**zero(2), "gradient_accumulation_steps": 2}, "contradicts batch.global_batch_images"),
        ({**zero(2), "gradient_clipping": 0.5}, "contradicts optimizer.gradient_clipping = 1.0"),
        ({**zero(2), "gradient_clipping": None}, "must be a number"),
        ({**zero(2), "optimizer": {"type": "AdamW"}}, "`optimizer` section of the run config"),
        ({**zero(2), "scheduler": {"type": "WarmupLR"}}, "`schedule` section of the run config"),
        ({**zero(2), "fp16": {"enabled": True}}, "training.precision"),
        ({**zero(2), "bfloat16": {"enabled": True}}, 'write "bf16"'),
        ({**zero(2), "torch_autocast": {"enabled": True}}, "training.precision"),
        ({**zero(2), "communication_data_type": "fp16"}, "contradicts training.precision = bf16"),
        ({**zero(2), "checkpoint": {"load_universal": True}}, "must be false or absent"),
        ({**zero(2), "checkpoint": {"writer": {"type": "FAST"}}}, "torch 2.6"),
        (
            {**zero(2), "activation_checkpointing": {"cpu_checkpointing": True}},
            "is said by blocks.checkpointing",
        ),
        ({**zero(2), "elasticity": {"enabled": True}}, "removed from DeepSpeed"),
        ({**zero(2), "tensor_parallel": {"autotp_size": 2}}, "data parallelism"),
        ({**zero(2), "wandb": {"enabled": "auto"}}, "is left over"),
        ({**zero(2), "overlap_comm": True}, "it belongs at zero_optimization.overlap_comm"),
        ({**zero(2), "steps_per_print": 0}, "of at least 1 or null"),
    ],
)
def test_what_deepspeed_would_take_in_silence_is_refused(raw, text):
    problems = problems_of(raw)
    assert len(problems) == 1, problems
    assert text in problems[0]


def test_all_problems_come_together():
    raw = {**zero(2, overlap_com=True, stage3_max_live_parameters=1), "gradient_cliping": 1}
    assert len(problems_of(raw, world_size=3)) == 4  # the batch, too


def test_switched_off_blocks_and_observability_may_stay():
    raw = {
        **zero(3, **{"stage3_max_live_parameters": 1e9}),
        "fp16": {"enabled": False},
        "steps_per_print": None,
        "flops_profiler": {"enabled": True, "profile_step": 3, "output_file": None},
        "tensorboard": {"enabled": True, "output_path": "tb", "job_name": "x"},
        "data_types": {"keep_in_fp32_modules": "auto"},
        "checkpoint": {"tag_validation": "Fail"},
        "wall_clock_breakdown": True,
    }
    config = resolve_deepspeed_config(RUN, 8, raw)
    assert config["zero_optimization"]["stage3_max_live_parameters"] == 10**9
    assert isinstance(config["zero_optimization"]["stage3_max_live_parameters"], int)


def test_keys_newer_than_the_installed_deepspeed_are_refused(monkeypatch):
    raw = zero(2, parameter_alignment=True)
    resolve_deepspeed_config(RUN, 8, raw)
    monkeypatch.setattr(metadata, "version", lambda name: "0.18.4")
    (problem,) = problems_of(raw)
    assert "is not known to the installed DeepSpeed 0.18.4" in problem


@pytest.mark.parametrize("sums", [{}, {"data_types": {"grad_accum_dtype": "float32"}}])
def test_stage_1_in_bf16_needs_the_deepspeed_that_leaves_bad_steps_out(monkeypatch, sums):
    """0.19.7 and before stop at an assertion there, and do not say `overflow` to the averages."""
    resolve_deepspeed_config(RUN, 8, {**zero(1), **sums})
    monkeypatch.setattr(metadata, "version", lambda name: "0.19.7")
    (problem,) = problems_of({**zero(1), **sums})
    assert problem.startswith("zero_optimization.stage = 1 (zero3_bf16) does not go with training.")
    assert "DeepSpeed 0.19.7" in problem
    assert "write 2 or 3, or upgrade to 0.19.8" in problem
    # Other optimizers of DeepSpeed's.
    in_bf16 = {"data_types": {"grad_accum_dtype": "bf16"}}
    offloaded = zero(1, offload_optimizer={"device": "cpu"})
    for raw in ({**zero(1), **in_bf16}, {**zero(2), **sums}, {**offloaded, **sums}):
        resolve_deepspeed_config(RUN, 8, raw)
    resolve_deepspeed_config(FP32_RUN, 8, zero(1))


def test_json_files_are_read_strictly(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2,\n "stage": 3}}')
    with pytest.raises(SettingsError, match=r"ds\.json: zero_optimization\.stage is written twice"):
        load_deepspeed_json(str(path))
    path.write_text('{\n "a": 1,\n}')
    with pytest.raises(SettingsError, match=r"ds\.json:[23] is not JSON"):
        load_deepspeed_json(str(path))
    path.write_text("[]")
    with pytest.raises(SettingsError, match="one JSON object"):
        load_deepspeed_json(str(path))
    path.write_text('{"a": ' * 100_000)
    with pytest.raises(SettingsError, match=r"ds\.json is nested too deeply"):
        load_deepspeed_json(str(path))
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(SettingsError, match=r"ds\.json cannot be read: 'utf-8' codec"):
        load_deepspeed_json(str(path))
    path.write_text(json.dumps(zero(1)))
    assert load_deepspeed_json(str(path)) == zero(1)
    with pytest.raises(SettingsError, match="no DeepSpeed config 'xxx"):
        load_deepspeed_json("x" * 300)
    with pytest.raises(SettingsError, match=r"did you mean zero2_bf16\? .*zero3_offload_bf16"):
        load_deepspeed_json("zero2_bf15")
