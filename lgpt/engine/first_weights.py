"""First weights of a model that was built on the meta device, a module at a time.

So no rank ever holds more than it will keep: under ZeRO-3 its part of every parameter, under the
other stages the model in the dtype that it trains in.
"""

from __future__ import annotations

from typing import Any, Callable, Protocol, cast

import torch
from torch import nn

from lgpt.engine.start import device_of_this_rank, load_deepspeed


class _Initialized(Protocol):
    def initialize(self, module: nn.Module) -> None:
        """Give the parameters that `module` itself owns their first values."""


def make_first_weights(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Fill a model that has shapes only, and keep what this rank will train. All ranks call it.

    Values are drawn in float32 on the CPU, so they depend on its generator alone: not on the
    device, the ZeRO stage or the number of ranks.

    Args:
        model: Its parameters are on the meta device, none of them shared; its buffers are not. Its
            `initialize(module)` gives a module's own parameters their first values.
        ds_config: As for `build_engine`.
    """
    dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32
    is_stage3 = ds_config["zero_optimization"]["stage"] == 3
    keep = _keep_a_part(ds_config, dtype) if is_stage3 else _keep_whole(dtype)

    def fill(module: nn.Module) -> None:
        own = list(module.named_parameters(recurse=False))
        for name, shape_only in own:
            empty = torch.empty(shape_only.shape, dtype=torch.float32)
            module.register_parameter(name, nn.Parameter(empty, shape_only.requires_grad))
        if own:
            cast(_Initialized, model).initialize(module)
            keep(module)
        for name, buffer in list(module.named_buffers(recurse=False)):
            # DeepSpeed moves only models that it partitions itself.
            setattr(module, name, buffer.to(device_of_this_rank()))

    model.apply(fill)


def _keep_whole(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def keep(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    return keep


def _keep_a_part(ds_config: dict[str, Any], dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """As under `deepspeed.zero.Init`, after the values are there and not before.

    In its context the values would be drawn in bf16, another stream of numbers.
    """
    to_dtype = _keep_whole(dtype)
    converted: list[Any] = []

    def keep(module: nn.Module) -> None:
        to_dtype(module)
        own = list(module.parameters(recurse=False))
        if converted:  # DeepSpeed's own way to follow its first parameter
            converted[0].convert_to_zero_parameters(param_list=own)
        else:
            zero = load_deepspeed().zero
            zero.Init(module=module, config_dict_or_path=ds_config, dtype=dtype)
            converted.extend(own)

    return keep
