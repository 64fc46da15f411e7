from typing import Any

import pytest

from results import result, tracked
from trocar.client_core import Event, PromptAccepted, Resumed
from trocar_bench.faults import FaultTally, describe, is_good
from trocar_engines.masklets import Prompt

KILLED_S = 1.02


def resumed(*lost_object_ids: int) -> Resumed:
    return Resumed(
        address="b:1",
        stream_id=2,
        outage_s=0.1,
        attempts=1,
        replayed_frames=7,
        lost_frame_ids=(),
        unsent_frames=0,
        lost_object_ids=lost_object_ids,
    )


def accepted(object_id: int) -> PromptAccepted:
    prompt = Prompt(object_id=object_id, frame_id=0)
    return PromptAccepted(prompt=prompt, frame_id=0, tracked=tracked(object_id))


def tally_of(*events: tuple[float, Event]) -> FaultTally:
    tally = FaultTally(objects=1)
    before: list[tuple[float, Event]] = [(0.0, result(0)), (0.0, accepted(1))]
    for now_s, event in [*before, *events]:
        if isinstance(event, Resumed):
            tally.note_kill(KILLED_S)
        tally.take(event, now_s)
    return tally


def test_gap_runs_from_the_last_result_before_to_the_first_after() -> None:
    tally = tally_of((1.0, result(1, 1)), (1.2, resumed()), (1.5, result(2, 1)), (1.6, result(3, 1)))
    assert tally.gaps_s == [0.5]
    parts_ms = {"before": 20.0, "notice": 80.0, "open": 100.0, "catch_up": 300.0}
    assert describe(tally, kills=1)["gap_parts_ms"] == parts_ms, "they add up to the gap"
    assert is_good(describe(tally, kills=1))


def test_parts_add_up_to_the_gap_also_when_a_result_comes_after_the_kill() -> None:
    tally = FaultTally(objects=1)
    for now_s, event in ((1.0, result(1)), (1.01, accepted(1))):
        tally.take(event, now_s)
    for kill, late_s in enumerate((0.0, 0.016, 0.03)):
        begin_s, frame_id = 10.0 * (kill + 1), 10 * (kill + 1)
        tally.take(result(frame_id, 1), begin_s)
        tally.note_kill(begin_s + 0.01)
        tally.take(result(frame_id + 1, 1), begin_s + 0.01 + late_s)
        tally.take(resumed(), begin_s + 0.2)
        tally.take(result(frame_id + 2, 1), begin_s + 0.3 + 0.1 * kill)
    figures: dict[str, Any] = describe(tally, kills=3)
    for gap_s, *parts_s in zip(tally.gaps_s, *tally.parts_s.values(), strict=True):
        assert sum(parts_s) == pytest.approx(gap_s)
        assert min(parts_s) >= 0
    assert sum(figures["gap_parts_ms"].values()) == pytest.approx(figures["gap_ms"]["mean"], abs=0.2)


def test_missing_resumption_lost_object_and_repeated_result_are_not_good() -> None:
    good = ((1.0, result(1, 1)), (1.2, resumed()), (1.5, result(2, 1)))
    lost = ((1.0, result(1, 1)), (1.2, resumed(1)), (1.5, result(2, 1)))
    assert not is_good(describe(tally_of(*good), kills=2))
    assert not is_good(describe(tally_of(*lost), kills=1))
    assert not is_good(describe(tally_of(*good, (1.6, result(2, 1))), kills=1))
    assert not is_good(describe(tally_of(*good, (1.6, result(3))), kills=1)), "the object's id is gone"
