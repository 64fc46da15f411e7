"""Who earns a long-term slot: of several good frames in a row, the one least like what is already kept.

SAM2S (arXiv 2511.16618), "Diverse memory".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trocar_engines.masklets import Float32Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """A frame that may become a long-term memory.

    Args:
        summary: float32 [C], its globally pooled image features.
        predicted_iou: 0 to 1, how good its mask is believed to be.
        time_s: its presentation time.
    """

    summary: Float32Array
    predicted_iou: float
    time_s: float


class Verdict(NamedTuple):
    """What becomes of a candidate.

    Args:
        is_best_so_far: it is the least similar of its run and takes the staging slot.
        elected: the run is complete; the candidate in the staging slot, which may become a long-term memory.
    """

    is_best_so_far: bool
    elected: Candidate | None


class CandidateRun:
    """Consecutive candidate frames, of which the most diverse is elected.

    Args:
        length: candidates in a row that complete a run.
        interval_s: least time between two candidates; frames in between neither count nor break the run.
    """

    def __init__(self, length: int, interval_s: float) -> None:
        self.length, self.interval_s = length, interval_s
        self._reference: Float32Array | None = None
        self._next_at_s = -np.inf
        self._count = 0
        self._lowest_similarity = np.inf
        self._best: Candidate | None = None

    def start_anew(self, reference: Float32Array) -> None:
        """Begin with the latest memory kept, float32 [C], as what a candidate should not resemble."""
        self._reference = reference
        self._next_at_s = -np.inf
        self._restart()

    def keep(self, elected: Candidate) -> None:
        """The elected candidate was kept: the next ones are compared with it."""
        self._reference = elected.summary

    def break_off(self, time_s: float) -> None:
        """A frame that is no candidate ends the run, if it was due as one."""
        if time_s >= self._next_at_s:
            self._restart()

    def offer(self, candidate: Candidate) -> Verdict:
        """Count a candidate."""
        assert self._reference is not None, "a run starts from the conditioning frame"
        if candidate.time_s < self._next_at_s:
            return Verdict(is_best_so_far=False, elected=None)
        self._next_at_s = candidate.time_s + self.interval_s
        similarity = cosine_similarity(candidate.summary, self._reference)
        is_best = similarity < self._lowest_similarity
        if is_best:
            self._lowest_similarity, self._best = similarity, candidate
        self._count += 1
        elected = self._best if self._count == self.length else None
        if elected is not None:
            self._restart()
        return Verdict(is_best_so_far=is_best, elected=elected)

    def _restart(self) -> None:
        self._count = 0
        self._lowest_similarity = np.inf
        self._best = None


def redundant_member(members: Sequence[Candidate], conditioning: Float32Array) -> int:
    """Which of several memories says least: the worse one of the two that resemble each other most.

    Args:
        members: two or more.
        conditioning: float32 [C] summary of the conditioning frame, a neighbour that never leaves.

    Returns:
        its index.
    """
    highest, redundant = -np.inf, 0
    for index, member in enumerate(members):
        similarity = cosine_similarity(member.summary, conditioning)
        if similarity > highest:
            highest, redundant = similarity, index
        for other in range(index):
            similarity = cosine_similarity(member.summary, members[other].summary)
            if similarity > highest:
                is_worse = member.predicted_iou <= members[other].predicted_iou
                highest, redundant = similarity, index if is_worse else other
    return redundant


def cosine_similarity(first: Float32Array, second: Float32Array) -> float:
    """Cosine of the angle between two vectors; 0 if one of them is null."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else 0.0
