"""`python -m trocar_bench.hostile`: what attackers do to a server, and to the honest stream beside them.

For each attack a `trocar serve` of its own, one live stream through the Python client, and an attacker in a
process of its own. Before the attack the stream is measured alone for a while, then beside the attack: its
p99 latency from the moment a frame was due, its drops, and how both compare. The server's memory is read all
the while.

Attackers, server and honest client share this machine. Attackers run at the lowest priority, yet a core that
has nothing idle to give makes every ratio worse than it would be on a network. So the stream is measured once
more after each attack, beside a process that uses as much CPU time as the attacker did and sends nothing:
`beside_control`. What the attack costs the server is what `beside` has more.

`--light` leaves the network out of the server, so that what is measured is the service. Without it frames and
prompts go through the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trocar.cli import add_engine_options, allow_many_files, read_engine_options
from trocar.client import connect
from trocar.client_core import Event, Notice, Reconnect, Result, StreamOptions
from trocar.config import Access
from trocar.decode import Codec
from trocar.ui import make_certificate
from trocar_bench.assault import ATTACKS, CALLERS, CONTROL, COUNTED_ATTACKS
from trocar_bench.faults import read_size
from trocar_bench.footage import FRAME_RATE_HZ, Footage, render_footage
from trocar_bench.live_stream import LiveStream
from trocar_bench.process_meter import ProcessMeter, compare, compare_memory
from trocar_bench.serve_process import ServeProcess, ServerRequest, run_bench
from trocar_bench.service_lane import TIME_BASE
from trocar_engines.errors import TrocarError

EPILOG = """\
attacks:
  malformed    calls of messages and packets that no honest client would send: random bytes, damaged messages,
               senseless fields, damaged H.264, HEVC, JPEG, RGB24 and NV12, prompts and masks from nowhere,
               and connections that speak HTTP/2 badly; each must be refused by name, or survived
  volume       --messages of these, with the server's limits of calls and prompts a second lifted: what is
               judged is what becomes of the server, not of the stream beside
  files        damaged weights files, loaded in the attacker's process: each must be refused
  flood        streams that send as fast as they can and never read
  loris        connections that say as little as keeps them open, a byte a second
  connections  --connections at once, each with a call that asks for nothing
  resets       calls that are cancelled as soon as they begin
  paths        calls of a path that is no text, at which gRPC's own server stops listening

examples:
  everything, on the shipped model (a quarter of an hour or more):
    python -m trocar_bench.hostile
  the service alone, two attacks, over TLS:
    python -m trocar_bench.hostile --light --tls --attack loris --attack connections
  a look at two in half a minute:
    python -m trocar_bench.hostile --light --seconds 3 --alone 3 --attack malformed --attack flood

The last line is JSON. Exit code 1 says that something was found: a crash, a hang, a call that ended otherwise
than it should, an honest stream that broke. p99_ratio and lost frames beside their targets are yours to
judge."""
SHARE_OF_FILES = 0.05
"""Of the messages: reading a file costs more, and there is less to get wrong."""
LORIS_CONNECTIONS = 200
RESETTING_CONNECTIONS = 4
PATH_CONNECTIONS = 4
SERVER_STREAMS = 8
OWN_FILES = 64
"""Of an attacker's process, besides its connections."""
SETTLE_S = 2.0
"""Between an attack and the next measurement, and for the last results of one."""
READ_MEMORY_EVERY_S = 0.25
SHOWN_NOTICES = 3
CURVE_POINTS = 11
LARGEST_RATIOS = {"malformed": 1.2, "volume": None, "files": 1.2}
"""Of p99 beside an attack to p99 alone, as promised; 2 for the others, nothing without limits."""
LIFTED = ("--max-calls-per-s", "100000", "--max-prompts-per-s", "10000")
"""For volume: prompts by the thousand, each of them a case; `--rate` says how many."""
OTHER_RATIO = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The honest stream over a while.

    Args:
        frames: that were due.
        p50_ms: latency from the moment a frame was due to its result here.
        p99_ms: likewise.
        service_p99_ms: what the server says of its own part.
        lost: frames without a result: dropped for a newer one, lost, or never answered.
    """

    frames: int
    p50_ms: float
    p99_ms: float
    service_p99_ms: float
    lost: int


class Patient:
    """Keeps the time of every frame of the honest stream."""

    def __init__(self) -> None:
        self._received_ns = array("q")
        self._service_ns = array("q")
        self.notices: list[str] = []

    def take(self, event: Event, now_s: float) -> None:
        """Note an event."""
        if isinstance(event, Notice):
            self.notices.append(event.message)
        if isinstance(event, Result):
            missing = event.frame_id + 1 - len(self._received_ns)
            self._received_ns.extend([0] * missing)
            self._service_ns.extend([0] * missing)
            self._received_ns[event.frame_id] = round(now_s * 1e9)
            self._service_ns[event.frame_id] = event.service_latency_ns

    def describe(self, due_ns: Sequence[int], begin_s: float, end_s: float) -> Health | None:
        """Sum up the frames that were due in between.

        Args:
            due_ns: of every frame.
            begin_s: monotonic.
            end_s: monotonic.

        Returns:
            None when there is no result at all.
        """
        known = min(len(due_ns), len(self._received_ns))
        due = np.array(due_ns[:])
        received = np.zeros_like(due)
        received[:known] = self._received_ns[:known]
        service = np.zeros_like(due)
        service[:known] = self._service_ns[:known]
        is_due = (due >= begin_s * 1e9) & (due < end_s * 1e9)
        is_answered = is_due & (received > 0)
        if not is_answered.any():
            return None
        latency_ms = (received - due)[is_answered] / 1e6
        return Health(
            frames=int(is_due.sum()),
            p50_ms=round(float(np.percentile(latency_ms, 50)), 2),
            p99_ms=round(float(np.percentile(latency_ms, 99)), 2),
            service_p99_ms=round(float(np.percentile(service[is_answered] / 1e6, 99)), 2),
            lost=int(is_due.sum() - is_answered.sum()),
        )


class MemoryWatch:
    """Reads a process's memory until it is closed.

    Args:
        meter: of the server.
    """

    def __init__(self, meter: ProcessMeter) -> None:
        self._meter = meter
        self._readings: list[float] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="bench-memory")
        self._thread.start()

    @property
    def readings_mb(self) -> list[float]:
        """So far."""
        return list(self._readings)

    def close(self) -> None:
        """Read no more."""
        self._is_over.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._is_over.wait(READ_MEMORY_EVERY_S):
            if (rss_mb := self._meter.read_rss_mb()) is not None:
                self._readings.append(rss_mb)


@dataclass(frozen=True, kw_only=True)
class Onslaught:
    """One attack to come.

    Args:
        kind: see `ATTACKS`.
        count: messages, files or connections.
        is_counted: whether the count ends it; else time does.
    """

    kind: str
    count: int
    is_counted: bool


class HostileBench:
    """All attacks of one command.

    Args:
        options: parsed.
        say: takes lines for people.
    """

    def __init__(self, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        self._options = options
        self._say = say
        self._ca: Path | None = None

    def run(self) -> dict[str, object]:
        """Attack, and measure.

        Raises:
            TrocarError: for the first attack the server or the honest stream does not start, or the system
                allows too few open files; later it is a finding.
        """
        options = self._options
        attacks = self._list_attacks()
        peers = (attack.count for attack in attacks if not attack.is_counted)
        check_files(max(peers, default=0), allow_many_files())
        footage = render_footage(*options.resolution, on_frame=lambda: None)
        described: dict[str, dict[str, Any]] = {}
        try:
            for number, attack in enumerate(attacks, 1):
                self._say(f"attack {number} of {len(attacks)}: {attack.kind}")
                described[attack.kind] = self._attack_server(attack, footage)
        except TrocarError as error:
            if not described:
                raise
            described[attack.kind] = {"first_findings": [str(error)]}
        except KeyboardInterrupt:
            self._say("interrupted: what was measured so far follows")
        return {
            "tracker": "none" if options.light else options.model or "default",
            "tls": options.tls,
            "fps": options.fps,
            "attacks": described,
        }

    def _attack_server(self, attack: Onslaught, footage: Footage) -> dict[str, Any]:
        options = self._options
        with ExitStack() as resources:
            server = resources.enter_context(ServeProcess(self._request_server(resources, attack.kind)))
            client = resources.enter_context(
                connect(
                    server.address,
                    access=Access(ca=self._ca),
                    reconnect=Reconnect(timeout_s=0, silence_s=60),
                )
            )
            patient = Patient()
            live = LiveStream(
                client.open_stream(StreamOptions(codec=Codec.H264, is_live=True, time_base=TIME_BASE)),
                footage,
                fps=options.fps,
                objects=options.objects,
                take=patient.take,
            )
            resources.callback(live.close)
            live.start()
            return self._run_attack(attack, server, live, patient)

    def _list_attacks(self) -> list[Onslaught]:
        options = self._options
        counts = {
            "malformed": CALLERS,
            "volume": options.messages,
            "files": max(round(options.messages * SHARE_OF_FILES), 1),
            "flood": 0,
            "loris": LORIS_CONNECTIONS,
            "connections": options.connections,
            "resets": RESETTING_CONNECTIONS,
            "paths": PATH_CONNECTIONS,
        }
        chosen = options.attack or ATTACKS
        return [
            Onslaught(kind=kind, count=counts[kind], is_counted=kind in COUNTED_ATTACKS)
            for kind in ATTACKS
            if kind in chosen
        ]

    def _run_attack(
        self, attack: Onslaught, server: ServeProcess, live: LiveStream, patient: Patient
    ) -> dict[str, object]:
        time.sleep(SETTLE_S)
        alone_s = time.perf_counter()
        time.sleep(self._options.alone)
        not_alone_s = time.perf_counter()
        memory: MemoryWatch | None = None
        with self._start_attacker(attack.kind, server.address, attack.count) as attacker:
            try:
                assert attacker.stdout is not None
                # An interpreter that starts costs more than one that attacks: wait for its first word.
                attacker.stdout.readline()
                began_s = time.perf_counter()
                memory = MemoryWatch(ProcessMeter(server.pid))
                meter = ProcessMeter(attacker.pid)
                before = meter.read_cpu()
                outcome = self._follow(attack, attacker, server, live)
                cpu_percent = compare(before, meter.read_cpu()).server_percent or 0.0
            finally:
                attacker.kill()
                if memory is not None:
                    memory.close()
        ended_s = time.perf_counter()
        time.sleep(SETTLE_S)
        control = self._run_control(cpu_percent, server) if server.is_running else None
        figures = compare_memory(memory.readings_mb)
        return {
            **describe_attack(
                attack,
                outcome,
                alone=patient.describe(live.due_ns, alone_s, not_alone_s),
                beside=patient.describe(live.due_ns, began_s, ended_s),
                beside_control=None if control is None else patient.describe(live.due_ns, *control),
                exit_code=server.exit_code,
                ended=f"{live.failure or 'by the server'}" if live.is_over else None,
            ),
            "seconds": round(ended_s - began_s, 1),
            "attacker_cpu_percent": round(cpu_percent),
            "rss": None if figures is None else figures._asdict(),
            "rss_curve_mb": draw_curve(memory.readings_mb),
            "notices": patient.notices[:SHOWN_NOTICES],
        }

    def _run_control(self, cpu_percent: float, server: ServeProcess) -> tuple[float, float]:
        """Use as much CPU time as the attacker did, for as long as the stream was alone.

        Returns:
            from when to when.
        """
        seconds = self._options.alone
        with self._start_attacker(
            CONTROL, server.address, 0, ["--seconds", str(seconds), "--cpu-percent", str(cpu_percent)]
        ) as burner:
            assert burner.stdout is not None
            burner.stdout.readline()
            began_s = time.perf_counter()
            burner.communicate()
        ended_s = time.perf_counter()
        time.sleep(SETTLE_S)
        return began_s, ended_s

    def _start_attacker(
        self, kind: str, address: str, count: int, more: Sequence[str] = ()
    ) -> "subprocess.Popen[str]":
        options = self._options
        command = [sys.executable, "-m", "trocar_bench.assault", kind, address]
        command += ["--count", str(count), "--seconds", str(options.seconds)]
        command += ["--seed", str(options.seed), "--rate", str(options.rate)]
        if self._ca is not None:
            command += ["--ca", str(self._ca)]
        command += more
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _follow(
        self, attack: Onslaught, attacker: "subprocess.Popen[str]", server: ServeProcess, live: LiveStream
    ) -> dict[str, Any]:
        """Wait for an attacker's last word, telling how far it is; no longer than there is what to attack."""
        assert attacker.stdout is not None
        began_s = told_s = time.monotonic()
        for line in attacker.stdout:
            content: dict[str, Any] = json.loads(line)
            if "done" not in content:
                return content
            if not server.is_running or live.is_over:
                return {"counts": content, "first_findings": []}
            if attack.is_counted and time.monotonic() - told_s >= self._options.progress:
                told_s = time.monotonic()
                self._say(_write_progress(content["done"], attack.count, told_s - began_s))
        return {"counts": {}, "first_findings": [f"the attacker's process ended: {attacker.wait()}"]}

    def _request_server(self, resources: ExitStack, kind: str) -> ServerRequest:
        options = self._options
        flags = list(LIFTED if kind == "volume" else ())
        if options.tls:
            folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
            self._ca, key = folder / "server.pem", folder / "server.key"
            make_certificate(self._ca, key, "127.0.0.1")
            flags += ["--tls-certificate", str(self._ca), "--tls-key", str(key)]
        return ServerRequest(
            engine=read_engine_options(options, max_streams=SERVER_STREAMS),
            max_objects=options.objects,
            on_line=self._say,
            module="trocar_bench.light_serve" if options.light else "trocar.cli",
            flags=tuple(flags),
        )


def check_files(connections: int, allowed: int) -> None:
    """See that an attacker can hold so many connections.

    Raises:
        TrocarError: it cannot, and its own failures would look like the server's.
    """
    if connections + OWN_FILES > allowed:
        raise TrocarError(
            f"{connections} connections need {connections + OWN_FILES} open files and the system allows "
            f"{allowed}: raise the hard limit (ulimit -Hn), or attack with {max(allowed - OWN_FILES, 0)}"
        )


def describe_attack(
    attack: Onslaught,
    outcome: dict[str, Any],
    *,
    alone: Health | None,
    beside: Health | None,
    beside_control: Health | None,
    exit_code: int | None,
    ended: str | None,
) -> dict[str, Any]:
    """The figures of one attack, whatever it has left of the server.

    Args:
        attack: as asked for.
        outcome: the attacker's counts and findings.
        alone: the honest stream before; None when it got nothing.
        beside: the honest stream meanwhile; likewise.
        beside_control: the honest stream beside nothing but the attacker's use of CPU time; likewise, and
            None where the server did not outlive the attack.
        exit_code: of the server's process; None while it runs.
        ended: why the honest stream did; None where it goes on.
    """
    findings = list(outcome["first_findings"])
    if exit_code is not None:
        findings.append(f"the server's process ended: exit code {exit_code}")
    if ended is not None:
        findings.append(f"the honest stream ended: {ended}")
    if alone is None or beside is None:
        findings.append("the honest stream got no result at all")
    return {
        **outcome,
        "first_findings": findings,
        "alone": alone and asdict(alone),
        "beside": beside and asdict(beside),
        "beside_control": beside_control and asdict(beside_control),
        "p99_ratio": _find_ratio(beside, alone),
        "p99_ratio_control": _find_ratio(beside_control, alone),
        "p99_ratio_target": LARGEST_RATIOS.get(attack.kind, OTHER_RATIO),
    }


def _find_ratio(first: Health | None, second: Health | None) -> float | None:
    return round(first.p99_ms / second.p99_ms, 2) if first and second else None


def draw_curve(readings_mb: Sequence[float]) -> list[float]:
    """The server's memory at even steps from first to last, so that a reader sees whether growth ends."""
    if not readings_mb:
        return []
    places = np.linspace(0, len(readings_mb) - 1, CURVE_POINTS).round().astype(int)
    return [round(readings_mb[place], 1) for place in places]


def _write_progress(done: int, total: int, seconds: float) -> str:
    left_s = (total - done) * seconds / max(done, 1)
    return f"  {min(done, total)} of {total}, about {left_s:.0f} s left"


def is_good(figures: dict[str, Any]) -> bool:
    """Whether nothing was found."""
    return not any(one["first_findings"] for one in figures["attacks"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack a server and tell what came of it.

    Args:
        arguments: None for those of the process.

    Returns:
        0; 1 when something was found; 2 after an expected failure, which one line on stderr tells.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trocar_bench.hostile",
        description="Attack a server in several ways, and measure an honest live stream beside each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--attack", action="append", choices=ATTACKS, help="one of them; again for more; else all"
    )
    parser.add_argument(
        "--messages", type=int, default=100_000, help="of volume, answered (default %(default)s)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=1_000.0,
        help="malformed messages a second at most, where no limit is lower (default %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of each other attack (default %(default)s)"
    )
    parser.add_argument(
        "--alone", type=float, default=20.0, help="s before each attack (default %(default)s)"
    )
    parser.add_argument("--connections", type=int, default=1_000, help="at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is malformed (default %(default)s)")
    parser.add_argument("--light", action="store_true", help="a server whose tracker computes nothing")
    parser.add_argument("--tls", action="store_true", help="everything over TLS")
    parser.add_argument(
        "--fps", type=float, default=FRAME_RATE_HZ, help="of the honest stream (default %(default)s)"
    )
    parser.add_argument("--objects", type=int, default=2, help="that it tracks (default %(default)s)")
    parser.add_argument(
        "--resolution", type=read_size, default=(640, 360), metavar="WxH", help="of its picture"
    )
    parser.add_argument("--progress", type=float, default=5.0, metavar="S", help="between two lines of it")
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    return run_bench("hostile", lambda say: HostileBench(options, say).run(), is_good)


if __name__ == "__main__":
    sys.exit(main())
