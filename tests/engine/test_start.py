"""bf16 with float32 products against double precision and torch's own bf16."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

from lgpt.engine import start
from lgpt.engine.start import Float32Products


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (lambda a, b: functional.linear(a, b), [(5, 64), (7, 64)]),
        (lambda a, b: a @ b, [(5, 64), (64, 7)]),
        (lambda a, b: torch.bmm(a, b), [(2, 5, 64), (2, 64, 7)]),
        (lambda a, b: functional.conv2d(a, b), [(1, 8, 5, 5), (4, 8, 3, 3)]),
    ],
)
def test_products_round_once_as_bf16_hardware_does(product, shapes):
    torch.manual_seed(0)
    a, b = (torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
    exact = product(a.double(), b.double())
    with Float32Products():
        got = product(a, b)
        got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    # Half a unit in the last place of bf16 (8 bits), and float32's own rounding.
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    a64, b64 = (t.detach().double().requires_grad_() for t in (a, b))
    product(a64, b64).sum().backward()
    for mine, reference in ((a, a64), (b, b64)):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), reference.grad, rtol=2**-7, atol=1e-3)


def test_attention_with_a_mask_and_float32_products_is_plain_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 16).bfloat16() for _ in range(3))
    mask = torch.rand(2, 1, 6, 6) > 0.3
    mask[..., 0] = True
    expected = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask
    )
    with Float32Products():
        got = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=1e-2)


def test_a_product_lands_in_the_tensor_it_is_asked_to_fill():
    a, b = torch.randn(3, 16).bfloat16(), torch.randn(16, 5).bfloat16()
    filled = torch.full((3, 5), 7.0).bfloat16()
    with Float32Products():
        torch.mm(a, b, out=filled)
    torch.testing.assert_close(filled.double(), a.double() @ b.double(), rtol=2**-7, atol=1e-3)


def test_other_types_pass_untouched():
    a = torch.randn(4, 8, dtype=torch.float64)
    with Float32Products():
        assert (a @ a.T).dtype == torch.float64


def test_a_launchers_port_that_another_program_has_is_a_sentence():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        program = """
from lgpt.core.errors import SettingsError
from lgpt.engine.start import start_process_group
try:
    start_process_group()
except SettingsError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **launched, "MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert f"port {port} of this machine is taken" in done.stdout, done.stderr[-3000:]
    assert "--master_port" in done.stdout


def test_a_rank_does_not_import_mlflow_and_can():
    program = """
import sys
from lgpt.engine.start import load_deepspeed
load_deepspeed()
print([name for name in sys.modules if name.split(".")[0] == "mlflow"])
import deepspeed.autotuning.autotuner, mlflow
print(mlflow.__name__)
load_deepspeed()
print(mlflow is sys.modules["mlflow"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-3:] == ["[]", "mlflow", "True"], done.stderr[-3000:]


def test_what_a_cpu_has_instructions_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that noise spoilt would cost the whole run its bf16 products."""
    spoilt = {torch.bfloat16: 1.0, torch.float32: 1e-3}
    monkeypatch.setattr(start, "_seconds_of_a_product", spoilt.__getitem__)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert start._slowdown_of_bf16() == 1000
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cpu, name, lambda: True)
            patch.setattr(start, "onednn_multiplies_bf16", lambda: True)
            assert start._slowdown_of_bf16() == 1
            patch.setattr(start, "onednn_multiplies_bf16", lambda: False)
            assert start._slowdown_of_bf16() == 1000


@pytest.mark.skipif(
    not hasattr(torch.cpu, "_is_avx512_bf16_supported"), reason="this PyTorch does not tell"
)
def test_the_instructions_are_those_that_the_kernel_names() -> None:
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or platform.machine() != "x86_64":
        pytest.skip("no x86 Linux")
    flags = set(cpu.read_text().split())
    assert start._has_bf16_instructions() == bool(flags & {"avx512_bf16", "amx_tile"})
