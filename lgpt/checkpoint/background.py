"""A save that goes on while training does: states copied at the step, written by a thread.

DeepSpeed hands its states to its checkpoint engine; one that only copies them takes the place of
the real one for the time of the call. The thread of each rank writes, syncs and digests its own
files and meets no other rank: collectives of two threads could come in another order on another
rank. Whether all ranks' threads have ended is agreed on by the loop, which then completes the save.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from lgpt.checkpoint.manifest import FileRecord, record_files
from lgpt.core.errors import CheckpointError


class CopiedStates:
    """What was to be written: states in CPU memory, by the path of their file."""

    def __init__(self) -> None:
        self.by_path: dict[Path, Any] = {}

    def add(self, path: Path, state: Any) -> None:
        """Copy what belongs into a file."""
        self.by_path[path] = copy_to_memory(state)

    @contextmanager
    def instead_of_files(self, engine: Any) -> Iterator[None]:
        """Within, the engine's saves are copied to here."""
        plain = engine.checkpoint_engine
        engine.checkpoint_engine = _Copying(plain, self)
        try:
            yield
        finally:
            engine.checkpoint_engine = plain


class _Copying:
    """DeepSpeed's checkpoint engine, but for the writing."""

    def __init__(self, plain: Any, states: CopiedStates) -> None:
        self._plain, self._states = plain, states

    def save(self, state_dict: Any, path: str) -> None:
        """Copy, and write nothing."""
        self._states.add(Path(path), state_dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


class Writer(threading.Thread):
    """Writes copied states to their files, syncs and digests them.

    Attributes:
        records: Size and digest of each file, by its name below `folder`; whole when the thread has
            ended without an error.
        error: What stopped it.
    """

    def __init__(self, folder: Path, states: CopiedStates) -> None:
        # A rank that dies does not wait for it: the half-written folder is no checkpoint.
        super().__init__(name="lgpt-save", daemon=True)
        self.records: dict[str, FileRecord] = {}
        self.error: Optional[Exception] = None
        self._folder, self._states = folder, states.by_path

    def run(self) -> None:
        """The thread's life."""
        try:
            while self._states:
                path, state = self._states.popitem()
                with _without_crc32():
                    torch.save(state, path)
                del state  # its memory is free before the next one is written
                name = path.relative_to(self._folder).as_posix()
                self.records.update(record_files(self._folder, [name]))
        except Exception as error:  # whatever it is: what was not written must not be published
            self.error = error
        finally:
            self._states.clear()

    def raise_what_failed(self) -> None:
        """After its end, on the main thread."""
        if isinstance(self.error, (OSError, RuntimeError)):  # the latter is torch's on a full disk
            raise self.error
        if self.error is not None:
            # All ranks learn of these (agreement.py), and not only of what a disk does.
            told = f"{type(self.error).__name__}: {self.error}"
            raise CheckpointError(f"the thread that writes ended with {told}") from self.error


@contextmanager
def _without_crc32() -> Iterator[None]:
    """torch's own sums of a file take half of its CPU time; sha256 is taken of it anyway.

    For the whole process: what another thread saves meanwhile is without them too. `torch.load`
    does not look at them.
    """
    choose = getattr(torch.serialization, "set_crc32_options", None)  # torch 2.6
    if choose is None:
        yield
        return
    before = torch.serialization.get_crc32_options()
    choose(False)
    try:
        yield
    finally:
        choose(before)


def copy_to_memory(value: Any, memo: Optional[dict[int, Any]] = None) -> Any:
    """A copy of everything that `torch.save` would write, its tensors in CPU memory.

    Tensors that share memory share it in the copy, so the file has them once, as it would have.
    Memory that a GPU is copied to is pinned, which makes the copy several times faster.
    """
    memo = {} if memo is None else memo
    if isinstance(value, Tensor):
        return _copied_tensor(value, memo)
    if isinstance(value, Mapping):
        copied = copy.copy(value)  # keeps an OrderedDict's metadata
        for key, item in value.items():
            copied[key] = copy_to_memory(item, memo)  # type: ignore[index]
        return copied
    if type(value) in (list, tuple):
        return type(value)(copy_to_memory(item, memo) for item in value)
    return copy.deepcopy(value)


def _copied_tensor(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    storage = tensor.detach().untyped_storage()
    if storage.data_ptr() not in memo:
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        target = torch.empty(len(source), dtype=torch.uint8, pin_memory=tensor.is_cuda)
        # The source stays beside the copy: memory that is freed could be another tensor's next.
        memo[storage.data_ptr()] = (target.copy_(source).untyped_storage(), source)
    shared = memo[storage.data_ptr()][0]
    place = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(shared, *place)
