import numpy as np
import pytest

from trocar_engines.search import GLANCE_MEMORY_S, TRIAL_S, Search, shrink

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
    assert search.choose_point(affinity(), NOTHING, GLANCE_MEMORY_S / 2) == (2.5 / 8, 2.5 / 8)
    assert search.choose_point(affinity(), NOTHING, GLANCE_MEMORY_S + 0.1) == first


def test_a_clock_that_begins_anew_forgets_where_was_looked() -> None:
    search = Search()
    first = search.choose_point(affinity(), NOTHING, 100.0)
    assert first is not None
    search.reject(first, NOTHING, 100.0)
    assert search.choose_point(affinity(), NOTHING, 0.0) == first


def test_where_all_has_been_looked_at_there_is_no_glance() -> None:
    search = Search()
    search.reject((0.5, 0.5), ~NOTHING, 0.0)
    assert search.choose_point(affinity(), NOTHING, 0.1) is None


def test_glances_are_counted_and_dated() -> None:
    search = Search()
    for time_s in (1.0, 2.0):
        search.choose_point(affinity(), NOTHING, time_s)
    assert (search.glances, search.glanced_at_s) == (2, 2.0)


@pytest.mark.parametrize(("after_s", "is_over"), [(TRIAL_S / 2, False), (TRIAL_S + 0.1, True), (-9.0, True)])
def test_a_trial_has_its_time(after_s: float, is_over: bool) -> None:
    search = Search()
    assert not search.is_trial_over(after_s), "there is none"
    search.trial_from_s = 0.0
    assert search.is_on_trial
    assert search.is_trial_over(after_s) == is_over


def test_a_mask_shrinks_to_every_block_that_it_touches() -> None:
    mask = np.zeros((4, 6), np.bool_)
    mask[0, 1] = mask[3, 4] = True
    np.testing.assert_array_equal(shrink(mask, 2, 3), [[True, False, False], [False, False, True]])
