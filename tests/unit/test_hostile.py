from itertools import islice

import pytest

from results import result
from trocar.client_core import Notice
from trocar_bench.hostile import Patient, is_good
from trocar_bench.malformed import Mutator
from trocar_bench.process_meter import compare_memory
from trocar_engines.errors import TrocarError


def test_same_seed_gives_the_same_attack() -> None:
    first, again, other = (list(islice(Mutator(seed).cases(), 10)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {case.kind for case in first} == {"packets", "prompts", "wire", "fields", "junk"}


def test_damage_changes_bytes() -> None:
    mutator = Mutator(3)
    good = bytes(range(200))
    assert sum(mutator.damage(good) != good for _ in range(100)) > 90


def test_latency_counts_from_when_a_frame_was_due_and_missing_results_are_lost() -> None:
    patient = Patient()
    due_ns = [round(second * 1e9) for second in (0.0, 1.0, 2.0, 3.0, 4.0)]
    for frame_id, received_s in ((0, 0.5), (1, 1.01), (3, 3.03)):
        patient.take(result(frame_id), received_s)
    health = patient.describe(due_ns, 1.0, 4.0)
    assert (health.frames, health.lost) == (3, 1)
    assert health.p50_ms == pytest.approx(20, abs=0.1)
    with pytest.raises(TrocarError, match="no result"):
        patient.describe(due_ns, 4.0, 5.0)


def test_notices_are_kept() -> None:
    patient = Patient()
    patient.take(Notice(reason="frame_gap", message="frame 3 is missing", lost_frame_ids=(3,)), 0.0)
    assert patient.notices == ["frame 3 is missing"]


def test_memory_is_compared_from_after_the_warm_up() -> None:
    figures = compare_memory([50.0] * 4 + [100.0] * 18 + [110.0] * 18)
    assert figures is not None
    assert figures.growth_percent == 10.0
    assert compare_memory([100.0] * 20) is None, "too few"


def test_a_finding_or_a_death_is_not_good() -> None:
    quiet = {"attacks": {"files": {"first_findings": []}}, "server_died": False, "stream_ended": False}
    assert is_good(quiet)
    assert not is_good({**quiet, "server_died": True})
    assert not is_good({**quiet, "attacks": {"files": {"first_findings": ["file 3: it loaded"]}}})
