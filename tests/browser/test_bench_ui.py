import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from browser.clips import FRAMES, GREEN_CENTER, HEIGHT_PX, WIDTH_PX, encode_round, red_center
from browser.screens import HOLD_MS
from trocar.cli import EngineOptions
from trocar.operation import OperationSource
from trocar_bench.ui import Footage, main, summarise
from trocar_engines.errors import TrocarError
from wire.fakes import FakeScheduler


def prepare(frame_rate_hz: int) -> Footage:
    spots = (GREEN_CENTER, red_center(3))
    shares = tuple((x / WIDTH_PX, y / HEIGHT_PX) for x, y in spots)
    return Footage(
        source=OperationSource(encode_round(), WIDTH_PX, HEIGHT_PX, frame_rate_hz),
        round_frames=FRAMES,
        places=dict.fromkeys(range(10), shares),
    )


def start_fake(options: EngineOptions) -> FakeScheduler:
    return FakeScheduler()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium: apt-get install chromium")
def test_bench_measures_what_is_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seconds", "4", "--taps", "2", "--fps", "8", "--hold-ms", str(HOLD_MS)]
    # In a thread of its own: playwright runs once per thread, and the other tests' browser has this one.
    with ThreadPoolExecutor() as threads:
        running = threads.submit(main, arguments, start_scheduler=start_fake, prepare=prepare)
        assert running.result() == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["wrong"] == 0
    assert figures["checked"] > 5
    assert 0 < figures["end_to_end_ms"]["p50"] <= figures["end_to_end_ms"]["p99"]
    assert figures["taps"] == 2
    assert figures["tap_to_mask_ms"]["p95"] > 0
    assert figures["page_kb"] <= 300


def test_overlay_on_another_picture_is_counted_and_an_unreadable_one_is_not() -> None:
    def seen(overlay: int | None, barcode: int, objects: int = 1) -> dict[str, object]:
        return {"overlay": overlay, "barcode": barcode, "objects": objects, "latencyMs": 40.0}

    shown = [seen(3, 3), seen(54, 4), seen(5, 6), seen(7, -1), seen(None, 8, 0)]
    figures = summarise(shown, [100.0, 200.0], 2.0, 50)
    assert (figures["wrong"], figures["checked"], figures["unreadable"], figures["bare"]) == (1, 3, 1, 1)
    assert figures["frames_per_s"] == 2.0
    with pytest.raises(TrocarError, match="too busy"):
        summarise([seen(None, 1, 0)], [], 2.0, 50)


def test_senseless_rate_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--fps", "0"])
    assert "--fps takes 1 to 60" in capsys.readouterr().err
