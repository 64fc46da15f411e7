"""The `trocar` command. Only this file reads flags and the environment.

Each subcommand is one entry of `COMMANDS`; what it needs is imported when it runs, so that `--help` is quick.
"""

import argparse
import gc
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trocar.config import Access
from trocar.errors import ConfigError
from trocar_engines.errors import TrocarError

if TYPE_CHECKING:
    from trocar.client import Client
    from trocar.config import ServerConfig, TlsFiles
    from trocar.sources import Source
    from trocar.track import TrackRun, TrackSummary
    from trocar.tracking import Scheduler
    from trocar_engines.masklets import Prompt
    from trocar_engines.models import ModelEntry
    from trocar_engines.scheduler import SchedulerConfig
    from trocar_engines.training.train import Stage


EXIT_EXPECTED_FAILURE = 2
EXIT_DEVICE_FAILURE = 3
EXIT_INTERRUPTED = 130

EPILOG = """\
start here:
  trocar track clip.mp4 --point 640,360 --out results
  trocar ui
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
  for this machine only, on 127.0.0.1:50051:
    trocar serve
  for clients with certificates, each within what clients.json allows, with metrics and probes:
    trocar serve --address 0.0.0.0:50051 --tls-certificate server.pem --tls-key server.key \\
        --tls-client-ca clients-ca.pem --clients clients.json --metrics-address 127.0.0.1:9464
  for clients with bearer tokens: the same without --tls-client-ca
  for everybody on a network that you trust, in plain text:
    trocar serve --address 0.0.0.0:50051 --insecure
Health is grpc.health.v1: SERVING once the model is warm. SIGTERM: no new streams, open ones are told and have
--drain-s to finish, and what was received is answered. Certificates and clients are read again when their
files change. docs/deployment.md has more.
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
MODELS_EPILOG = """\
examples:
  trocar models list
  trocar models show sam2s-nano
  trocar models import sam2.1-hiera-tiny sam2.1_hiera_tiny.pt
"""
IMPORT_EPILOG = """\
examples:
  an official SAM 2.1 checkpoint, as the SAM 2 project publishes it:
    trocar models import sam2.1-hiera-base-plus sam2.1_hiera_base_plus.pt
    trocar track clip.mp4 --point 640,360 --out results --model sam2.1-hiera-base-plus-512
  own weights from trocar train, in place of the shipped ones:
    trocar models import sam2s-nano runs/mine/weights.safetensors --replace

NAME and NAME-512 differ only in input size and share one file: 512 is faster, 1024 sees finer detail.
The file is checked before anything is installed: every tensor by name and shape, no NaN. Nothing in it is
executed. It is copied as safetensors, with a card, to trocar/weights in the user's data folder; an import
that is interrupted leaves what was there. The last line on stdout is JSON: what trocar models show tells.
"""
UI_EPILOG = """\
examples:
  trocar ui                                       on this machine: http://127.0.0.1:8080
  trocar ui --server 127.0.0.1:50051              with a server that runs already
  trocar ui --source rtsp://camera/stream --source clip.mp4
                                                  sources on this machine for the page to choose
  trocar ui --address 0.0.0.0:8443 --self-signed  for a tablet; the browser will warn once
The page also takes a camera, a capture card or a file of the machine that the browser runs on.
"""
ENGINES_EPILOG = """\
examples:
  trocar engines build --runtime onnx --model sam2.1-hiera-tiny-512
  trocar engines build --runtime tensorrt --model sam2.1-hiera-base-plus-512 --max-objects 16
  trocar engines show

A plan belongs to one kind of GPU, one version of TensorRT and one set of weights. It is used only where it
is faster than a captured CUDA graph and as exact; batches beyond --max-streams and --max-objects run as
graphs. The last line on stdout is JSON: for TensorRT the manifest, with error, time and verdict of each plan.
"""
TRAIN_EPILOG = """\
examples:
  trocar train --steps 6000
  trocar train --real my_clips --start-from weights.safetensors --steps 2000 --out runs/mine
  trocar track clip.mp4 --point 640,360 --out results --weights runs/mine/weights.safetensors
The same command again resumes after the last checkpoint.
"""


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage that `--help` shows better; for every command."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_EXPECTED_FAILURE)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the flags say of the model side.

    Args:
        model: the default model; empty for the shipped one.
        memory: default policy; empty for the model side's own.
        runtime: "auto", "openvino", "onnx", "eager", "cuda" or "tensorrt".
        weights: a file instead of the installed one, for that model.
        max_streams: at once.
        max_objects: of all streams together, for each model.
        threads: of a model on a CPU; 0 for every core but one.
        is_compiled: on a GPU, torch compiles the stages; used where that is exact and faster.
    """

    model: str = ""
    memory: str = ""
    runtime: str = "auto"
    weights: Path | None = None
    max_streams: int = 8
    max_objects: int = 64
    threads: int = 0
    is_compiled: bool = False


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
    from trocar_engines.scheduler import Scheduler

    return Scheduler(scheduler_config(options), on_progress=print_progress)


def scheduler_config(options: EngineOptions) -> "SchedulerConfig":
    """What the options ask of the model side."""
    from trocar_engines.models import DEFAULT_MODEL, cpu_threads
    from trocar_engines.scheduler import DEFAULT_MEMORY, SchedulerConfig

    if options.threads < 0:
        raise ConfigError(f"--threads {options.threads}: expected at least 1, or 0 for every core but one")
    return SchedulerConfig(
        # One core decodes video and speaks to the network. Where the model took that one too, it was the
        # slower for it: two cores, 60 frames/s of 720p: p99 44 against 34 ms, 1% of the frames dropped
        # against none.
        threads=options.threads or max(1, cpu_threads() - 1),
        model=options.model or DEFAULT_MODEL,
        memory=options.memory or DEFAULT_MEMORY,
        runtime=options.runtime,
        weights=options.weights,
        max_streams=options.max_streams,
        max_objects=options.max_objects,
        is_compiled=options.is_compiled,
    )


def print_progress(text: str) -> None:
    """Tell what takes its time while a model is loaded."""
    print(f"trocar: {text}", file=sys.stderr)


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
    return run_command(f"trocar {options.command}", lambda: int(options.run(options)))


def run_command(name: str, run: Callable[[], int]) -> int:
    """Run a command's work; what stops it as expected is told in one line on stderr.

    Args:
        name: of the command, as typed.
        run: does the work and returns the exit code.

    Returns:
        the exit code.
    """
    try:
        return run()
    except TrocarError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
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
    parser.add_argument("--memory", default="", choices=("vanilla", "fifo", "spread"), help="memory policy")
    parser.add_argument(
        "--runtime",
        default="auto",
        choices=("auto", "openvino", "onnx", "eager", "cuda", "tensorrt"),
        help="what runs the model (default auto: a GPU where there is one; else openvino, which encodes "
        "pictures in bfloat16, for sam2s-nano on a CPU that can; else onnx, in float32)",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights instead of the installed ones")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="CPU threads of the model (default 0: every core but one, which decodes)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=EngineOptions.is_compiled,
        help="on a GPU, let torch compile the network's stages: minutes at the first start, fewer at "
        "later ones; used where it proves exact and faster "
        f"(default: {'yes' if EngineOptions.is_compiled else 'no'})",
    )


def read_engine_options(
    options: argparse.Namespace, *, max_streams: int = 1, max_objects: int = EngineOptions.max_objects
) -> EngineOptions:
    """Read the flags of `add_engine_options`."""
    return EngineOptions(
        model=options.model,
        memory=options.memory,
        runtime=options.runtime,
        weights=options.weights,
        max_streams=max_streams,
        max_objects=max_objects,
        threads=options.threads,
        is_compiled=options.compile,
    )


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a running server and what `read_access` reads."""
    parser.add_argument(
        "--server",
        metavar="ADDR[,ADDR...]",
        help="host:port of a running server, and others to go on with when it fails; else one is started",
    )
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="PEM of the server's authority")
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM of the own certificate")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of the own private key")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="bearer token for the server")
    parser.add_argument("--insecure", action="store_true", help="plain text to a server on another machine")


def read_access(options: argparse.Namespace) -> Access:
    """Read the flags of `add_server_options`, but for the address."""
    from trocar.security import read_token

    return Access(
        ca=options.tls_ca,
        certificate=options.tls_certificate,
        key=options.tls_key,
        token="" if options.token_file is None else read_token(options.token_file),
        insecure=options.insecure,
    )


# serve


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    from trocar.config import ServerConfig

    defaults = ServerConfig()

    def add(flag: str, text: str, kind: Callable[[str], object] = int, *, setting: str = "") -> None:
        setting = setting or flag.removeprefix("--").replace("-", "_")
        default = getattr(defaults, setting)
        parser.add_argument(
            flag, dest=setting, type=kind, default=default, help=f"{text} (default %(default)s)"
        )

    add("--address", "host:port", str)
    parser.add_argument(
        "--insecure", action="store_true", help="let other machines in without TLS, or without knowing them"
    )
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM of the server's chain")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its private key")
    parser.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE", help="clients need a certificate of this authority"
    )
    parser.add_argument(
        "--clients",
        type=Path,
        metavar="FILE",
        help="JSON: names or tokens admitted, streams, models",
    )
    parser.add_argument(
        "--metrics-address", default="", metavar="ADDR", help="host:port of /metrics, /livez and /readyz"
    )
    parser.add_argument(
        "--audit-log", type=Path, metavar="FILE", help="a line for each stream and prompt; else in the log"
    )
    parser.add_argument(
        "--log-format", default="text", choices=("text", "json"), help="log lines (default %(default)s)"
    )
    add("--trace-every", "trace one frame in so many with OpenTelemetry, 0 for none")
    add("--max-streams", "streams at once")
    add("--max-objects", "objects per stream")
    add("--max-objects-total", "objects of all streams together, for each model")
    add("--max-message-bytes", "bytes of one request")
    add("--max-picture-pixels", "pixels of one picture")
    add(
        "--max-calls-per-s",
        "calls per second and connection in the long run; beyond, a call waits, or is refused",
        float,
    )
    add("--max-prompts-per-s", "prompts per second and stream", float)
    add(
        "--max-requests-per-s",
        "requests per second and stream that are read; EVERY frames do not count",
        float,
    )
    add("--max-waiting-packets", "packets of a live H.264 or HEVC stream that may wait for the decoder")
    add("--max-idle-s", "seconds without a request after which a stream ends", float)
    add("--max-unread-s", "seconds for which a client may leave results unread", float)
    add("--max-decode-s", "seconds for decoding one packet, or coding one frame's masks", float)
    add("--max-device-s", "seconds for one step of the device; beyond, the server ends", float)
    add("--health-interval-s", "seconds between two looks at the device", float)
    add("--keepalive-time-s", "seconds of silence after which a peer is pinged", float)
    add("--keepalive-timeout-s", "seconds after which a peer that leaves a ping unanswered is gone", float)
    add("--drain-s", "seconds for open streams after SIGTERM", float, setting="shutdown_grace_s")
    add_engine_options(parser)


def _serve(options: argparse.Namespace) -> int:
    import asyncio
    from dataclasses import fields

    from trocar.config import ServerConfig

    _log_as_server(options)
    allow_many_files()
    settings = {field.name for field in fields(ServerConfig)} & vars(options).keys()
    config = ServerConfig(tls=_read_tls_files(options), **{name: getattr(options, name) for name in settings})
    # One place more than streams: for the look at the device that health asks for.
    engine = read_engine_options(
        options, max_streams=config.max_streams + 1, max_objects=config.max_objects_total
    )
    scheduler = options.start_scheduler(engine)
    has_hung_threads = False
    try:
        is_healthy, has_hung_threads = asyncio.run(_serve_until_signal(config, scheduler))
    finally:
        if not has_hung_threads:
            scheduler.close()
    if not is_healthy:
        print("trocar serve: the device or the listener failed; restart the server", file=sys.stderr)
    if has_hung_threads:
        # Whatever else ends a process waits for its threads, and one of these never ends.
        sys.stderr.flush()
        os._exit(EXIT_DEVICE_FAILURE)
    return 0 if is_healthy else EXIT_DEVICE_FAILURE


def keep_from_collector() -> None:
    """Let the garbage collector pass over all that was made so far, which stays for good.

    Modules are 260,000 objects, and while a full collection looks at them no frame moves: 0.25 s on a busy
    core. What an export of engines left behind goes first.
    """
    gc.collect()
    gc.freeze()


def allow_many_files() -> int:
    """Open as many files as the system lets us: 1,024 idle peers would else keep everybody out.

    Returns:
        how many.
    """
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a kernel may have a bound of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if allowed == resource.RLIM_INFINITY else allowed


def _log_as_server(options: argparse.Namespace) -> None:
    """A server tells of each stream and prompt, and writes for programs if asked to."""
    from trocar.journal import ClientWords, JsonFormatter

    for name in ClientWords.LOGGERS:
        logging.getLogger(name).addFilter(ClientWords())
    for name in ("trocar", "trocar_engines"):
        logging.getLogger(name).setLevel(logging.INFO)
    if options.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


def _read_tls_files(options: argparse.Namespace) -> "TlsFiles | None":
    from trocar.config import TlsFiles

    if options.tls_certificate is None and options.tls_key is None:
        if options.tls_client_ca is not None:
            raise ConfigError("--tls-client-ca needs --tls-certificate and --tls-key")
        return None
    if options.tls_certificate is None or options.tls_key is None:
        raise ConfigError("--tls-certificate and --tls-key belong together: give both")
    return TlsFiles(certificate=options.tls_certificate, key=options.tls_key, client_ca=options.tls_client_ca)


async def _serve_until_signal(config: "ServerConfig", scheduler: "Scheduler") -> tuple[bool, bool]:
    """Serve; returns whether the device is well, and whether threads hang."""
    from trocar.server import TrackingServer
    from trocar_engines.gpu_meter import GpuMeter
    from trocar_engines.models import cpu_threads
    from trocar_engines.preprocess import resize_to_model

    gpu = GpuMeter() if config.metrics_address else None
    server = TrackingServer(config, scheduler, resize_to_model, gpu, cores=cpu_threads())
    server.stop_on_signals()
    await server.start()
    print(f"trocar serve: warming up {scheduler.default_model}", file=sys.stderr)
    try:
        await server.warm_up()
    except BaseException:
        await server.stop()
        raise
    if config.is_open:
        print(
            f"trocar serve: --insecure: everybody who reaches {server.address} may use this server, and "
            f"{'nobody is asked for a name' if config.tls else 'video travels in plain text'}",
            file=sys.stderr,
        )
    if server.metrics_address:
        print(f"trocar serve: metrics on http://{server.metrics_address}/metrics", file=sys.stderr)
    keep_from_collector()
    print(f"trocar serve: serving on {server.address}; Ctrl-C stops", file=sys.stderr)
    is_healthy = await server.run_until_stopped()
    return is_healthy, server.has_hung_threads


# models


def _add_models_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|import")
    actions.add_parser("list", help="one line per model, and whether its weights are installed")
    show = actions.add_parser("show", help="one model and its card, as JSON")
    show.add_argument("name", metavar="NAME")
    summary = "Install a checkpoint under a model's name."
    importing = actions.add_parser(
        "import",
        help=summary,
        description=summary,
        epilog=IMPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importing.add_argument("name", metavar="NAME", help="one of trocar models list")
    importing.add_argument("file", metavar="FILE", type=Path, help="torch file or .safetensors")
    importing.add_argument(
        "--replace", action="store_true", help="prefer it to other weights that are installed under that name"
    )


def _models(options: argparse.Namespace) -> int:
    from trocar_engines.models import DEFAULT_MODEL, model_entries, model_entry

    if options.action == "import":
        return _import_model(options)
    if options.action == "show":
        print(json.dumps(_describe_model(model_entry(options.name)), indent=2))
        return 0
    for entry in model_entries():
        state = f"weights in {entry.weights.name}" if entry.weights else "no weights"
        mark = " (default)" if entry.name == DEFAULT_MODEL else ""
        print(f"{entry.name:<28} {entry.config.input_size_px:>5} px  {state}{mark}")
    return 0


def _import_model(options: argparse.Namespace) -> int:
    from trocar_engines.models import import_weights, model_entry

    def say(text: str) -> None:
        print(f"trocar models import: {text}", file=sys.stderr)

    is_new = import_weights(options.name, options.file, is_replacing=options.replace, on_stage=say)
    say(f"{options.name} is installed" if is_new else f"{options.name}: these weights were installed already")
    print(json.dumps(_describe_model(model_entry(options.name))))
    return 0


def _describe_model(entry: "ModelEntry") -> dict[str, object]:
    from trocar_engines.models import installed_hash

    described: dict[str, object] = {
        "name": entry.name,
        "input_size_px": entry.config.input_size_px,
        "classes": list(entry.config.classes),
    }
    if entry.weights is None:
        described["weights"] = None
        described["install_with"] = f"trocar models import {entry.name} FILE"
    else:
        described["weights"] = str(entry.weights)
        described["weights_hash"] = installed_hash(entry.weights)
        described["card"] = entry.card
    return described


# engines


def _add_engines_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|show")
    actions.add_parser("show", help="every manifest of TensorRT plans, as JSON")
    summary = "Export a model's engines ahead of time; for TensorRT, build and compare its plans."
    build = actions.add_parser(
        "build",
        help=summary,
        description=summary,
        epilog=ENGINES_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--model", default="", help="model, see trocar models list")
    build.add_argument("--weights", type=Path, metavar="FILE", help="weights instead of the installed ones")
    build.add_argument(
        "--runtime",
        required=True,
        choices=("onnx", "tensorrt"),
        help="what will run the engines; those of onnx are openvino's too",
    )
    build.add_argument(
        "--max-streams", type=int, default=4, help="pictures of the largest batch (default %(default)s)"
    )
    build.add_argument(
        "--max-objects", type=int, default=8, help="objects of the largest batch (default %(default)s)"
    )


def _engines(options: argparse.Namespace) -> int:
    from trocar_engines.export import default_cache, engine_folder, export_stages
    from trocar_engines.models import DEFAULT_MODEL, load_network
    from trocar_engines.plans import build_model_plans, read_manifests

    def say(text: str) -> None:
        print(f"trocar engines build: {text}", file=sys.stderr)

    cache = default_cache()
    if options.action == "show":
        print(json.dumps([asdict(manifest) for manifest in read_manifests(cache)], indent=2))
        return 0
    for flag, number in (("--max-streams", options.max_streams), ("--max-objects", options.max_objects)):
        if number < 1:
            raise ConfigError(f"{flag} {number}: expected at least 1")
    model = options.model or DEFAULT_MODEL
    network = load_network(model, options.weights)
    if options.runtime == "onnx":
        folder = engine_folder(cache, network)
        export_stages(network, folder, lambda stage: say(f"exporting {stage}"))
        print(json.dumps({"model": model, "engines": str(folder)}))
        return 0
    manifest = build_model_plans(
        model,
        network,
        cache=cache,
        pictures=options.max_streams,
        rows=options.max_objects,
        on_progress=say,
    )
    print(json.dumps(asdict(manifest)))
    return 0


# track


def _add_track_options(parser: argparse.ArgumentParser) -> None:
    from trocar.prompt_options import add_prompt_options

    parser.add_argument("input", metavar="INPUT", help="video file, rtsp:// URL, or folder of frames")
    add_prompt_options(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new or empty folder for results"
    )
    add_engine_options(parser)
    add_server_options(parser)


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

    if options.server is not None:
        return resources.enter_context(connect(options.server.split(","), access=read_access(options)))
    return resources.enter_context(connect(_start_server(options, resources)))


def _start_server(options: argparse.Namespace, resources: ExitStack, *, max_streams: int = 1) -> str:
    """Start a server of our own; returns its address."""
    from trocar.local import LocalServer
    from trocar_engines.preprocess import resize_to_model

    scheduler = options.start_scheduler(read_engine_options(options, max_streams=max_streams))
    resources.callback(scheduler.close)
    return resources.enter_context(LocalServer(scheduler, resize_to_model)).address


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
    add_server_options(parser)


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
    print(f"watch {result / 'overlay.mp4'}; to tap instruments yourself: trocar ui", file=sys.stderr)
    print(json.dumps({**asdict(summary), **asdict(score), "out": str(options.out)}))
    return 0


# ui


def _add_ui_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", default="127.0.0.1:8080", help="host:port of the page (default %(default)s)"
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="INPUT",
        help="video file, folder of frames or rtsp:// URL that the page may choose; more than one is fine",
    )
    parser.add_argument("--self-signed", action="store_true", help="https with a certificate made just now")
    parser.add_argument("--cert", type=Path, metavar="FILE", help="certificate in PEM form, for https")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its key")
    add_engine_options(parser)
    add_server_options(parser)


def _ui(options: argparse.Namespace) -> int:
    from trocar.ui import UiConfig, serve_ui
    from trocar_engines.export import default_cache

    config = UiConfig(
        address=options.address,
        sources=tuple(options.source),
        cache=default_cache().parent / "operation",
        is_self_signed=options.self_signed,
        certificate=options.cert,
        key=options.key,
        access=read_access(options),
    )
    with ExitStack() as resources:
        # One stream, and one more while its predecessor is being closed.
        address = options.server or _start_server(options, resources, max_streams=2)
        keep_from_collector()
        serve_ui(config, address, lambda text: print(f"trocar ui: {text}", file=sys.stderr))
    return 0


# train


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/nano"), help="checkpoints, log and weights")
    parser.add_argument("--model", default="sam2s-nano", help="network (default %(default)s)")
    parser.add_argument(
        "--real", type=Path, action="append", default=[], metavar="FOLDER", help="own clips in DAVIS layout"
    )
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps (default %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="end by then, the learning rate falling with the time: for a machine that is lent",
    )
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="its peak (default %(default)s)")
    parser.add_argument(
        "--stage",
        type=_read_stage,
        action="append",
        metavar="SIZE:CLIPS:FRAMES:SHARE",
        help="side of the pictures, clips a step, frames of each, share of the steps; once for each stage "
        "(default: 192:6:5:0.55 and 256:4:6:0.45, on a GPU 256:64:10:1)",
    )
    parser.add_argument("--objects", type=int, default=2, help="objects of each clip (default %(default)s)")
    parser.add_argument(
        "--clip-frames", type=int, default=16, help="length of rendered clips (default %(default)s)"
    )
    parser.add_argument(
        "--pool", type=int, default=600, help="rendered clips at hand at a time (default %(default)s)"
    )
    parser.add_argument(
        "--fresh",
        type=int,
        default=2,
        help="clips rendered for each step, in the place of the oldest (default %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that render (default %(default)s)")
    parser.add_argument(
        "--diverse-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="clips that read long-term memories too, as SAM2S trains; 0 reads the most recent alone, as "
        "SAM 2 does (default %(default)s)",
    )
    parser.add_argument(
        "--tsl",
        type=float,
        default=0.1,
        metavar="WEIGHT",
        help="of the loss of classes, temporal semantic learning; 0 learns masks alone (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, metavar="FILE", help="weights to begin with")
    parser.add_argument(
        "--only",
        choices=("classes", "appearance"),
        default="",
        help="let only the semantic head learn, from what the network tracks in rendered clips, or only the "
        "appearance head, from rendered views of instruments",
    )
    parser.add_argument(
        "--views",
        type=Path,
        default=Path("runs/views"),
        help="folder of rendered views, for --only appearance; filled when short, 35 to 90 a scene",
    )
    parser.add_argument(
        "--scenes", type=int, default=1300, help="operations to render views of, for --only appearance"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for every core")


def _read_stage(text: str) -> "Stage":
    from trocar_engines.training.train import Stage

    try:
        size_px, clips, frames, share = text.split(":")
        return Stage(size_px=int(size_px), clips=int(clips), frames=int(frames), share=float(share))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected SIZE:CLIPS:FRAMES:SHARE, as in 256:4:6:1"
        ) from error


def _train(options: argparse.Namespace) -> int:
    from trocar_engines.models import cpu_threads, set_torch_threads
    from trocar_engines.network.config import network_config
    from trocar_engines.training.appearance import fill_store
    from trocar_engines.training.losses import LossWeights
    from trocar_engines.training.train import GPU_STAGES, STAGES, Progress, TrainConfig, train

    if options.only and options.start_from is None:
        raise TrocarError("--only needs --start-from: the rest of the network would stay random")
    if options.only == "classes" and options.real:
        raise TrocarError("--real clips name no classes: --only classes renders its own pictures")
    threads = options.threads or cpu_threads()
    if options.only == "appearance":
        rendered = itertools.count(1)
        with _show_progress("rendering views", options.scenes) as on_ground:
            fill_store(
                options.views,
                size_px=network_config(options.model).input_size_px,
                grounds=options.scenes,
                workers=threads,
                on_ground=lambda: on_ground(next(rendered)),
            )
    set_torch_threads(threads)
    config = TrainConfig(
        model=options.model,
        out=options.out,
        real=tuple(options.real),
        clip_frames=options.clip_frames,
        pool_clips=options.pool,
        first_clips=min(options.pool, 200),
        fresh_clips=options.fresh,
        workers=options.workers,
        steps=options.steps,
        minutes=options.minutes,
        learning_rate=options.learning_rate,
        objects=options.objects,
        diverse_share=options.diverse_share,
        weights=LossWeights(tsl=options.tsl),
        stages=tuple(options.stage or (GPU_STAGES if options.device.startswith("cuda") else STAGES)),
        seed=options.seed,
        start_from=options.start_from,
        device=options.device,
        only=options.only,
        views=options.views,
    )
    last: Progress | None = None

    def show(progress: Progress) -> None:
        nonlocal last
        last = progress
        left_min = progress.seconds_left / 60
        losses = ", ".join(f"{name} {value:.2f}" for name, value in progress.losses.items())
        print(f"step {progress.step}/{progress.steps}, {left_min:.0f} min left: {losses}", file=sys.stderr)

    def show_clips(done: int, of: int) -> None:
        if done % 20 == 0 or done == of:
            print(f"{done} of {of} clips rendered to begin with", file=sys.stderr)

    weights = train(config, show, show_clips)
    done = {"steps": last.step, "losses": last.losses} if last else {"steps": options.steps, "losses": {}}
    print(json.dumps({"weights": str(weights), **done}))
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
        name="ui",
        summary="Serve the surgeon's page: live picture, masklets, taps.",
        epilog=UI_EPILOG,
        add_options=_add_ui_options,
        run=_ui,
    ),
    Command(
        name="models",
        summary="List the models, show one, or install a checkpoint.",
        epilog=MODELS_EPILOG,
        add_options=_add_models_options,
        run=_models,
    ),
    Command(
        name="engines",
        summary="Build what runs a model ahead of time, or show the TensorRT plans there are.",
        add_options=_add_engines_options,
        run=_engines,
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
