"""Device memory of every tracked object: allocated once, handed out by the row.

Like the key-value cache of a language-model server: an object owns a row while it lives, nothing grows with
the length of the video, and a row that comes back is reused. What the slots of a row mean is `bank`'s affair.
"""

from typing import Any

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
POINTERS = CONDITIONING_POINTERS + RECENT_POINTERS
"""Object pointers of a row: SAM 2 attends to the conditioning frames' and to 15 recent ones."""


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

    def write(self, row: int, slot: int, spatial: Tensor, prototypes: Tensor) -> None:
        """Copy one memory, [C_mem, h', w'] and [D, N], into a slot."""
        self.spatial[row, slot] = spatial
        self.prototypes[row, slot] = prototypes

    def copy_slot(self, row: int, source: int, target: int) -> None:
        """Copy a slot of a row over another one."""
        self.spatial[row, target] = self.spatial[row, source]
        self.prototypes[row, target] = self.prototypes[row, source]

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
        view = MemoryView(
            spatial=_pick(self.spatial, row, slots),
            slot_time=self._place(times),
            slot_bias=self._place(slot_bias),
            pointers=_pick(self.pointers, row, pointers),
            pointer_age=self._place(ages.astype(np.float32)),
            pointer_bias=self._place(pointer_bias),
        )
        return view, _pick(self.prototypes, row, remembered)

    def _place(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.spatial.device)


def _pick(pool: Tensor, row: IntArray, columns: IntArray) -> Tensor:
    """Copy pool[row, columns], [B, K, …], of a pool [rows, columns, …].

    Selecting by one flat index takes a third of the time of indexing by two.
    """
    index = torch.from_numpy(row * pool.shape[1] + columns).to(pool.device)
    return pool.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)  # type: ignore[no-any-return]


class SlotReads:
    """What one object reads of its row on one frame.

    Args:
        slots: indices of filled slots, and `times`, their rows of the temporal embedding.
        pointers: indices of filled pointers, and `pointer_ages` in frames.
        prototypes: `READOUT_SLOTS` slots that the affinity readout compares with: the frame prompted last
            and the latest frame that showed the object or, while it is away, that did not.
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
