"""`python -m trocar_bench.soak`: whether a server is after 100,000 frames what it was after the first.

A `trocar serve` of its own, and four streams through the Python client, as fast as it answers. Objects come
and go in each of them: at every round of the footage one is forgotten and one with a new number is prompted,
so that rows, ids and memories are handed out and taken back thousands of times.

- Growth of the server's resident memory, from the end of the warm-up (a tenth of the frames) to the end, as
  the difference of the medians of ten readings each: allocators breathe, and one reading says little.
- Errors: prompts refused, frames lost, calls ended, warnings, and results with other objects than expected.
- p99 of the service latency over the last tenth of the frames after the warm-up, against that of the first.
  On a machine that does other work as well this tells of the other work.

Ctrl-C or SIGTERM ends it early, and what was measured so far is told.
"""

import argparse
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trocar.cli import add_engine_options, read_engine_options
from trocar.client import Client, connect
from trocar.client_core import (
    Event,
    Frame,
    Notice,
    PromptAccepted,
    PromptRejected,
    Reconnect,
    Removal,
    Request,
    Result,
    Resumed,
    StreamOptions,
)
from trocar.decode import Codec
from trocar_bench.faults import read_size
from trocar_bench.footage import FRAME_RATE_HZ, Footage, render_footage, spread_clicks
from trocar_bench.process_meter import ProcessMeter, after_warm_up, compare_memory
from trocar_bench.serve_process import ServeProcess, ServerRequest, run_bench
from trocar_bench.service_lane import TIME_BASE
from trocar_engines.errors import TrocarError
from trocar_engines.masklets import Prompt

EPILOG = """\
examples:
  as long as the project promises, about 20 minutes at 90 frames/s:
    python -m trocar_bench.soak
  a look in a minute:
    python -m trocar_bench.soak --frames 5000

The last line is JSON: errors, rss_growth_percent (target below 1) and p99_change_percent (target within 10).
Exit code 1 says that there were errors."""
READINGS = 200
"""Of the server's memory, evenly over the frames."""
PROGRESS_S = 10.0
OBJECTS = 2
LARGEST_ID = 65_535


class SoakStream:
    """One stream whose objects come and go.

    Args:
        client: a connection.
        footage: what it shows.
        frames: how many.
        on_frame: called at each result.
    """

    def __init__(self, client: Client, footage: Footage, frames: int, on_frame: Callable[[], None]) -> None:
        self.latencies_ns = array("Q")
        self.errors: list[str] = []
        self.prompted = self.accepted = 0
        self.frames = frames
        self._client = client
        self._footage = footage
        self._clicks = spread_clicks(footage.labels, OBJECTS)
        self._on_frame = on_frame
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="bench-soak")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more; what was sent is still answered."""
        self._is_stopped = True

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _run(self) -> None:
        options = StreamOptions(codec=Codec.H264, is_live=False, time_base=TIME_BASE, max_objects=OBJECTS)
        try:
            with self._client.open_stream(options) as stream:
                for event in stream.track(self._list_requests()):
                    self._take(event)
        except TrocarError as error:
            self.errors.append(str(error))

    def _list_requests(self) -> Iterator[Request]:
        """Frames; at the start of each round, whose picture has known objects, one goes and one comes."""
        packets = self._footage.packets
        for frame_id in range(self.frames):
            if self._is_stopped:
                return
            round_, place = divmod(frame_id, len(packets))
            if place == 0 and round_:
                yield Removal(object_id=_number(round_ - 1))
            pts = round(frame_id / FRAME_RATE_HZ / TIME_BASE)
            yield Frame(payload=packets[place], frame_id=frame_id, pts=pts)
            if place == 0:
                for index in range(0 if round_ == 0 else OBJECTS - 1, OBJECTS):
                    yield self._prompt(round_ + index, frame_id)

    def _prompt(self, index: int, frame_id: int) -> Prompt:
        self.prompted += 1
        click = self._clicks[index % OBJECTS]
        return Prompt(object_id=_number(index), frame_id=frame_id, points=(click,), labels=(1,))

    def _take(self, event: Event) -> None:
        match event:
            case Result():
                self._take_result(event)
            case Notice():
                self.errors.append(event.message)
            case PromptRejected():
                self.errors.append(f"prompt refused: {event.message}")
            case Resumed():
                self.errors.append(f"taken up again after {event.outage_s:.1f} s")
            case PromptAccepted():
                self.accepted += 1
            case _:
                return

    def _take_result(self, result: Result) -> None:
        self.latencies_ns.append(result.service_latency_ns)
        round_, place = divmod(result.frame_id, len(self._footage.packets))
        # The frame that an object is prompted on is answered before the prompt.
        newest = round_ + OBJECTS - 1 if place else round_ + OBJECTS - 2
        oldest = round_ if result.frame_id else newest + 1
        expected = [_number(index) for index in range(oldest, newest + 1)]
        if sorted(tracked.object_id for tracked in result.objects) != sorted(expected):
            self.errors.append(f"frame {result.frame_id}: other objects than {expected}")
        self._on_frame()


def _number(index: int) -> int:
    return 1 + index % LARGEST_ID


class Logbook:
    """Counts the frames of all streams, tells how far they are, and reads the server's memory at even steps.

    Args:
        meter: of the server.
        frames: of all streams together.
        say: takes lines for people.
        clock: monotonic, s.
    """

    def __init__(
        self,
        meter: ProcessMeter,
        frames: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rss_mb: list[float] = []
        self._meter = meter
        self._total = frames
        self._step = max(frames // READINGS, 1)
        self._say = say
        self._clock = clock
        self._began_s = self._told_s = clock()
        self._frames = 0
        self._lock = threading.Lock()

    def count_frame(self) -> None:
        """Count one; called from any stream's thread."""
        with self._lock:
            self._frames += 1
            if self._frames % self._step == 0 and (rss_mb := self._meter.read_rss_mb()) is not None:
                self.rss_mb.append(rss_mb)
            now_s = self._clock()
            if now_s - self._told_s >= PROGRESS_S:
                self._told_s = now_s
                self._tell(now_s - self._began_s)

    def _tell(self, seconds: float) -> None:
        left_s = (self._total - self._frames) * seconds / self._frames
        memory = f", server {self.rss_mb[-1]:.0f} MB" if self.rss_mb else ""
        self._say(
            f"{self._frames} of {self._total} frames, {self._frames / seconds:.0f} frames/s{memory}, "
            f"about {left_s / 60:.1f} min left"
        )


def describe(streams: Sequence[SoakStream], rss_mb: Sequence[float], seconds: float) -> dict[str, object]:
    """The figures."""
    errors = [error for stream in streams for error in stream.errors]
    unanswered = sum(stream.prompted - stream.accepted for stream in streams)
    warm = [np.asarray(after_warm_up(stream.latencies_ns)) / 1e6 for stream in streams]
    tenths = [(one[: len(one) // 10], one[-(len(one) // 10) :]) for one in warm if len(one) >= 10]
    p99 = [float(np.percentile(np.concatenate(part), 99)) for part in zip(*tenths, strict=True)]
    described: dict[str, object] = {
        "frames": sum(len(stream.latencies_ns) for stream in streams),
        "frames_asked_for": sum(stream.frames for stream in streams),
        "streams": len(streams),
        "objects_prompted": sum(stream.prompted for stream in streams),
        "seconds": round(seconds, 1),
        "errors": len(errors) + unanswered,
        "first_errors": errors[:5],
        "p99_ms": {"first_tenth": round(p99[0], 2), "last_tenth": round(p99[1], 2)} if p99 else None,
        "p99_change_percent": round(100 * (p99[1] - p99[0]) / p99[0], 1) if p99 else None,
    }
    if (memory := compare_memory(rss_mb)) is not None:
        described["rss_mb"] = {"after_warm_up": memory.after_warm_up_mb, "end": memory.end_mb}
        described["rss_growth_percent"] = memory.growth_percent
    return described


def soak(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, object]:
    """Run all streams to their end.

    Raises:
        TrocarError: the server does not start.
    """
    footage = render_footage(*options.resolution, on_frame=lambda: None)
    request = ServerRequest(
        engine=read_engine_options(options, max_streams=options.streams),
        max_objects=OBJECTS,
        on_line=say,
    )
    with (
        ServeProcess(request) as server,
        connect(server.address, reconnect=Reconnect(timeout_s=0, silence_s=60)) as client,
    ):
        logbook = Logbook(ProcessMeter(server.pid), options.frames, say)
        each = options.frames // options.streams
        streams = [SoakStream(client, footage, each, logbook.count_frame) for _ in range(options.streams)]
        began_s = time.perf_counter()
        for stream in streams:
            stream.start()
        try:
            for stream in streams:
                stream.join()
        except KeyboardInterrupt:
            say("stopped early: what was measured so far follows")
            for stream in streams:
                stream.stop()
            for stream in streams:
                stream.join()
        return describe(streams, logbook.rss_mb, time.perf_counter() - began_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak a server and tell how it came out.

    Args:
        arguments: None for those of the process.

    Returns:
        0; 1 when there were errors; 2 after an expected failure, which one line on stderr tells.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trocar_bench.soak",
        description="Run a server for long, with objects coming and going, and look for growth and errors.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--frames", type=int, default=100_000, help="of all streams (default %(default)s)")
    parser.add_argument("--streams", type=int, default=4, help="default %(default)s")
    parser.add_argument("--resolution", type=read_size, default=(640, 360), metavar="WxH")
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    return run_bench("soak", lambda say: soak(options, say), lambda figures: not figures["errors"])


if __name__ == "__main__":
    sys.exit(main())
