"""`bench-fps`: how many frames a second, how late, and where the time goes.

Two modes, so that the cost of the service shows as their difference:

- `engine`: pictures at the model's input size go straight into the scheduler of this process. No video, no
  coding of masks, no network: the tracker's own speed.
- `service`: a `trocar serve` of its own, in a process of its own on a loopback port, gets H.264 through the
  Python client, as a video pipeline would send it, and answers with run-length masks at source resolution.

Two disciplines (see `pacing`):

- Unpaced: delivery EVERY with back-pressure. Answers "how fast": the pipeline is full all the time, so its
  latency only tells how long the pipeline is.
- Paced (`--fps N`): delivery LATEST, a camera on an absolute schedule. Answers "how late": a frame counts
  from when it was due, not from when a sender that was itself held up got round to it. A stall of a second at
  60 frames/s is 60 late or dropped frames, not one. Dropped frames have no latency: read both figures.

Two latencies, never one for the other: `latency` is the client's, from due (paced) or sent (unpaced) to the
result received and parsed, its masks still coded. `service` is the server's own, from its receipt of the
frame to the reply handed to the transport; it knows nothing of what waits in sockets and in the client. On
cores that are busy our own camera wakes up late, which no real one does; "source late" is that part.

What bounds the figures:

- One thread owns the device. Per frame it spends encode_image + attend_memory + decode_masks + readback
  before the reply and write_memory after it. "device" is the sum of their medians; a tick of that thread, and
  so one stream, cannot be faster than 1000 / device a second.
- "between stages" is service latency that no stage accounts for: hops between threads, and waiting for the
  interpreter or a core. It is what the service itself adds, and should be small.
- Client and server share the cores. "cpu" is CPU milliseconds a frame, which other work on the machine
  changes less than any wall-clock figure: n cores carry at most n * 1000 / cpu frames a second.
- "others" is CPU that neither of them used. A measurement worth quoting has next to none.

The footage is 1.6 s of a held-out synthetic operation, to and fro without a cut, since a cut would lose the
objects, and what is lost is cheap; "visible" is the share of masklets that had a mask. Objects are prompted
by one click each on frame 0, before the clock starts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import product
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trocar.cli import (
    EXIT_EXPECTED_FAILURE,
    EXIT_INTERRUPTED,
    StartScheduler,
    add_engine_options,
    read_engine_options,
    start_scheduler,
)
from trocar.client import connect
from trocar_bench.engine_lane import EngineLane
from trocar_bench.footage import FOOTAGE_FRAMES, Footage, Render, render_footage
from trocar_bench.fps_report import RunReport, describe_bench, find_slopes, name_run, print_tables
from trocar_bench.process_meter import ProcessMeter
from trocar_bench.serve_process import ServeProcess, ServerRequest, StartServer
from trocar_bench.service_lane import ServiceLane
from trocar_bench.speed_run import Lane, RunPlan, SpeedRun, Watch
from trocar_engines.errors import TrocarError
from trocar_engines.preprocess import resize_to_model

MODES = ("engine", "service")
LEAST_SIDE_PX, MOST_SIDE_PX = 64, 7_680
MOST_FRAMES = 10_000_000
Number = TypeVar("Number", int, float)
EPILOG = """\
examples:
  bench-fps                                       both modes, one object, one stream, as fast as it goes
  bench-fps --mode service --fps 60               a camera at 60 frames/s: latency and drops
  bench-fps --mode engine --objects 1,2,4,8       what a further object costs
  bench-fps --mode service --frames 20000         whether memory stays flat

The last line on stdout is JSON: commit, versions, hardware, resolution, runs (mode, model, runtime, objects,
streams, paced_fps, frames, fps, dropped, latency_ms, service_latency_ms, stages_ms, cpu_percent, rss_mb, ...)
and ms_per_object, the slope over the numbers of objects.
"""


# --- the command ----------------------------------------------------------------------------------------


def main(
    arguments: Sequence[str] | None = None,
    *,
    start_scheduler: StartScheduler = start_scheduler,
    start_server: StartServer = ServeProcess,
    render: Render = render_footage,
) -> int:
    """Measure.

    Args:
        arguments: None for those of the process.
        start_scheduler: makes the tracker of the mode `engine`.
        start_server: makes the server of the mode `service`.
        render: makes the footage.

    Returns:
        0, or 2 after an expected failure, which one line on stderr tells.
    """
    options = _make_parser().parse_args(arguments)
    try:
        Bench(options, start_scheduler, start_server, render).run()
    except TrocarError as error:
        print(f"bench-fps: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        print("bench-fps: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_EXPECTED_FAILURE)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bench-fps",
        description="Measure frames per second, latency and where the time goes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--mode", action="append", type=_modes, metavar="MODE,...", help="engine, service (default both)")
    add("--fps", type=_rate, default=0.0, metavar="N", help="pace of each stream; 0, the default: unpaced")
    add("--objects", type=_counts, default=(1,), metavar="N,...", help="per stream, a run each (default 1)")
    add("--streams", type=_counts, default=(1,), metavar="N,...", help="at once, a run each (default 1)")
    add("--frames", type=_count, default=600, metavar="N", help="of each stream (default %(default)s)")
    add("--warmup", type=_whole, default=60, metavar="N", help="frames before these (default %(default)s)")
    add("--resolution", type=_size, default=(1280, 720), metavar="WxH", help="default 1280x720")
    add_engine_options(parser)
    return parser


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    for mode in modes:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{mode!r}: expected {' or '.join(MODES)}")
    return modes


def _rate(text: str) -> float:
    return _number(float, text, 0, 1_000, "frames a second, 0 for unpaced")


def _whole(text: str) -> int:
    return _number(int, text, 0, MOST_FRAMES, "frames")


def _count(text: str) -> int:
    return _number(int, text, 1, MOST_FRAMES, "a whole number")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_count(part) for part in text.split(",")))


def _number(kind: Callable[[str], Number], text: str, lowest: int, highest: int, what: str) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = None
    # Not the other way round: nan is neither below nor above.
    if value is None or not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {what}, {lowest} to {highest}")
    return value


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    sides = [int(side) if side.isdecimal() else 0 for side in (width, height)]
    if any(side % 2 or not LEAST_SIDE_PX <= side <= MOST_SIDE_PX for side in sides):
        limits = f"even sides of {LEAST_SIDE_PX} to {MOST_SIDE_PX} pixels"
        raise argparse.ArgumentTypeError(f"{text!r}: expected WxH with {limits}, such as 1280x720")
    return sides[0], sides[1]


# --- the runs -------------------------------------------------------------------------------------------


class Bench:
    """All runs of one command.

    Args:
        options: parsed.
        start_scheduler: makes the tracker of the mode `engine`.
        start_server: makes the server of the mode `service`.
        render: makes the footage.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        start_scheduler: StartScheduler,
        start_server: StartServer,
        render: Render,
    ) -> None:
        self._options = options
        self._render_footage = render
        self._start_scheduler = start_scheduler
        self._start_server = start_server
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        is_shown = self._console.is_terminal
        self._progress = Progress(*columns, console=self._console, transient=True, disable=not is_shown)

    def run(self) -> None:
        """Measure, then print table and JSON.

        Raises:
            TrocarError: a model cannot be loaded, a server does not start, or a stream broke.
        """
        modes = dict.fromkeys(mode for group in self._options.mode or [MODES] for mode in group)
        with self._progress:
            reports = [report for mode in modes for report in self._run_mode(mode)]
        slopes = find_slopes(reports)
        print_tables(reports, slopes)
        print(json.dumps(describe_bench(reports, slopes, self._options.resolution)))

    @cached_property
    def _footage(self) -> Footage:
        """Rendered when a tracker is ready: nobody should wait for it to learn of a mistyped model."""
        width_px, height_px = self._options.resolution
        task = self._progress.add_task(f"rendering {width_px}x{height_px}", total=FOOTAGE_FRAMES)
        return self._render_footage(width_px, height_px, on_frame=lambda: self._progress.advance(task))

    def _run_mode(self, mode: str) -> Iterator[RunReport]:
        plans = [
            RunPlan(
                mode=mode,
                objects=objects,
                streams=streams,
                paced_fps=self._options.fps,
                frames=self._options.frames,
                warmup=self._options.warmup,
            )
            for streams, objects in product(self._options.streams, self._options.objects)
        ]
        yield from (self._run_engine if mode == "engine" else self._run_service)(plans)

    def _run_engine(self, plans: Sequence[RunPlan]) -> Iterator[RunReport]:
        engine = read_engine_options(self._options, max_streams=max(self._options.streams))
        with closing(self._start_scheduler(engine)) as scheduler:
            scheduler.warm_up()
            model, memory = scheduler.default_model, scheduler.default_memory
            card = scheduler.model_card(model)
            inputs = [resize_to_model(picture, card.input_size_px) for picture in self._footage.pictures]

            def open_lane(plan: RunPlan) -> Lane:
                stream = scheduler.open_stream(
                    model=model, memory=memory, is_live=plan.is_live, max_objects=plan.objects
                )
                return EngineLane(stream, plan, self._footage, inputs)

            for plan in plans:
                yield self._measure(plan, open_lane, card.name, card.runtime, ProcessMeter(None))

    def _run_service(self, plans: Sequence[RunPlan]) -> Iterator[RunReport]:
        request = ServerRequest(
            engine=read_engine_options(self._options, max_streams=max(self._options.streams)),
            max_objects=max(self._options.objects),
            on_line=self._show_line,
        )
        with self._start_server(request) as server, connect(server.address) as client:
            info = client.server_info()
            card = next(card for card in info.models if card.name == info.default_model)

            def open_lane(plan: RunPlan) -> Lane:
                return ServiceLane(client, plan, self._footage)

            for plan in plans:
                yield self._measure(plan, open_lane, card.name, card.runtime, ProcessMeter(server.pid))

    def _show_line(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _measure(
        self,
        plan: RunPlan,
        open_lane: Callable[[RunPlan], Lane],
        model: str,
        runtime: str,
        meter: ProcessMeter,
    ) -> RunReport:
        name = name_run(plan)
        task = self._progress.add_task(name, total=1 + plan.warmup + plan.frames)
        watch = Watch(meter, lambda settled: self._progress.update(task, completed=settled))
        figures, usage = SpeedRun(plan, open_lane, watch).run()
        self._progress.remove_task(task)
        self._console.print(f"{name}: {figures.fps:.1f} frames/s", highlight=False)
        return RunReport(plan=plan, model=model, runtime=runtime, figures=figures, usage=usage)


if __name__ == "__main__":
    sys.exit(main())
