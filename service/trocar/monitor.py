"""Metrics and probes over HTTP, on a port of their own: /metrics, /livez, /readyz."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from trocar.config import split_address
from trocar.errors import ConfigError

REQUEST_TIMEOUT_S = 5.0
"""For a peer that connects and says nothing."""


class Monitor:
    """Answers until it is closed.

    Args:
        address: host:port; port 0 takes a free one.
        registry: what /metrics shows.
        is_live: whether the process should go on.
        is_ready: whether streams are taken.

    Raises:
        ConfigError: the address is taken or not ours.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        *,
        is_live: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        host, port = split_address(address)
        try:
            self._server = ThreadingHTTPServer((host, port), _make_handler(registry, is_live, is_ready))
        except OSError as error:
            raise ConfigError(f"cannot listen on {address} for metrics: {error.strerror}") from error
        self._server.daemon_threads = True
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="trocar-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _make_handler(
    registry: CollectorRegistry, is_live: Callable[[], bool], is_ready: Callable[[], bool]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            """Answer one request."""
            match self.path:
                case "/metrics":
                    self._answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
                case "/livez":
                    self._answer_probe(is_live())
                case "/readyz":
                    self._answer_probe(is_ready())
                case _:
                    self._answer(HTTPStatus.NOT_FOUND, b"/metrics, /livez, /readyz\n")

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Say nothing: a probe every few seconds is no news."""

        def _answer_probe(self, is_good: bool) -> None:
            status = HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, b"ok\n" if is_good else b"not now\n")

        def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
