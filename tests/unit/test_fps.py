"""`bench-fps`: what it computes, and the command with trackers that need no model."""

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trocar.cli import EngineOptions, StartScheduler
from trocar.decode import Codec, Packet, PacketDecoder, VideoFormat
from trocar.local import LocalServer
from trocar_bench.footage import Footage, spread_clicks
from trocar_bench.fps import main
from trocar_bench.fps_report import RunReport, describe_run, find_remarks, find_slopes
from trocar_bench.frame_log import Figures, FrameLog, percentiles, slope_per_object, sum_up
from trocar_bench.pacing import NS_PER_S, BackPressure, OpenLoop
from trocar_bench.process_meter import CpuReading, CpuUse, ProcessMeter, compare
from trocar_bench.serve_process import RunningServer, ServerRequest, StartServer, write_arguments
from trocar_bench.speed_run import RunPlan, Usage
from trocar_engines.errors import TrocarError, UnknownModelError
from trocar_engines.masklets import Picture, UInt8Array
from wire.fakes import FakeScheduler, resize_linear

NS_PER_MS = 1_000_000
SMALL = ("--resolution", "96x64", "--warmup", "3", "--frames", "30")


class FakeClock:
    """Time that passes only when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now_ns = 5 * NS_PER_S

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_ns += round(seconds * NS_PER_S)

    def work(self, ms: float) -> None:
        self.now_ns += round(ms * NS_PER_MS)


def note(log: FrameLog, frame_id: int, received_ns: int, **more: Any) -> None:
    stages = more.pop("stage_ns", {"encode_image": NS_PER_MS})
    log.note_result(frame_id, received_ns, stages, **{"masklets": 1, "visible_masklets": 1, **more})


def log_of(
    received_ms: Sequence[float], *, warmup: int = 0, due_ms: Sequence[float] | None = None
) -> FrameLog:
    """Frame 0 at 0, then results at these times, due at those or at the same."""
    log = FrameLog(warmup=warmup, frames=len(received_ms) - warmup)
    note(log, 0, 0)
    for frame_id, received in enumerate(received_ms, 1):
        due = received if due_ms is None else due_ms[frame_id - 1]
        log.note_sent(frame_id, round(due * NS_PER_MS), round(due * NS_PER_MS))
        note(log, frame_id, round(received * NS_PER_MS))
    return log


# --- pacing ---------------------------------------------------------------------------------------------


def consume(pacing: OpenLoop, clock: FakeClock, work_ms: Sequence[float]) -> Figures:
    """A consumer that takes one frame at a time, each for so long."""
    log = FrameLog(warmup=0, frames=len(work_ms))
    started_ns = clock()
    pacing.start(started_ns)
    for frame_id, ms in enumerate(work_ms, 1):
        due_ns = pacing.wait()
        assert due_ns is not None
        log.note_sent(frame_id, due_ns, clock())
        clock.work(ms)
        note(log, frame_id, clock())
    return sum_up([log], started_ns)


def test_stalled_consumer_shows_in_the_latency_of_every_frame_that_was_due() -> None:
    clock = FakeClock()
    figures = consume(
        OpenLoop(100, clock=clock, sleep=clock.sleep), clock, [1.0] * 40 + [1_000.0] + [1.0] * 59
    )
    # A source that waited for its consumer would have seen one slow frame in a hundred.
    assert figures.latency_ms.max == pytest.approx(1_000)
    assert figures.latency_ms.p50 > 500
    assert figures.source_late_ms.max == pytest.approx(990), "the frame after the slow one"
    assert figures.dropped == 0


def test_punctual_consumer_is_measured_from_the_schedule() -> None:
    clock = FakeClock()
    figures = consume(OpenLoop(100, clock=clock, sleep=clock.sleep), clock, [4.0] * 50)
    assert figures.latency_ms.p50 == figures.latency_ms.max == pytest.approx(4)
    assert figures.source_late_ms.max == 0


def test_schedule_does_not_drift() -> None:
    clock = FakeClock()
    pacing = OpenLoop(30, clock=clock, sleep=clock.sleep)
    pacing.start(0)
    dues = [pacing.wait() for _ in range(9_001)]
    assert dues[-1] == 300 * NS_PER_S


def test_stopped_sources_wait_no_longer() -> None:
    open_loop, back_pressure = OpenLoop(1), BackPressure(1)
    open_loop.start(2**62)
    assert back_pressure.wait() is not None
    threading.Timer(0.02, open_loop.stop).start()
    threading.Timer(0.02, back_pressure.stop).start()
    assert open_loop.wait() is None
    assert back_pressure.wait() is None


def test_back_pressure_sends_when_a_frame_is_settled_and_counts_from_then() -> None:
    clock = FakeClock()
    pacing = BackPressure(2, clock=clock)
    assert [pacing.wait(), pacing.wait()] == [clock(), clock()]
    clock.work(70)
    pacing.settle()
    assert pacing.wait() == clock()


def test_cameras_are_out_of_step() -> None:
    plan = RunPlan(mode="engine", objects=1, streams=4, paced_fps=25, frames=1, warmup=0)
    assert [plan.find_offset_ns(stream) // NS_PER_MS for stream in range(4)] == [0, 10, 20, 30]


# --- figures --------------------------------------------------------------------------------------------


def test_percentiles_of_known_values() -> None:
    latency = percentiles(np.arange(101, dtype=np.float64))
    assert (latency.p50, latency.p95, latency.p99, latency.max) == (50, 95, 99, 100)


def test_rate_is_frames_per_interval_and_leaves_out_the_warm_up() -> None:
    log = log_of([500, 900, *range(1_000, 1_200, 10)], warmup=2)
    figures = sum_up([log], 0)
    assert figures.fps == pytest.approx(20 / 0.29)
    assert figures.latency_ms.max == 0


def test_streams_are_measured_while_all_of_them_run() -> None:
    slow, fast = log_of(list(range(100, 2_100, 100))), log_of(list(range(10, 210, 10)))
    assert sum_up([slow, fast], 0).fps == pytest.approx(110), "10 frames/s and 100 frames/s together"


def test_steady_run_is_not_flagged() -> None:
    figures = sum_up([log_of([10.0 * frame for frame in range(1, 101)])], 0)
    assert figures.window_fps == pytest.approx([100] * 5)
    assert figures.fps_spread == pytest.approx(0)
    assert not figures.is_unsteady


def test_run_that_slows_down_is_flagged() -> None:
    intervals = [10.0] * 80 + [12.0] * 20
    figures = sum_up([log_of(list(np.cumsum(intervals)))], 0)
    assert figures.window_fps == pytest.approx([100, 100, 100, 100, 1_000 / 12])
    assert figures.fps_spread == pytest.approx(1 / 6)
    assert figures.is_unsteady
    assert "unsteady" in find_remarks([report(figures)])[0]


def test_run_too_short_for_windows_has_none() -> None:
    figures = sum_up([log_of([10, 20, 30])], 0)
    assert figures.window_fps == ()
    assert figures.fps_spread is None


def test_drops_are_counted_by_id_and_silent_ones_apart() -> None:
    log = FrameLog(warmup=2, frames=6)
    for frame_id in (0, 1, 3, 6, 8):
        note(log, frame_id, frame_id * NS_PER_MS)
    log.note_dropped([2, 4])
    log.note_dropped([4, 5])
    figures = sum_up([log], 0)
    assert figures.dropped == 3, "2 belongs to the warm-up"
    assert figures.unreported == 1
    assert log.settled == 8
    assert any("1 frames vanished" in remark for remark in find_remarks([report(figures)]))


def test_run_without_a_result_is_refused() -> None:
    log = FrameLog(warmup=0, frames=2)
    log.note_dropped([1, 2])
    with pytest.raises(TrocarError, match="no frame that counts was tracked"):
        sum_up([log], 0)


def test_what_no_stage_accounts_for_is_told() -> None:
    log = FrameLog(warmup=0, frames=3)
    stages = {"decode": 2 * NS_PER_MS, "queue": NS_PER_MS, "write_memory": 9 * NS_PER_MS}
    for frame_id in (1, 2, 3):
        note(log, frame_id, frame_id * NS_PER_MS, stage_ns=stages, service_ns=5 * NS_PER_MS)
    figures = sum_up([log], 0)
    assert figures.between_ms == pytest.approx(2), "writing memory follows the reply"
    assert figures.service_latency_ms is not None
    assert figures.service_latency_ms.max == 5
    assert list(figures.stages_ms) == ["decode", "queue", "write_memory"]


def test_engine_has_no_service_latency() -> None:
    figures = sum_up([log_of([10, 20])], 0)
    assert figures.service_latency_ms is None
    assert figures.between_ms is None


def test_slope_is_the_cost_of_a_further_object() -> None:
    assert slope_per_object([(1, 15.0), (2, 18.0), (4, 24.0), (8, 36.0)]) == pytest.approx(3)
    assert slope_per_object([(2, 18.0)]) is None


def test_slopes_are_found_per_mode_and_number_of_streams() -> None:
    reports = [
        report(sum_up([log_of([ms * frame for frame in range(1, 9)])], 0), objects=objects, streams=streams)
        for streams, objects, ms in ((1, 1, 10.0), (1, 3, 16.0), (2, 1, 20.0))
    ]
    (slope,) = find_slopes(reports)
    assert (slope.mode, slope.streams) == ("service", 1)
    assert slope.ms == pytest.approx(3)


def test_runs_that_dropped_frames_have_no_slope() -> None:
    calm, crowded = (sum_up([log_of([10 * frame for frame in range(1, 9)])], 0) for _ in range(2))
    reports = [report(calm), report(dataclasses.replace(crowded, dropped=1), objects=2)]
    assert find_slopes(reports) == []


def report(figures: Figures, *, objects: int = 1, streams: int = 1) -> RunReport:
    plan = RunPlan(mode="service", objects=objects, streams=streams, paced_fps=0, frames=8, warmup=0)
    cpu = CpuUse(seconds=2, client_percent=10, server_percent=80, others_percent=3)
    usage = Usage(cpu=cpu, rss_mb=500, rss_growth_mb=None)
    return RunReport(plan=plan, model="nano", runtime="onnx", figures=figures, usage=usage)


def test_cpu_time_is_told_per_frame() -> None:
    run = describe_run(report(sum_up([log_of([10, 20, 30, 40])], 0)))
    assert run["cpu_ms_per_frame"] == {"client": 1, "server": 8}
    assert run["fps"] == 100


# --- processes ------------------------------------------------------------------------------------------


def test_cpu_use_is_the_difference_of_two_readings() -> None:
    before = CpuReading(at_s=10, client_s=1, server_s=5, busy_s=20)
    use = compare(before, CpuReading(at_s=12, client_s=1.5, server_s=6, busy_s=22))
    assert (use.client_percent, use.server_percent, use.others_percent) == (25, 50, 25)


def test_server_is_read_from_proc(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(f"7 (odd ) name) S {' 0' * 10} {2 * ticks} {ticks} 0 0")
    (tmp_path / "7" / "status").write_text("Name:\tx\nVmHWM:\t   3000 kB\nVmRSS:\t   2000 kB\n")
    core = min(os.sched_getaffinity(0))
    (tmp_path / "stat").write_text(
        f"cpu 9 9 9\ncpu{core} {4 * ticks} 0 {ticks} 77 88 0 0 0 5 5\ncpu999 1 1 1\n"
    )
    meter = ProcessMeter(7, proc=tmp_path)
    reading = meter.read_cpu()
    assert (reading.server_s, reading.busy_s) == (3, 5)
    assert (meter.read_rss_mb(), meter.read_peak_mb()) == (2.048, 3.072)


def test_what_proc_does_not_tell_is_unknown(tmp_path: Path) -> None:
    meter = ProcessMeter(7, proc=tmp_path)
    meter.reset_peak()
    reading = meter.read_cpu()
    assert (reading.server_s, reading.busy_s, meter.read_rss_mb()) == (None, None, None)
    assert compare(reading, reading).others_percent is None


def test_flags_of_the_server(tmp_path: Path) -> None:
    engine = EngineOptions(model="m", weights=tmp_path, runtime="eager", max_streams=3)
    text = " ".join(write_arguments(ServerRequest(engine=engine, max_objects=40, on_line=print)))
    assert "--address 127.0.0.1:0 --runtime eager --max-streams 3 --max-objects 40 --model m" in text
    assert text.endswith(f"--weights {tmp_path}")
    assert "--memory" not in text


# --- footage --------------------------------------------------------------------------------------------


def make_footage(pictures: int = 5) -> Footage:
    labels = np.zeros((64, 96), np.uint8)
    labels[5:60, 10:20], labels[5:60, 50:60] = 1, 2
    return Footage(
        pictures=tuple(np.full((64, 96, 3), 40 * index, np.uint8) for index in range(pictures)), labels=labels
    )


def test_footage_plays_to_and_fro() -> None:
    assert make_footage().places == (0, 1, 2, 3, 4, 3, 2, 1)
    assert make_footage(1).places == (0,)


def test_footage_decodes_round_after_round_without_a_gap() -> None:
    footage = make_footage()
    decoder = PacketDecoder(VideoFormat(codec=Codec.H264, max_pixels=10_000))
    for frame_id in range(20):
        payload = footage.packets[frame_id % len(footage.packets)]
        decoded = decoder.decode(Packet(frame_id=frame_id, payload=payload))
        assert decoded.picture is not None
        assert decoded.picture.is_trusted
        assert decoded.faults == ()
        shown = footage.pictures[footage.places[frame_id % len(footage.places)]]
        assert abs(float(decoded.picture.rgb.mean()) - float(shown.mean())) < 4


def test_clicks_lie_on_the_labels_in_turn_and_apart() -> None:
    labels = make_footage().labels
    clicks = spread_clicks(labels, 6)
    assert [int(labels[int(y), int(x)]) for x, y in clicks] == [1, 2, 1, 2, 1, 2]
    assert len(set(clicks)) == 6


def test_more_objects_than_places_share_them() -> None:
    labels: UInt8Array = np.zeros((64, 64), np.uint8)
    labels[3, 3] = 1
    assert spread_clicks(labels, 3) == [(3.0, 3.0)] * 3


# --- the command ----------------------------------------------------------------------------------------


def start_fake(options: EngineOptions) -> FakeScheduler:
    return FakeScheduler(max_streams=options.max_streams)


@contextmanager
def serve_fake(request: ServerRequest) -> Iterator[RunningServer]:
    class Running:
        pid = os.getpid()
        address = ""

    scheduler = FakeScheduler(max_streams=request.engine.max_streams)
    try:
        with LocalServer(scheduler, resize_linear) as server:
            Running.address = server.address
            yield Running()
    finally:
        scheduler.close()


def render_fake(width_px: int, height_px: int, *, on_frame: Callable[[], None]) -> Footage:
    assert (width_px, height_px) == (96, 64)
    on_frame()
    return make_footage()


def run(
    *arguments: str, start_scheduler: StartScheduler = start_fake, start_server: StartServer = serve_fake
) -> int:
    return main(arguments, start_scheduler=start_scheduler, start_server=start_server, render=render_fake)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_unpaced_engine_and_service_with_objects(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--objects", "1,2") == 0
    told = last_line(capsys)
    assert told["resolution"] == "96x64"
    assert set(told["versions"]) == {"python", "torch", "onnxruntime", "trocar"}
    assert [(one["mode"], one["objects"]) for one in told["runs"]] == [
        ("engine", 1),
        ("engine", 2),
        ("service", 1),
        ("service", 2),
    ]
    for one in told["runs"]:
        assert one["fps"] > 0
        assert (one["dropped"], one["unreported"], one["paced_fps"]) == (0, 0, 0)
        assert one["latency_from"] == "sent"
        assert 0 < one["latency_ms"]["p50"] <= one["latency_ms"]["max"]
    engine, service = told["runs"][0], told["runs"][2]
    assert engine["service_latency_ms"] is None
    assert "decode" not in engine["stages_ms"]
    assert 0 < service["service_latency_ms"]["p50"] <= service["latency_ms"]["p50"]
    assert service["stages_ms"]["decode"] > 0
    assert [slope["mode"] for slope in told["ms_per_object"]] == ["engine", "service"]


def test_paced_streams_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--mode", "engine,service", "--streams", "2", "--fps", "120") == 0
    for one in last_line(capsys)["runs"]:
        assert one["streams"] == 2
        assert one["latency_from"] == "due"
        assert one["unreported"] == 0
        assert one["fps"] < 300


def test_stalled_tracker_costs_drops_and_latency(capsys: pytest.CaptureFixture[str]) -> None:
    class Stalling(FakeScheduler):
        def submit(self, stream: Any, future: Any, compute: Any, picture: Picture | None = None) -> None:
            def stall() -> object:
                time.sleep(0.2)
                return compute()

            is_heavy = picture is not None and picture.frame_id == 10
            super().submit(stream, future, stall if is_heavy else compute, picture)

    arguments = (*SMALL, "--mode", "engine", "--fps", "60")
    assert run(*arguments, start_scheduler=lambda _: Stalling()) == 0
    (one,) = last_line(capsys)["runs"]
    assert 5 <= one["dropped"] <= 20, "about 11 pictures came and were replaced meanwhile"
    assert one["unreported"] == 0
    assert one["latency_ms"]["max"] >= 200


@pytest.mark.parametrize(
    "arguments",
    [
        ("--mode", "reference"),
        ("--mode", "engine,"),
        ("--fps", "-1"),
        ("--fps", "fast"),
        ("--fps", "nan"),
        ("--objects", "0"),
        ("--objects", "1,,2"),
        ("--streams", "x"),
        ("--frames", "0"),
        ("--warmup", "-1"),
        ("--resolution", "1280"),
        ("--resolution", "1281x720"),
        ("--resolution", "0x0"),
        ("--runtime", "magic"),
        ("--unknown",),
    ],
)
def test_wrong_arguments_end_with_one_line(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        run(*arguments)
    assert leaving.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("bench-fps: ")
    assert "invalid _" not in told.err


def test_unknown_model_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(options: EngineOptions) -> FakeScheduler:
        raise UnknownModelError(f"model {options.model!r} is unknown")

    assert run(*SMALL, "--model", "sam9", start_scheduler=refuse) == 2
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == "bench-fps: model 'sam9' is unknown"
    assert told.out == ""


@pytest.mark.parametrize("mode", ["engine", "service"])
def test_refused_prompt_ends_with_one_line(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Forgetful(FakeScheduler):
        def open_stream(self, *, model: str, memory: str | None, is_live: bool, max_objects: int) -> Any:
            return super().open_stream(model=model, memory=memory, is_live=is_live, max_objects=0)

    @contextmanager
    def serve(request: ServerRequest) -> Iterator[RunningServer]:
        scheduler = Forgetful()
        running: Any = type("Running", (), {"pid": os.getpid()})
        try:
            with LocalServer(scheduler, resize_linear) as server:
                running.address = server.address
                yield running
        finally:
            scheduler.close()

    arguments = (*SMALL, "--mode", mode)
    assert run(*arguments, start_scheduler=lambda _: Forgetful(), start_server=serve) == 2
    assert "as many as allowed" in capsys.readouterr().err.splitlines()[-1]
