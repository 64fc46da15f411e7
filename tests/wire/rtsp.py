"""A camera: just enough RTSP (RFC 2326, interleaved in TCP) and RTP for H.264 (RFC 6184) for one viewer."""

import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Self

SDP = "\r\n".join(
    [
        "v=0",
        "o=- 0 0 IN IP4 127.0.0.1",
        "s=camera",
        "t=0 0",
        "m=video 0 RTP/AVP 96",
        "c=IN IP4 0.0.0.0",
        "a=rtpmap:96 H264/90000",
        "a=fmtp:96 packetization-mode=1",
        "a=control:track0",
        "",
    ]
)
LARGEST_PAYLOAD = 1_300
FU_A = 28


class Camera:
    """Serves access units at a frame rate to the first viewer, then hangs up."""

    def __init__(self, access_units: Sequence[bytes], *, rate: int = 30) -> None:
        self._access_units = access_units
        self._rate = rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="camera")
        self.url = f"rtsp://127.0.0.1:{self._listener.getsockname()[1]}/live"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Wakes the thread where no viewer has come.
        self._listener.close()
        self._thread.join(10)

    def _serve(self) -> None:
        try:
            viewer, _ = self._listener.accept()
        except OSError:
            return
        # A viewer may leave at any time.
        with viewer, suppress(ConnectionError):
            for request in iter_requests(viewer):
                method, sequence = request.split(" ", 1)[0], find_header(request, "CSeq")
                viewer.sendall(answer(method, sequence).encode())
                if method == "PLAY":
                    self._play(viewer)
                    return

    def _play(self, viewer: socket.socket) -> None:
        number = 0
        started = time.monotonic()
        for index, access_unit in enumerate(self._access_units):
            time.sleep(max(0.0, started + index / self._rate - time.monotonic()))
            payloads = list(packetize(access_unit))
            for payload in payloads:
                is_last = payload is payloads[-1]
                header = struct.pack(
                    "!BBHII", 0x80, 96 | (is_last << 7), number & 0xFFFF, index * 90_000 // self._rate, 7
                )
                packet = header + payload
                viewer.sendall(struct.pack("!cBH", b"$", 0, len(packet)) + packet)
                number += 1


def iter_requests(viewer: socket.socket) -> Iterator[str]:
    pending = b""
    while data := viewer.recv(4096):
        pending += data
        while b"\r\n\r\n" in pending:
            request, pending = pending.split(b"\r\n\r\n", 1)
            yield request.decode()


def find_header(request: str, name: str) -> str:
    return next(
        line.split(":", 1)[1].strip() for line in request.split("\r\n") if line.startswith(name + ":")
    )


def answer(method: str, sequence: str) -> str:
    head = f"RTSP/1.0 200 OK\r\nCSeq: {sequence}\r\nSession: 1\r\n"
    if method == "OPTIONS":
        return head + "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n"
    if method == "DESCRIBE":
        return head + f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n\r\n{SDP}"
    if method == "SETUP":
        return head + "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n\r\n"
    return head + "\r\n"


def packetize(access_unit: bytes) -> Iterator[bytes]:
    for unit in access_unit.replace(b"\x00\x00\x00\x01", b"\x00\x00\x01").split(b"\x00\x00\x01")[1:]:
        if len(unit) <= LARGEST_PAYLOAD:
            yield unit
            continue
        indicator, kind, body = unit[0] & 0xE0 | FU_A, unit[0] & 0x1F, unit[1:]
        for start in range(0, len(body), LARGEST_PAYLOAD):
            is_first, is_last = start == 0, start + LARGEST_PAYLOAD >= len(body)
            header = bytes([indicator, kind | is_first << 7 | is_last << 6])
            yield header + body[start : start + LARGEST_PAYLOAD]
