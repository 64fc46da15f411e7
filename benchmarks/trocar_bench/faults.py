"""`python -m trocar_bench.faults`: what a live stream loses when its server is killed.

Two `trocar serve` of its own on two loopback ports, and one live stream through the Python client, which
knows both addresses: a camera on an absolute schedule with a keyframe every second. Again and again the
server that has the stream is killed with SIGKILL, at another moment between two keyframes each time, and
started anew once the stream goes on with the other one.

The gap is the time between the last result before and the first new one after: what a surgeon sees as frozen
masks. Its parts, each with its mean in the last line, so that they add up to the mean gap:

- `before`: from the last result to the kill, none when that result was still under way; the next one would
  have come within a frame's time anyway;
- `notice`: until the client knows, a reset connection on loopback, on a network the watchdogs' seconds;
- `open`: until the other server has opened the stream;
- `catch_up`: decoding again from the last keyframe on, prompting each object with its last good mask, and
  tracking the first frame that nobody had answered.

Results of frames that were answered before are not new. Lost frames include those that a busy server skips;
look at them on an idle machine.

`--proxy ADDRESS` sends the stream to one address instead, such as nginx in front of the two.
"""

import argparse
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from trocar.cli import add_engine_options, read_engine_options
from trocar.client import connect
from trocar.client_core import (
    OBJECT_LOST,
    Event,
    Notice,
    PromptAccepted,
    Reconnect,
    Result,
    Resumed,
    StreamOptions,
)
from trocar.decode import Codec
from trocar_bench.footage import FRAME_RATE_HZ, render_footage
from trocar_bench.live_stream import LiveStream
from trocar_bench.serve_process import ServeProcess, ServerRequest, run_bench
from trocar_bench.service_lane import TIME_BASE
from trocar_engines.errors import TrocarError

SERVERS = 2
SETTLE_S = 2.0
"""Between a resumption and the next kill, at least."""
PHASE_S = 0.37
"""Added once more each time, modulo a second: kills meet a group of pictures everywhere."""
RESUME_TIMEOUT_S = 30.0
GAP_PARTS = ("before", "notice", "open", "catch_up")


@dataclass(kw_only=True, eq=False)
class FaultTally:
    """What a run came to. Written by the receiver, read by anybody.

    Args:
        objects: how many were prompted.
    """

    objects: int
    accepted: int = 0
    results: int = 0
    last_frame_id: int = -1
    last_result_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    parts_s: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in GAP_PARTS})
    replayed_frames: list[int] = field(default_factory=list)
    duplicates: int = 0
    lost_object_ids: list[int] = field(default_factory=list)
    wrong_objects: int = 0
    lost_frames: int = 0
    unsent_frames: int = 0
    dropped_frames: int = 0
    _killed_s: float = 0.0
    _resumed: tuple[float, float] | None = None
    """When the client knew of the fault, and when another server had opened the stream."""

    def note_kill(self, now_s: float) -> None:
        """Note that the server was killed."""
        self._killed_s = now_s

    def take(self, event: Event, now_s: float) -> None:
        """Count an event."""
        match event:
            case Result():
                self._take_result(event, now_s)
            case Resumed():
                self._resumed = now_s - event.outage_s, now_s
                self.replayed_frames.append(event.replayed_frames)
                self.lost_object_ids += event.lost_object_ids
                self.lost_frames += len(event.lost_frame_ids)
                self.unsent_frames += event.unsent_frames
            case Notice():
                self.lost_frames += len(event.lost_frame_ids)
                if event.reason == OBJECT_LOST:
                    self.lost_object_ids.append(0)
            case PromptAccepted():
                self.accepted += 1
            case _:
                return

    def _add_gap(self, resumed: tuple[float, float], now_s: float) -> None:
        """Cut the time without results at the moments in between: so its parts add up to it."""
        cuts = [self.last_result_s]
        for moment_s in (self._killed_s, *resumed):
            # A result that was under way when its server was killed comes after that.
            cuts.append(max(moment_s, cuts[-1]))
        cuts.append(now_s)
        self.gaps_s.append(now_s - self.last_result_s)
        for part, (begin_s, end_s) in zip(GAP_PARTS, pairwise(cuts), strict=True):
            self.parts_s[part].append(end_s - begin_s)

    def _take_result(self, result: Result, now_s: float) -> None:
        self.results += 1
        self.duplicates += result.frame_id <= self.last_frame_id
        self.dropped_frames += len(result.dropped_frame_ids)
        is_first_of_all = self.last_frame_id < 0
        self.last_frame_id = max(self.last_frame_id, result.frame_id)
        if self._resumed is not None:
            self._add_gap(self._resumed, now_s)
            self._resumed = None
        self.last_result_s = now_s
        if self.accepted == self.objects and not is_first_of_all:
            ids = {tracked.object_id for tracked in result.objects}
            self.wrong_objects += ids != set(range(1, self.objects + 1))


class FaultBench:
    """All kills of one command.

    Args:
        options: parsed.
        say: takes lines for people.
    """

    def __init__(self, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._addresses = [_find_free_address() for _ in range(SERVERS)]

    def run(self) -> dict[str, object]:
        """Kill, and measure.

        Raises:
            TrocarError: a server does not start, or the stream did not outlive one.
        """
        options = self._options
        width_px, height_px = options.resolution
        footage = render_footage(width_px, height_px, on_frame=lambda: None)
        with ExitStack() as resources:
            servers = [self._start(address, resources) for address in self._addresses]
            addresses = [options.proxy] if options.proxy else self._addresses
            client = resources.enter_context(
                connect(addresses, reconnect=Reconnect(timeout_s=RESUME_TIMEOUT_S))
            )
            stream_options = StreamOptions(
                codec=Codec.H264, is_live=True, time_base=TIME_BASE, max_objects=options.objects
            )
            tally = FaultTally(objects=options.objects)
            live = LiveStream(
                client.open_stream(stream_options),
                footage,
                fps=options.fps,
                objects=options.objects,
                take=tally.take,
            )
            resources.callback(live.close)
            live.start()
            for number in range(options.kills):
                time.sleep(SETTLE_S + number * PHASE_S % 1.0)
                index = self._addresses.index(self._find_holder(live))
                self._kill(servers[index], live, tally, number)
                servers[index] = self._start(self._addresses[index], resources)
            time.sleep(SETTLE_S)
        return describe(tally, options.kills)

    def _find_holder(self, live: LiveStream) -> str:
        """Address of the server that has the stream, asked of the servers when a proxy stands before them."""
        if not self._options.proxy:
            return live.stream.address
        for address in self._addresses:
            with connect(address) as client:
                if client.server_info().open_streams:
                    return address
        raise TrocarError("no server has the stream")

    def _kill(self, server: ServeProcess, live: LiveStream, tally: FaultTally, number: int) -> None:
        gaps = len(tally.gaps_s)
        tally.note_kill(time.perf_counter())
        server.kill()
        live.wait_for(lambda: len(tally.gaps_s) > gaps, RESUME_TIMEOUT_S)
        parts = ", ".join(f"{part} {seconds[-1] * 1e3:.0f}" for part, seconds in tally.parts_s.items())
        self._say(
            f"kill {number + 1} of {self._options.kills}: {tally.gaps_s[-1] * 1e3:.0f} ms without a new "
            f"result ({parts})"
        )

    def _start(self, address: str, resources: ExitStack) -> ServeProcess:
        request = ServerRequest(
            engine=read_engine_options(self._options, max_streams=4),
            max_objects=self._options.objects,
            on_line=self._say,
            address=address,
        )
        return resources.enter_context(ServeProcess(request))


def describe(tally: FaultTally, kills: int) -> dict[str, object]:
    """The figures."""
    gaps_ms = np.asarray(tally.gaps_s) * 1e3
    return {
        "kills": kills,
        "resumed": len(tally.gaps_s),
        "gap_ms": {
            "mean": round(float(gaps_ms.mean()), 1),
            "p50": round(float(np.median(gaps_ms)), 1),
            "max": round(float(gaps_ms.max()), 1),
        },
        "gap_parts_ms": {
            part: round(float(np.mean(seconds)) * 1e3, 1) for part, seconds in tally.parts_s.items()
        },
        "replayed_frames": round(float(np.median(tally.replayed_frames)), 1),
        "results": tally.results,
        "duplicate_results": tally.duplicates,
        "results_with_other_objects": tally.wrong_objects,
        "lost_objects": len(tally.lost_object_ids),
        "lost_frames": tally.lost_frames,
        "unsent_frames": tally.unsent_frames,
        "dropped_frames": tally.dropped_frames,
    }


def is_good(figures: dict[str, object]) -> bool:
    """Whether every kill was outlived, with every object and no result twice."""
    nothing = ("duplicate_results", "results_with_other_objects", "lost_objects")
    return figures["resumed"] == figures["kills"] and not any(figures[name] for name in nothing)


def _find_free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def read_size(text: str) -> tuple[int, int]:
    """Read WxH, px; for the parser of a command."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()) or int(width) % 2 or int(height) % 2:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WxH with even sides, such as 1280x720")
    return int(width), int(height)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill servers and tell what it cost.

    Args:
        arguments: None for those of the process.

    Returns:
        0; 1 when a kill was not outlived in full; 2 after an expected failure, told in one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trocar_bench.faults",
        description="Kill the server of a live stream again and again, and measure what the stream loses.",
    )
    parser.add_argument("--kills", type=int, default=20, help="default %(default)s")
    parser.add_argument("--fps", type=float, default=FRAME_RATE_HZ, help="default %(default)s")
    parser.add_argument("--objects", type=int, default=2, help="default %(default)s")
    parser.add_argument("--resolution", type=read_size, default=(1280, 720), metavar="WxH")
    parser.add_argument("--proxy", default="", metavar="ADDR", help="what stands before the two servers")
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    return run_bench("faults", lambda say: FaultBench(options, say).run(), is_good)


if __name__ == "__main__":
    sys.exit(main())
