"""Who earns a long-term slot: of several good frames in a row, the one least like what is already kept.

SAM2S (arXiv 2511.16618), "Diverse memory".
"""

from typing import NamedTuple

import numpy as np

from trocar_engines.masklets import Float32Array


class Verdict(NamedTuple):
    """What becomes of a candidate.

    Args:
        is_best_so_far: it is the least similar of its run and takes the staging slot.
        is_complete: the run is complete; what lies in the staging slot becomes a long-term memory.
    """

    is_best_so_far: bool
    is_complete: bool


class CandidateRun:
    """Consecutive candidate frames, of which the most diverse is elected.

    Args:
        length: candidates in a row that complete a run.
        interval_s: least time between two candidates; frames in between neither count nor break the run.
    """

    def __init__(self, length: int, interval_s: float) -> None:
        self.length, self.interval_s = length, interval_s
        self.count = 0
        self.lowest_similarity = np.inf
        self._reference: Float32Array | None = None
        self._elected: Float32Array | None = None
        self._next_at_s = -np.inf

    def start_anew(self, reference: Float32Array) -> None:
        """Begin with the conditioning frame, float32 [C], as what is already kept."""
        self._reference = reference
        self._restart()

    def break_off(self, time_s: float) -> None:
        """A frame that is no candidate ends the run, if it was due as one."""
        if time_s >= self._next_at_s:
            self._restart()

    def offer(self, summary: Float32Array, time_s: float) -> Verdict:
        """Count a candidate.

        Args:
            summary: float32 [C], its pooled image features.
            time_s: its presentation time.
        """
        assert self._reference is not None, "a run starts from the conditioning frame"
        if time_s < self._next_at_s:
            return Verdict(is_best_so_far=False, is_complete=False)
        self._next_at_s = time_s + self.interval_s
        similarity = cosine_similarity(summary, self._reference)
        is_best = similarity < self.lowest_similarity
        if is_best:
            self.lowest_similarity = similarity
            self._elected = summary
        self.count += 1
        is_complete = self.count == self.length
        if is_complete:
            assert self._elected is not None
            self._reference = self._elected
            self._restart()
        return Verdict(is_best_so_far=is_best, is_complete=is_complete)

    def _restart(self) -> None:
        self.count = 0
        self.lowest_similarity = np.inf
        self._elected = None


def cosine_similarity(first: Float32Array, second: Float32Array) -> float:
    """Cosine of the angle between two vectors; 0 if one of them is null."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else 0.0
