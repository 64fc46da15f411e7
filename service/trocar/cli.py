"""The `trocar` command. Only this file reads flags and the environment.

Each subcommand is one entry of `COMMANDS`; what it needs is imported when it runs, so that `--help` is quick.
"""

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trocar.errors import ConfigError
from trocar_engines.errors import TrocarError

if TYPE_CHECKING:
    from trocar.client import Client
    from trocar.config import ServerConfig
    from trocar.sources import Source
    from trocar.track import TrackRun, TrackSummary
    from trocar.tracking import Scheduler
    from trocar_engines.masklets import Prompt
    from trocar_engines.models import ModelEntry


EXIT_EXPECTED_FAILURE = 2
EXIT_DEVICE_FAILURE = 3
EXIT_INTERRUPTED = 130

EPILOG = """\
start here:
  trocar track clip.mp4 --point 640,360 --out results
  trocar serve
  trocar <command> --help
"""
TRACK_EPILOG = """\
examples:
  one instrument, one tap on frame 0:
    trocar track clip.mp4 --point 640,360 --out results
  two objects, a box and two taps, the second off the object, drawn on frame 30:
    trocar track clip.mp4 --object 1 --box 100,80,300,260 \\
        --object 2 --point 640,360 --point 700,360,0 --at 30 --out results
  a folder in DAVIS layout, from its first mask:
    trocar track JPEGImages/gae --mask Annotations/gae/00000.png --out results
  a live camera, until Ctrl-C:
    trocar track rtsp://camera/stream --point 640,360 --out results
  on a server that runs already:
    trocar track clip.mp4 --point 640,360 --out results --server 127.0.0.1:50051

results:
  DIR/masks/NNNNN.png   one per frame, paletted, pixel value = object id, size of the source
  DIR/overlay.mp4       the video with masks drawn over it
  DIR/result.json       state, score, presence, box and class of each object on each frame
The last line on stdout is JSON: frames, dropped, fps, latency_p50_ms, latency_p99_ms (service latency), ...
"""
SERVE_EPILOG = """\
examples:
  trocar serve                                    on 127.0.0.1:50051, for this machine only
  trocar serve --address 0.0.0.0:50051 --insecure on a network that you trust
Health is grpc.health.v1: SERVING once the model is warm. SIGTERM lets open streams finish for some seconds.
"""


DEMO_EPILOG = """\
writes:
  DIR/demo.mp4            the rendered clip, 1280x720 at 30 frames/s, of a kind that training never saw
  DIR/truth/NNNNN.png     its true masks
  DIR/result/overlay.mp4  what the service made of it, beside masks/ and result.json
The last line on stdout is JSON: that of `trocar track`, and
  jf         J&F over the frames on which an object is visible, 0 to 100
  absent_ok  share of frames on which an absent object has an empty mask
  id_kept    whether each instrument was found under its own id whenever it was visible
"""
TRAIN_EPILOG = """\
examples:
  trocar train --steps 6000
  trocar train --real my_clips --start-from weights.safetensors --steps 2000 --out runs/mine
  trocar track clip.mp4 --point 640,360 --out results --weights runs/mine/weights.safetensors
The same command again resumes after the last checkpoint.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage that `--help` shows better."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_EXPECTED_FAILURE)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the flags say of the model side.

    Args:
        model: the default model; empty for the shipped one.
        memory: default policy; empty for the model side's own.
        runtime: "auto", "onnx" or "eager".
        weights: a file instead of the installed one, for that model.
        max_streams: at once.
    """

    model: str = ""
    memory: str = ""
    runtime: str = "auto"
    weights: Path | None = None
    max_streams: int = 8


StartScheduler = Callable[[EngineOptions], "Scheduler"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand.

    Args:
        name: on the command line.
        summary: one line for `trocar --help`.
        epilog: examples for its own `--help`.
        add_options: declares its options.
        run: does the work and returns the exit code.
    """

    name: str
    summary: str
    epilog: str = ""
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def start_scheduler(options: EngineOptions) -> "Scheduler":
    """Load the models, exporting their engines on first use; the tracker is not warm yet.

    Raises:
        UnknownModelError, CheckpointError: a model cannot be loaded.
    """
    from trocar_engines.models import DEFAULT_MODEL
    from trocar_engines.scheduler import DEFAULT_MEMORY, Scheduler, SchedulerConfig

    config = SchedulerConfig(
        model=options.model or DEFAULT_MODEL,
        memory=options.memory or DEFAULT_MEMORY,
        runtime=options.runtime,
        weights=options.weights,
        max_streams=options.max_streams,
    )
    return Scheduler(config, on_progress=lambda text: print(f"trocar: {text}", file=sys.stderr))


def main(arguments: Sequence[str] | None = None, *, start_scheduler: StartScheduler = start_scheduler) -> int:
    """Run a subcommand.

    Args:
        arguments: None for those of the process.
        start_scheduler: makes the tracker.

    Returns:
        0, or 2 after an expected failure, which one line on stderr tells.
    """
    options = _make_parser().parse_args(arguments)
    options.start_scheduler = start_scheduler
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    try:
        return int(options.run(options))
    except TrocarError as error:
        print(f"trocar {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        print(f"trocar {options.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trocar",
        description="Real-time surgical video tracking: frames in, masklets out. Not a medical device.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="<command>")
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.add_argument("-v", "--verbose", action="store_true", help="log what happens, on stderr")
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what `read_engine_options` reads; for every command that starts a tracker."""
    parser.add_argument("--model", default="", help="model, see trocar models list")
    parser.add_argument("--memory", default="", choices=("vanilla", "fifo"), help="memory policy")
    parser.add_argument(
        "--runtime", default="auto", choices=("auto", "onnx", "eager"), help="what runs the model"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights instead of the installed ones")


def read_engine_options(options: argparse.Namespace, *, max_streams: int = 1) -> EngineOptions:
    """Read the flags of `add_engine_options`."""
    return EngineOptions(
        model=options.model,
        memory=options.memory,
        runtime=options.runtime,
        weights=options.weights,
        max_streams=max_streams,
    )


# serve


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    from trocar.config import ServerConfig

    defaults = ServerConfig()
    parser.add_argument("--address", default=defaults.address, help="host:port (default %(default)s)")
    parser.add_argument(
        "--insecure", action="store_true", help="listen without TLS on an address that other machines reach"
    )
    parser.add_argument(
        "--max-streams", type=int, default=defaults.max_streams, help="streams at once (default %(default)s)"
    )
    parser.add_argument(
        "--max-objects",
        type=int,
        default=defaults.max_objects,
        help="objects per stream (default %(default)s)",
    )
    add_engine_options(parser)


def _serve(options: argparse.Namespace) -> int:
    import asyncio

    from trocar.config import ServerConfig

    config = ServerConfig(
        address=options.address,
        insecure=options.insecure,
        max_streams=options.max_streams,
        max_objects=options.max_objects,
    )
    scheduler = options.start_scheduler(read_engine_options(options, max_streams=config.max_streams))
    try:
        is_healthy = asyncio.run(_serve_until_signal(config, scheduler))
    finally:
        scheduler.close()
    if not is_healthy:
        print("trocar serve: the device failed; restart the server", file=sys.stderr)
        return EXIT_DEVICE_FAILURE
    return 0


async def _serve_until_signal(config: "ServerConfig", scheduler: "Scheduler") -> bool:
    from trocar.server import TrackingServer
    from trocar_engines.preprocess import resize_to_model

    server = TrackingServer(config, scheduler, resize_to_model)
    server.stop_on_signals()
    await server.start()
    print(f"trocar serve: warming up {scheduler.default_model}", file=sys.stderr)
    try:
        await server.warm_up()
    except BaseException:
        await server.stop()
        raise
    print(f"trocar serve: serving on {server.address}; Ctrl-C stops", file=sys.stderr)
    return await server.run_until_stopped()


# models


def _add_models_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show")
    actions.add_parser("list", help="one line per model, and whether its weights are installed")
    show = actions.add_parser("show", help="one model, as JSON")
    show.add_argument("name")


def _models(options: argparse.Namespace) -> int:
    from trocar_engines.models import DEFAULT_MODEL, model_entries, model_entry

    if options.action == "show":
        print(json.dumps(_describe_model(model_entry(options.name)), indent=2))
        return 0
    for entry in model_entries():
        state = "weights installed" if entry.weights else "no weights"
        mark = " (default)" if entry.name == DEFAULT_MODEL else ""
        print(f"{entry.name:<24} {entry.config.input_size_px:>5} px  {state}{mark}")
    return 0


def _describe_model(entry: "ModelEntry") -> dict[str, object]:
    from trocar_engines.models import weights_folders
    from trocar_engines.network.weights import weights_hash

    described: dict[str, object] = {
        "name": entry.name,
        "input_size_px": entry.config.input_size_px,
        "classes": list(entry.config.classes),
    }
    if entry.weights is None:
        described["weights"] = None
        described["install_weights_into"] = str(weights_folders()[0])
    else:
        described["weights"] = str(entry.weights)
        described["weights_hash"] = weights_hash(entry.weights)
        described["card"] = entry.card
    return described


# track


def _add_track_options(parser: argparse.ArgumentParser) -> None:
    from trocar.prompt_options import add_prompt_options

    parser.add_argument("input", metavar="INPUT", help="video file, rtsp:// URL, or folder of frames")
    add_prompt_options(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new or empty folder for results"
    )
    add_engine_options(parser)
    parser.add_argument("--server", metavar="ADDR", help="host:port of a running server; else one is started")


def _track(options: argparse.Namespace) -> int:
    from trocar.errors import SourceError
    from trocar.sources import open_source
    from trocar.writer import check_png_ids, check_result_folder

    groups = options.prompt_groups
    if not groups:
        raise SourceError("nothing to track: give --point X,Y, --box X0,Y0,X1,Y1 or --mask FILE")
    if groups[-1].is_empty:
        raise SourceError(f"object {groups[-1].object_id} has no --point, --box or --mask")
    check_png_ids([group.object_id for group in groups])
    check_result_folder(options.out)
    prompts = [group.to_prompt() for group in groups]
    with ExitStack() as resources:
        source = open_source(options.input)
        resources.callback(source.close)
        summary = _track_source(options, source, options.input, prompts, options.out, resources)
    print(json.dumps({**asdict(summary), "out": str(options.out)}))
    return 0


def _track_source(
    options: argparse.Namespace,
    source: "Source",
    label: str,
    prompts: "Sequence[Prompt]",
    out: Path,
    resources: ExitStack,
) -> "TrackSummary":
    """Track an opened source through a server, own or given, into a folder."""
    from trocar.client_core import StreamOptions
    from trocar.track import TrackRun

    stream_options = StreamOptions(
        codec=source.codec,
        is_live=source.is_live,
        model=options.model,
        memory=options.memory,
        width_px=source.width_px if source.codec.is_raw else 0,
        height_px=source.height_px if source.codec.is_raw else 0,
        color_matrix=source.color_matrix,
        time_base=source.time_base,
        resolve_overlaps=True,
    )
    run = TrackRun(
        client=_open_client(options, resources),
        source=source,
        label=label,
        prompts=prompts,
        options=stream_options,
    )
    return _run_with_progress(run, source, out, resources)


def _open_client(options: argparse.Namespace, resources: ExitStack) -> "Client":
    from trocar.client import connect
    from trocar.local import LocalServer
    from trocar_engines.preprocess import resize_to_model

    address = options.server
    if address is None:
        scheduler = options.start_scheduler(read_engine_options(options))
        resources.callback(scheduler.close)
        address = resources.enter_context(LocalServer(scheduler, resize_to_model)).address
    return resources.enter_context(connect(address))


def _run_with_progress(run: "TrackRun", source: "Source", out: Path, resources: ExitStack) -> "TrackSummary":
    import signal

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("tracking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    def end_recording(*_: object) -> None:
        # A second Ctrl-C throws the recording away.
        signal.signal(signal.SIGINT, former_handler)
        run.stop()

    former_handler = signal.getsignal(signal.SIGINT)
    if source.is_live:
        signal.signal(signal.SIGINT, end_recording)
        resources.callback(signal.signal, signal.SIGINT, former_handler)
        console.print("recording; Ctrl-C ends it")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tracking", total=source.frame_count)
        return run.run(
            out,
            on_progress=lambda frames: progress.update(task, completed=frames),
            on_notice=lambda text: console.print(f"[yellow]{text}", highlight=False),
        )


# demo


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="folder for results"
    )
    parser.add_argument("--frames", type=int, default=600, help="length of the clip (default %(default)s)")
    add_engine_options(parser)
    parser.add_argument("--server", metavar="ADDR", help="host:port of a running server; else one is started")


def _demo(options: argparse.Namespace) -> int:
    # A measurement belongs to the benchmarks; this is the one place where the service calls one.
    from trocar.paced import PacedSource
    from trocar.sources import open_source
    from trocar.writer import check_result_folder
    from trocar_bench.demo import FRAME_RATE_HZ, FRAMES_AT_LEAST, render_demo, score_demo
    from trocar_engines.masklets import Prompt
    from trocar_engines.models import DEFAULT_MODEL, model_card

    if options.frames < FRAMES_AT_LEAST:
        raise ConfigError(f"--frames {options.frames}: the script needs at least {FRAMES_AT_LEAST}")
    result = options.out / "result"
    check_result_folder(result)
    if options.server is None:
        # Rendering takes a minute: what cannot be tracked is said before it.
        model_card(options.model or DEFAULT_MODEL, options.weights, options.runtime)
    with _show_progress("rendering", options.frames) as on_frame:
        clip = render_demo(options.out, frames=options.frames, on_frame=on_frame)
    prompts = [
        Prompt(object_id=index, frame_id=0, points=((float(x), float(y)),), labels=(1,))
        for index, (x, y) in enumerate(clip.clicks, start=1)
    ]
    with ExitStack() as resources:
        source = PacedSource(open_source(str(clip.video)), FRAME_RATE_HZ)
        resources.callback(source.close)
        summary = _track_source(options, source, str(clip.video), prompts, result, resources)
    score = score_demo(clip, result / "masks")
    print(f"watch {result / 'overlay.mp4'}", file=sys.stderr)
    print(json.dumps({**asdict(summary), **asdict(score), "out": str(options.out)}))
    return 0


# train


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="checkpoints, log and weights")
    parser.add_argument("--model", default="sam2s-nano", help="network (default %(default)s)")
    parser.add_argument(
        "--clips", type=Path, default=Path("runs/clips"), help="folder of rendered clips; filled when short"
    )
    parser.add_argument("--scenes", type=int, default=1300, help="synthetic operations to render")
    parser.add_argument("--worlds", type=int, default=700, help="synthetic worlds beyond surgery to render")
    parser.add_argument(
        "--real", type=Path, action="append", default=[], metavar="FOLDER", help="own clips in DAVIS layout"
    )
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, metavar="FILE", help="weights to begin with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for every core")


def _train(options: argparse.Namespace) -> int:
    from trocar_engines.models import cpu_threads, set_torch_threads
    from trocar_engines.network.config import network_config
    from trocar_engines.training.store import render_store
    from trocar_engines.training.train import Progress, TrainConfig, train

    threads = options.threads or cpu_threads()
    size_px = network_config(options.model).input_size_px
    with _show_progress("rendering clips", options.scenes + options.worlds) as on_clip:
        rendered = itertools.count(1)
        render_store(
            options.clips,
            size_px=size_px,
            scenes=options.scenes,
            worlds=options.worlds,
            workers=threads,
            on_clip=lambda: on_clip(next(rendered)),
        )
    set_torch_threads(threads)
    config = TrainConfig(
        model=options.model,
        out=options.out,
        clips=options.clips,
        real=tuple(options.real),
        steps=options.steps,
        seed=options.seed,
        start_from=options.start_from,
        device=options.device,
    )
    last: Progress | None = None

    def show(progress: Progress) -> None:
        nonlocal last
        last = progress
        left_min = (progress.steps - progress.step) * progress.seconds_per_step / 60
        losses = ", ".join(f"{name} {value:.2f}" for name, value in progress.losses.items())
        print(f"step {progress.step}/{progress.steps}, {left_min:.0f} min left: {losses}", file=sys.stderr)

    weights = train(config, show)
    print(
        json.dumps({"weights": str(weights), "steps": options.steps, "losses": last.losses if last else {}})
    )
    return 0


@contextmanager
def _show_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields what takes the number done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)


COMMANDS = (
    Command(
        name="demo",
        summary="Render a synthetic operation, track two instruments through the service, score the masks.",
        epilog=DEMO_EPILOG,
        add_options=_add_demo_options,
        run=_demo,
    ),
    Command(
        name="track",
        summary="Track prompted objects through a video and write masks, an overlay and JSON.",
        epilog=TRACK_EPILOG,
        add_options=_add_track_options,
        run=_track,
    ),
    Command(
        name="serve",
        summary="Serve the tracking service over gRPC.",
        epilog=SERVE_EPILOG,
        add_options=_add_serve_options,
        run=_serve,
    ),
    Command(
        name="models", summary="List the models, or show one.", add_options=_add_models_options, run=_models
    ),
    Command(
        name="train",
        summary="Train a network on synthetic surgery and own clips; stops and resumes at any time.",
        epilog=TRAIN_EPILOG,
        add_options=_add_train_options,
        run=_train,
    ),
)

if __name__ == "__main__":
    sys.exit(main())
