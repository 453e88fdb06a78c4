"""Bring up this process: device, process group, and products in bf16 that a CPU can afford."""

from __future__ import annotations

import os
import sys
import time
import warnings
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch.overrides import TorchFunctionMode

from lgpt.core.distributed import is_launched, is_rank_zero, local_rank
from lgpt.core.errors import SettingsError
from lgpt.core.logging import get_logger
from lgpt.engine.ranks import broadcast_from_rank_zero
from lgpt.models.packed_linear import onednn_multiplies_bf16

_log = get_logger(__name__)

_SLOWER_THAN_FLOAT32 = 3.0
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # rank 0 may verify a large checkpoint meanwhile


def device_of_this_rank() -> torch.device:
    """`cuda:<local rank>` where CUDA is, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def load_deepspeed() -> ModuleType:
    """Import DeepSpeed for the device that is there.

    On a CPU two things are set first: the accelerator (a CUDA build of torch on a machine without a
    GPU is taken for CUDA otherwise), and DeepSpeed's shared-memory collectives are switched off:
    they are compiled for 40 to 130 s at the first start and need a C++ compiler, gloo does the same
    (seen with 0.18 to 0.19.8).
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch >= 2.10 renamed two collectives; DeepSpeed 0.19.8 calls the old names at every step.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    deepspeed = _import_deepspeed()
    if not torch.cuda.is_available() and hasattr(deepspeed.ops, "__compatible_ops__"):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _import_deepspeed() -> ModuleType:
    """DeepSpeed without MLflow.

    DeepSpeed's autotuner takes MLflow where it finds it, though training never tunes: with it each
    rank imports 1,370 modules more, in 2 s of a core and 115 MiB (DeepSpeed 0.19.8, MLflow 3.17).
    Only the first import hides it: later a thread may be importing MLflow for the tracker.
    """
    hides = "deepspeed" not in sys.modules and "mlflow" not in sys.modules
    if hides:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
        import deepspeed.ops
    finally:
        if hides:
            del sys.modules["mlflow"]
    return deepspeed  # type: ignore[no-any-return]


def start_process_group() -> torch.device:
    """Join the other ranks (NCCL or, on CPU, gloo); started by hand, a process is a group of one.

    Returns:
        This rank's device.

    Raises:
        SettingsError: Another program listens on the launcher's port.
    """
    device = device_of_this_rank()
    if dist.is_initialized():
        return device
    if not is_launched():
        # A free port of our own: two commands on one machine must not meet.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    deepspeed = load_deepspeed()
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=_COLLECTIVE_TIMEOUT,
            verbose=False,
        )
    except RuntimeError as error:
        if "address already in use" not in str(error).lower():
            raise
        raise SettingsError(
            f"port {os.environ.get('MASTER_PORT')} of this machine is taken, probably by another "
            "training: give the launcher another one, as in `deepspeed --master_port 29501 ...`."
        ) from error
    return device


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Float32Products(TorchFunctionMode):
    """Products of bf16 tensors computed in float32 and rounded to bf16 once.

    What bf16 units do in hardware (float32 accumulation, one rounding), for CPUs that have none:
    there a bf16 matrix product runs some 300 times slower than a float32 one (0.2 against 58
    GFLOP/s seen on AVX2), while the casts cost a few percent. Backward products run in float32 too,
    because autograd sees the casts.
    """

    is_on = False
    """Whether `afford_bf16` has switched it on for this process."""

    _PRODUCTS = frozenset(
        {
            functional.linear,
            functional.conv1d,
            functional.conv2d,
            torch.conv2d,
            functional.scaled_dot_product_attention,
            torch.matmul,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
            torch.mm,
            torch.Tensor.mm,
            torch.bmm,
            torch.Tensor.bmm,
            torch.addmm,
            torch.baddbmm,
            torch.einsum,
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in self._PRODUCTS or not _first_tensor_is_bf16(args):
            return func(*args, **kwargs)
        out = kwargs.pop("out", None)
        product = func(*_as_float32(args), **{key: _as_float32(v) for key, v in kwargs.items()})
        return product.to(torch.bfloat16) if out is None else out.copy_(product)


def _first_tensor_is_bf16(args: Any) -> bool:
    for value in args:
        if isinstance(value, torch.Tensor):
            return value.dtype == torch.bfloat16
    return False


def _as_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_as_float32(item) for item in value)
    return value


def afford_bf16(device: torch.device) -> bool:
    """Switch `Float32Products` on for the rest of the process where bf16 products are slow.

    All ranks call it; rank 0 measures. Each for itself, a busy core could make them compute
    differently.

    Returns:
        True when it was switched on.
    """
    if device.type != "cpu":
        return False
    slowdown = broadcast_from_rank_zero(_slowdown_of_bf16() if is_rank_zero() else None)
    if slowdown < _SLOWER_THAN_FLOAT32:
        return False
    Float32Products().__enter__()
    Float32Products.is_on = True
    _log.info(
        "This CPU multiplies bf16 %.0f times slower than float32: products are computed "
        "in float32 and rounded to bf16, as bf16 hardware does; weights and ZeRO stay bf16.",
        slowdown,
    )
    return True


def multiplies_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bf16 in hardware, or at least as if it did."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return True
    # A busy core can make float32 look slow; oneDNN knows what the CPU has.
    return onednn_multiplies_bf16() and _slowdown_of_bf16() < _SLOWER_THAN_FLOAT32


def _slowdown_of_bf16() -> float:
    """How many times longer a bf16 product takes; 1 where oneDNN has the CPU's instructions for it.

    Those are not measured: a moment's noise once in ten starts would mean float32 for a whole run,
    which was three times slower (AVX-512 BF16, two cores).
    """
    if _has_bf16_instructions() and onednn_multiplies_bf16():  # ONEDNN_MAX_CPU_ISA may forbid it
        return 1.0
    return _seconds_of_a_product(torch.bfloat16) / _seconds_of_a_product(torch.float32)


def _has_bf16_instructions() -> bool:
    """AVX-512 BF16 or AMX. False where this PyTorch does not tell, and of other CPUs."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in asked)


def _seconds_of_a_product(dtype: torch.dtype, width: int = 128, repeats: int = 20) -> float:
    left = torch.ones(width, width, dtype=dtype)
    torch.mm(left, left)
    best = float("inf")
    for _ in range(repeats):
        started_at = time.perf_counter()
        torch.mm(left, left)
        best = min(best, time.perf_counter() - started_at)
    return best
