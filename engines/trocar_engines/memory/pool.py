"""Device memory of every tracked object: allocated once, handed out by the row.

Like the key-value cache of a language-model server: an object owns a row while it lives, nothing grows with
the length of the video, and a row that comes back is reused. What the slots of a row mean is `bank`'s affair.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trocar_engines.errors import CapacityError
from trocar_engines.masklets import Float32Array
from trocar_engines.network.config import NetworkConfig
from trocar_engines.network.sam2s import HIDDEN_BIAS, MemoryView

IntArray = npt.NDArray[np.int64]

CONDITIONING_POINTERS = 3
RECENT_POINTERS = 15
FOUND_POINTER, TRIAL_POINTER = 1, 2
"""Of the conditioning frames' places only the first is needed, for an object begins on one frame."""
POINTERS = CONDITIONING_POINTERS + RECENT_POINTERS
"""Object pointers of a row: SAM 2 attends to the conditioning frames' and to 15 recent ones."""
WIDEST_NUMBER = 8
"""Bytes; every array in a packed copy begins at a multiple."""


class Place(NamedTuple):
    """Where a memory goes.

    Args:
        row: of the object.
        slot: of spatial memory and prototypes.
        pointer_slot: of the object pointer.
        is_rounded: to bfloat16, as SAM 2's predictor stores spatial memory on any device.
    """

    row: int
    slot: int
    pointer_slot: int
    is_rounded: bool


class MemoryPool:
    """Rows of memory slots and object pointers.

    Args:
        config: the network whose memory it holds.
        rows: how many objects can be tracked at once.
        slots: memory slots of a row, staging included.
        device: where the tensors live.
    """

    def __init__(
        self, config: NetworkConfig, *, rows: int, slots: int, device: torch.device | str = "cpu"
    ) -> None:
        memory_shape = (config.memory_size, config.memory_size)
        self.rows, self.slots = rows, slots
        self.spatial = torch.zeros(rows, slots, config.d_memory, *memory_shape, device=device)
        self.prototypes = torch.zeros(rows, slots, config.readout_dim + 4, config.prototypes, device=device)
        self.pointers = torch.zeros(rows, POINTERS, config.d_model, device=device)
        self._free = list(range(rows - 1, -1, -1))

    @property
    def rows_in_use(self) -> int:
        """Rows owned by objects."""
        return self.rows - len(self._free)

    def allocate(self) -> int:
        """A row for a new object; what an earlier owner left in it is hidden until overwritten.

        Raises:
            CapacityError: every row is taken.
        """
        if not self._free:
            raise CapacityError(f"all {self.rows} memory rows are in use: remove an object first")
        return self._free.pop()

    def release(self, row: int) -> None:
        """Give a row back."""
        assert row not in self._free, f"row {row} was released twice"
        self._free.append(row)

    def store(self, places: Sequence[Place], spatial: Tensor, prototypes: Tensor, pointers: Tensor) -> None:
        """Copy what is remembered of several objects to their places.

        Args:
            places: of B objects.
            spatial: [B, C_mem, h', w'].
            prototypes: [B, D, N].
            pointers: [B, C].
        """
        are_rounded = np.array([place.is_rounded for place in places])
        slots, pointer_slots, rounding = upload(
            self.spatial.device,
            np.array([place.row * self.slots + place.slot for place in places]),
            np.array([place.row * POINTERS + place.pointer_slot for place in places]),
            are_rounded,
        )
        if are_rounded.any():
            rounded = spatial.to(torch.bfloat16).to(spatial.dtype)
            spatial = torch.where(rounding.view(-1, 1, 1, 1), rounded, spatial)
        for of_all, index, values in (
            (self.spatial, slots, spatial),
            (self.prototypes, slots, prototypes),
            (self.pointers, pointer_slots, pointers),
        ):
            of_all.flatten(0, 1).index_copy_(0, index, values.to(of_all.dtype))

    def copy_slot(self, row: int, source: int, target: int) -> None:
        """Copy a slot of a row over another one."""
        self.spatial[row, target] = self.spatial[row, source]
        self.prototypes[row, target] = self.prototypes[row, source]

    def copy_pointer(self, row: int, source: int, target: int) -> None:
        """Copy an object pointer of a row over another one."""
        self.pointers[row, target] = self.pointers[row, source]

    def gather(self, rows: list[int], reads: list["SlotReads"]) -> tuple[MemoryView, Tensor]:
        """The memory of several objects as one batch, empty places hidden by a bias.

        Args:
            rows: row of each object.
            reads: what to read of each, from `MemoryBank.reads`.

        Returns:
            the view for `attend_memory`, and prototypes [B, M, D, N] for `track_masks`.
        """
        row = np.array(rows)[:, None]
        slots, times, slot_bias = _padded([read.slots for read in reads], [read.times for read in reads])
        pointers, ages, pointer_bias = _padded(
            [read.pointers for read in reads], [read.pointer_ages for read in reads]
        )
        remembered = np.array([read.prototypes for read in reads])
        of_spatial, of_pointers, of_prototypes, slot_time, slot_hides, age, pointer_hides = upload(
            self.spatial.device,
            row * self.slots + slots,
            row * POINTERS + pointers,
            row * self.slots + remembered,
            times,
            slot_bias,
            ages.astype(np.float32),
            pointer_bias,
        )
        view = MemoryView(
            spatial=_pick(self.spatial, of_spatial),
            slot_time=slot_time,
            slot_bias=slot_hides,
            pointers=_pick(self.pointers, of_pointers),
            pointer_age=age,
            pointer_bias=pointer_hides,
        )
        return view, _pick(self.prototypes, of_prototypes)


def upload(device: torch.device, *arrays: npt.NDArray[Any]) -> list[Tensor]:
    """Arrays as tensors on a device.

    To a GPU they go in one copy that nobody waits for. A copy of its own for each, from memory that is not
    pinned, has the host wait until the device has done all that it was asked before.
    """
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    return copy_packed(arrays, lambda packed: packed.pin_memory().to(device, non_blocking=True))


def copy_packed(arrays: Sequence[npt.NDArray[Any]], copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Arrays as tensors in memory of which `copy` makes one piece of bytes, uint8 [N]."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + -(-array.nbytes // WIDEST_NUMBER) * WIDEST_NUMBER)
    packed = np.zeros(starts[-1], dtype=np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    copied = copy(torch.from_numpy(packed))
    return [
        copied[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def _pick(pool: Tensor, index: Tensor) -> Tensor:
    """Copy those columns of those rows, [B, K, …], of a pool [rows, columns, …].

    Selecting by one flat index [B, K] takes a third of the time of indexing by two.
    """
    return pool.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)  # type: ignore[no-any-return]


class SlotReads:
    """What one object reads of its row on one frame.

    Args:
        slots: indices of filled slots, and `times`, their rows of the temporal embedding.
        pointers: indices of filled pointers, and `pointer_ages` in frames.
        prototypes: `READOUT_SLOTS` slots that the affinity readout compares with: the frame that told last
            what the object is (`MemoryBank.told_slot`), and the latest one that showed it or, while it is
            away, the former again.
    """

    __slots__ = ("pointer_ages", "pointers", "prototypes", "slots", "times")

    def __init__(
        self,
        *,
        slots: list[int],
        times: list[int],
        pointers: list[int],
        pointer_ages: list[int],
        prototypes: tuple[int, int],
    ) -> None:
        self.slots, self.times = slots, times
        self.pointers, self.pointer_ages = pointers, pointer_ages
        self.prototypes = prototypes


def is_uniform(reads: list[SlotReads]) -> bool:
    """Whether all read as much as each other, so that a batch of them has no padding to hide."""
    return len({(len(read.slots), len(read.pointers)) for read in reads}) == 1


def _padded(indices: list[list[int]], values: list[list[int]]) -> tuple[IntArray, IntArray, Float32Array]:
    """Indices and values as int64 [B, longest], and the bias [B, longest] that hides the padding."""
    longest = max(len(row) for row in indices)
    bias = np.zeros((len(indices), longest), dtype=np.float32)
    # Padding repeats the first entry: whatever is hidden by a bias must still be finite.
    for row, filled in enumerate(indices):
        bias[row, len(filled) :] = HIDDEN_BIAS
    padded = [
        np.array([row + row[:1] * (longest - len(row)) for row in table]) for table in (indices, values)
    ]
    return padded[0], padded[1], bias
