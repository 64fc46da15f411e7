import numpy as np
import pytest
import torch

from networks import TINY
from trocar_engines.errors import CapacityError
from trocar_engines.memory.pool import MemoryPool, Place, SlotReads, copy_packed


def make_pool(rows: int = 2) -> MemoryPool:
    return MemoryPool(TINY, rows=rows, slots=4)


def read(slots: list[int], pointers: list[int]) -> SlotReads:
    return SlotReads(
        slots=slots, times=slots, pointers=pointers, pointer_ages=pointers, prototypes=(0, slots[-1])
    )


def test_rows_come_back_after_release() -> None:
    pool = make_pool()
    first, second = pool.allocate(), pool.allocate()
    with pytest.raises(CapacityError, match="all 2 memory rows"):
        pool.allocate()
    pool.release(first)
    assert pool.allocate() == first
    assert pool.rows_in_use == 2
    assert first != second


def test_memories_stored_together_lie_where_each_would_alone() -> None:
    together, alone = make_pool(rows=3), make_pool(rows=3)
    torch.manual_seed(0)
    spatial, prototypes, pointers = (
        torch.randn(2, *of_all.shape[2:]) for of_all in (alone.spatial, alone.prototypes, alone.pointers)
    )
    places = [Place(2, 3, 5, False), Place(0, 1, 17, True)]
    together.store(places, spatial, prototypes, pointers)
    for index, (row, slot, pointer_slot, is_rounded) in enumerate(places):
        rounded = spatial[index].to(torch.bfloat16) if is_rounded else spatial[index]
        alone.spatial[row, slot] = rounded
        alone.prototypes[row, slot] = prototypes[index]
        alone.pointers[row, pointer_slot] = pointers[index]
    for name in ("spatial", "prototypes", "pointers"):
        assert getattr(together, name).equal(getattr(alone, name)), name
    assert not together.spatial[0, 1].equal(spatial[1])


def test_arrays_of_any_type_pass_through_one_piece_of_memory() -> None:
    arrays = [
        np.arange(3),
        np.array([True, False, True]),
        np.linspace(0, 1, 5, dtype=np.float32).reshape(1, 5),
        np.zeros((2, 0), dtype=np.int64),
        np.arange(8).reshape(2, 4)[:, ::2],
    ]
    pieces = []

    def copy(packed: torch.Tensor) -> torch.Tensor:
        pieces.append(packed.clone())
        return pieces[-1]

    for tensor, array in zip(copy_packed(arrays, copy), arrays, strict=True):
        assert tensor.equal(torch.from_numpy(np.ascontiguousarray(array)))
    assert len(pieces) == 1


def test_ten_thousand_objects_come_and_go_without_growth() -> None:
    pool = make_pool(rows=3)
    tensors = (pool.spatial.data_ptr(), pool.prototypes.data_ptr(), pool.pointers.data_ptr())
    for _ in range(10_000):
        rows = [pool.allocate() for _ in range(3)]
        assert sorted(rows) == [0, 1, 2]
        for row in rows:
            pool.release(row)
    assert pool.rows_in_use == 0
    assert tensors == (pool.spatial.data_ptr(), pool.prototypes.data_ptr(), pool.pointers.data_ptr())


POISON = 1e6
"""Finite, as whatever hides behind a bias must be, and so large that the slightest leak shows."""


def test_ten_thousand_objects_never_see_a_slot_of_a_former_owner() -> None:
    """Each object fills some slots with its own number and leaves poison; what it reads must be its own."""
    pool = MemoryPool(TINY, rows=5, slots=6)
    allocated = [values.nbytes for values in (pool.spatial, pool.prototypes, pool.pointers)]
    rng = np.random.default_rng(0)
    living: dict[int, tuple[int, SlotReads]] = {}
    for number in range(1, 10_001):
        if len(living) == pool.rows:
            gone = int(rng.choice(list(living)))
            row, _ = living.pop(gone)
            for values in (pool.spatial, pool.prototypes, pool.pointers):
                values[row] = POISON
            pool.release(row)
        row = pool.allocate()
        assert row not in [taken for taken, _ in living.values()]
        slots = [0, *(1 + rng.permutation(5)[: rng.integers(5)]).tolist()]
        pointers = [0, *(3 + rng.permutation(15)[: rng.integers(15)]).tolist()]
        for slot in slots:
            pool.spatial[row, slot] = pool.prototypes[row, slot] = float(number)
        pool.pointers[row, pointers] = float(number)
        living[number] = row, read(slots, pointers)
        if number % 29 == 0:
            numbers, owned = list(living), list(living.values())
            view, prototypes = pool.gather([row for row, _ in owned], [reads for _, reads in owned])
            for values in (view.spatial, view.pointers, prototypes):
                own = torch.tensor(numbers).view(-1, *[1] * (values.dim() - 1))
                assert (values == own).all(), "even what a bias hides is the object's own"
    assert allocated == [values.nbytes for values in (pool.spatial, pool.prototypes, pool.pointers)]
    assert pool.rows_in_use == pool.rows


def test_gather_hides_the_padding_of_shorter_rows() -> None:
    pool = make_pool()
    for row in range(2):
        for slot in range(3):
            pool.spatial[row, slot] = 10 * row + slot
            pool.prototypes[row, slot] = 10 * row + slot
    view, prototypes = pool.gather([0, 1], [read([0, 2], [0]), read([1], [0, 3])])
    assert view.spatial[:, :, 0, 0, 0].tolist() == [[0, 2], [11, 11]]
    assert (view.slot_bias < 0).tolist() == [[False, False], [False, True]]
    assert (view.pointer_bias < 0).tolist() == [[False, True], [False, False]]
    assert prototypes[1, 1].unique().tolist() == [11]


def test_gather_copies_so_that_later_writes_do_not_reach_a_view() -> None:
    pool = make_pool()
    view, _ = pool.gather([0], [read([0], [0])])
    ones = (torch.ones_like(values[:1, 0]) for values in (pool.spatial, pool.prototypes, pool.pointers))
    pool.store([Place(0, 0, 0, False)], *ones)
    assert view.spatial.unique().tolist() == [0]
