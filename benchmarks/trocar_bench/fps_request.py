"""What the flags of `bench-fps` ask for, checked before anything starts."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trocar.cli import CommandParser, EngineOptions, add_engine_options, read_engine_options
from trocar.errors import ConfigError
from trocar_bench.capacity import Limits
from trocar_bench.plotting import check_plot
from trocar_bench.reference_lane import BUILDS, check_reference_model
from trocar_bench.speed_run import RunPlan
from trocar_engines.errors import CapacityError
from trocar_engines.models import DEFAULT_MODEL, model_entry
from trocar_engines.scheduler import SchedulerConfig

ENGINE, SERVICE, REFERENCE = MODES = ("engine", "service", "reference")
LEAST_SIDE_PX, MOST_SIDE_PX = 64, 7_680
MOST_FRAMES = 10_000_000
FRAMES, WARMUP = 600, 60
REFERENCE_FRAMES, REFERENCE_WARMUP = 30, 16
"""The reference takes a second a frame on a CPU; after 16 its memory is full and each costs the same."""
CAPACITY_FPS = 60.0
P99_LIMIT_MS = 33.0
MOST_OBJECTS = SchedulerConfig.max_objects
"""Of all streams together: the tracker's memory rows."""
Number = TypeVar("Number", int, float)
EPILOG = f"""\
examples:
  bench-fps                                       engine and service, one object, as fast as it goes
  bench-fps --mode service --fps 60               a camera at 60 frames/s: latency and drops
  bench-fps --mode engine --objects 1,2,4,8       what a further object costs
  bench-fps --mode reference --model sam2.1-hiera-tiny-512 --objects 1,4
                                                  against sam2's own predictor
  bench-fps --mode service --find-capacity --plot fps.png
                                                  how many cameras this device carries
  bench-fps --mode service --frames 20000         whether memory stays flat

For the mode reference the defaults are --frames {REFERENCE_FRAMES} --warmup {REFERENCE_WARMUP}.
The last line on stdout is JSON: commit, versions, hardware, ceilings, resolution, weights, runs (mode, model,
runtime, objects, streams, paced_fps, frames, fps, fps_spread, dropped, dropped_ids, latency_ms,
service_latency_ms, stages_ms, cpu_percent, gpu, ceiling_share, ratio where a reference ran, ...),
ms_per_object (the slope over the numbers of objects) and capacity.
"""


# --- flags ----------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = CommandParser(
        prog="bench-fps",
        description="Measure frames per second, latency and where the time goes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--mode",
        action="append",
        type=_modes,
        metavar="MODE,...",
        help="engine, service, reference (default engine,service)",
    )
    add("--fps", type=_rate, metavar="N", help="pace of each stream; 0, the default: unpaced")
    add("--objects", type=_counts, default=(1,), metavar="N,...", help="per stream, a run each (default 1)")
    add("--streams", type=_counts, metavar="N,...", help="at once, a run each (default 1)")
    add("--frames", type=_count, metavar="N", help=f"of each stream (default {FRAMES})")
    add("--warmup", type=_whole, metavar="N", help=f"frames before these (default {WARMUP})")
    add("--resolution", type=_size, default=(1280, 720), metavar="WxH", help="default 1280x720")
    add(
        "--find-capacity",
        action="store_true",
        help=f"search the largest number of streams within the limits (at {CAPACITY_FPS:g}/s unless --fps)",
    )
    add(
        "--p99-limit",
        type=_milliseconds,
        metavar="MS",
        help=f"limit of --find-capacity on latency (default {P99_LIMIT_MS:g})",
    )
    add(
        "--drop-limit",
        type=_percent,
        metavar="PERCENT",
        help="limit of --find-capacity on dropped frames (default 0)",
    )
    add(
        "--reference-builds",
        type=_builds,
        metavar="BUILD,...",
        help=f"of --mode reference: {', '.join(BUILDS)} (default both on a GPU, else the first)",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the runs into a .png, .pdf or .svg")
    add_engine_options(parser)
    return parser


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    for mode in modes:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{mode!r}: expected {', '.join(MODES[:-1])} or {MODES[-1]}")
    return modes


def _builds(text: str) -> tuple[str, ...]:
    builds = tuple(dict.fromkeys(text.split(",")))
    for build in builds:
        if build not in BUILDS:
            raise argparse.ArgumentTypeError(f"{build!r}: expected {' or '.join(BUILDS)}")
    return builds


def _rate(text: str) -> float:
    return _number(float, text, 0, 1_000, "frames a second, 0 for unpaced")


def _milliseconds(text: str) -> float:
    return _number(float, text, 0.1, 60_000, "milliseconds")


def _percent(text: str) -> float:
    return _number(float, text, 0, 100, "percent")


def _whole(text: str) -> int:
    return _number(int, text, 0, MOST_FRAMES, "frames")


def _count(text: str) -> int:
    return _number(int, text, 1, MOST_FRAMES, "a whole number")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_count(part) for part in text.split(",")))


def _number(kind: Callable[[str], Number], text: str, lowest: float, highest: float, what: str) -> Number:
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


# --- what they ask for together -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What the flags ask for, checked.

    Args:
        modes: distinct.
        objects: per stream, a run each.
        streams: at once, a run each; empty where the capacity is sought.
        paced_fps: of each stream, 0 for unpaced.
        frames: that count; None for the default of the mode.
        warmup: before these; likewise.
        resolution: of the source, width and height in pixels.
        limits: of the search for the capacity; None without one.
        builds: of the reference; empty for those that fit the device.
        plot: file to draw into.
        engine: the model side; its weights None for the installed ones.
    """

    modes: tuple[str, ...]
    objects: tuple[int, ...]
    streams: tuple[int, ...]
    paced_fps: float
    frames: int | None
    warmup: int | None
    resolution: tuple[int, int]
    limits: Limits | None
    builds: tuple[str, ...]
    plot: Path | None
    engine: EngineOptions

    def __post_init__(self) -> None:
        most_streams = max(self.streams, default=1)
        if max(self.objects) * most_streams > MOST_OBJECTS:
            raise CapacityError(
                f"--objects {max(self.objects)} on --streams {most_streams}: the tracker holds "
                f"{MOST_OBJECTS} objects of all streams together; ask for fewer"
            )
        if REFERENCE in self.modes and (self.streams != (1,) or self.paced_fps):
            raise ConfigError(
                "--mode reference: sam2's predictor takes one video, as fast as it goes: leave out "
                "--streams, --fps and --find-capacity, or run them by themselves"
            )

    def make_plan(self, mode: str, objects: int, streams: int) -> RunPlan:
        """One run."""
        frames, warmup = (REFERENCE_FRAMES, REFERENCE_WARMUP) if mode == REFERENCE else (FRAMES, WARMUP)
        return RunPlan(
            mode=mode,
            objects=objects,
            streams=streams,
            paced_fps=self.paced_fps,
            frames=self.frames or frames,
            warmup=warmup if self.warmup is None else self.warmup,
        )


def read_request(options: argparse.Namespace) -> BenchRequest:
    """Check what the flags say together.

    Raises:
        ConfigError: flags that contradict each other.
        CapacityError: more objects than a tracker holds.
        UnknownModelError: no such model, or the reference does not have it.
        TrocarError: nothing can be drawn.
    """
    modes = tuple(dict.fromkeys(mode for group in options.mode or [(ENGINE, SERVICE)] for mode in group))
    limits = _read_limits(options)
    model = options.model or DEFAULT_MODEL
    if REFERENCE in modes:
        check_reference_model(model)
    model_entry(model)
    if options.plot is not None:
        check_plot(options.plot)
    fps = (CAPACITY_FPS if limits else 0.0) if options.fps is None else options.fps
    return BenchRequest(
        modes=modes,
        objects=options.objects,
        streams=() if limits else options.streams or (1,),
        paced_fps=fps,
        frames=options.frames,
        warmup=options.warmup,
        resolution=options.resolution,
        limits=limits,
        builds=options.reference_builds or (),
        plot=options.plot,
        engine=read_engine_options(options),
    )


def _read_limits(options: argparse.Namespace) -> Limits | None:
    if not options.find_capacity:
        if options.p99_limit is not None or options.drop_limit is not None:
            raise ConfigError("--p99-limit and --drop-limit are those of --find-capacity: pass it too")
        return None
    if options.streams is not None:
        raise ConfigError("--find-capacity looks for the number of streams itself: leave out --streams")
    if options.fps == 0:
        raise ConfigError("--find-capacity needs cameras with a pace: pass --fps above 0, or leave it out")
    return Limits(
        p99_ms=P99_LIMIT_MS if options.p99_limit is None else options.p99_limit,
        drop_share=(options.drop_limit or 0.0) / 100,
    )
