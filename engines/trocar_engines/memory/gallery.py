"""What one object looked like: a few appearance descriptors, each unlike the others.

A gallery of descriptors and the nearest of them as in DeepSORT (arXiv 1703.07402), which keeps the last
hundred; ours keeps those that differ most, since an operation is long.
"""

import numpy as np

from trocar_engines.masklets import Float32Array

MOST_VIEWS = 24
FIRST_VIEWS = 5
"""Views after a prompt that are believed without a comparison, and that are kept for good."""
NEAREST_VIEWS = 3
"""So many views, the most alike, are compared with."""


class Gallery:
    """Appearance descriptors of one object, see `appearance.AppearanceHead`."""

    def __init__(self) -> None:
        self.views: list[Float32Array] = []

    @property
    def is_begun(self) -> bool:
        """Whether it holds all the views that are believed without a comparison."""
        return len(self.views) >= FIRST_VIEWS

    def compare(self, descriptor: Float32Array) -> float:
        """How much what is seen is like the object: mean cosine of the nearest views, -1 to 1.

        Args:
            descriptor: float32 [D], of length 1.
        """
        return float(np.sort(np.stack(self.views) @ descriptor)[-NEAREST_VIEWS:].mean())

    def add(self, descriptor: Float32Array) -> None:
        """Add a view; of the two most alike in a full gallery the newer gives way."""
        self.views.append(descriptor)
        if len(self.views) <= MOST_VIEWS:
            return
        views = np.stack(self.views)
        alike = views @ views.T
        alike[np.tril_indices(len(views))] = -np.inf
        alike[:, :FIRST_VIEWS] = -np.inf
        del self.views[int(np.unravel_index(alike.argmax(), alike.shape)[1])]
