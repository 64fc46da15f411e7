"""The short form of `python -m trocar_bench.soak`: no errors while objects come and go."""

import json
from pathlib import Path

import pytest

from trocar_bench.soak import main

FRAMES = 240


@pytest.mark.slow
def test_objects_come_and_go_on_four_streams_without_an_error(
    engine_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(engine_cache))
    assert main(("--frames", str(FRAMES), "--resolution", "320x180")) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["frames"], figures["streams"], figures["errors"]) == (FRAMES, 4, 0)
    assert "rss_growth_percent" in figures
