import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest

from results import result
from trocar.cli import allow_many_files
from trocar.client_core import Notice
from trocar_bench.assault import CONTROL
from trocar_bench.hostile import (
    OWN_FILES,
    Health,
    HostileBench,
    Onslaught,
    Patient,
    check_files,
    describe_attack,
    draw_curve,
    is_good,
)
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
    assert health is not None
    assert (health.frames, health.lost) == (3, 1)
    assert health.p50_ms == pytest.approx(20, abs=0.1)
    assert patient.describe(due_ns, 4.0, 5.0) is None


def test_notices_are_kept() -> None:
    patient = Patient()
    patient.take(Notice(reason="frame_gap", message="frame 3 is missing", lost_frame_ids=(3,)), 0.0)
    assert patient.notices == ["frame 3 is missing"]


def test_memory_is_compared_from_after_the_warm_up() -> None:
    figures = compare_memory([50.0] * 4 + [100.0] * 18 + [110.0] * 18)
    assert figures is not None
    assert figures.growth_percent == 10.0
    assert compare_memory([100.0] * 20) is None, "too few"


def test_death_is_a_finding_beside_what_was_measured() -> None:
    attack = Onslaught(kind="loris", count=200, is_counted=False)
    health = Health(frames=30, p50_ms=1.0, p99_ms=2.0, service_p99_ms=1.0, lost=0)
    outcome = {"counts": {"opened": 7}, "first_findings": []}
    told = describe_attack(
        attack, outcome, alone=health, beside=None, beside_control=None, exit_code=-9, ended="gone"
    )
    assert told["counts"] == {"opened": 7}
    assert (told["alone"]["p99_ms"], told["beside"], told["p99_ratio"]) == (2.0, None, None)
    assert "exit code -9" in told["first_findings"][0]
    assert told["first_findings"][1] == "the honest stream ended: gone"
    slow = replace(health, p99_ms=3.0)
    survived = describe_attack(
        attack, outcome, alone=health, beside=health, beside_control=slow, exit_code=None, ended=None
    )
    assert (survived["first_findings"], survived["p99_ratio"]) == ([], 1.0)
    assert survived["p99_ratio_control"] == 1.5


class ShortAttacks(HostileBench):
    """Each attacker says at once that it is done."""

    def __init__(self) -> None:
        super().__init__(argparse.Namespace(alone=0.0, progress=60.0), print)
        self.started: list[str] = []

    def _start_attacker(
        self, kind: str, address: str, count: int, more: Sequence[str] = ()
    ) -> "subprocess.Popen[str]":
        self.started.append(kind)
        program = """print('{}\\n{"counts": {}, "first_findings": []}')"""
        return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("exit_code", "started"), [(None, ["loris", CONTROL]), (-9, ["loris"])])
def test_server_that_died_is_not_measured_beside_the_control(
    monkeypatch: pytest.MonkeyPatch, exit_code: int | None, started: list[str]
) -> None:
    monkeypatch.setattr("trocar_bench.hostile.SETTLE_S", 0.0)
    server = SimpleNamespace(pid=os.getpid(), address="", exit_code=exit_code, is_running=exit_code is None)
    live = SimpleNamespace(due_ns=[], is_over=False, failure=None)
    bench = ShortAttacks()
    attack = Onslaught(kind="loris", count=200, is_counted=False)
    bench._run_attack(attack, server, live, Patient())  # type: ignore[arg-type]
    assert bench.started == started


def test_curve_shows_memory_from_first_to_last() -> None:
    assert draw_curve([100.0 + step for step in range(101)]) == [100.0 + 10 * step for step in range(11)]
    assert draw_curve([]) == []


def test_too_few_open_files_are_told_before_the_attack() -> None:
    check_files(1_000, 1_024 + OWN_FILES)
    with pytest.raises(TrocarError, match="3000 connections need 3064 open files and the system allows 1024"):
        check_files(3_000, 1_024)


def test_soft_limit_of_files_is_raised_to_the_hard_one() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] - 1, limits[1]))
        assert allow_many_files() == limits[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_finding_is_not_good() -> None:
    assert is_good({"attacks": {"files": {"first_findings": []}}})
    assert not is_good({"attacks": {"files": {"first_findings": ["file 3: it loaded"]}}})
