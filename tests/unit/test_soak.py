from trocar_bench.process_meter import ProcessMeter
from trocar_bench.soak import PROGRESS_S, Logbook


def test_progress_tells_rate_and_time_left() -> None:
    now_s = 0.0
    said: list[str] = []
    logbook = Logbook(ProcessMeter(None), 1_000, said.append, clock=lambda: now_s)
    for _ in range(100):
        logbook.count_frame()
    assert not said
    now_s = PROGRESS_S
    logbook.count_frame()
    (line,) = said
    assert line.startswith("101 of 1000 frames, 10 frames/s")
    assert line.endswith("about 1.5 min left")
