"""Compile and open `cpu_decoding.cpp`, once a machine, with the C++ compiler that is there.

No wheel could hold it: it is made for the very CPU that runs it. Without a compiler sampling takes
PyTorch's products instead.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import ClassVar, Optional

import torch
from torch import Tensor

from lgpt.core.logging import get_logger
from lgpt.models.int8_weights import to_int8

_logger = get_logger(__name__)

_SOURCE = Path(__file__).with_name("cpu_decoding.cpp")
_COMPILERS = ("c++", "g++", "clang++")
# Without the last two a square root and a rounding become calls of the C library.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# What some compilers do not know, best first: clang often comes without OpenMP.
_OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
_COMPILE_SECONDS = 300
# Some 0.1 ms. Threads meet a dozen times a block, and each time wait for one whose core is busy.
_MULTIPLICATIONS_A_THREAD = 1 << 21
_UNKEPT = "~/.cache cannot be written, or what XDG_CACHE_HOME names instead"
TILE = 16
# `LgptFormat` of the source.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Matrix(Structure):
    """`LgptMatrix` of the source."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("tiles", "scales")),
        *((name, c_int64) for name in ("outputs", "inputs")),
    ]


class Norm(Structure):
    """`LgptNorm` of the source."""

    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p), ("epsilon", c_float)]


class Block(Structure):
    """`LgptBlock` of the source."""

    _fields_: ClassVar = [
        *((name, Matrix) for name in ("qkv", "out", "cross_q", "cross_out", "up", "down")),
        *((name, Norm) for name in ("self_norm", "q_norm", "k_norm")),
        *((name, Norm) for name in ("cross_norm", "cross_q_norm", "mlp_norm")),
        *((name, c_int64) for name in ("width", "heads", "inner")),
        *((name, c_int32) for name in ("is_gated", "format")),
    ]


class Call(Structure):
    """`LgptCall` of the source."""

    _fields_: ClassVar = [
        ("x", c_void_p),
        *((name, c_int64) for name in ("batch", "length", "position")),
        *((name, c_void_p) for name in ("keys", "values")),
        ("positions", c_int64),
        *((name, c_void_p) for name in ("cos", "sin", "text_keys", "text_values", "text_mask")),
        ("words", c_int64),
        ("scratch", c_void_p),
        ("threads", c_int32),
    ]


@functools.cache
def cpu_library(*macros: str) -> Optional[ctypes.CDLL]:
    """The library, or None where it cannot be had; says why once.

    Args:
        macros: Defined for the compiler; what a test compiles differently.
    """
    compiler = _compiler()
    if compiler is None:
        named = os.environ.get("CXX")
        _logger.info(
            "sampling: no C++ compiler (%s), so PyTorch's products are taken; with one, "
            "this CPU draws about twice as fast",
            f"CXX is '{named}', which is not there"
            if named
            else ", ".join((*_COMPILERS, "or CXX")),
        )
        return None
    try:
        path = _compiled(compiler, macros)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        _logger.warning("sampling: %s; PyTorch's products are taken", _told(error))
        return None
    library.lgpt_scratch_floats.restype = c_int64
    library.lgpt_scratch_floats.argtypes = [POINTER(Block), *[c_int64] * 4, c_int32]
    library.lgpt_block.restype = library.lgpt_linear.restype = None
    library.lgpt_block.argtypes = [POINTER(Block), POINTER(Call)]
    library.lgpt_linear.argtypes = [
        *(POINTER(Matrix), c_int32, c_void_p, c_void_p, c_int64, c_void_p, c_int32)
    ]
    if not _is_right(library):
        _logger.warning("sampling: %s computes wrongly here; PyTorch's products are taken", path)
        return None
    return library


def in_tiles(weight: Tensor) -> Tensor:
    """Matrices [.., outputs, inputs] in the order in which the library reads them.

    Float32: [.., outputs/16, inputs, 16]; bf16 and int8, whose inputs are an even number:
    [.., outputs/16, inputs/2, 16, 2]. Outputs are filled up with zeros.
    """
    *many, outputs, inputs = weight.shape
    filled = torch.nn.functional.pad(weight.detach(), (0, 0, 0, -outputs % TILE))
    if weight.dtype == torch.float32:
        return filled.view(*many, -1, TILE, inputs).transpose(-2, -1).contiguous()
    assert weight.dtype in (torch.bfloat16, torch.int8), weight.dtype
    assert inputs % 2 == 0, inputs
    return filled.view(*many, -1, TILE, inputs // 2, 2).transpose(-3, -2).contiguous()


def out_of_tiles(tiles: Tensor, outputs: int) -> Tensor:
    """The one matrix that `in_tiles` was given."""
    swapped = tiles.transpose(1, 2)
    return swapped.reshape(swapped.shape[0] * TILE, -1)[:outputs].contiguous()


def times_tiles(
    library: ctypes.CDLL, tiles: Tensor, outputs: int, x: Tensor, scales: Optional[Tensor] = None
) -> Tensor:
    """x [rows, inputs] float32 times the matrix: [rows, outputs] float32.

    Args:
        library: From `cpu_library`.
        tiles: From `in_tiles`.
        outputs: Of the matrix.
        x: Its rows.
        scales: [outputs] float32 of an int8 matrix, see `to_int8`.
    """
    assert x.dtype == torch.float32, x.dtype
    assert x.is_contiguous(), x.stride()
    rows, inputs = x.shape
    y, scratch = x.new_empty(rows, outputs), x.new_empty(2, rows, inputs)
    library.lgpt_linear(
        matrix(tiles, outputs, inputs, scales),
        FORMATS[tiles.dtype],
        x.data_ptr(),
        y.data_ptr(),
        rows,
        scratch.data_ptr(),
        threads_for(rows * inputs * outputs),
    )
    return y


def matrix(tiles: Tensor, outputs: int, inputs: int, scales: Optional[Tensor]) -> Matrix:
    """As the library wants it; the tensors must outlive it."""
    assert (scales is not None) == (tiles.dtype == torch.int8), tiles.dtype
    return Matrix(tiles.data_ptr(), None if scales is None else scales.data_ptr(), outputs, inputs)


def threads_for(multiplications: int) -> int:
    """How many threads a call is worth: one for a small model."""
    worth = multiplications // _MULTIPLICATIONS_A_THREAD
    return max(1, min(torch.get_num_threads(), worth))


def _is_right(library: ctypes.CDLL) -> bool:
    """One small product in every format against PyTorch's in float64.

    What a compiler makes of the products on a CPU that nobody tried is found out here; attention
    and norms, which have no instructions of their own, are left to the tests.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 74, generator=generator)
    x = torch.randn(11, 74, generator=generator)
    integers, scales = to_int8(weight)
    for rounded, of_int8, tolerance in (
        (weight, None, 1e-4),
        (weight.bfloat16(), None, 0.2),
        (integers, scales, 0.2),
    ):
        product = times_tiles(library, in_tiles(rounded), 40, x, of_int8)
        expected = x.double() @ rounded.double().t()
        if of_int8 is not None:
            expected *= of_int8
        if not bool((product.double() - expected).abs().max() < tolerance):
            return False
    return True


def _compiler() -> Optional[tuple[str, ...]]:
    """Program and arguments; CXX may be `ccache g++`."""
    given = os.environ.get("CXX", "")
    try:
        named = shlex.split(given)
    except ValueError:  # a quote without its end: no program has such a name
        named = [given]
    programs, arguments = ((named[0],), named[1:]) if named else (_COMPILERS, [])
    found = next(filter(None, map(shutil.which, programs)), None)
    return None if found is None else (found, *arguments)


def _compiled(compiler: tuple[str, ...], macros: tuple[str, ...]) -> Path:
    """The library for this source, compiler and CPU, compiled if it is not there yet."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=60
    ).stdout
    circumstances = repr((compiler, version, macros, _FLAGS, _OPTIONAL_FLAGS, _cpu()))
    digest = hashlib.sha256(_SOURCE.read_bytes() + circumstances.encode()).hexdigest()
    stem = f"cpu_decoding_{digest[:16]}"
    folder = _kept_folder()
    is_kept = folder is not None
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="lgpt_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in sorted(folder.glob(f"{stem}_*.so")):
        # To open a file whose end is lost, by a crash say, would end this process by SIGBUS.
        if path.name == _name(stem, path):
            return path
    started_at = time.monotonic()
    descriptor, staged = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    try:
        for number, optional in enumerate(_OPTIONAL_FLAGS):
            command = [*compiler, *_FLAGS, *optional, *(f"-D{macro}" for macro in macros)]
            done = subprocess.run(
                [*command, str(_SOURCE), "-o", staged],
                capture_output=True,
                check=number == len(_OPTIONAL_FLAGS) - 1,
                timeout=_COMPILE_SECONDS,
            )
            if done.returncode == 0:
                break
        if "-fopenmp" not in optional:
            _logger.warning(
                "sampling: %s has no OpenMP (clang's is the package libomp), so drawing takes one "
                "thread; CXX may name another compiler",
                compiler[0],
            )
        path = folder / _name(stem, Path(staged))
        os.replace(staged, path)
    finally:
        Path(staged).unlink(missing_ok=True)
    _logger.info(
        "sampling: compiled %s for this CPU in %.1f s (%s)",
        _SOURCE.name,
        time.monotonic() - started_at,
        f"once, {path}" if is_kept else f"at every start: {_UNKEPT}",
    )
    return path


def _name(stem: str, library: Path) -> str:
    """What a library is called where it is kept: its content's digest shows that it is whole."""
    return f"{stem}_{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _kept_folder() -> Optional[Path]:
    """The user's own; None where it cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(home) if home else Path("~/.cache").expanduser()) / "lgpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        _logger.debug("no %s: %s", folder, error)
    return None


def _cpu() -> str:
    """What the CPU can do: a home folder may be shared by nodes that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(sorted(set(told)))


def _told(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        return f"{error.cmd[0]} failed: {lines[-1] if lines else error}"
    return str(error)
