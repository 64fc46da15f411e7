"""Settings, checked once and then immutable; built in `cli.py`, passed to constructors."""

import ipaddress
from dataclasses import dataclass

from trocar.errors import ConfigError

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})
MEBIBYTE = 1 << 20
LARGEST_OBJECT_ID = 65_535
UHD_8K_PIXELS = 7_680 * 4_320


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How the server listens and what it admits.

    Args:
        address: host:port; port 0 takes a free one.
        insecure: listen without TLS on an address that other machines reach.
        max_streams: streams at once.
        max_objects: objects at once in one stream.
        max_message_bytes: one request; a 4K RGB24 frame takes 25 MB.
        max_picture_pixels: width times height of one picture; guards against decompression bombs.
        max_waiting_packets: received and not yet decoded packets per inter-coded stream; in LATEST more than
            that means that decoding has fallen behind.
        keepalive_time_s: silence after which a peer is pinged.
        keepalive_timeout_s: no answer to the ping for so long, and the peer is gone.
        shutdown_grace_s: time that open streams get to finish after SIGTERM.
    """

    address: str = "127.0.0.1:50051"
    insecure: bool = False
    max_streams: int = 8
    max_objects: int = 16
    max_message_bytes: int = 32 * MEBIBYTE
    max_picture_pixels: int = UHD_8K_PIXELS
    max_waiting_packets: int = 30
    keepalive_time_s: float = 10.0
    keepalive_timeout_s: float = 5.0
    shutdown_grace_s: float = 5.0

    def __post_init__(self) -> None:
        host, _ = split_address(self.address)
        if not self.insecure and not is_loopback(host):
            raise ConfigError(
                f"address {self.address} is reached by other machines, and this release has no TLS: listen "
                "on 127.0.0.1, or pass --insecure on a network that you trust"
            )
        _check_range("max_streams", self.max_streams, 1, 1_024)
        _check_range("max_objects", self.max_objects, 1, LARGEST_OBJECT_ID)
        _check_range("max_message_bytes", self.max_message_bytes, 64 << 10, 512 * MEBIBYTE)
        _check_range("max_picture_pixels", self.max_picture_pixels, 64 * 64, 1 << 28)
        _check_range("max_waiting_packets", self.max_waiting_packets, 2, 256)
        _check_range("keepalive_time_s", self.keepalive_time_s, 1, 3_600)
        _check_range("keepalive_timeout_s", self.keepalive_timeout_s, 0.1, 3_600)
        _check_range("shutdown_grace_s", self.shutdown_grace_s, 0, 3_600)


def split_address(address: str) -> tuple[str, int]:
    """Split host:port; an IPv6 host stands in brackets.

    Raises:
        ConfigError: it is not of that form.
    """
    host, colon, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isdecimal() or int(port) > 65_535 or (":" in host and not is_bracketed):
        raise ConfigError(f"address {address!r}: expected host:port, such as 127.0.0.1:50051 or [::1]:50051")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches the host."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_range(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ConfigError(f"{name} is {value}: expected {lowest} to {highest}")
