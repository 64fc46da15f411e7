"""What is kept of an object's looks, and how it is compared with."""

import math

import numpy as np
import pytest

from trocar_engines.masklets import Float32Array
from trocar_engines.memory.gallery import FIRST_VIEWS, MOST_VIEWS, Gallery


def view(angle: float) -> Float32Array:
    return np.array([math.cos(angle), math.sin(angle)], np.float32)


def test_gallery_keeps_the_first_views_and_of_the_others_the_most_unlike() -> None:
    gallery = Gallery()
    for angle in [0.0] * FIRST_VIEWS + [0.02 * step for step in range(3 * MOST_VIEWS)]:
        gallery.add(view(angle))
    assert len(gallery.views) == MOST_VIEWS
    seen = [math.atan2(one[1], one[0]) for one in gallery.views]
    assert seen[:FIRST_VIEWS] == [0.0] * FIRST_VIEWS
    assert max(seen) > 1.0, "a slow change is followed"
    assert max(np.diff(sorted(seen))) < 0.2, "and all of its way is kept"


def test_likeness_is_that_of_the_nearest_views() -> None:
    gallery = Gallery()
    for angle in (0.0, 0.0, 0.0, math.pi / 2, math.pi / 2):
        assert not gallery.is_begun
        gallery.add(view(angle))
    assert gallery.is_begun
    assert gallery.compare(view(0.0)) == pytest.approx(1.0)
    assert gallery.compare(view(math.pi)) == pytest.approx(-1 / 3, abs=1e-6)


def test_first_views_stay_among_views_that_have_nothing_in_common() -> None:
    gallery = Gallery()
    axes = np.eye(MOST_VIEWS + 3, dtype=np.float32)
    for axis in axes:
        gallery.add(axis)
    np.testing.assert_array_equal(np.stack(gallery.views[:FIRST_VIEWS]), axes[:FIRST_VIEWS])
