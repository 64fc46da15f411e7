"""Settings, checked once and then immutable; built in `cli.py`, passed to constructors."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from trocar.errors import ConfigError

LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost"})
MEBIBYTE = 1 << 20
LARGEST_OBJECT_ID = 65_535
UHD_8K_PIXELS = 7_680 * 4_320


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsFiles:
    """A server's TLS, all PEM; the files are read again when they change.

    Args:
        certificate: the server's chain.
        key: its private key, without a passphrase.
        client_ca: authority whose certificates clients must show; None asks them for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How the server listens and what it admits.

    Args:
        address: host:port; port 0 takes a free one.
        insecure: do without TLS, or without asking who a client is, where other machines reach the address.
        tls: None listens in plain text.
        clients: JSON file of the clients admitted, see `security.read_allow_list`; None admits everybody
            whose certificate is good.
        metrics_address: host:port of metrics and probes over HTTP; empty for none.
        audit_log: file that gets a line for each stream and prompt; None leaves them to the log.
        trace_every: one frame in so many is traced; 0 traces none.
        max_streams: streams at once.
        max_objects: objects at once in one stream.
        max_objects_total: objects at once in all streams, for each model.
        max_message_bytes: one request; a 4K RGB24 frame takes 25 MB.
        max_picture_pixels: width times height of one picture; guards against decompression bombs.
        max_calls_per_s: of one connection in the long run, of whatever kind; `calls.CALL_BURST` more may come
            at once, or twice `max_streams`.
        max_prompts_per_s: of one stream in the long run; one for each object may come at once.
        max_requests_per_s: of one stream: frames of a live one, and prompts, removals and the like of any;
            beyond that reading waits.
        max_idle_s: silence of a client after which its stream is ended.
        max_unread_s: time for which a client may leave its results unread.
        max_decode_s: time that decoding one packet, or coding one frame's masks, may take.
        max_device_s: time that the device may take over one step.
        max_waiting_packets: received and not yet decoded packets per inter-coded stream; in LATEST more than
            that means that decoding has fallen behind.
        health_interval_s: time between two looks at the device.
        keepalive_time_s: silence after which a peer is pinged.
        keepalive_timeout_s: no answer to the ping for so long, and the peer is gone.
        shutdown_grace_s: time that open streams get to finish after SIGTERM.
    """

    address: str = "127.0.0.1:50051"
    insecure: bool = False
    tls: TlsFiles | None = None
    clients: Path | None = None
    metrics_address: str = ""
    audit_log: Path | None = None
    trace_every: int = 0
    max_streams: int = 8
    max_objects: int = 16
    max_objects_total: int = 64
    max_message_bytes: int = 32 * MEBIBYTE
    max_picture_pixels: int = UHD_8K_PIXELS
    max_calls_per_s: float = 1.0
    max_prompts_per_s: float = 20.0
    max_requests_per_s: float = 150.0
    max_idle_s: float = 300.0
    max_unread_s: float = 30.0
    max_decode_s: float = 10.0
    max_device_s: float = 60.0
    max_waiting_packets: int = 30
    health_interval_s: float = 10.0
    keepalive_time_s: float = 10.0
    keepalive_timeout_s: float = 5.0
    shutdown_grace_s: float = 5.0

    def __post_init__(self) -> None:
        self._check_admission()
        if self.metrics_address:
            split_address(self.metrics_address)
        _check_range("trace_every", self.trace_every, 0, 1 << 31)
        _check_range("max_streams", self.max_streams, 1, 1_024)
        _check_range("max_objects", self.max_objects, 1, LARGEST_OBJECT_ID)
        _check_range("max_objects_total", self.max_objects_total, 1, 1_048_576)
        _check_range("max_message_bytes", self.max_message_bytes, 64 << 10, 512 * MEBIBYTE)
        _check_range("max_picture_pixels", self.max_picture_pixels, 64 * 64, 1 << 28)
        _check_range("max_calls_per_s", self.max_calls_per_s, 0.01, 100_000)
        _check_range("max_prompts_per_s", self.max_prompts_per_s, 0.01, 10_000)
        _check_range("max_requests_per_s", self.max_requests_per_s, 1, 100_000)
        _check_range("max_idle_s", self.max_idle_s, 0.1, 86_400)
        _check_range("max_unread_s", self.max_unread_s, 0.1, 86_400)
        _check_range("max_decode_s", self.max_decode_s, 0.1, 3_600)
        _check_range("max_device_s", self.max_device_s, 0.1, 3_600)
        _check_range("max_waiting_packets", self.max_waiting_packets, 2, 256)
        _check_range("health_interval_s", self.health_interval_s, 0.1, 3_600)
        _check_range("keepalive_time_s", self.keepalive_time_s, 1, 3_600)
        _check_range("keepalive_timeout_s", self.keepalive_timeout_s, 0.1, 3_600)
        _check_range("shutdown_grace_s", self.shutdown_grace_s, 0, 3_600)

    @property
    def is_open(self) -> bool:
        """Whether other machines reach the server in plain text, or without saying who they are."""
        host, _ = split_address(self.address)
        asks_names = self.tls is not None and (self.tls.client_ca is not None or self.clients is not None)
        return not is_loopback(host) and not asks_names

    def _check_admission(self) -> None:
        if self.is_open and not self.insecure:
            raise ConfigError(
                f"address {self.address} is reached by other machines: give --tls-certificate and --tls-key, "
                "and --tls-client-ca or --clients to know who they are; or listen on 127.0.0.1; or pass "
                "--insecure on a network that you trust"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How a client shows who it is, and whom it trusts.

    Args:
        ca: PEM of the authority that signed the server's certificate; None connects in plain text.
        certificate: PEM, the client's own chain, for servers that ask for one.
        key: PEM, its private key.
        token: sent as bearer token.
        insecure: plain text to an address on another machine.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str = field(default="", repr=False)
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a client's certificate and its key belong together: give both or none")
        if self.certificate is not None and self.ca is None:
            raise ConfigError("a client's certificate needs the authority of the server's: give --tls-ca")

    def check(self, address: str) -> None:
        """Refuse to send video, or a token, in plain text to another machine.

        Raises:
            ConfigError: nobody allowed that.
        """
        host, _ = split_address(address)
        if self.ca is None and not self.insecure and not is_loopback(host):
            raise ConfigError(
                f"server {address} is another machine: give --tls-ca, or pass --insecure on a network that "
                "you trust"
            )


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
