"""A proxy that fails on demand: what a dead, a frozen or a vanished server looks like from outside."""

import contextlib
import socket
import struct
import threading
from typing import Self


class Proxy:
    """Forwards TCP to a server for as long as the context lasts."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        self._is_dead = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._flows.set()

    def kill(self) -> None:
        """Reset every connection and refuse new ones, like a process that was killed."""
        self._is_dead = True
        with contextlib.suppress(OSError):
            # Closing alone would leave the port open for as long as `accept` waits.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with contextlib.suppress(OSError):
                # Linger 0 resets instead of closing.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def freeze(self) -> None:
        """Say nothing more, and hang up on nobody."""
        self._flows.clear()

    def _accept(self) -> None:
        while not self._is_dead:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            self.connections += 1
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                self._flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return
