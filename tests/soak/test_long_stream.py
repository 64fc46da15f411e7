"""Thousands of frames through one stream of a real server: nothing may grow with the length of the video.

`TROCAR_SOAK_FRAMES=20000` runs as long as the project promises; `bench-fps --mode service --frames 20000` is
the same with a model that has been trained.
"""

import json
import os
from pathlib import Path

import pytest

from networks import lively_network
from trocar_bench.fps import main
from trocar_bench.speed_run import SETTLED_FRAMES
from trocar_engines.models import DEFAULT_MODEL
from trocar_engines.network.config import network_config
from trocar_engines.network.weights import save_weights

FRAMES = int(os.environ.get("TROCAR_SOAK_FRAMES", "2000"))
MOST_GROWTH_MB = 20.0


@pytest.mark.slow
def test_server_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert FRAMES > SETTLED_FRAMES, "growth is counted from there on"
    weights = tmp_path / "random.safetensors"
    save_weights(weights, lively_network(network_config(DEFAULT_MODEL)).state_dict(), DEFAULT_MODEL)
    # The server is a child of this process: what it exports goes where the test's files go.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("--mode", "service", "--resolution", "320x180", "--weights", str(weights))
    # A first server exports the engines: what that leaves behind moves about for a thousand frames.
    assert main((*arguments, "--frames", "60")) == 0
    capsys.readouterr()
    assert main((*arguments, "--objects", "2", "--frames", str(FRAMES))) == 0
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert (run["dropped"], run["unreported"]) == (0, 0)
    assert run["rss_growth_mb"] < MOST_GROWTH_MB
