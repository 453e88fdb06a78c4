"""Where, in which dtype and in which order of its weights a model draws."""

from __future__ import annotations

import torch

from lgpt.core.errors import SettingsError
from lgpt.engine.start import multiplies_bf16
from lgpt.models.cpu_block import pack_for_decoding
from lgpt.models.cpu_library import cpu_library
from lgpt.models.latent_gpt import LatentGPT


def lay_out_for_drawing(model: LatentGPT, device: torch.device, dtype: torch.dtype) -> bool:
    """Put a model that is on the CPU where and in what it draws, in place; packed on a CPU.

    Args:
        model: In any dtype.
        device: Where it draws.
        dtype: float32, bf16, or int8 on a CPU.

    Returns:
        False where it draws on a CPU and could not be packed; it is in the dtype all the same.

    Raises:
        SettingsError: There can be no int8 here.
    """
    if dtype != torch.int8:
        model.to(device, dtype)
        return device.type != "cpu" or pack_for_decoding(model)
    if device.type != "cpu":
        raise SettingsError(f"dtype int8 draws on CPUs alone, and this is {device}: take bf16.")
    if not pack_for_decoding(model, int8=True):
        raise SettingsError(
            "dtype int8 needs a C++ compiler (g++, clang++, or what CXX names) and even widths (of "
            "the model and its feed-forward): take bf16 or fp32."
        )
    return True


def fastest_dtype(device: torch.device) -> torch.dtype:
    """In which weights draw fastest: bf16, or float32 where a device computes bf16 slowly.

    A CPU without bf16 units reads bf16 weights all the same where a compiler is
    (`cpu_decoding.cpp`).
    """
    is_fast = multiplies_bf16(device) or (device.type == "cpu" and cpu_library() is not None)
    return torch.bfloat16 if is_fast else torch.float32
