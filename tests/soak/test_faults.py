"""Real servers, killed: the short form of `python -m trocar_bench.faults`."""

import json
from pathlib import Path

import pytest

from trocar_bench.faults import main


@pytest.mark.slow
def test_live_stream_outlives_killed_servers(
    engine_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The servers are children of this process: what they export goes where the test's files go.
    monkeypatch.setenv("XDG_CACHE_HOME", str(engine_cache))
    assert main(("--kills", "2", "--fps", "10", "--resolution", "320x180")) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["resumed"] == figures["kills"] == 2
    assert (figures["duplicate_results"], figures["lost_objects"]) == (0, 0)
    assert figures["results"] > 20
