"""`trocar ui`: the surgeon's page and its gateway, over HTTP."""

import asyncio
import datetime
import ipaddress
import signal
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from trocar.config import Access, is_loopback, split_address
from trocar.errors import ConfigError
from trocar.gateway import Gateway, SourceEntry
from trocar.operation import open_operation
from trocar.sources import open_source

WEB = Path(__file__).parent / "web"
LARGEST_MESSAGE_BYTES = 32 << 20
CERTIFICATE_DAYS = 397
"""Browsers refuse certificates that are valid for longer."""
HEADERS = {
    # Everything the page needs comes from here; nothing inline runs.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # A page of another version than its gateway misreads it.
    "cache-control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class UiConfig:
    """How the page is served.

    Args:
        address: host:port; port 0 takes a free one.
        sources: files, folders and rtsp:// URLs that the page may choose, as `open_source` reads them.
        cache: folder that keeps the built-in operation.
        is_self_signed: https with a certificate made at the start.
        certificate: PEM file, for https.
        key: PEM file of its key.
        access: to the tracking server.
        hold_ms: how long a picture waits for its masks; what comes later is never drawn.
    """

    address: str
    sources: tuple[str, ...] = ()
    cache: Path
    hold_ms: int = 150
    is_self_signed: bool = False
    certificate: Path | None = None
    key: Path | None = None
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        host, _ = split_address(self.address)
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a certificate and its key belong together: give both --cert and --key")
        if self.certificate is not None and self.is_self_signed:
            raise ConfigError("--self-signed beside --cert: choose one of them")
        if not self.is_secure and not is_loopback(host):
            raise ConfigError(
                f"address {self.address} is reached by other machines, and browsers give a page no camera "
                "and no video coder without https there: add --self-signed, or --cert and --key"
            )
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path} is no file: expected a certificate and a key in PEM form")

    @property
    def is_secure(self) -> bool:
        """Whether the page is served over https."""
        return self.is_self_signed or self.certificate is not None


class UiServer:
    """Serves the page until stopped.

    Args:
        config: how.
        server: host:port of the tracking server.
        folder: an existing one of our own, for what waits to be taken away.
        sources: instead of those of the configuration, for tests.
    """

    def __init__(
        self, config: UiConfig, server: str, folder: Path, sources: tuple[SourceEntry, ...] | None = None
    ) -> None:
        host, port = split_address(config.address)
        self._config = config
        self.fingerprint = ""
        certificate, key = config.certificate, config.key
        if config.is_self_signed:
            certificate, key = folder / "certificate.pem", folder / "key.pem"
            self.fingerprint = make_certificate(certificate, key, host)
        entries = sources if sources is not None else list_sources(config)
        gateway = Gateway(server, entries, folder, hold_ms=config.hold_ms, access=config.access)
        self._uvicorn = _Server(
            uvicorn.Config(
                make_app(gateway, host),
                host=host,
                port=port,
                ssl_certfile=certificate,
                ssl_keyfile=key,
                # The other implementation that uvicorn knows is deprecated by its own makers.
                ws="websockets-sansio",
                ws_max_size=LARGEST_MESSAGE_BYTES,
                # Video does not shrink, and the attempt costs a core.
                ws_per_message_deflate=False,
                ws_ping_interval=5.0,
                ws_ping_timeout=10.0,
                log_level="warning",
                lifespan="off",
                timeout_graceful_shutdown=3,
            )
        )

    @property
    def url(self) -> str:
        """Where to open it, once `on_ready` was called."""
        host, _ = split_address(self._config.address)
        scheme = "https" if self._config.is_secure else "http"
        shown = f"[{host}]" if ":" in host else host
        return f"{scheme}://{shown}:{self._uvicorn.port}"

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._uvicorn.should_exit = True

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serve until `stop` or a signal.

        Raises:
            ConfigError: the address is taken or not ours, or the certificate does not fit its key.
        """
        try:
            self._uvicorn.config.load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the certificate cannot be used: {error}") from error
        self._uvicorn.on_ready = on_ready
        try:
            asyncio.run(self._uvicorn.serve())
        except SystemExit:
            raise ConfigError(
                f"cannot listen on {self._config.address}: taken, or not an address of this machine"
            ) from None


class _Server(uvicorn.Server):
    """Says when it listens, and on which port."""

    on_ready: Callable[[], None]
    port = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT; uvicorn would raise them again afterwards, and nothing be tidied up."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: "list[object] | None" = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self.port = self.servers[0].sockets[0].getsockname()[1]
            self.on_ready()


def list_sources(config: UiConfig) -> tuple[SourceEntry, ...]:
    """What the page may choose on this side; a page can name none that is not listed."""
    entries = [
        SourceEntry(
            source_id="operation",
            label="Built-in operation",
            kind="operation",
            open=lambda on_progress: open_operation(config.cache, on_progress),
        )
    ]
    for index, text in enumerate(config.sources):
        is_camera = "://" in text
        entries.append(
            SourceEntry(
                source_id=f"source-{index}",
                label=_name_source(text),
                kind="camera" if is_camera else "file",
                open=lambda _, text=text: open_source(text),  # type: ignore[misc]
            )
        )
    return tuple(entries)


def make_app(gateway: Gateway, host: str) -> ASGIApp:
    """Make the web application.

    Args:
        gateway: behind the WebSocket.
        host: that is listened on; on a loopback address no other Host header is answered.
    """

    async def show_page(_: Request) -> Response:
        return FileResponse(WEB / "index.html")

    async def hand_out(request: Request) -> Response:
        path = gateway.backstage.archives.pop(request.path_params["token"], None)
        if path is None:
            return PlainTextResponse("This archive was taken away already: record again.", 404)
        return FileResponse(
            path, filename="trocar.zip", background=BackgroundTask(path.unlink, missing_ok=True)
        )

    async def serve_page(websocket: WebSocket) -> None:
        await gateway.serve(websocket)

    app = Starlette(
        routes=[
            Route("/", show_page),
            Route("/takeaway/{token}.zip", hand_out),
            WebSocketRoute("/gateway", serve_page),
            Mount("/web", StaticFiles(directory=WEB)),
        ]
    )
    return _Guard(app, only_loopback=is_loopback(host))


class _Guard:
    """Adds the security headers, and turns away pages of other sites.

    A foreign page can reach a server on its visitor's machine: by WebSocket, which no browser restricts, and
    through a name that its owner lets point to 127.0.0.1. Origin and Host give both away.
    """

    def __init__(self, app: ASGIApp, *, only_loopback: bool) -> None:
        self._app = app
        self._only_loopback = only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_ours(scope):
            await PlainTextResponse("Open this page by the address that trocar ui printed.", 403)(
                scope, receive, send
            )
            return
        if scope["type"] == "websocket" and not self._is_ours(scope):
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, send_guarded)

    def _is_ours(self, scope: Scope) -> bool:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._only_loopback and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return False
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc == host


def make_certificate(certificate: Path, key: Path, host: str) -> str:
    """Make a self-signed certificate for this machine's names.

    Args:
        certificate: PEM file to write.
        key: PEM file to write, readable by its owner only.
        host: that is listened on.

    Returns:
        SHA-256 fingerprint, as browsers show it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    machine = socket.gethostname()
    if machine.isascii():
        names.append(x509.DNSName(machine))
    addresses = {"127.0.0.1", host, *_own_addresses()}
    for text in sorted(addresses):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(text)))
        except ValueError:
            names.append(x509.DNSName(text))
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Trocar")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(private, hashes.SHA256())
    )
    key.touch(mode=0o600)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    return built.fingerprint(hashes.SHA256()).hex(":").upper()


def serve_ui(config: UiConfig, server: str, say: Callable[[str], None]) -> None:
    """Serve the page until a signal comes; what waits to be taken away goes with it.

    Args:
        config: how.
        server: host:port of the tracking server.
        say: called with lines for people.
    """
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="trocar-ui-")))
        ui = UiServer(config, server, folder)

        def announce() -> None:
            say(f"open {ui.url} in a browser; Ctrl-C stops")
            if ui.fingerprint:
                say(
                    "the certificate was made just now and nobody vouches for it: the browser will warn. "
                    f"Go on only if it shows this SHA-256 fingerprint: {ui.fingerprint}"
                )

        ui.run(announce)


def _name_source(text: str) -> str:
    """What people call a source: a file's name, or an address without the credentials in it."""
    if "://" not in text:
        return Path(text).name
    parts = urlsplit(text)
    return f"{parts.hostname or ''}{parts.path}"


def _own_addresses() -> set[str]:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return set()
    # A link-local address carries its interface after a percent sign.
    return {str(entry[4][0]).partition("%")[0] for entry in found}
