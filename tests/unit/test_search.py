import numpy as np
import pytest

from trocar_engines.search import (
    GLANCE_MEMORY_S,
    LEAST_GLANCES,
    MOST_TRIAL_FRAMES,
    TRIAL_S,
    Search,
    Trial,
    shrink,
)

NOTHING = np.zeros((16, 16), np.bool_)


def affinity() -> np.ndarray:
    """Most alike at the bottom right, then at the top left."""
    maps = np.full((8, 8), -9.0, np.float32)
    maps[4:7, 4:7], maps[1:4, 1:4] = 2.0, 1.0
    return maps


def test_a_glance_goes_to_the_middle_of_what_is_most_alike() -> None:
    assert Search().choose_point(affinity(), NOTHING, 0.0) == (5.5 / 8, 5.5 / 8)


def test_a_glance_goes_to_no_other_object() -> None:
    taken = NOTHING.copy()
    taken[8:, 8:] = True
    assert Search().choose_point(affinity(), taken, 0.0) == (2.5 / 8, 2.5 / 8)


def test_where_another_thing_was_found_nobody_looks_again_soon() -> None:
    search = Search()
    first = search.choose_point(affinity(), NOTHING, 0.0)
    assert first is not None
    search.reject(first, NOTHING, 0.0)
    for time_s in (GLANCE_MEMORY_S / 2, GLANCE_MEMORY_S + 0.1):
        assert search.choose_point(affinity(), NOTHING, time_s) == (2.5 / 8, 2.5 / 8)
    for _ in range(LEAST_GLANCES):
        search.reject((0.0, 0.0), NOTHING, GLANCE_MEMORY_S)
    assert search.choose_point(affinity(), NOTHING, GLANCE_MEMORY_S + 0.1) == first


def test_a_clock_that_begins_anew_forgets_where_was_looked() -> None:
    search = Search()
    first = search.choose_point(affinity(), NOTHING, 100.0)
    assert first is not None
    search.reject(first, NOTHING, 100.0)
    assert search.choose_point(affinity(), NOTHING, 0.0) == first


def test_where_all_has_been_looked_at_there_is_no_glance() -> None:
    search = Search()
    assert search.choose_point(affinity(), ~NOTHING, 0.1) is None
    search.reject((5.5 / 8, 5.5 / 8), NOTHING, 0.1)
    search.reject((2.5 / 8, 2.5 / 8), NOTHING, 0.1)
    assert search.choose_point(affinity(), ~NOTHING, 0.2) is None
    assert search.choose_point(affinity(), NOTHING, 0.2) == (5.5 / 8, 5.5 / 8), "and then anew"


def test_glances_are_counted_and_dated() -> None:
    search = Search()
    for time_s in (1.0, 2.0):
        search.choose_point(affinity(), NOTHING, time_s)
    assert (search.glances, search.glanced_at_s) == (2, 2.0)


def test_a_mask_of_the_background_covers_its_click_alone() -> None:
    search = Search()
    search.reject((5.5 / 8, 5.5 / 8), ~NOTHING, 0.0)
    assert search.choose_point(affinity(), NOTHING, 0.1) == (2.5 / 8, 2.5 / 8)


@pytest.mark.parametrize(
    ("after_s", "frames", "is_over"),
    [
        (TRIAL_S / 2, 9, False),
        (TRIAL_S + 0.1, 9, True),
        (-9.0, 9, True),
        (TRIAL_S + 0.1, 1, False),
        (0.0, MOST_TRIAL_FRAMES, True),
    ],
    ids=["short", "long", "clock-began-anew", "slow-source", "clock-stands-still"],
)
def test_a_trial_has_its_time(after_s: float, frames: int, is_over: bool) -> None:
    trial = Trial(point=(0.5, 0.5), mask=NOTHING, from_s=10.0, frames=frames)
    assert trial.is_over(10.0 + after_s) == is_over


def test_a_mask_shrinks_to_every_block_that_it_touches() -> None:
    mask = np.zeros((4, 6), np.bool_)
    mask[0, 1] = mask[3, 4] = True
    np.testing.assert_array_equal(shrink(mask, 2, 3), [[True, False, False], [False, False, True]])
