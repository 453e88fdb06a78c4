"""A DeepSpeed engine around a model, and the few questions the loop asks of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lgpt.core.distributed import rank, world_size
from lgpt.engine.first_weights import make_first_weights
from lgpt.engine.kept_gradients import keep_gradients
from lgpt.engine.memory import keep_freed_memory
from lgpt.engine.row_norms import clip_if_need_be, take_norms_by_rows
from lgpt.engine.start import Float32Products, load_deepspeed
from lgpt.models.codebook import Codebook
from lgpt.settings.training import OptimizerSettings

# Decay would pull the codes of a VQ-VAE away from the latents that they stand for.
_NOT_DECAYED_MODULES = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, Codebook)

_NOT_HYPERPARAMETERS = ("params", "lr", "initial_lr")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices and kernels decayed; norms, biases, vectors and embeddings not.

    A VQ-VAE's codebook counts as an embedding. Only trainable parameters; each is in exactly one
    group, in the model's own order.
    """
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NOT_DECAYED_MODULES)
        for parameter in module.parameters(recurse=False)
    }
    decayed, not_decayed = [], []
    for parameter in _trainable(model):
        # Under ZeRO-3 a parameter may be in parts already, and those are vectors.
        axes = len(getattr(parameter, "ds_shape", parameter.shape))
        target = not_decayed if axes < 2 or id(parameter) in spared else decayed
        target.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def build_engine(model: nn.Module, optimizer: OptimizerSettings, ds_config: dict[str, Any]) -> Any:
    """Wrap a model in a DeepSpeed engine with AdamW in two groups.

    Args:
        model: In float32, the same weights on every rank; or on the meta device, where
            `make_first_weights` fills it. Its `zero3_leaf_modules`, if it has them, are the classes
            of submodules that ZeRO-3 gathers as a whole.
        optimizer: AdamW's numbers; the loop sets the learning rate at every step.
        ds_config: Resolved, without "auto" (settings/deepspeed.py). Copied: DeepSpeed keeps what it
            is handed.

    Returns:
        The DeepSpeedEngine. `engine(...)`, `engine.backward(loss)`, `engine.step()`.
    """
    deepspeed = load_deepspeed()
    config = copy.deepcopy(ds_config)
    if Float32Products.is_on:
        # DeepSpeed's own linear function multiplies in bf16 in its backward (seen: 2 s a step).
        config["zero_optimization"]["memory_efficient_linear"] = False
    if world_size() == 1 and config["zero_optimization"]["stage"] < 3:
        # Nobody to scatter to or to wait for, yet DeepSpeed copies each bucket for the one, and
        # back, and makes a second bucket for the other (0.19.8). The bits are the same.
        config["zero_optimization"].update(reduce_scatter=False, overlap_comm=False)
    if any(parameter.is_meta for parameter in model.parameters()):
        make_first_weights(model, config)
    groups = parameter_groups(model, optimizer.weight_decay)
    adamw = torch.optim.AdamW(
        groups,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,  # one pass over weights and moments, on CPUs too
    )
    leaves = getattr(model, "zero3_leaf_modules", ())
    if config["zero_optimization"]["stage"] == 3 and leaves:
        # Gathered and released as a whole: hooks and messages a block, not a matrix. Two gloo ranks
        # did 1.7 times the steps (test_convert.py and test_three_phases.py draw through it).
        deepspeed.utils.set_z3_leaf_modules(model, list(leaves))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw, config=config, dist_init_required=False
    )
    if world_size() == 1:
        keep_gradients(engine.optimizer)
    take_norms_by_rows(engine.optimizer, engine.device)
    clip_if_need_be(engine.optimizer, engine.device)
    _forget_sums_of_skipped_steps(engine.optimizer)
    _keep_memory_from_the_first_step_on(adamw, engine.device)
    return engine


def _forget_sums_of_skipped_steps(optimizer: Any) -> None:
    """With the optimizer of ZeRO-1 or 2 on the CPU, start a step's sums anew after a skipped one.

    DeepSpeed (0.19.8) keeps bf16 gradients' float32 sums when it skips a step for a gradient that
    is not finite, and adds the next ones to them, so that every later step is skipped as well.
    """
    if not getattr(optimizer, "cpu_offload", False):
        return
    reset = optimizer.reset_cpu_buffers  # at the end of every step, skipped or not

    def reset_sums_too() -> None:
        reset()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.reset_cpu_buffers = reset_sums_too


def _keep_memory_from_the_first_step_on(optimizer: torch.optim.Optimizer, device: Any) -> None:
    """Not before: what building the engine and the moments takes for a moment would be kept too."""

    def keep(*_: Any) -> None:
        keep_freed_memory(device)
        hook.remove()

    hook = optimizer.register_step_post_hook(keep)


def set_masters(engine: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Put float32 weights into the optimizer's masters. All ranks call it, with the same weights.

    DeepSpeed (0.19.8) makes them of weights that it has rounded to bf16 before; the bf16 weights
    themselves are right already.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not engine.bfloat16_enabled():
        return
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = weights[name].to(engine.device, torch.float32)
        if hasattr(parameter, "ds_tensor"):
            # The full setter fails on the last rank where the ranks do not divide the elements.
            safe_set_local_fp32_param(parameter, _stage3_part(whole, parameter.ds_tensor.numel()))
        else:
            safe_set_full_fp32_param(parameter, whole)


def _stage3_part(whole: torch.Tensor, length: int) -> torch.Tensor:
    """This rank's part of a parameter, with zeros behind its end."""
    part = whole.new_zeros(length)
    mine = whole.flatten()[rank() * length : (rank() + 1) * length]
    part[: mine.numel()] = mine
    return part


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """The same rate in every group, before the step that uses it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def hyperparameters(engine: Any) -> dict[str, Any]:
    """What the optimizer uses now: every group's numbers, and the gradient norm it clips at.

    The learning rate is not in it: the loop sets it before every step.
    """
    return {
        "groups": [
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in group.items()
                if name not in _NOT_HYPERPARAMETERS and _is_json(value)
            }
            for group in engine.optimizer.param_groups
        ],
        "gradient_clipping": float(getattr(engine.optimizer, "clip_grad", 0.0)),
    }


def set_hyperparameters(engine: Any, wanted: dict[str, Any]) -> None:
    """Make the optimizer use what `hyperparameters` gave."""
    for group, numbers in zip(engine.optimizer.param_groups, wanted["groups"]):
        for name, value in numbers.items():
            group[name] = tuple(value) if isinstance(value, list) else value
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = wanted["gradient_clipping"]


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple, list))


def gradient_norm(engine: Any) -> float:
    """Global norm of the last step's gradient before clipping; NaN when DeepSpeed kept none."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def forget_gradients(engine: Any) -> None:
    """Drop what `torch.autograd.grad` by other tensors has left in ZeRO-3's bucket.

    Its backward hooks of modules that are gathered as a whole (deepspeed 0.19.8,
    reduce_leaf_module_grads) put their parameters there, with gradients of zeros; the next step
    would find them twice and stop at an assertion.
    """
    if not hasattr(next(engine.module.parameters()), "ds_tensor"):  # another stage
        return
    for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values():
        bucket.params.clear()
        bucket.elements = 0
    for parameter in engine.module.parameters():
        parameter.grad = None


def parameter_dtype(engine: Any) -> torch.dtype:
    """What floating-point inputs must be cast to."""
    return next(engine.module.parameters()).dtype
