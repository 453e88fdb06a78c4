"""Every key that DeepSpeed 0.18 to 0.19.8 reads from its JSON, checked by DeepSpeed or not.

DeepSpeed validates only some blocks with pydantic; at the top level and in
`activation_checkpointing`, `checkpoint`, `data_types`, `flops_profiler`, `torch_autocast` and
others an unknown key is read by nobody and nobody says so. Types, limits and the stages at which a
key does something were read in `deepspeed/runtime/config.py`, `zero/config.py` and the engine's
`_configure_zero_optimizer` of 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Union

ALL_STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Key:
    """One key: its JSON type, limits, and where it has an effect.

    Attributes:
        kind: "bool", "int", "float", "text", "list" or "block" (a mapping that nobody looks into
            here).
        low: Smallest number allowed.
        above: Number the value must exceed.
        high: Largest number allowed.
        choices: Allowed values.
        nullable: null is allowed.
        stages: ZeRO stages at which something reads the key.
        refused: Why lgpt does not take the key whatever its value, and the way out.
        idle: The only value that is taken, because lgpt does not use what the key switches on;
            `refused` then says why other values are not.
        is_auto: "auto" is DeepSpeed's own word here, not a placeholder.
        note: Why numbers beyond a limit are not taken, when that is no limit of DeepSpeed's.
    """

    kind: str
    low: Union[int, float, None] = None
    above: Union[int, float, None] = None
    high: Union[int, float, None] = None
    choices: tuple[Any, ...] = ()
    nullable: bool = False
    stages: tuple[int, ...] = ALL_STAGES
    refused: str = ""
    idle: Any = None
    is_auto: bool = False
    note: str = ""


Tree = Mapping[str, Any]  # of Keys and of further Trees

_FLAG = Key("bool")
_COUNT = Key("int", low=0)
_POSITIVE = Key("int", low=1)
_NUMBER = Key("float")
_TEXT = Key("text")
_MAYBE_TEXT = Key("text", nullable=True)
_LIST = Key("list")
_SHARE = Key("float", low=0, high=1)
_DTYPE = Key(
    "text",
    choices=("fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "float", "half"),
    nullable=True,
)


def _at(key: Key, *stages: int) -> Key:
    return replace(key, stages=stages)


def _refuse(why: str, kind: str = "block") -> Key:
    return Key(kind, refused=why)


def _each(names: str, key: Key) -> dict[str, Key]:
    """The same key under several names, written in one text."""
    return dict.fromkeys(names.split(), key)


def _off(why: str) -> Key:
    """A switch that may be written, but only as false."""
    return Key("bool", idle=False, refused=why)


_ADAMW = "lgpt hands DeepSpeed a torch AdamW, and this needs DeepSpeedCPUAdam; remove it."
_NO_REENTRY = (
    "lgpt does not hand it on to deepspeed.checkpointing; remove it. What is computed again is "
    "said by blocks.checkpointing in the run config."
)
_REMOVED = "removed from DeepSpeed (0.19.8 refuses it); remove it."
_REMOVED_ZERO_KEYS = ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
_NOT_HERE = "lgpt trains with data parallelism and ZeRO only; remove it."

_OFFLOAD_OPTIMIZER: Tree = {
    "device": Key("text", choices=("none", "cpu", "nvme")),
    "nvme_path": _MAYBE_TEXT,
    "buffer_count": _COUNT,
    "pin_memory": _FLAG,
    "pipeline_read": _FLAG,
    "pipeline_write": _FLAG,
    "fast_init": _FLAG,
    "ratio": Key("float", idle=1.0, refused=_ADAMW),
    "super_offload": _off(_ADAMW),
    "cpuadam_cores_perc": Key("float", idle=0.8, refused="only super_offload reads it; remove it."),
}
_OFFLOAD_PARAM: Tree = {
    "device": Key("text", choices=("none", "cpu", "nvme")),
    "nvme_path": _MAYBE_TEXT,
    "buffer_count": _COUNT,
    "buffer_size": _COUNT,
    "max_in_cpu": _COUNT,
    "pin_memory": _FLAG,
}
# Names that DeepSpeed takes with and without the prefix `stage3_`.
STAGE3_ALIASES: Mapping[str, Key] = {
    "prefetch_bucket_size": _at(_COUNT, 3),
    "param_persistence_threshold": _at(_COUNT, 3),
    "model_persistence_threshold": _at(_COUNT, 3),
    "max_live_parameters": _at(_COUNT, 3),
    "max_reuse_distance": _at(_COUNT, 3),
    "gather_16bit_weights_on_model_save": _at(_FLAG, 3),
    "module_granularity_threshold": _at(_COUNT, 3),
    "use_all_reduce_for_fetch_params": _at(_FLAG, 3),
    "allgather_sequential": _at(_FLAG, 3),
}
_ZERO: Tree = {
    "stage": Key("int", low=1, high=3, note="without ZeRO there are no shards to convert"),
    "contiguous_gradients": _FLAG,
    "reduce_scatter": _FLAG,
    "reduce_bucket_size": Key("int", above=0),
    "use_multi_rank_bucket_allreduce": _at(_FLAG, 1, 2),
    "allgather_partitions": Key(
        "bool",
        idle=True,
        refused="no part of DeepSpeed reads it any more; remove it.",
        stages=(1, 2),
    ),
    "allgather_bucket_size": _at(_COUNT, 1, 2),
    "overlap_comm": Key("bool", nullable=True),
    "compute_grad_norm": Key(
        "bool", idle=True, refused="lgpt logs the gradient norm of every step; remove it."
    ),
    "load_from_fp32_weights": _FLAG,
    "elastic_checkpoint": _off("DeepSpeed has replaced it by universal checkpoints; remove it."),
    "offload_param": _OFFLOAD_PARAM,
    "offload_optimizer": _OFFLOAD_OPTIMIZER,
    "zenflow": _refuse(_ADAMW),
    "sub_group_size": _at(_COUNT, 3),
    "cpu_offload": _refuse('deprecated; write "offload_optimizer": {"device": "cpu"}.', "bool"),
    "cpu_offload_param": _refuse('deprecated; write "offload_param": {"device": "cpu"}.', "bool"),
    "cpu_offload_use_pin_memory": _refuse(
        "deprecated; write pin_memory inside offload_optimizer or offload_param.", "bool"
    ),
    **STAGE3_ALIASES,
    **{f"stage3_{name}": key for name, key in STAGE3_ALIASES.items()},
    "stage3_gather_fp16_weights_on_model_save": _refuse(
        "deprecated; write stage3_gather_16bit_weights_on_model_save.", "bool"
    ),
    "ignore_unused_parameters": _at(_FLAG, 1, 2),
    "legacy_stage1": _off("DeepSpeed has removed the old stage 1; remove it."),
    "round_robin_gradients": _at(_FLAG, 1, 2),
    "parameter_alignment": _at(_FLAG, 1, 2),
    "zero_hpz_partition_size": _at(_COUNT, 3),
    "zero_quantized_weights": _at(_FLAG, 3),
    "zero_quantized_nontrainable_weights": _at(_FLAG, 3),
    "zero_quantized_gradients": _at(_FLAG, 3),
    "memory_efficient_linear": _at(_FLAG, 3),
    "pipeline_loading_checkpoint": _off("lgpt has no pipeline; remove it."),
    "override_module_apply": _at(_FLAG, 3),
    "log_trace_cache_warnings": _at(_FLAG, 3),
    "enable_sanity_checks": _at(_FLAG, 3),
    "save_muon_momentum_buffer_in_memory": _off("lgpt trains with AdamW, not Muon; remove it."),
    **{name: _refuse(_REMOVED) for name in _REMOVED_ZERO_KEYS},
    "leaf_module": {"classes": _LIST, "names": _LIST, "name_suffixes": _LIST},
}
_MASTER = "lgpt keeps float32 master weights; remove it."
_BUFFERS = "the VQ-VAE's quantizer counts in float32 buffers; remove it."
_PRECISION = "training.precision of the run config decides bf16 or fp32; remove it."
_BF16: Tree = {
    "enabled": _FLAG,
    "immediate_grad_update": _FLAG,
    "check_grad_overflow": _FLAG,
    "bf16_master_weights_and_grads": _off(_MASTER),
    "bf16_optimizer_states": _off(_MASTER),
}
_FP16: Tree = {
    "enabled": _off(_PRECISION),
    "auto_cast": _FLAG,
    "loss_scale": Key("float", low=0),
    "initial_scale_power": _COUNT,
    "loss_scale_window": _POSITIVE,
    "hysteresis": _COUNT,
    "consecutive_hysteresis": _FLAG,
    "min_loss_scale": _POSITIVE,
    "fp16_master_weights_and_grads": _FLAG,
}
_COMPILE: Tree = {
    "deepcompile": _off("lgpt does not compile its engine; remove it."),
    "free_activation_threshold": _COUNT,
    "passes": Key("list", nullable=True),
    **_each(
        "autoep_non_moe free_activation offload_activation offload_activation_pin_memory "
        "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters "
        "sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather "
        "keep_int_input_tensors keep_all_input_tensors",
        _FLAG,
    ),
}
_AUTOTUNING: Tree = {
    "enabled": _off("the autotuner restarts training with batches of its own; remove it."),
    **_each("results_dir exps_dir metric_path metric tuner_type model_info_path", _MAYBE_TEXT),
    **_each(
        "start_profile_step end_profile_step tuner_early_stopping tuner_num_trials mp_size "
        "max_train_batch_size min_train_batch_size max_train_micro_batch_size_per_gpu "
        "min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes",
        Key("int", nullable=True),
    ),
    "fast": _FLAG,
    "overwrite": _FLAG,
    "arg_mappings": Key("block", nullable=True),
    "model_info": Key("block", nullable=True),
}
_WRITER = "torch 2.6 and newer cannot load what it writes (DeepSpeed 0.19.8); remove it."
_CHECKPOINT: Tree = {
    "tag_validation": Key("text", choices=("Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL")),
    "load_universal": _off("lgpt decides how a checkpoint is loaded; remove it."),
    "use_node_local_storage": _off("lgpt reads all shards from one folder; remove it."),
    "parallel_write": {"pipeline_stage": _off("lgpt has no pipeline; remove it.")},
    "checkpoint_serialization": _FLAG,
    "writer": {
        "type": _refuse(_WRITER, "text"),
        "decoupled": _refuse(_WRITER, "bool"),
        "io_buffer_size": _refuse(_WRITER, "int"),
        "io_buffer_double": _refuse(_WRITER, "bool"),
        "show_statistics": _refuse(_WRITER, "bool"),
        "data_parallel": _refuse(_WRITER, "text"),
        "io_multiplier": _refuse(_WRITER, "int"),
    },
}
_MONITOR_JOB: Tree = {"enabled": _FLAG, "output_path": _TEXT, "job_name": _TEXT}
TREE: Tree = {
    "train_batch_size": _POSITIVE,
    "train_micro_batch_size_per_gpu": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "managed_gradient_accumulation": Key(
        "bool", idle=True, refused="lgpt's loop counts on it; remove it."
    ),
    "gradient_clipping": Key("float", low=0),
    "steps_per_print": Key("int", low=1, nullable=True),
    "dump_state": _FLAG,
    "disable_python_gc": _FLAG,
    "disable_allgather": _off("no part of DeepSpeed reads it any more; remove it."),
    "communication_data_type": Key("text", choices=("fp32", "fp16", "bf16"), nullable=True),
    "seq_parallel_communication_data_type": _refuse(_NOT_HERE, "text"),
    "prescale_gradients": _off("ZeRO with reduce_scatter cannot do it; remove it."),
    "gradient_predivide_factor": Key(
        "float", idle=1.0, refused="ZeRO with reduce_scatter cannot do it; remove it."
    ),
    "gradient_allreduce_op": Key(
        "text", choices=("mean", "sum"), idle="mean", refused="the loss is a mean over all ranks."
    ),
    "wall_clock_breakdown": _FLAG,
    "memory_breakdown": _FLAG,
    "dataloader_drop_last": _refuse("lgpt has its own data loader; remove it.", "bool"),
    "vocabulary_size": _refuse("DeepSpeed only warns with it; remove it.", "int"),
    "log_level": Key("text", nullable=True),
    "zero_allow_untested_optimizer": _FLAG,
    "zero_force_ds_cpu_optimizer": _FLAG,
    "use_data_before_expert_parallelism": _off(_NOT_HERE),
    "optimizer": {
        "type": _refuse(
            "the `optimizer` section of the run config owns it; remove the block.", "text"
        ),
        "params": _refuse("the `optimizer` section of the run config owns it; remove the block."),
        "legacy_fusion": _refuse("lgpt hands DeepSpeed a torch AdamW; remove the block.", "bool"),
    },
    "scheduler": {
        "type": _refuse(
            "the `schedule` section of the run config owns it; remove the block.", "text"
        ),
        "params": _refuse("the `schedule` section of the run config owns it; remove the block."),
    },
    "zero_optimization": _ZERO,
    "bf16": _BF16,
    "bfloat16": _refuse('the old name of the block; write "bf16".'),
    "fp16": _FP16,
    "torch_autocast": {
        "enabled": _off(_PRECISION),
        "dtype": _DTYPE,
        "lower_precision_safe_modules": _LIST,
    },
    "data_types": {
        "grad_accum_dtype": _DTYPE,
        "param_dtype": _DTYPE,
        "buffer_dtype": Key("text", nullable=True, idle="fp32", refused=_BUFFERS),
        "keep_in_fp32_modules": Key("list", is_auto=True),
    },
    "activation_checkpointing": {
        "partition_activations": _off(_NO_REENTRY),
        "contiguous_memory_optimization": _off(_NO_REENTRY),
        "cpu_checkpointing": _off(_NO_REENTRY),
        "number_checkpoints": Key("int", nullable=True, idle=None, refused=_NO_REENTRY),
        "synchronize_checkpoint_boundary": _off(_NO_REENTRY),
        "profile": _off(_NO_REENTRY),
    },
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _refuse(_WRITER),
    "aio": {
        "block_size": _POSITIVE,
        "queue_depth": _POSITIVE,
        "intra_op_parallelism": _POSITIVE,
        "thread_count": _POSITIVE,
        "single_submit": _FLAG,
        "overlap_events": _FLAG,
        "use_gds": _FLAG,
    },
    "flops_profiler": {
        "enabled": _FLAG,
        "recompute_fwd_factor": Key("float", low=0),
        "profile_step": _POSITIVE,
        "module_depth": Key("int", low=-1),
        "top_modules": _POSITIVE,
        "detailed": _FLAG,
        "output_file": _MAYBE_TEXT,
    },
    "comms_logger": {
        "enabled": _FLAG,
        "prof_all": _FLAG,
        "prof_ops": _LIST,
        "verbose": _FLAG,
        "debug": _FLAG,
    },
    "tensorboard": _MONITOR_JOB,
    "csv_monitor": _MONITOR_JOB,
    "wandb": {"enabled": _FLAG, "group": _MAYBE_TEXT, "team": _MAYBE_TEXT, "project": _TEXT},
    "comet": {
        "enabled": _FLAG,
        "samples_log_interval": _POSITIVE,
        "online": Key("bool", nullable=True),
        "mode": Key("text", choices=("get", "create", "get_or_create"), nullable=True),
        **_each("project workspace api_key experiment_name experiment_key", _MAYBE_TEXT),
    },
    "timers": {"throughput": {"enabled": _FLAG, "synchronized": _FLAG}},
    "compile": _COMPILE,
    "autotuning": _AUTOTUNING,
    "hybrid_engine": {
        "enabled": _off("lgpt samples with its own KV cache; remove it."),
        "max_out_tokens": _POSITIVE,
        "inference_tp_size": _POSITIVE,
        "release_inference_cache": _FLAG,
        "pin_parameters": _FLAG,
        "tp_gather_partition_size": _POSITIVE,
        "enable_cuda_graph": _FLAG,
    },
    "tensor_parallel": _refuse(_NOT_HERE),
    "pipeline": _refuse(_NOT_HERE),
    "expert_parallel": _refuse(_NOT_HERE),
    "sequence_parallel_size": _refuse(_NOT_HERE, "int"),
    "data_parallel_size": _refuse(_NOT_HERE, "int"),
    "data_efficiency": _refuse("lgpt's `data` section decides what is read when; remove it."),
    "weight_quantization": _refuse("lgpt trains unquantised weights; remove it."),
    **_each(
        "nebula compression_training amp quantize_training sparse_gradients eigenvalue "
        "sparse_attention elasticity graph_harvesting curriculum_learning "
        "progressive_layer_drop",
        _refuse(_REMOVED),
    ),
}
# Blocks inside zero_optimization that nothing reads at other stages.
BLOCK_STAGES: Mapping[str, tuple[int, ...]] = {
    "offload_param": (3,),
    "leaf_module": (3,),
}
# 0.18.0 refuses these inside pydantic blocks and ignores them silently elsewhere.
NOT_IN_0_18 = frozenset(
    _each(
        "zero_optimization.compute_grad_norm zero_optimization.parameter_alignment "
        "zero_optimization.allgather_sequential zero_optimization.stage3_allgather_sequential "
        "zero_optimization.save_muon_momentum_buffer_in_memory "
        "bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states data_types.param_dtype "
        "data_types.buffer_dtype data_types.keep_in_fp32_modules compile.autoep_non_moe "
        "compile.passes compile.offload_activation_pin_memory managed_gradient_accumulation "
        "disable_python_gc gradient_allreduce_op log_level",
        _FLAG,
    )
)
