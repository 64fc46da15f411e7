"""Device memory of every tracked object: allocated once, handed out by the row.

Like the key-value cache of a language-model server: an object owns a row while it lives, nothing grows with
the length of the video, and a row that comes back is reused. What the slots of a row mean is `bank`'s affair.
"""

import torch
from torch import Tensor

from trocar_engines.errors import CapacityError
from trocar_engines.network.config import NetworkConfig
from trocar_engines.network.sam2s import HIDDEN_BIAS, MemoryView

CONDITIONING_POINTERS = 3
RECENT_POINTERS = 15
READOUT_SLOTS = 2
"""The affinity readout compares with the conditioning frame and the latest one that showed the object."""
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
        size, keys = config.embedding_size, config.readout_dim + 3 if config.readout_dim else 0
        self.rows, self.slots = rows, slots
        self.spatial = torch.zeros(rows, slots, config.d_memory, size, size, device=device)
        self.prototypes = torch.zeros(rows, slots, keys, 2, size, size, device=device)
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
        """Copy one memory, [C_mem, h, w] and [D, 2, h, w], into a slot."""
        self.spatial[row, slot] = spatial
        self.prototypes[row, slot] = prototypes

    def copy_slot(self, row: int, source: int, target: int) -> None:
        """Copy a slot of a row over another one."""
        self.spatial[row, target] = self.spatial[row, source]
        self.prototypes[row, target] = self.prototypes[row, source]

    def gather(self, rows: list[int], reads: list["SlotReads"]) -> tuple[MemoryView, Tensor, Tensor]:
        """The memory of several objects as one batch, empty places hidden by a bias.

        Args:
            rows: row of each object.
            reads: what to read of each, from `MemoryBank.reads`.

        Returns:
            the view for `attend_memory`; prototypes [B, M, D, 2, h, w] and their bias [B, M] for
            `track_masks`.
        """
        row = torch.tensor(rows).unsqueeze(1)
        slots, times, slot_bias = _padded([read.slots for read in reads], [read.times for read in reads])
        pointers, ages, pointer_bias = _padded(
            [read.pointers for read in reads], [read.pointer_ages for read in reads]
        )
        remembered = torch.tensor([read.prototypes for read in reads])
        view = MemoryView(
            spatial=self.spatial[row, slots],
            slot_time=times,
            slot_bias=slot_bias,
            pointers=self.pointers[row, pointers],
            pointer_age=ages.float(),
            pointer_bias=pointer_bias,
        )
        return view, self.prototypes[row, remembered], torch.zeros(remembered.shape)


class SlotReads:
    """What one object reads of its row on one frame.

    Args:
        slots: indices of filled slots, and `times`, their rows of the temporal embedding.
        pointers: indices of filled pointers, and `pointer_ages` in frames.
        prototypes: slots that the affinity readout compares with: conditioning frame and latest one.
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


def _padded(indices: list[list[int]], values: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and values as int64 [B, longest], and the bias [B, longest] that hides the padding."""
    longest = max(len(row) for row in indices)
    padding = [longest - len(row) for row in indices]
    bias = [[0.0] * (longest - pad) + [HIDDEN_BIAS] * pad for pad in padding]
    # Padding repeats the first entry: whatever is hidden by a bias must still be finite.
    filled = [row + [row[0]] * pad for row, pad in zip(indices, padding, strict=True)]
    filled_values = [row + [row[0]] * pad for row, pad in zip(values, padding, strict=True)]
    return torch.tensor(filled), torch.tensor(filled_values), torch.tensor(bias)
