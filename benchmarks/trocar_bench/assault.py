"""One attack on a server, in a process of its own: `python -m trocar_bench.assault KIND ADDRESS`.

`trocar_bench.hostile` starts these, at the lowest priority: on a network the attacker has a machine of his
own. Each line on stdout is JSON: how far it is, and at last what came of it.

    malformed    calls with messages and packets from `malformed`, each to its end; and connections that speak
                 HTTP/2 badly, for as long as said
    volume       the same, until so many messages are answered
    files        weights files from `malformed`, loaded here: what `trocar models import` reads
    flood        streams that send frames as fast as they can and never read a result
    loris        connections that say as little as keeps them open, byte by byte
    connections  so many connections at once, each with a call that asks for nothing
    resets       calls that are cancelled as soon as they begin, without end
    paths        calls of a path that is no text, at which gRPC's own server stops listening
    burn         no attack: nothing is sent, and as much CPU time used as an attack did; what that alone costs
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import resource
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import grpc

from trocar.config import split_address
from trocar.v1 import tracking_pb2 as pb
from trocar_bench.malformed import Case, Mutator

ATTACKS = ("malformed", "volume", "files", "flood", "loris", "connections", "resets", "paths")
CONTROL = "burn"
COUNTED_ATTACKS = ("volume", "files")
"""These end with their count, the others with their time."""
METHOD = "/trocar.v1.TrackingService/Track"
QUESTION = "/trocar.v1.TrackingService/GetServerInfo"
RESET_METHODS = (METHOD, QUESTION, "/grpc.health.v1.Health/Watch", "/trocar.v1.TrackingService/None")
"""Each kind: a stream, a question with one answer, one with many, and none."""
EXPECTED = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""What a call of nonsense may end with; anything else is a defect of ours."""
PASSING = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""What a call may end with while the server listens anew, after a path that is no text; clients try again."""
CALLERS = 3
"""At once; the server admits 8 streams, and the healthy one needs a place."""
CASE_TIMEOUT_S = 20.0
"""A call that is not over by then hangs."""
HTTP2_SHARE = 20
"""One connection of bad HTTP/2 for so many calls."""
REPORT_EVERY_S = 1.0
SHOWN_FINDINGS = 5
FILES_MEMORY_BYTES = 8 << 30
"""A file that claims to be huge must not take the machine."""
DRIBBLE_S = 1.0
FLOODS = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING = 0, 1, 3, 4, 6
ACK = END_STREAM = 1
END_HEADERS = 4
CANCEL = struct.pack(">I", 8)
RESETS_AT_ONCE = 100
BURN_PIECE_S = 0.002
OPENED_PER_S = 200
"""Connections, at the beginning: what is measured is what they cost once they are there."""


class Report:
    """Counts, and tells how far it is.

    Args:
        total: None when time ends the attack.
    """

    def __init__(self, total: int | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self._total = total
        self._told_s = 0.0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Say that the attack begins now."""
        self._told_s = time.monotonic()
        self._say({"done": 0})

    def add(self, what: str, number: int = 1) -> None:
        """Count something, `done` for what brings the end nearer."""
        with self._lock:
            self.counts[what] += number
            now_s = time.monotonic()
            if now_s - self._told_s >= REPORT_EVERY_S:
                self._told_s = now_s
                self._say({"done": self.counts["done"]})

    def find(self, finding: str) -> None:
        """Note a defect."""
        with self._lock:
            self.counts["findings"] += 1
            self.findings.append(finding)

    @property
    def is_done(self) -> bool:
        """Whether as much is done as was asked for."""
        return self._total is not None and self.counts["done"] >= self._total

    def end(self) -> None:
        """Tell what came of it."""
        self._say({"counts": dict(self.counts), "first_findings": self.findings[:SHOWN_FINDINGS]})

    def _say(self, content: dict[str, object]) -> None:
        print(json.dumps(content), flush=True)


# malformed: calls


def attack_with_calls(options: argparse.Namespace, report: Report) -> None:
    """Send cases until the server has answered `--count` messages, or until the time is over."""
    mutator = Mutator(options.seed)
    cases = zip(count(), mutator.cases(), strict=False)
    mutator.good_packets(pb.VIDEO_CODEC_HEVC_ANNEX_B)
    report.begin()
    taking = threading.Lock()
    began_s = time.monotonic()
    seconds = math.inf if options.kind in COUNTED_ATTACKS else options.seconds

    def call() -> None:
        with _open_channel(options) as channel:
            stub = channel.stream_stream(METHOD, None, pb.TrackResponse.FromString)
            while not report.is_done and time.monotonic() - began_s < seconds:
                with taking:
                    number, case = next(cases)
                answered = _run_case(stub, number, case, report)
                if number % HTTP2_SHARE == 0:
                    answered += _speak_badly(options, options.seed + number, report)
                    answered += _ask_badly(channel, options.seed + number, report)
                report.add("done", answered)
                time.sleep(max(began_s + report.counts["done"] / options.rate - time.monotonic(), 0))

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def _run_case(
    stub: "grpc.StreamStreamMultiCallable[bytes, pb.TrackResponse]", number: int, case: Case, report: Report
) -> int:
    """Make one call; returns how many messages were answered, by a result, a refusal or its end."""
    for is_last in (False, True):
        call = stub(iter(case.requests), timeout=CASE_TIMEOUT_S, wait_for_ready=is_last)
        answered = 0
        try:
            for response in call:
                answered += _count_answers(response)
        except grpc.RpcError:
            answered += 1
        code, details = call.code(), call.details() or ""
        report.add(f"{case.kind}.{code.name}")
        if code not in PASSING:
            break
    if code not in EXPECTED:
        report.find(f"case {number} ({case.kind}): {code.name}: {details}")
    return min(answered, len(case.requests))


def _ask_badly(channel: grpc.Channel, seed: int, report: Report) -> int:
    """Ask for the server's description with bytes that are no message, but now and then by chance."""
    ask = channel.unary_unary(QUESTION, None, None)
    for is_last in (False, True):
        code = grpc.StatusCode.OK
        try:
            question = Mutator(seed).damage(METHOD.encode())
            ask(question, timeout=CASE_TIMEOUT_S, wait_for_ready=is_last)
        except grpc.RpcError as error:
            code = error.code()
        report.add(f"question.{code.name}")
        if code not in PASSING:
            break
    if code not in EXPECTED:
        report.find(f"question {seed}: {code.name}")
    return 1


def _count_answers(response: pb.TrackResponse) -> int:
    match response.WhichOneof("response"):
        case "frame_result":
            return 1 + len(response.frame_result.dropped_frame_ids)
        case "stream_warning":
            reason = response.stream_warning.reason
            is_answer = reason in (pb.WARNING_REASON_UNKNOWN_OBJECT, pb.WARNING_REASON_UNKNOWN_FRAME)
            return len(response.stream_warning.lost_frame_ids) + is_answer
        case "stream_opened" | "prompt_accepted" | "prompt_rejected":
            return 1
        case _:
            return 0


def _open_channel(options: argparse.Namespace) -> grpc.Channel:
    # A server that is gone must show, not be waited for; and each caller has a connection of his own.
    settings = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    if options.ca is None:
        return grpc.insecure_channel(options.address, settings)
    return grpc.secure_channel(
        options.address, grpc.ssl_channel_credentials(options.ca.read_bytes()), settings
    )


# malformed: HTTP/2


def _speak_badly(options: argparse.Namespace, seed: int, report: Report) -> int:
    """Send a damaged HTTP/2 conversation over a connection of its own; the server should hang up."""
    mutator = Mutator(seed)
    opening = next(mutator.cases()).requests[0]
    good = b"".join(
        (begin_call(1), frame(DATA, END_STREAM, 1, b"\x00" + struct.pack(">I", len(opening)) + opening))
    )
    # The greeting whole, else nothing after it is looked at; now and then not even that.
    data = PREFACE + frame(SETTINGS) + mutator.damage(good) if seed % 4 else mutator.damage(PREFACE + good)
    try:
        with _connect(options) as one:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            while one.recv(65_536):
                pass
    except TimeoutError:
        report.find(f"seed {seed}: the server keeps a broken connection for {CASE_TIMEOUT_S:g} s")
    except OSError:
        pass  # hung up on while it was still speaking
    report.add("http2")
    return 1


def _connect(options: argparse.Namespace) -> socket.socket:
    one = socket.create_connection(split_address(options.address), CASE_TIMEOUT_S)
    return one if options.ca is None else _tls_context(options).wrap_socket(one)


def _tls_context(options: argparse.Namespace) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(options.ca))
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    return context


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def begin_call(stream: int, *, flags: int = END_HEADERS, path: bytes = METHOD.encode()) -> bytes:
    """The frame that begins a call."""
    headers = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    # HPACK (RFC 7541, section 6.2.2): literal fields without indexing; all are shorter than 127 bytes.
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in headers.items()
    )
    return frame(HEADERS, flags, stream, block)


# files


def attack_with_files(options: argparse.Namespace, report: Report) -> None:
    """Load `--count` damaged weights files; each must be refused, or hold what it says."""
    # Only this attack needs them, and they take seconds and memory.
    from trocar_engines.errors import CheckpointError
    from trocar_engines.network.config import network_config
    from trocar_engines.network.sam2s import SAM2S
    from trocar_engines.network.weights import load_weights

    resource.setrlimit(resource.RLIMIT_AS, (FILES_MEMORY_BYTES, FILES_MEMORY_BYTES))
    network = SAM2S(network_config("sam2s-nano"))
    report.begin()
    with tempfile.TemporaryDirectory() as folder:
        for number, (suffix, data) in enumerate(islice(Mutator(options.seed).files(), options.count)):
            path = Path(folder, f"weights{suffix}")
            path.write_bytes(data)
            try:
                load_weights(network, path)
            except CheckpointError:
                report.add("refused")
            except Exception as error:
                report.find(f"file {number}{suffix}: {type(error).__name__}: {error}")
            else:
                report.find(f"file {number}{suffix}: loaded, and holds none of the network's weights")
            report.add("done")


# flood


def attack_with_floods(options: argparse.Namespace, report: Report) -> None:
    """Open streams that never read, half of them live, and open each again when the server ends it."""
    packets = Mutator(options.seed).good_packets(pb.VIDEO_CODEC_H264_ANNEX_B)
    report.begin()
    end_s = time.monotonic() + options.seconds

    def flood(delivery: pb.Delivery.ValueType) -> None:
        with _open_channel(options) as channel:
            stub = channel.stream_stream(METHOD, None, None)
            while (left_s := end_s - time.monotonic()) > 0:
                call = stub(_list_flood(packets, delivery, end_s, report), timeout=left_s)
                with contextlib.suppress(grpc.RpcError):
                    # Waits for the end without taking any of the results.
                    call.code()
                report.add("calls")

    floods = [
        threading.Thread(target=flood, args=((pb.DELIVERY_LATEST, pb.DELIVERY_EVERY)[number % 2],))
        for number in range(FLOODS)
    ]
    for one in floods:
        one.start()
    for one in floods:
        one.join()


def _list_flood(
    packets: Sequence[bytes], delivery: pb.Delivery.ValueType, end_s: float, report: Report
) -> Iterator[bytes]:
    video = pb.VideoFormat(codec=pb.VIDEO_CODEC_H264_ANNEX_B)
    opening = pb.TrackRequest(open_stream=pb.OpenStream(video=video, delivery=delivery))
    yield opening.SerializeToString()
    for frame_id in count():
        if time.monotonic() >= end_s:
            return
        video_frame = pb.VideoFrame(frame_id=frame_id, payload=packets[frame_id % len(packets)])
        yield pb.TrackRequest(video_frame=video_frame).SerializeToString()
        report.add("done")


# connections: raw sockets on one event loop


class Peer:
    """One HTTP/2 connection that does no more than it must: it answers settings and pings.

    Args:
        reader: from the server.
        writer: to it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def answer(self) -> None:
        """Answer until the server hangs up."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                if head[3] in (SETTINGS, PING) and not head[4] & ACK:
                    self.writer.write(frame(head[3], ACK, 0, payload if head[3] == PING else b""))

    async def listen(self) -> None:
        """Say nothing until the server hangs up."""
        with contextlib.suppress(OSError):
            while await self._reader.read(65_536):
                pass


Behaviour = Callable[[Peer], Coroutine[Any, Any, None]]


async def dribble_greeting(peer: Peer) -> None:
    """A byte of the greeting now and then."""
    for octet in PREFACE:
        peer.writer.write(bytes([octet]))
        await asyncio.sleep(DRIBBLE_S)


async def stay_half_open(peer: Peer) -> None:
    """The greeting, and never a word again: no settings are acknowledged, no ping is answered."""
    peer.writer.write(PREFACE + frame(SETTINGS))
    await peer.listen()


async def leave_headers_open(peer: Peer) -> None:
    """Headers whose rest never comes."""
    peer.writer.write(PREFACE + frame(SETTINGS) + begin_call(1, flags=0))
    await peer.answer()


async def dribble_message(peer: Peer) -> None:
    """A call whose first message is announced as large and comes byte by byte."""
    peer.writer.write(PREFACE + frame(SETTINGS) + begin_call(1))
    peer.writer.write(frame(DATA, 0, 1, b"\x00" + struct.pack(">I", 1 << 20)))
    answering = asyncio.ensure_future(peer.answer())
    while not answering.done():
        peer.writer.write(frame(DATA, 0, 1, b"\x0a"))
        await asyncio.sleep(DRIBBLE_S)


async def call_for_nothing(peer: Peer) -> None:
    """A call that sends nothing, and the connection for as long as the server keeps it."""
    peer.writer.write(PREFACE + frame(SETTINGS) + begin_call(1))
    await peer.answer()


async def reset_calls(peer: Peer) -> None:
    """Calls that are cancelled at once, as fast as they go."""
    peer.writer.write(PREFACE + frame(SETTINGS))
    answering = asyncio.ensure_future(peer.answer())
    for first in range(1, 2**31, 2 * RESETS_AT_ONCE):
        peer.writer.write(write_resets(first))
        await peer.writer.drain()
        # `drain` returns at once while there is room: without this nothing else would have its turn.
        await asyncio.sleep(0)
        if answering.done():
            return


def write_resets(first: int) -> bytes:
    """So many calls from HTTP/2 stream `first` on, each cancelled at once."""
    streams = range(first, first + 2 * RESETS_AT_ONCE, 2)
    methods = itertools.cycle(RESET_METHODS)
    return b"".join(
        begin_call(one, path=method.encode()) + frame(RST_STREAM, 0, one, CANCEL)
        for one, method in zip(streams, methods, strict=False)
    )


async def call_no_text(peer: Peer) -> None:
    """A call whose path is no text."""
    peer.writer.write(PREFACE + frame(SETTINGS) + begin_call(1, path=b"/\xff"))
    await peer.answer()


LORIS: tuple[Behaviour, ...] = (dribble_greeting, stay_half_open, leave_headers_open, dribble_message)


async def attack_with_connections(
    options: argparse.Namespace, report: Report, behaviours: Sequence[Behaviour], number: int
) -> None:
    """Hold connections for `--seconds`, and open each again when the server closes it."""
    host, port = split_address(options.address)
    context = None if options.ca is None else _tls_context(options)

    async def hold(behave: Behaviour, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            # Raw bytes under TLS would not even be looked at: the greeting is then a handshake that stalls.
            is_raw = behave is dribble_greeting
            try:
                reader, writer = await asyncio.open_connection(host, port, ssl=None if is_raw else context)
            except (OSError, ssl.SSLError):
                report.add("refused")
                await asyncio.sleep(DRIBBLE_S)
                continue
            report.add("opened")
            report.counts["open"] += 1
            report.counts["most_open"] = max(report.counts["most_open"], report.counts["open"])
            with contextlib.suppress(OSError):
                await behave(Peer(reader, writer))
            report.counts["open"] -= 1
            writer.close()
            report.add("closed")
            await asyncio.sleep(DRIBBLE_S)

    report.begin()
    tasks = [
        asyncio.ensure_future(hold(behaviours[index % len(behaviours)], index / OPENED_PER_S))
        for index in range(number)
    ]
    end_s = time.monotonic() + options.seconds
    while (left_s := end_s - time.monotonic()) > 0:
        await asyncio.sleep(min(left_s, REPORT_EVERY_S))
        report.add("seconds")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# control


def burn(options: argparse.Namespace, report: Report) -> None:
    """Use `--cpu-percent` of a core for `--seconds`, in short pieces, as callers do."""
    report.begin()
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    while (passed_s := time.monotonic() - began_s) < options.seconds:
        if time.process_time() - began_cpu_s >= passed_s * options.cpu_percent / 100:
            time.sleep(BURN_PIECE_S)
        report.add("done")


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack, and tell what came of it; a defect is a finding, not a failure of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m trocar_bench.assault", description="One attack on a server; see trocar_bench.hostile."
    )
    parser.add_argument("kind", choices=(*ATTACKS, CONTROL))
    parser.add_argument("address", help="host:port")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="PEM of the server's authority")
    parser.add_argument("--count", type=int, default=1_000, help="messages, files or connections")
    parser.add_argument("--rate", type=float, default=1e9, help="messages a second at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the attacks without a count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-percent", type=float, default=100.0, help="of one core, for burn")
    options = parser.parse_args(arguments)
    os.nice(19)
    report = Report(options.count if options.kind in COUNTED_ATTACKS else None)
    match options.kind:
        case "malformed" | "volume":
            attack_with_calls(options, report)
        case "files":
            attack_with_files(options, report)
        case "flood":
            attack_with_floods(options, report)
        case "burn":
            burn(options, report)
        case kind:
            behaviours = {
                "loris": LORIS,
                "connections": (call_for_nothing,),
                "resets": (reset_calls,),
                "paths": (call_no_text,),
            }[kind]
            asyncio.run(attack_with_connections(options, report, behaviours, options.count))
    report.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
