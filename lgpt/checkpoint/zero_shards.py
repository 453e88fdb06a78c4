"""ZeRO shards as whole float32 tensors, read one rank after the other.

How DeepSpeed (0.18 to 0.19.8) cuts the float32 masters of R ranks:
- ZeRO-1 and 2: a parameter group is one flat vector, its parameters one after the other (and
  padding); rank r holds the r-th of R equal pieces of it.
- ZeRO-3: every parameter is padded to a multiple of R and cut into R pieces; rank r holds the r-th
  piece of every parameter, one after the other, over the flat vectors of all groups.
Buffers, frozen parameters and the names of shared parameters stand in the model_states files. The
moving average of the masters, where there is one, is cut as they are (average_files.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from lgpt.checkpoint.average_files import average_file, read_average
from lgpt.checkpoint.deepspeed_files import files_by_rank, read_safely
from lgpt.checkpoint.weight_source import Piece, TensorInfo
from lgpt.core.errors import CheckpointError
from lgpt.engine.average import AverageState

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


class _Cut(NamedTuple):
    """Elements `start` to `start + length` of a tensor lie in a rank's vector from `place` on."""

    name: str
    start: int
    vector: int
    place: int
    length: int


class Held(NamedTuple):
    """Elements of a parameter from `start` on, as a rank's optimizer holds them.

    Attributes:
        parts: By `MASTER`, by `MOMENTS` once AdamW has stepped, and by `AVERAGE` where a moving
            average was saved: flat, of one length.
    """

    name: str
    start: int
    parts: dict[str, Tensor]


class ZeroShards:
    """The float32 masters, frozen parameters and buffers of one engine of a checkpoint.

    A `WeightSource`. Floating point comes as float32, integers as they are.

    Args:
        folder: The engine's folder (DeepSpeed's tag), with its `*_optim_states.pt`.
        of_average: Take the moving average of the masters instead of them.

    Raises:
        CheckpointError: A file is missing, unreadable or holds code, or names and sizes do not add
            up.
    """

    def __init__(self, folder: Path, *, of_average: bool = False) -> None:
        self.folder, self.is_average = folder, of_average
        try:
            self._optimizer_files, self.stage, self._sizes, paddings = _read_headers(folder)
            self._models = _read_models(folder, self.stage, len(self._optimizer_files))
            self._groups: list[dict[str, tuple[int, ...]]] = [
                {name: tuple(shape) for name, shape in group.items()}
                for group in self._models[0]["param_shapes"]
            ]
            self._paddings = paddings or [[0] * len(group) for group in self._groups]
            self._check_sizes()
            if of_average:
                self._check_average()
            self._buffers = _buffers(self._models[0])
            self._frozen = self._frozen_parameters()
            self._describe()
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"The files in {folder} are not laid out as DeepSpeed's "
                f"({type(error).__name__}: {error})."
            ) from error

    @property
    def ranks(self) -> int:
        """How many ranks saved it."""
        return len(self._sizes)

    @property
    def global_steps(self) -> int:
        """Optimizer steps that DeepSpeed counted."""
        return self.counter("global_steps")

    @property
    def deepspeed_version(self) -> str:
        """The version that saved it."""
        return str(self._models[0].get("ds_version", "unknown"))

    @property
    def num_parameters(self) -> int:
        """Numbers in parameters: each stored tensor that is no buffer."""
        return sum(t.elements for name, t in self.tensors.items() if name not in self._buffers)

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that the optimizer owns."""
        return {name: shape for group in self._groups for name, shape in group.items()}

    @property
    def fixed(self) -> dict[str, tuple[int, ...]]:
        """The shapes of buffers and frozen parameters."""
        shapes = {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}
        return {**shapes, **{name: shape for name, (shape, _) in self._frozen.items()}}

    def counter(self, name: str) -> int:
        """One of DeepSpeed's counts of the save: global_steps, global_samples, skipped_steps."""
        return int(self._models[0].get(name, 0))

    def pieces(self) -> Iterator[Piece]:
        """Buffers and frozen parameters, then what each rank holds of every parameter."""
        yield from self.fixed_pieces()
        for rank in range(self.ranks):
            vectors = self._vectors_of(rank)
            for cut in self._cuts(rank):
                values = vectors[cut.vector].detach()[cut.place : cut.place + cut.length]
                yield Piece(cut.name, cut.start, values.float())
            del vectors

    def held_by(self, rank: int) -> Iterator[Held]:
        """What one rank's optimizer holds of the parameters; a piece is gone with the next one."""
        # Opened again, and closed after its turn: what was read of it leaves the memory.
        state = read_safely(self._optimizer_files[rank])["optimizer_state_dict"]
        vectors = state[_vectors_key(self.stage)]
        moments = _adam_states(state, self.stage)
        average = self._average(rank)
        for cut in self._cuts(rank):
            of_vector = moments.get(cut.vector, {})
            flat = {MASTER: vectors[cut.vector].detach()}
            flat.update({name: of_vector[name] for name in MOMENTS if name in of_vector})
            if average is not None:
                flat[AVERAGE] = average.vectors[cut.vector]
            parts = {
                name: vector[cut.place : cut.place + cut.length] for name, vector in flat.items()
            }
            yield Held(cut.name, cut.start, parts)

    def adam_steps(self) -> Optional[float]:
        """How many steps AdamW counted; None before its first one."""
        found = set()
        for path in self._optimizer_files:
            state = read_safely(path)["optimizer_state_dict"]
            states = _adam_states(state, self.stage)
            found |= {float(each["step"]) for each in states.values() if each}
        if len(found) > 1:
            raise CheckpointError(
                f"The ranks in {self.folder} counted different numbers of steps: {sorted(found)}."
            )
        return found.pop() if found else None

    def average_updates(self) -> int:
        """How many steps the moving average of the weights has followed; 0 without one."""
        average = self._average(0)
        return 0 if average is None else average.updates

    def _average(self, rank: int) -> Optional[AverageState]:
        there = average_file(self.folder, rank).is_file()
        return read_average(self.folder, rank) if there else None

    def fixed_pieces(self) -> Iterator[Piece]:
        """Buffers and frozen parameters."""
        for name, buffer in self._buffers.items():
            values = buffer.float() if buffer.is_floating_point() else buffer
            yield Piece(name, 0, values.reshape(-1))
        for name, (shape, fragments) in self._frozen.items():
            start, whole = 0, math.prod(shape)
            for fragment in fragments:
                flat = fragment.reshape(-1)[: whole - start]
                yield Piece(name, start, flat.float())
                start += flat.numel()

    def _vectors_of(self, rank: int) -> Sequence[Tensor]:
        """Opened again, and closed after its turn: what was read of it leaves the memory."""
        if self.is_average:
            return read_average(self.folder, rank).vectors
        state = read_safely(self._optimizer_files[rank])["optimizer_state_dict"]
        vectors: Sequence[Tensor] = state[_vectors_key(self.stage)]
        return vectors

    def _check_average(self) -> None:
        for rank, expected in enumerate(self._sizes):
            sizes = [vector.numel() for vector in read_average(self.folder, rank).vectors]
            if sizes != expected:
                raise CheckpointError(
                    f"The average of rank {rank} in {self.folder} holds {sizes} elements, its "
                    f"masters {expected}."
                )

    def _describe(self) -> None:
        """`names`, `tensors` and `aliases`, in the module's order."""
        first = self._models[0]
        self.names = list(first["module"])
        stored = {
            name: TensorInfo(
                tuple(buffer.shape), torch.float32 if buffer.is_floating_point() else buffer.dtype
            )
            for name, buffer in self._buffers.items()
        }
        stored.update({n: TensorInfo(s, torch.float32) for n, (s, _) in self._frozen.items()})
        for group in self._groups:
            stored.update({name: TensorInfo(shape, torch.float32) for name, shape in group.items()})
        self.aliases = {a: o for a, o in first["shared_params"].items() if o in stored}
        for alias in self.aliases:
            stored.pop(alias, None)
        there = stored.keys() | self.aliases.keys()
        missing, extra = sorted(set(self.names) - there), sorted(there - set(self.names))
        if missing or extra:
            raise CheckpointError(
                f"The shards in {self.folder} do not make up the model: missing {missing}, extra "
                f"{extra}."
            )
        self.tensors = {name: stored[name] for name in self.names if name in stored}

    def _check_sizes(self) -> None:
        ranks = len(self._sizes)
        if self.stage == 3:
            needed = sum(
                math.ceil(math.prod(shape) / ranks)
                for group in self._groups
                for shape in group.values()
            )
            for rank, sizes in enumerate(self._sizes):
                if sum(sizes) != needed:
                    raise CheckpointError(
                        f"The shard of rank {rank} in {self.folder} holds {sum(sizes)} elements, "
                        f"its parameters need {needed}."
                    )
            return
        for index, (group, paddings) in enumerate(zip(self._groups, self._paddings)):
            needed = sum(math.prod(shape) for shape in group.values()) + sum(paddings)
            # DeepSpeed pads a group to a multiple of 2 x ranks elements.
            left = sum(sizes[index] for sizes in self._sizes) - needed
            if not 0 <= left < 2 * ranks:
                raise CheckpointError(
                    f"Parameter group {index} in {self.folder} has {left} elements more than its "
                    "parameters need."
                )

    def _cuts(self, rank: int) -> Iterator[_Cut]:
        return self._cuts_of_parameters(rank) if self.stage == 3 else self._cuts_of_groups(rank)

    def _cuts_of_groups(self, rank: int) -> Iterator[_Cut]:
        """ZeRO-1 and 2: a parameter is a stretch of its group's vector, which spans the ranks."""
        for index, (group, paddings) in enumerate(zip(self._groups, self._paddings)):
            first = sum(sizes[index] for sizes in self._sizes[:rank])
            last = first + self._sizes[rank][index]
            offset = 0
            for (name, shape), padding in zip(group.items(), paddings):
                end = offset + math.prod(shape)
                start, stop = max(offset, first), min(end, last)
                if start < stop:
                    yield _Cut(name, start - offset, index, start - first, stop - start)
                offset = end + padding

    def _cuts_of_parameters(self, rank: int) -> Iterator[_Cut]:
        """ZeRO-3: each parameter is one stretch of every rank's vectors, taken as one."""
        ranks, offset = len(self._sizes), 0
        for name, shape in (item for group in self._groups for item in group.items()):
            whole = math.prod(shape)
            length = math.ceil(whole / ranks)
            start = rank * length
            stop = min(start + length, whole)
            place = 0
            for vector, size in enumerate(self._sizes[rank]):
                first = max(offset, place)
                last = min(offset + max(stop - start, 0), place + size)
                if first < last:
                    yield _Cut(name, start + first - offset, vector, first - place, last - first)
                place += size
            offset += length

    def _frozen_parameters(self) -> dict[str, tuple[tuple[int, ...], list[Tensor]]]:
        """Shape and fragments by name, the fragments in rank order."""
        first = self._models[0]
        if self.stage == 3:
            shapes = first.get("frozen_param_shapes") or {}
            return {
                name: (tuple(shape), [m["frozen_param_fragments"][name] for m in self._models])
                for name, shape in shapes.items()
            }
        # ZeRO-1 and 2 keep the whole module: what the optimizer does not own is taken from there.
        owned = {name for group in self._groups for name in group}
        owned |= set(first["shared_params"]) | set(first["buffer_names"])
        module = first["module"]
        return {n: (tuple(module[n].shape), [module[n]]) for n in module if n not in owned}


def _read_headers(folder: Path) -> tuple[list[Path], int, list[list[int]], Sequence[Any]]:
    """The optimizer shards, the stage, each rank's vector sizes, and ZeRO-1 and 2's paddings."""
    files = files_by_rank(folder, "optim")
    if not files:
        raise CheckpointError(
            f"{folder} holds no ZeRO shards (*_optim_states.pt); give a step folder of a run that "
            "was trained with ZeRO stage 1, 2 or 3."
        )
    sizes: list[list[int]] = []
    stage, expected, paddings = 0, 0, []
    for path in files:
        state = read_safely(path).get("optimizer_state_dict", {})
        if "partition_count" not in state:
            raise CheckpointError(f"{path} was not saved by ZeRO stage 1, 2 or 3.")
        if not sizes:
            # BF16_Optimizer, which stage 1 in bf16 with float32 gradients is, does not name it.
            stage, partitions = int(state.get("zero_stage", 1)), state["partition_count"]
            expected = max(partitions) if isinstance(partitions, list) else int(partitions)
            paddings = state.get("param_alignment_paddings") or []
        if _vectors_key(stage) not in state:
            raise CheckpointError(
                f"{path} is without float32 weights ({_vectors_key(stage)}), which stage {stage} "
                "keeps there."
            )
        sizes.append([vector.numel() for vector in state[_vectors_key(stage)]])
    if len(files) != expected:
        raise CheckpointError(
            f"{folder} was saved by {expected} ranks but holds {len(files)} optimizer shards."
        )
    if len({len(each) for each in sizes}) != 1:
        raise CheckpointError(f"The shards in {folder} hold different numbers of vectors.")
    return files, stage, sizes, paddings


def _read_models(folder: Path, stage: int, ranks: int) -> list[Mapping[str, Any]]:
    """The model_states file, at stage 3 one a rank."""
    files = (
        files_by_rank(folder, "model") if stage == 3 else [folder / "mp_rank_00_model_states.pt"]
    )
    if stage == 3 and len(files) != ranks:
        raise CheckpointError(
            f"{folder} was saved by {ranks} ranks but holds {len(files)} model shards."
        )
    return [read_safely(path) for path in files]


def _vectors_key(stage: int) -> str:
    return "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"


def _adam_states(state: Mapping[str, Any], stage: int) -> dict[int, Mapping[str, Any]]:
    """AdamW's own state of each flat vector, by the vector's number."""
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    stored = state.get(key, {})
    return dict(stored.get("state", {})) if isinstance(stored, Mapping) else {}


def _buffers(model: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: model["module"][name] for name in model["buffer_names"]}
