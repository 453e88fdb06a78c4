"""The compiled block draws what PyTorch's draws, whatever the options, the batch and the CPU."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lgpt.models import cpu_library
from lgpt.models.cpu_block import CpuLinear, pack_for_decoding
from lgpt.models.cpu_library import in_tiles, out_of_tiles, times_tiles
from lgpt.models.int8_weights import to_int8
from lgpt.models.latent_gpt import LatentGPT, LatentGPTConfig
from lgpt.sampling.generate import generate_tokens

# As on a CPU with AVX-512 BF16, its one instruction written out: the code around it runs here.
EMULATED = "LGPT_EMULATE_BF16_PRODUCTS"
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=[(), (EMULATED,)], ids=["this-cpu", "bf16-products"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """The library as this CPU compiles it, and as one with bf16 products would; in use for both."""
    opened = cpu_library.cpu_library(*request.param)
    assert opened is not None, "the tests need a C++ compiler"
    monkeypatch.setattr(cpu_library, "cpu_library", lambda: opened)
    return opened


@pytest.fixture
def old_threads() -> Iterator[None]:
    """PyTorch has as many threads after the test as before."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _model(dtype: torch.dtype, **changes: object) -> LatentGPT:
    torch.manual_seed(0)
    # 72 codes and a feed-forward of 52 fill no tile.
    shape = {"layers": 2, "hidden": 64, "heads": 4, "mlp_hidden": 52}
    grid = {"grid_height": 4, "grid_width": 4}
    model = LatentGPT(LatentGPTConfig(72, text_width=10, **{**shape, **grid, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def _inputs(model: LatentGPT, words: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, text and a mask under which one picture has no word, and one has a gap."""
    torch.manual_seed(1)
    mask = torch.arange(words) < torch.tensor([[2], [words], [0], [words], [words - 1]])
    mask[4, 1] = False
    return torch.randint(72, (5, model.config.num_tokens)), torch.randn(5, words, 10), mask


NULL_TEXT = torch.tensor([False, False, False, True, False])


@torch.no_grad()
def _cached_logits(model: LatentGPT, given: int, words: int = 5) -> Tensor:
    """Of all positions: after the given tokens at once, the others one by one."""
    tokens, text, mask = _inputs(model, words)
    state = model.start_decoding(text, mask, NULL_TEXT)
    if given:
        logits = [model.read_given(tokens[:, :given], state)]
    else:
        logits = [model.decode_next(None, state)]
    logits += [model.decode_next(tokens[:, i], state) for i in range(given, tokens.shape[1] - 1)]
    return torch.stack(logits, dim=1)


@torch.no_grad()
def _plain_logits(model: LatentGPT, words: int = 5) -> Tensor:
    tokens, text, mask = _inputs(model, words)
    return model(tokens, text, mask, null_text=NULL_TEXT)


def _rounds_activations() -> bool:
    """Whether this CPU's bf16 products round their left side too (AVX-512 BF16)."""
    ones, x = in_tiles(torch.ones(1, 2).bfloat16()), torch.tensor([[1 + 2**-10, 0.0]])
    return times_tiles(cpu_library.cpu_library(), ones, 1, x).item() == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("norm", "mlp", "positions", "qk_norm"),
    [
        *itertools.product(
            ("rmsnorm", "layernorm"), ("swiglu", "gelu"), ("rope2d", "learned"), (True, False)
        )
    ],
)
def test_every_option_gives_the_plain_model_s_logits_at_every_position(
    norm: str, mlp: str, positions: str, qk_norm: bool, dtype: torch.dtype
) -> None:
    model = _model(dtype, norm=norm, mlp=mlp, positions=positions, qk_norm=qk_norm)
    expected = _plain_logits(copy.deepcopy(model).float())
    # In bf16 the kept keys and values are rounded, as they are in the plain model.
    plain_error = (_plain_logits(model).float() - expected).abs().max()
    assert pack_for_decoding(model)
    assert all(block.cached_step is not None for block in model.blocks)
    cached_allowed = 1e-4 if dtype == torch.float32 else plain_error
    plain_allowed = torch.tensor(1e-4)
    if dtype == torch.bfloat16 and _rounds_activations():  # the errors are about the same then
        cached_allowed = plain_allowed = 1.2 * plain_error
    for given in (0, 7):
        error = (_cached_logits(model, given) - expected[:, given:]).abs().max()
        assert error < cached_allowed, (given, error)
    assert (_plain_logits(model) - expected).abs().max() <= plain_allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "heads"), [(128, 2), (72, 3), (66, 22), (160, 2)])
def test_heads_and_captions_may_fill_tiles_or_not(
    library: object, hidden: int, heads: int, dtype: torch.dtype
) -> None:
    """Head widths 64, 24, 3 and 80; 110 positions and 38 words, the null embedding one of them."""
    changes = {"hidden": hidden, "heads": heads, "positions": "learned"}
    model = _model(dtype, grid_height=11, grid_width=10, **changes)
    expected = _plain_logits(copy.deepcopy(model).float(), 37)
    allowed = torch.tensor(1e-4)
    if dtype == torch.bfloat16:
        allowed = 1.2 * (_plain_logits(model, 37).float() - expected).abs().max()
    assert pack_for_decoding(model)
    for given in (0, 50):
        error = (_cached_logits(model, given, 37) - expected[:, given:]).abs().max()
        assert error < allowed, (given, error, allowed)


def test_scores_may_be_large(library: object) -> None:
    """Their exponentials would overflow, were not the largest of all taken off."""
    model = _model(torch.float32, grid_height=8, grid_width=8)
    for block in model.blocks:
        block.self_attention.q_norm.weight.data *= 300
        block.cross_attention.q_norm.weight.data *= 300
    expected = _plain_logits(model)
    assert pack_for_decoding(model)
    assert (_cached_logits(model, 0) - expected).abs().max() < 0.1


def test_a_caption_may_be_longer_than_the_picture(
    library: object, monkeypatch: pytest.MonkeyPatch, old_threads: None
) -> None:
    monkeypatch.setattr(cpu_library, "_MULTIPLICATIONS_A_THREAD", 1)
    model = _model(torch.float32)
    expected = _plain_logits(model, 200)
    assert pack_for_decoding(model)
    torch.set_num_threads(4)
    assert (_cached_logits(model, 0, 200) - expected).abs().max() < 1e-4


def test_fewer_threads_than_were_asked_for_do_all_the_work() -> None:
    code = (
        "import torch; from lgpt.models import cpu_library;"
        "cpu_library._MULTIPLICATIONS_A_THREAD = 1; torch.set_num_threads(2);"
        "from tests.models.test_cpu_block import _cached_logits, _model, _plain_logits;"
        "from lgpt.models.cpu_block import pack_for_decoding;"
        "model = _model(torch.float32); expected = _plain_logits(model);"
        "assert pack_for_decoding(model);"
        "assert (_cached_logits(model, 0) - expected).abs().max() < 1e-4"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_with_bf16_products_the_error_is_that_of_rounded_activations(library: object) -> None:
    model = _model(torch.bfloat16)
    expected = _plain_logits(copy.deepcopy(model).float())
    plain_error = (_plain_logits(model).float() - expected).abs().max()
    assert pack_for_decoding(model)
    for given in (0, 7):
        error = (_cached_logits(model, given) - expected[:, given:]).abs().max()
        assert error <= plain_error, (given, error, plain_error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (17, 74), (1000, 2), (48, 130)])
def test_a_product_is_right_and_no_row_depends_on_its_company(
    library: object, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(23, inputs).to(dtype).float()
    tiles = in_tiles(weight)
    assert torch.equal(out_of_tiles(tiles, outputs), weight)
    together = times_tiles(library, tiles, outputs, x)
    expected = x.double() @ weight.double().t()
    assert (together.double() - expected).abs().max() < 2e-6 * inputs
    for rows in range(1, 23):
        assert torch.equal(times_tiles(library, tiles, outputs, x[:rows]), together[:rows]), rows


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (17, 74), (1000, 2), (48, 130)])
def test_an_8_bit_product_is_that_of_its_integers_and_scales(
    library: object, outputs: int, inputs: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(23, inputs).bfloat16().float()
    integers, scales = to_int8(torch.randn(outputs, inputs))
    integers[0, :2] = torch.tensor([-128, 127])  # all that 8 bits can hold
    tiles = in_tiles(integers)
    assert torch.equal(out_of_tiles(tiles, outputs), integers)
    together = times_tiles(library, tiles, outputs, x, scales)
    expected = x.double() @ integers.double().t() * scales.double()
    assert (together.double() - expected).abs().max() < 2e-6 * inputs
    for rows in range(1, 23):
        alone = times_tiles(library, tiles, outputs, x[:rows], scales)
        assert torch.equal(alone, together[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("norm", "mlp"), [("rmsnorm", "swiglu"), ("layernorm", "gelu")])
def test_in_8_bits_the_model_is_the_one_with_rounded_matrices(
    library: object, norm: str, mlp: str, dtype: torch.dtype
) -> None:
    model = _model(dtype, norm=norm, mlp=mlp)
    rounded = copy.deepcopy(model).float()
    for module in rounded.modules():
        if isinstance(module, nn.Linear) or module is rounded.head:
            integers, scales = to_int8(module.weight)
            module.weight.data = integers * scales[:, None]
    expected = _plain_logits(rounded)
    in_bf16 = (_plain_logits(copy.deepcopy(rounded).bfloat16()).float() - expected).abs().max()
    assert pack_for_decoding(model, int8=True)
    for given in (0, 7):
        error = (_cached_logits(model, given) - expected[:, given:]).abs().max()
        # Keys and values are kept in bf16, and CPUs with bf16 products round activations.
        assert error <= in_bf16, (given, error, in_bf16)
    saved = model.state_dict()
    assert saved.keys() == rounded.state_dict().keys()
    for key, tensor in rounded.state_dict().items():
        assert torch.equal(saved[key], tensor.to(dtype)), key


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_pictures_are_the_same_in_any_batch_and_with_any_threads(
    library: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, old_threads: None
) -> None:
    monkeypatch.setattr(cpu_library, "_MULTIPLICATIONS_A_THREAD", 1)  # or one would do it all
    is_int8 = dtype == torch.int8
    model = _model(torch.float32 if is_int8 else dtype)
    assert pack_for_decoding(model, int8=is_int8)
    text, mask = torch.randn(7, 5, 10), torch.arange(5) < torch.arange(7).unsqueeze(1) % 5 + 1
    choices = {"guidance": 5.0, "top_k": 40}
    together = generate_tokens(model, text, mask, seeds=range(7), **choices)
    for number, (first, last) in enumerate(((0, 1), (1, 3), (3, 7), (0, 7))):
        torch.set_num_threads(1 + number % 2)
        seeds, part = range(first, last), slice(first, last)
        drawn = generate_tokens(model, text[part], mask[part], seeds=seeds, **choices)
        assert torch.equal(drawn, together[part])


def test_a_small_call_gets_one_thread_and_a_large_one_what_pytorch_has(old_threads: None) -> None:
    torch.set_num_threads(4)
    # A token of demo/phase3_shapes, of a model between, of the 512M one; with guidance.
    works = [2 * 250_000, 2 * 3_500_000, 2 * 18_900_000]
    assert [cpu_library.threads_for(work) for work in works] == [1, 3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_saves_what_it_was(dtype: torch.dtype) -> None:
    model = _model(dtype)
    plain = copy.deepcopy(model).state_dict()
    assert pack_for_decoding(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    saved = model.state_dict()
    assert saved.keys() == plain.keys()
    for key, tensor in plain.items():
        assert saved[key].dtype == dtype, key
        assert torch.equal(saved[key], tensor), key


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("int8", [False, True])
def test_logits_that_are_not_finite_stay_so(int8: bool, number: float) -> None:
    model = _model(torch.float32)
    model.blocks[1].mlp.up.weight.data[3, 5] = number
    assert pack_for_decoding(model, int8=int8)
    assert not _cached_logits(model, 0).isfinite().any()


def test_tensors_that_are_replaced_after_packing_are_still_there() -> None:
    """The compiled block has their addresses."""
    model = _model(torch.float32)
    assert pack_for_decoding(model)
    before = _cached_logits(model, 0)
    for block in model.blocks:
        for norm in (block.self_norm, block.cross_norm, block.mlp_norm):
            norm.weight = nn.Parameter(torch.full_like(norm.weight, 7.0))
    filler = [torch.full((64,), float("nan")) for _ in range(2000)]
    assert torch.equal(_cached_logits(model, 0), before)
    del filler


def test_an_odd_width_in_8_bits_is_refused_and_leaves_the_model() -> None:
    model = _model(torch.float32, mlp_hidden=51)
    expected = _plain_logits(model)
    assert not pack_for_decoding(model, int8=True)
    assert torch.equal(_plain_logits(model), expected)


def test_an_odd_width_in_bf16_is_left_to_pytorch() -> None:
    """A bf16 tile holds pairs of inputs."""
    model = _model(torch.bfloat16, mlp_hidden=51)
    pack_for_decoding(model)
    assert not any(isinstance(module, CpuLinear) for module in model.modules())
    assert all(block.cached_step is None for block in model.blocks)
    model = _model(torch.float32, mlp_hidden=51)
    expected = _plain_logits(model)
    assert pack_for_decoding(model)
    assert isinstance(model.head, CpuLinear)
    torch.testing.assert_close(_cached_logits(model, 0), expected, atol=1e-4, rtol=0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library is open or compiled yet; the folder where it will be."""
    monkeypatch.setattr(cpu_library, "cpu_library", cpu_library.cpu_library.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lgpt"


def test_it_is_compiled_once(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lgpt"):
        assert cpu_library.cpu_library() is not None
        assert "compiled cpu_decoding.cpp for this CPU in" in caplog.text
        (compiled,) = fresh.iterdir()
        written_at = compiled.stat().st_mtime_ns
        assert cpu_library.cpu_library() is not None
    assert list(fresh.iterdir()) == [compiled]
    assert compiled.stat().st_mtime_ns == written_at


def test_a_damaged_library_is_compiled_anew(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cpu_library.cpu_library() is not None
    (compiled,) = fresh.iterdir()
    whole = compiled.read_bytes()
    # A new file: this process has the old one open. Where 4096 bytes are left, opening is SIGBUS.
    compiled.unlink()
    compiled.write_bytes(whole[:4096])
    with caplog.at_level("INFO", "lgpt"):
        assert cpu_library.cpu_library() is not None
    assert "compiled cpu_decoding.cpp" in caplog.text
    assert compiled.read_bytes() == whole


def test_without_a_compiler_pytorch_multiplies(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = _model(torch.float32)
    expected = _plain_logits(model)
    with caplog.at_level("INFO", "lgpt"):
        pack_for_decoding(model)
    assert "no C++ compiler (c++, g++, clang++, or CXX), so PyTorch's products are taken" in (
        caplog.text
    )
    torch.testing.assert_close(_cached_logits(model, 0), expected, atol=1e-4, rtol=0)


def test_cxx_may_have_arguments_and_one_that_is_not_there_is_named(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "env c++ -O1")
    assert cpu_library.cpu_library() is not None
    for named in ("no-such-compiler -O1", "c++ 'no end"):
        monkeypatch.setenv("CXX", named)
        with caplog.at_level("INFO", "lgpt"):
            assert cpu_library.cpu_library() is None
        assert f"CXX is '{named}', which is not there" in caplog.text


def test_without_openmp_one_thread_still_uses_all_that_the_cpu_can(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script, log = fresh.parent / "c++", fresh.parent / "flags"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        'case " $* " in *" -fopenmp "*) exit 1;; esac\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert cpu_library.cpu_library() is not None
    assert "-march=native" in log.read_text().splitlines()[-1]
    assert "has no OpenMP" in caplog.text
    assert "one thread" in caplog.text


@pytest.mark.parametrize("broken", ["compiler", "result"])
def test_what_a_compiler_gets_wrong_is_not_used(
    broken: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if broken == "compiler":
        script = fresh.parent / "c++"
        script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no disk" >&2; exit 1; }\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
    else:
        right = cpu_library.times_tiles
        monkeypatch.setattr(cpu_library, "times_tiles", lambda *a: right(*a).neg())
    assert cpu_library.cpu_library() is None
    told = {"compiler": "failed: no disk", "result": "computes wrongly here"}[broken]
    assert told in caplog.text
    assert "PyTorch's products are taken" in caplog.text
    assert not list(fresh.glob("tmp*")), "a half-made library is left"


def test_a_home_that_cannot_be_written_is_no_obstacle(fresh: Path, tmp_path: Path) -> None:
    """In a process of its own, at whose end nothing is left of the library."""
    fresh.write_text("a file where the folder should be")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = (
        "import logging; logging.basicConfig(level=20);"
        "from lgpt.models.cpu_library import cpu_library; assert cpu_library() is not None"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "at every start: ~/.cache cannot be written" in done.stderr
    assert not list(temporary.iterdir())
