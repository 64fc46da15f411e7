"""`bench-fps`: what it computes, and the command with trackers that need no model."""

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from trocar.cli import EngineOptions, StartScheduler
from trocar.decode import Codec, Packet, PacketDecoder, VideoFormat
from trocar.local import LocalServer
from trocar_bench.ceilings import Ceilings, StageCost
from trocar_bench.footage import Footage, spread_clicks
from trocar_bench.fps import Parts, main
from trocar_bench.fps_report import (
    DROPS_TOLD,
    RunReport,
    describe_added,
    describe_run,
    find_remarks,
    find_run_shares,
    find_slopes,
    find_stage_shares,
    find_versions,
)
from trocar_bench.frame_log import (
    Figures,
    FrameLog,
    NothingTrackedError,
    percentiles,
    slope_per_object,
    sum_up,
)
from trocar_bench.pacing import NS_PER_S, BackPressure, OpenLoop, Pacing
from trocar_bench.process_meter import CpuReading, CpuUse, ProcessMeter, add_up, compare
from trocar_bench.reference_lane import BuildReference
from trocar_bench.serve_process import RunningServer, ServerRequest, ServerStart, StartServer, write_arguments
from trocar_bench.speed_run import AlternatingRun, RunPlan, SpeedRun, Usage, Watch
from trocar_engines.errors import CheckpointError
from trocar_engines.gpu_meter import GpuMeter
from trocar_engines.masklets import FrameMasklets, Picture, UInt8Array
from trocar_engines.network.sam2s import IMAGE_MEAN, IMAGE_STD
from trocar_engines.network.weights import load_state
from wire.fakes import COLOR_DISTANCE, INPUT_SIZE_PX, FakeScheduler, resize_linear

NS_PER_MS = 1_000_000
TINY = "sam2.1-hiera-tiny-512"
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


class StallingLane:
    """A stream whose sender is held up for a second at frame 10; all else is answered in 2 ms."""

    def __init__(self, plan: RunPlan, clock: FakeClock) -> None:
        self.log = plan.make_log()
        self.pacing: Pacing = OpenLoop(plan.paced_fps, clock=clock, sleep=clock.sleep)
        self._clock = clock

    def begin(self) -> None:
        note(self.log, 0, self._clock())

    def send(self, frame_id: int) -> None:
        self._clock.work(1_000 if frame_id == 10 else 2)
        note(self.log, frame_id, self._clock())

    def finish(self) -> None: ...

    def close(self) -> None: ...


def watch_nothing() -> Watch:
    return Watch(ProcessMeter(None), GpuMeter(load=no_nvml), lambda _: None)


def no_nvml() -> Any:
    raise ImportError


def test_held_up_sender_owes_every_frame_of_the_stall_its_latency() -> None:
    clock = FakeClock()
    plan = RunPlan(mode="engine", objects=1, streams=1, paced_fps=50, frames=100, warmup=0)
    run = SpeedRun(plan, lambda _: StallingLane(plan, clock), watch_nothing(), clock=clock)
    figures, _ = run.run()
    # Due every 20 ms and caught up at 2 ms each: the stall of 1 s is felt by 56 frames. A source that omits
    # what it could not send in time would report one slow frame in a hundred, and a p95 of 2 ms.
    late = figures.timeline.latency_ms > 3
    assert np.count_nonzero(late) == 56
    assert figures.latency_ms.p95 > 800
    assert figures.dropped == 0
    assert figures.timeline.at_s == pytest.approx(np.arange(100) / 50), "as scheduled, whatever came of it"


class RecordingLane:
    """A tracker of the alternating run; tells everybody what it does."""

    def __init__(self, name: str, plan: RunPlan, told: list[str]) -> None:
        self.log = plan.make_log()
        self.pacing: Pacing = BackPressure(1)
        self._name, self._told = name, told

    def begin(self) -> None:
        note(self.log, 0, time.perf_counter_ns())

    def send(self, frame_id: int) -> None:
        self._told.append(f"{self._name}{frame_id}")
        note(self.log, frame_id, time.perf_counter_ns())
        self.pacing.settle()

    def drain(self) -> None:
        self._told.append(f"{self._name}.")

    def finish(self) -> None: ...

    def close(self) -> None:
        self._told.append(f"{self._name}!")


def test_trackers_take_turns_and_finish_before_the_next_one_begins() -> None:
    told: list[str] = []
    plan = RunPlan(mode="reference", objects=1, streams=1, paced_fps=0, frames=10, warmup=1)
    lanes = [RecordingLane(name, plan, told) for name in "ab"]
    results = AlternatingRun(plan, lanes, ProcessMeter(None), GpuMeter(load=no_nvml), lambda: None).run()
    assert " ".join(told) == (
        "a1 a. b1 b. a2 a3 a. b2 b3 b. a4 a5 a. b4 b5 b. a6 a7 a. b6 b7 b. a8 a9 a. b8 b9 b. "
        "a10 a11 a. b10 b11 b. b! a!"
    )
    for figures, usage in results:
        assert len(figures.window_fps) == 5
        assert figures.timeline.latency_ms.size == 10, "without the warm-up"
        assert usage.gpu is None


# --- figures --------------------------------------------------------------------------------------------


def test_percentiles_of_known_values() -> None:
    latency = percentiles(np.arange(1_001, dtype=np.float64))
    assert (latency.p50, latency.p95, latency.p99, latency.p99_9, latency.max) == pytest.approx(
        (500, 950, 990, 999, 1_000)
    )


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
    assert "unsteady" in find_remarks([report(figures)], CEILINGS)[0]


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
    assert figures.dropped_ids == ((4, 5, 7),), "2 belongs to the warm-up"
    assert figures.dropped == 3
    assert figures.unreported == 1
    assert log.settled == 8
    remarks = find_remarks([report(figures)], CEILINGS)
    assert any("1 frames vanished" in remark for remark in remarks)
    assert any("dropped 4, 5, 7 (stream 0)" in remark for remark in remarks)


def test_endless_drops_are_not_listed_without_end() -> None:
    figures = sum_up([log_of([10, 20])], 0)
    flooded = dataclasses.replace(figures, dropped_ids=(tuple(range(600)), tuple(range(600))))
    run = describe_run(report(flooded), CEILINGS)
    assert run["dropped"] == 1_200
    told: Any = run["dropped_ids"]
    assert [len(frame_ids) for frame_ids in told] == [600, DROPS_TOLD - 600]


def test_run_without_a_result_is_refused() -> None:
    log = FrameLog(warmup=0, frames=2)
    log.note_dropped([1, 2])
    with pytest.raises(NothingTrackedError, match="no frame that counts was tracked"):
        sum_up([log], 0)


def test_what_the_service_adds_is_told_frame_by_frame() -> None:
    log = FrameLog(warmup=0, frames=3)
    stages = {"decode": 2, "preprocess": 1, "queue": 3, "encode_masklets": 1, "write_memory": 9}
    for frame_id, slow in ((1, 0), (2, 5), (3, 0)):
        log.note_sent(frame_id, frame_id * NS_PER_MS, frame_id * NS_PER_MS)
        # A frame that waited for the device is not the service's fault; one that was held up between is.
        stage_ns = {stage: ms * NS_PER_MS for stage, ms in stages.items()} | {
            "readback": frame_id * NS_PER_MS
        }
        service_ns = (9 + frame_id + slow) * NS_PER_MS
        received_ns = log.sent_ns[frame_id] + service_ns + NS_PER_MS
        note(log, frame_id, received_ns, stage_ns=stage_ns, service_ns=service_ns)
    figures = sum_up([log], 0)
    assert figures.service_latency_ms is not None
    assert figures.service_latency_ms.max == 16
    assert figures.added_ms is not None
    between, server, client = figures.added_ms.between, figures.added_ms.server, figures.added_ms.client
    assert (between.p50, between.max) == (2, 7), "writing memory follows the reply"
    assert (server.p50, server.max) == (4, 9), "with preprocess and encode_masklets"
    assert (client.p50, client.max) == (5, 10)
    assert set(figures.stages_ms) == {*stages, "readback"}
    assert "server p50 4.0, p99 8.9 ms (target 3 at 60/s)" in describe_added(figures.added_ms)
    told: Any = describe_run(report(figures), CEILINGS)["added_ms"]
    assert told["client"]["max"] == 10


def test_engine_has_no_service_latency() -> None:
    figures = sum_up([log_of([10, 20])], 0)
    assert figures.service_latency_ms is None
    assert figures.added_ms is None


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
    reports = [report(calm), report(dataclasses.replace(crowded, dropped_ids=((3,),)), objects=2)]
    assert find_slopes(reports) == []


CEILINGS = Ceilings(device="cpu", threads=1, fp32_gflops=50, fp16_gflops=None, bf16_gflops=100, copy_gb_s=10)


def report(figures: Figures, *, objects: int = 1, streams: int = 1) -> RunReport:
    plan = RunPlan(mode="service", objects=objects, streams=streams, paced_fps=0, frames=8, warmup=0)
    cpu = CpuUse(seconds=2, client_percent=10, server_percent=80, others_percent=3)
    usage = Usage(cpu=cpu, rss_mb=500, rss_growth_mb=None, gpu=None)
    costs = {"encode_image": StageCost(gflop=0.02, mb=3), "attend_memory": StageCost(gflop=0.08, mb=1)}
    return RunReport(plan=plan, model="nano", runtime="onnx", figures=figures, usage=usage, costs=costs)


def test_share_of_the_ceilings_follows_from_rate_and_cost() -> None:
    one = report(sum_up([log_of([10, 20, 30, 40])], 0))
    shares = find_run_shares(one, CEILINGS)
    assert shares is not None, "0.1 GFLOP and 4 MB at 100 frames/s"
    assert (shares.arithmetic, shares.bandwidth) == pytest.approx((0.2, 0.04))
    stages = find_stage_shares(one, CEILINGS)
    assert list(stages) == ["encode_image"], "the other one was not timed"
    assert stages["encode_image"].arithmetic == pytest.approx(0.4), "0.02 GFLOP in 1 ms"
    assert stages["encode_image"].bandwidth == pytest.approx(0.3)
    halved = dataclasses.replace(one, runtime="openvino")
    shares = find_run_shares(halved, CEILINGS)
    assert shares is not None, "0.02 GFLOP of it in bfloat16, twice as quick at most"
    assert shares.arithmetic == pytest.approx(0.18)
    assert find_stage_shares(halved, CEILINGS)["encode_image"].arithmetic == pytest.approx(0.2)


def test_share_beyond_a_ceiling_is_doubted() -> None:
    one = report(sum_up([log_of([10, 20, 30, 40])], 0))
    assert not find_remarks([one], CEILINGS)
    held_down = dataclasses.replace(CEILINGS, fp32_gflops=15)
    assert "beyond a ceiling" in find_remarks([one], held_down)[0]


def test_stages_of_several_streams_share_a_batch_and_tell_no_share() -> None:
    assert find_stage_shares(report(sum_up([log_of([10, 20])], 0), streams=2), CEILINGS) == {}


def test_cpu_time_is_told_per_frame() -> None:
    run = describe_run(report(sum_up([log_of([10, 20, 30, 40])], 0)), CEILINGS)
    assert run["cpu_ms_per_frame"] == {"client": 1, "server": 8}
    assert run["fps"] == 100


# --- processes ------------------------------------------------------------------------------------------


def test_cpu_use_is_the_difference_of_two_readings() -> None:
    before = CpuReading(at_s=10, client_s=1, server_s=5, busy_s=20)
    use = compare(before, CpuReading(at_s=12, client_s=1.5, server_s=6, busy_s=22))
    assert (use.client_percent, use.server_percent, use.others_percent) == (25, 50, 25)


def test_stretches_add_up_by_their_length() -> None:
    short = CpuUse(seconds=1, client_percent=100, server_percent=None, others_percent=0)
    long = CpuUse(seconds=3, client_percent=20, server_percent=None, others_percent=40)
    both = add_up([short, long])
    assert (both.seconds, both.client_percent, both.server_percent, both.others_percent) == (4, 40, None, 30)


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
    assert "--address 127.0.0.1:0 --runtime eager --max-streams 3 --max-objects 40 " in text
    assert "--max-objects 40 --max-objects-total 104 --model m" in text
    assert text.endswith(f"--weights {tmp_path}")
    assert "--memory" not in text
    assert "--no-compile" in text
    compiled = ServerRequest(
        engine=dataclasses.replace(engine, is_compiled=True), max_objects=1, on_line=print
    )
    assert "--compile" in write_arguments(compiled)
    several = dataclasses.replace(engine, threads=3)
    assert write_arguments(ServerRequest(engine=several, max_objects=1, on_line=print))[-2:] == [
        "--threads",
        "3",
    ]


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
        start = ServerStart(seconds=1.25, has_exported=False)
        address = ""

    scheduler = FakeScheduler(max_streams=request.engine.max_streams)
    try:
        with LocalServer(scheduler, resize_linear) as server:
            Running.address = server.address
            yield Running()
    finally:
        scheduler.close()


class FakePredictor:
    """sam2's predictor, as far as the benchmark knows it, and the fake tracker's idea of an object."""

    OFFSET = 0.25
    device = torch.device("cpu")
    image_size = INPUT_SIZE_PX

    def init_state(self, folder: str) -> dict[str, Any]:
        assert [path.suffix for path in Path(folder).iterdir()] == [".jpg"]
        return {"colors": {}}

    def add_new_points_or_box(
        self, state: dict[str, Any], *, frame_idx: int, obj_id: int, points: Any, labels: Any
    ) -> None:
        assert list(labels) == [1]
        x, y = (points[0] * INPUT_SIZE_PX / state["video_width"]).astype(int)
        state["colors"][obj_id] = self.forward_image(state["images"][frame_idx])[:, y, x]

    def propagate_in_video(
        self, state: dict[str, Any], *, start_frame_idx: int
    ) -> Iterator[tuple[int, list[int], torch.Tensor]]:
        for frame_id in range(start_frame_idx, state["num_frames"]):
            rgb = self.forward_image(state["images"][frame_id])
            masks = [
                torch.where((rgb - color[:, None, None]).abs().sum(0) < COLOR_DISTANCE, 8.0, -8.0)
                for color in state["colors"].values()
            ]
            yield frame_id, list(state["colors"]), torch.stack(masks).unsqueeze(1) + self.OFFSET

    def forward_image(self, picture: torch.Tensor) -> torch.Tensor:
        """Back to grey levels."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        return (picture * std + mean).round()

    def _prepare_memory_conditioned_features(self) -> None: ...

    def _forward_sam_heads(self) -> None: ...

    def _encode_new_memory(self) -> None: ...


def build_fake_reference(model: str, weights: Path, *, build: str, device: str) -> FakePredictor:
    assert (model, build, device) == (TINY, "sam2", "cpu")
    return FakePredictor()


def render_fake(width_px: int, height_px: int, *, on_frame: Callable[[], None]) -> Footage:
    assert (width_px, height_px) == (96, 64)
    on_frame()
    return make_footage()


def run(
    *arguments: str,
    start_scheduler: StartScheduler = start_fake,
    start_server: StartServer = serve_fake,
    build_reference: BuildReference = build_fake_reference,
) -> int:
    parts = Parts(
        start_scheduler=start_scheduler,
        start_server=start_server,
        render=render_fake,
        build_reference=build_reference,
        measure_ceilings=lambda device, threads: CEILINGS,
    )
    return main(arguments, parts)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(package: str) -> str:
        if package == "openvino":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr("trocar_bench.fps_report.version", find)
    assert (find_versions()["openvino"], find_versions()["torch"]) == (None, "1.0")


def test_engines_are_made_for_as_many_objects_as_are_measured() -> None:
    asked: list[EngineOptions] = []

    def start(options: EngineOptions) -> FakeScheduler:
        asked.append(options)
        return start_fake(options)

    assert run(*SMALL, "--mode", "engine", "--objects", "1,3", "--streams", "2", start_scheduler=start) == 0
    assert [(options.max_streams, options.max_objects) for options in asked] == [(2, 6)]


def test_unpaced_engine_and_service_with_objects(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL, "--objects", "1,2") == 0
    told = last_line(capsys)
    assert told["resolution"] == "96x64"
    packages = {"torch", "openvino", "onnxruntime", "sam2", "grpcio", "av", "trocar"}
    assert set(told["versions"]) == {"python", *packages}
    assert told["ceilings"]["fp32_gflops"] == 50
    assert told["weights"].endswith("sam2s-nano.safetensors")
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
        assert list(one["latency_ms"]) == ["p50", "p95", "p99", "p99_9", "max"]
        assert 0 < one["latency_ms"]["p50"] <= one["latency_ms"]["max"]
        assert one["dropped_ids"] == [[]]
    engine, service = told["runs"][0], told["runs"][2]
    assert engine["service_latency_ms"] is None
    assert "decode" not in engine["stages_ms"]
    assert 0 < service["service_latency_ms"]["p50"] <= service["latency_ms"]["p50"]
    assert 0 < service["stages_ms"]["decode"]["p50"] <= service["stages_ms"]["decode"]["max"]
    assert engine["added_ms"] is None
    assert service["added_ms"]["server"]["p50"] <= service["service_latency_ms"]["p50"]
    assert told["server_start"] == {"seconds": 1.25, "has_exported": False}
    assert "ratio" not in engine
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
    (dropped_ids,) = one["dropped_ids"]
    assert len(dropped_ids) == one["dropped"]
    assert set(dropped_ids) & set(range(11, 22)), "those that came during the stall"
    assert one["latency_ms"]["max"] >= 200


@pytest.mark.parametrize(
    "arguments",
    [
        ("--mode", "peer"),
        ("--mode", "engine,"),
        ("--fps", "-1"),
        ("--fps", "fast"),
        ("--fps", "nan"),
        ("--objects", "0"),
        ("--objects", "1,,2"),
        ("--streams", "x"),
        ("--streams", "0"),
        ("--p99-limit", "0"),
        ("--drop-limit", "101"),
        ("--frames", "0"),
        ("--warmup", "-1"),
        ("--resolution", "1280"),
        ("--resolution", "1281x720"),
        ("--resolution", "0x0"),
        ("--resolution", "99999x99998"),
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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--model", "sam9"), "model 'sam9': expected one of sam2s-nano"),
        (("--objects", "65"), "--objects 65 on --streams 1: the tracker holds 64 objects"),
        (("--objects", "9", "--streams", "2,8"), "--objects 9 on --streams 8: the tracker holds 64 objects"),
        (("--find-capacity", "--streams", "2"), "leave out --streams"),
        (("--find-capacity", "--fps", "0"), "needs cameras with a pace"),
        (("--p99-limit", "20"), "pass it too"),
        (("--mode", "reference"), "model sam2s-nano: sam2's predictor knows only SAM 2.1's networks"),
        (("--mode", "reference", "--model", TINY, "--streams", "2"), "takes one video"),
        (("--mode", "reference", "--model", TINY, "--fps", "30"), "takes one video"),
        (("--mode", "reference", "--model", TINY, "--find-capacity"), "takes one video"),
        (("--plot", "nowhere/fps.png"), "there is no folder nowhere"),
        (("--plot", "fps.gif"), "expected a file that ends in .png"),
    ],
)
def test_what_cannot_be_measured_ends_with_one_line_before_anything_starts(
    arguments: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: EngineOptions) -> FakeScheduler:
        raise AssertionError("nothing should have started")

    assert run(*SMALL, *arguments, start_scheduler=refuse) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("bench-fps: ")
    assert reason in line


def test_failing_tracker_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: EngineOptions) -> FakeScheduler:
        raise CheckpointError("broken")

    assert run(*SMALL, start_scheduler=refuse) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "bench-fps: broken"


def test_absent_matplotlib_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*SMALL, "--plot", "fps.png") == 2
    assert "pip install 'matplotlib>=3.10,<4'" in capsys.readouterr().err


def test_plot_shows_every_kind_of_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fps.png"
    assert run(*SMALL, "--streams", "1,2", "--plot", str(path)) == 0
    picture = cv2.imread(str(path))
    assert picture is not None
    height_px, width_px, _ = picture.shape
    # Three panels with something drawn in each: a blank one has no colour but grey.
    for panel in np.split(picture[: height_px // 3 * 3], 3):
        assert np.count_nonzero(np.ptp(panel.astype(int), axis=2) > 60) > 20
    assert width_px > 1_000


class Dropping(FakeScheduler):
    """Drops the pictures that are picked by frame_id and number of open streams."""

    def __init__(self, is_dropped: Callable[[int, int], bool], max_streams: int) -> None:
        super().__init__(max_streams=max_streams)
        self._is_dropped = is_dropped

    def open_stream(self, **options: Any) -> Any:
        stream = super().open_stream(**options)
        offer = stream.offer

        def offer_or_drop(picture: Picture) -> Future[FrameMasklets]:
            if not self._is_dropped(picture.frame_id, len(self.streams)):
                return offer(picture)
            dropped: Future[FrameMasklets] = Future()
            dropped.set_result(FrameMasklets(frame_id=picture.frame_id, is_dropped=True))
            return dropped

        stream.offer = offer_or_drop  # type: ignore[method-assign]
        return stream


def test_capacity_is_the_last_number_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    def start(options: EngineOptions) -> FakeScheduler:
        return Dropping(lambda frame_id, streams: streams > 2 and frame_id % 2 == 1, options.max_streams)

    limits = ("--p99-limit", "60000", "--drop-limit", "25")
    arguments = (*SMALL, "--mode", "engine", "--find-capacity", "--fps", "30", *limits)
    assert run(*arguments, start_scheduler=start) == 0
    told = last_line(capsys)
    (capacity,) = told["capacity"]
    assert capacity["streams"] == 2
    assert capacity["limited_by"] == "drops"
    assert [probe["streams"] for probe in capacity["probes"]] == [1, 2, 4, 3]
    assert [one["streams"] for one in told["runs"]] == [1, 2, 4, 3]


def test_overload_beyond_measure_is_no_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def start(options: EngineOptions) -> FakeScheduler:
        return Dropping(lambda frame_id, _: frame_id > 0, options.max_streams)

    arguments = (*SMALL, "--mode", "engine", "--find-capacity", "--plot", str(tmp_path / "fps.png"))
    assert run(*arguments, start_scheduler=start) == 2
    told = capsys.readouterr()
    assert "no run tracked anything" in told.err.splitlines()[-1]
    described = json.loads(told.out.splitlines()[-1])
    (capacity,) = described["capacity"]
    assert (capacity["streams"], capacity["limited_by"]) == (0, "latency and drops")
    assert described["runs"] == []


def test_reference_runs_in_turn_and_tells_ratio_and_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--mode", "reference", "--model", TINY, "--weights", str(tmp_path), "--objects", "1,2")
    assert run(*SMALL, *arguments) == 0
    told = last_line(capsys)
    assert [(one["mode"], one["runtime"], one["objects"]) for one in told["runs"]] == [
        ("engine", "fake", 1),
        ("reference", "sam2", 1),
        ("engine", "fake", 2),
        ("reference", "sam2", 2),
    ]
    for engine, reference in zip(told["runs"][::2], told["runs"][1::2], strict=True):
        assert engine["ratio"] == reference["ratio"]
        # Of rounded figures.
        assert engine["ratio"] == pytest.approx(engine["fps"] / reference["fps"], rel=0.01)
        assert len(engine["window_ratios"]) == 5
        assert reference["logit_difference"]["max"] == pytest.approx(FakePredictor.OFFSET, abs=1e-4)
        assert len(reference["logit_difference"]["per_frame"]) == 16
        assert reference["logit_difference"]["presence_disagreements"] == 0
        assert reference["visible_share"] == engine["visible_share"] > 0
        assert list(reference["stages_ms"]) == ["encode_image"]


def test_only_the_builds_that_were_asked_for_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built: list[str] = []

    def build_reference(model: str, weights: Path, *, build: str, device: str) -> FakePredictor:
        built.append(build)
        return FakePredictor()

    arguments = ("--mode", "reference", "--model", TINY, "--weights", str(tmp_path))
    asked = ("--reference-builds", "vos_optimized")
    assert run(*SMALL, *arguments, *asked, build_reference=build_reference) == 0
    assert [one["runtime"] for one in last_line(capsys)["runs"]] == ["fake", "vos_optimized"]
    assert built == ["vos_optimized"]
    with pytest.raises(SystemExit):
        run(*SMALL, *arguments, "--reference-builds", "sam3")
    assert "'sam3': expected sam2 or vos_optimized" in capsys.readouterr().err


def test_model_without_weights_is_measured_with_random_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    seen: list[dict[str, torch.Tensor]] = []

    def start(options: EngineOptions) -> FakeScheduler:
        assert options.weights is not None
        seen.append(load_state(options.weights))
        return FakeScheduler()

    for _ in range(2):
        assert run(*SMALL, "--mode", "engine", "--model", TINY, start_scheduler=start) == 0
        assert last_line(capsys)["weights"] == "random"
    first, second = seen
    assert all(torch.isfinite(value).all() for value in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first), "the same every time"


@pytest.mark.parametrize("mode", ["engine", "service"])
def test_refused_prompt_ends_with_one_line(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Forgetful(FakeScheduler):
        def open_stream(self, *, model: str, memory: str | None, is_live: bool, max_objects: int) -> Any:
            return super().open_stream(model=model, memory=memory, is_live=is_live, max_objects=0)

    @contextmanager
    def serve(request: ServerRequest) -> Iterator[RunningServer]:
        scheduler = Forgetful()
        running: Any = type("Running", (), {"pid": os.getpid(), "start": None})
        try:
            with LocalServer(scheduler, resize_linear) as server:
                running.address = server.address
                yield running
        finally:
            scheduler.close()

    arguments = (*SMALL, "--mode", mode)
    assert run(*arguments, start_scheduler=lambda _: Forgetful(), start_server=serve) == 2
    assert "as many as allowed" in capsys.readouterr().err.splitlines()[-1]
