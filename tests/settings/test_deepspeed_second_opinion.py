"""The installed DeepSpeed beside our resolver: what it swallows, and if we know all its keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from lgpt.core.errors import SettingsError
from lgpt.settings.deepspeed import resolve_deepspeed_config
from lgpt.settings.deepspeed_schema import TREE, Key
from lgpt.settings.run import load_run_settings

RUN = load_run_settings("phase3_500m", environ={})
ZERO2 = {"zero_optimization": {"stage": 2}}
ACCEPTED, REFUSED = "accepted", "refused"


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **keys}}


# What DeepSpeed takes and does not do, or refuses without advice; last, some words of ours.
TYPOS = [
    ({"zero_optimisation": {"stage": 3}}, ACCEPTED, "did you mean zero_optimization?"),
    ({**ZERO2, "gradient_cliping": 0.5}, ACCEPTED, "did you mean gradient_clipping?"),
    ({**ZERO2, "optimiser": {"type": "AdamW"}}, ACCEPTED, "did you mean optimizer?"),
    ({**ZERO2, "mlflow": {"enabled": True}}, ACCEPTED, "`tracking` section"),
    ({**ZERO2, "scheduler": {"type": "WarmupCosin"}}, ACCEPTED, "`schedule` section"),
    (
        {**ZERO2, "activation_checkpointing": {"partition_activation": False}},
        ACCEPTED,
        "did you mean activation_checkpointing.partition_activations?",
    ),
    (
        {**ZERO2, "checkpoint": {"load_univeral": False}},
        ACCEPTED,
        "did you mean checkpoint.load_universal?",
    ),
    (
        {**ZERO2, "data_types": {"grad_accum_type": "fp32"}},
        ACCEPTED,
        "did you mean data_types.grad_accum_dtype?",
    ),
    ({**ZERO2, "flops_profiler": {"enable": True}}, ACCEPTED, "flops_profiler.enabled?"),
    ({**ZERO2, "torch_autocast": {"enable": True}}, ACCEPTED, "torch_autocast.enabled?"),
    (
        {**ZERO2, "checkpoint": {"writer": {"decouple": True}}},
        ACCEPTED,
        "did you mean checkpoint.writer.decoupled?",
    ),
    ({**ZERO2, "data_types": {"grad_accum_dtype": "float99"}}, ACCEPTED, "must be one of fp32"),
    ({"zero_optimization": {"stage": "auto"}}, ACCEPTED, "is left over"),
    ({**ZERO2, "gradient_clipping": "atuo"}, ACCEPTED, "must be a number of at least 0"),
    (zero(stage3_prefetch_bucket_size=1), ACCEPTED, "has no effect at ZeRO stage 2"),
    (zero(offload_param={"device": "cpu"}), ACCEPTED, "has no effect at ZeRO stage 2"),
    (zero(overlap_com=True), REFUSED, "did you mean zero_optimization.overlap_comm?"),
    ({**ZERO2, "bf16": {"enable": True}}, REFUSED, "did you mean bf16.enabled?"),
    ({**ZERO2, "tensorboard": {"enable": True}}, REFUSED, "did you mean tensorboard.enabled?"),
    ({**ZERO2, "compile": {"x": 1}}, REFUSED, "compile.x = 1"),
    ({**ZERO2, "comms_logger": {"prof": True}}, REFUSED, "did you mean comms_logger.prof_"),
    (zero(reduce_bucket_size=5.5), REFUSED, "must be a whole number above 0"),
]


@pytest.fixture(scope="module")
def deepspeed_config() -> Any:
    """DeepSpeed's own parser, on one rank."""
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig


@pytest.mark.parametrize(("raw", "theirs", "ours"), TYPOS)
def test_typos_are_refused_here_whatever_deepspeed_does(raw, theirs, ours, deepspeed_config):
    config = {"train_batch_size": 4, **copy.deepcopy(raw)}
    if theirs == ACCEPTED:
        deepspeed_config(config)
    else:
        with pytest.raises(ValueError, match="validation error"):
            deepspeed_config(config)
    with pytest.raises(SettingsError) as caught:
        resolve_deepspeed_config(RUN, 8, raw)
    assert ours in str(caught.value)


def test_what_silence_costs(deepspeed_config):
    wrong_name = deepspeed_config({"train_batch_size": 4, "zero_optimisation": {"stage": 3}})
    assert wrong_name.zero_optimization_stage == 0
    left_over = {"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}
    left_over = deepspeed_config({"train_batch_size": 4, **left_over})
    assert left_over.zero_optimization_stage == 0
    assert left_over.bfloat16_config.enabled is False


@pytest.mark.parametrize("name", ["zero2_bf16", "zero3_bf16", "zero3_offload_bf16"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deepspeed_reads_in_our_configs_what_we_meant(name, precision, deepspeed_config):
    overrides = [f"deepspeed={name}", f"training.precision={precision}"]
    run = load_run_settings("phase3_500m", overrides, {})
    config = deepspeed_config(resolve_deepspeed_config(run, 1))
    assert config.zero_optimization_stage == int(name[4])
    assert config.bfloat16_config.enabled is (precision == "bf16")
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (256, 8)
    assert config.gradient_clipping == 1.0
    assert config.grad_accum_dtype == "fp32"
    offload = config.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") is ("offload" in name)


def _model_keys(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        for spelling in {name, field.alias or name}:
            yield (*prefix, spelling)


def test_our_key_tree_knows_every_key_of_deepspeeds_models(deepspeed_config):
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
        "hybrid_engine": HybridEngineConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    unknown = []
    for block, model in models.items():
        for path in _model_keys(model, tuple(block.split("."))):
            node: Any = TREE
            for key in path:
                node = None if node is None or isinstance(node, Key) else node.get(key)
            if node is None:
                unknown.append(".".join(path))
    assert not unknown


def test_our_key_tree_knows_every_key_deepspeed_reads_from_plain_dicts(deepspeed_config):
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.model_checkpointing.config import CHECKPOINT_DEFAULT_DICT
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    # A key of the JSON is a constant that has a default: X and X_DEFAULT (or X_ENABLED_DEFAULT).
    top_level = {
        getattr(constants, name[: -len("_DEFAULT")]).strip()
        for name in vars(constants)
        if name.endswith("_DEFAULT") and isinstance(getattr(constants, name[:-8], None), str)
    }
    blocks = {
        "activation_checkpointing": ACT_CHKPT_DEFAULT,
        "aio": AIO_DEFAULT_DICT,
        "checkpoint": CHECKPOINT_DEFAULT_DICT,
        "flops_profiler": [
            getattr(profiling, name[:-8]) for name in vars(profiling) if name.endswith("_DEFAULT")
        ],
    }
    for block, keys in blocks.items():
        known = TREE[block]
        assert not isinstance(known, Key)
        assert set(keys) <= set(known), block
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(TREE)
    known_zero = TREE["zero_optimization"]
    assert not isinstance(known_zero, Key)
    assert set(_REMOVED_ZERO_CONFIG_KEYS) <= set(known_zero)
    everywhere = {name for node in _all_blocks(TREE) for name in node}
    one_word = {name for name in top_level if name.isidentifier()}
    assert one_word - everywhere == set()


def _all_blocks(tree: Any) -> Iterator[Any]:
    yield tree
    for node in tree.values():
        if not isinstance(node, Key):
            yield from _all_blocks(node)
