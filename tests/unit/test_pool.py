import pytest
import torch

from networks import TINY
from trocar_engines.errors import CapacityError
from trocar_engines.memory.pool import MemoryPool, SlotReads


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


def test_gather_hides_the_padding_of_shorter_rows() -> None:
    pool = make_pool()
    for row in range(2):
        for slot in range(3):
            pool.spatial[row, slot] = 10 * row + slot
            pool.prototypes[row, slot] = 10 * row + slot
    view, prototypes, prototype_bias = pool.gather([0, 1], [read([0, 2], [0]), read([1], [0, 3])])
    assert view.spatial[:, :, 0, 0, 0].tolist() == [[0, 2], [11, 11]]
    assert (view.slot_bias < 0).tolist() == [[False, False], [False, True]]
    assert (view.pointer_bias < 0).tolist() == [[False, True], [False, False]]
    assert prototype_bias.tolist() == [[0, 0]] * 2
    assert prototypes[1, 1].unique().tolist() == [11]


def test_gather_copies_so_that_later_writes_do_not_reach_a_view() -> None:
    pool = make_pool()
    view, _, _ = pool.gather([0], [read([0], [0])])
    pool.write(0, 0, torch.ones_like(pool.spatial[0, 0]), torch.ones_like(pool.prototypes[0, 0]))
    assert view.spatial.unique().tolist() == [0]
