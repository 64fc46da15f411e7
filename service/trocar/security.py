"""Who may open what: TLS for both sides, client names, allow-list, tokens, and rates.

A client is named by its certificate (subject alternative names, or the common name where it has none) or, on
a server without client certificates, by the bearer token that it sends. Reasons for a refusal stay in the
server's log: a peer that is not admitted learns only that.
"""

import hashlib
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from trocar.config import ServerConfig, TlsFiles
from trocar.errors import ConfigError, ForbiddenError, NotAdmittedError

LOCAL_CLIENT = "local"
"""Name of everybody on a server that asks nobody who he is: loopback, or --insecure."""
BEARER = "Bearer "
SHORTEST_TOKEN = 16
CLIENT_KEYS = {"max_streams", "models", "token_sha256"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRights:
    """What one client may do.

    Args:
        name: from its certificate, or of its token.
        max_streams: at once; None for the server's own limit.
        models: that it may open; None for all.
    """

    name: str
    max_streams: int | None = None
    models: frozenset[str] | None = None

    def check_model(self, model: str) -> None:
        """Refuse a model that is not on the client's list.

        Raises:
            ForbiddenError: it is not.
        """
        if self.models is not None and model not in self.models:
            listed = ", ".join(sorted(self.models)) or "none"
            raise ForbiddenError(f"client {self.name} may not open model {model!r}: its models are {listed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowList:
    """The clients that a server admits.

    Args:
        by_name: rights by name.
        by_token: rights by SHA-256 of the token, hexadecimal.
    """

    by_name: Mapping[str, ClientRights]
    by_token: Mapping[str, ClientRights]


def read_allow_list(path: Path) -> AllowList:
    """Read a JSON file of clients.

        {"clients": {"or-3.example": {"max_streams": 2, "models": ["sam2s-nano"]},
                     "page": {"token_sha256": "9f86d081…"}}}

    Raises:
        ConfigError: it cannot be read, or has a key or value that means nothing.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"clients file {path}: {error}") from error
    if (
        not isinstance(content, dict)
        or set(content) != {"clients"}
        or not isinstance(content["clients"], dict)
    ):
        raise ConfigError(f'clients file {path}: expected {{"clients": {{NAME: {{…}}}}}}')
    by_name, by_token = {}, {}
    for name, entry in content["clients"].items():
        rights = _read_rights(path, name, entry)
        by_name[name] = rights
        if "token_sha256" in entry:
            by_token[_read_token_hash(path, name, entry["token_sha256"])] = rights
    return AllowList(by_name=by_name, by_token=by_token)


def _read_rights(path: Path, name: str, entry: Any) -> ClientRights:
    if not isinstance(entry, dict) or not set(entry) <= CLIENT_KEYS:
        raise ConfigError(f"clients file {path}: {name}: expected some of {', '.join(sorted(CLIENT_KEYS))}")
    max_streams, models = entry.get("max_streams"), entry.get("models")
    if max_streams is not None and (type(max_streams) is not int or max_streams < 0):
        raise ConfigError(f"clients file {path}: {name}: max_streams is {max_streams!r}: expected 0 or more")
    if models is not None and not (isinstance(models, list) and all(isinstance(one, str) for one in models)):
        raise ConfigError(f"clients file {path}: {name}: models is {models!r}: expected a list of names")
    return ClientRights(
        name=name, max_streams=max_streams, models=None if models is None else frozenset(models)
    )


def _read_token_hash(path: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or not set(value.lower()) <= set("0123456789abcdef"):
        raise ConfigError(f"clients file {path}: {name}: token_sha256: expected 64 hexadecimal digits")
    return value.lower()


def hash_token(token: str) -> str:
    """SHA-256 of a bearer token, hexadecimal, as the clients file has it."""
    return hashlib.sha256(token.encode()).hexdigest()


class _Watched:
    """Files whose content is read anew when one of them changes; a bad change keeps the last good content."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._seen: tuple[tuple[int, int, int], ...] | None = None

    def has_changed(self) -> bool:
        """Tell whether a file is another one than at the last call; true at the first."""
        try:
            states = [path.stat() for path in self._paths]
        except OSError as error:
            # In the middle of a rotation a file may be missing for a moment.
            log.warning("cannot look at %s: %s", error.filename, error.strerror)
            return False
        # The inode too: a rotation by rename may keep size and time.
        seen = tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in states)
        is_new, self._seen = seen != self._seen, seen
        return is_new


class Certificates:
    """The server's certificate and its clients' authority, read again when the files change.

    Args:
        files: PEM.

    Raises:
        ConfigError: they cannot be read, or certificate and key do not belong together.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._watched = _Watched(
            path for path in (files.certificate, files.key, files.client_ca) if path is not None
        )
        self._lock = threading.Lock()
        self._watched.has_changed()
        self._current = self._read()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that look at the files at each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._current, self._fetch, require_client_authentication=self._files.client_ca is not None
        )

    def _fetch(self) -> Any:
        """Runs in gRPC's threads, once for each handshake."""
        with self._lock:
            if self._watched.has_changed():
                try:
                    self._current = self._read()
                    log.info("read the certificate %s again", self._files.certificate)
                except ConfigError as error:
                    log.error("keeping the former certificate: %s", error)
            return self._current

    def _read(self) -> Any:
        files = self._files
        try:
            # gRPC would accept a key that does not fit and then refuse every handshake.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(files.certificate, files.key, password=_refuse_password)
            if files.client_ca is not None:
                context.load_verify_locations(files.client_ca)
            authority = None if files.client_ca is None else files.client_ca.read_bytes()
            pair = (files.key.read_bytes(), files.certificate.read_bytes())
        except (OSError, ValueError) as error:
            message = f"TLS files {files.certificate}, {files.key}, {files.client_ca}: {error}"
            raise ConfigError(message) from error
        return grpc.ssl_server_certificate_configuration([pair], authority)


class Gate:
    """Tells who a peer is and what it may do.

    Args:
        config: of the server.

    Raises:
        ConfigError: the clients file cannot be read.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._has_names = config.tls is not None and config.tls.client_ca is not None
        self._path = config.clients
        self._allowed: AllowList | None = None
        if self._path is not None:
            self._watched = _Watched([self._path])
            self._watched.has_changed()
            self._allowed = read_allow_list(self._path)

    def admit(
        self, names: Iterable[str], metadata: Iterable[tuple[str, str | bytes]], peer: str
    ) -> ClientRights:
        """Find a peer's rights.

        Args:
            names: that its certificate proves.
            metadata: of its call.
            peer: its address, for the log.

        Raises:
            NotAdmittedError: it is nobody that is admitted.
        """
        allowed = self._read_again()
        if self._has_names:
            return self._admit_name(tuple(names), allowed, peer)
        if allowed is None:
            return ClientRights(name=LOCAL_CLIENT)
        token = _find_token(metadata)
        if not token:
            raise NotAdmittedError(f"{peer} sends no bearer token", is_known=False)
        # A look-up by hash: what its time tells is about the hash, not about the token.
        rights = allowed.by_token.get(hash_token(token))
        if rights is None:
            raise NotAdmittedError(f"{peer} sends a bearer token of nobody", is_known=False)
        return rights

    def _admit_name(self, names: tuple[str, ...], allowed: AllowList | None, peer: str) -> ClientRights:
        if not names:
            raise NotAdmittedError(f"{peer} has a certificate without a name", is_known=False)
        if allowed is None:
            return ClientRights(name=names[0])
        for name in names:
            if name in allowed.by_name:
                return allowed.by_name[name]
        raise NotAdmittedError(f"{peer} is {', '.join(names)}, which the clients file lacks", is_known=True)

    def _read_again(self) -> AllowList | None:
        if self._path is not None and self._watched.has_changed():
            try:
                self._allowed = read_allow_list(self._path)
                log.info("read the clients file %s again", self._path)
            except ConfigError as error:
                log.error("keeping the former clients: %s", error)
        return self._allowed


class Rate:
    """Lets through so many a second in the long run.

    Args:
        per_s: in the long run.
        burst: at once, on top of one second's.
        clock: monotonic, s.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._capacity = per_s + burst
        self._left = self._capacity
        self._clock = clock
        self._filled_s = clock()

    def take(self) -> bool:
        """Take one's share; False when there is none."""
        self._fill()
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def borrow_s(self) -> float:
        """Take one's share, if need be from what is still to come; returns how long to wait for that, s."""
        self._fill()
        self._left -= 1
        return max(-self._left / self._per_s, 0.0)

    def give_back(self) -> None:
        """Undo what was taken or borrowed last."""
        self._left += 1

    def _fill(self) -> None:
        now_s = self._clock()
        self._left = min(self._capacity, self._left + (now_s - self._filled_s) * self._per_s)
        self._filled_s = now_s


def read_token(path: Path) -> str:
    """Read a bearer token from a file, so that it stands in no process list.

    Raises:
        ConfigError: it cannot be read, or is too short to be one.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {path}: {error}") from error
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"token file {path}: expected one line of at least {SHORTEST_TOKEN} ASCII characters"
        )
    return token


def _find_token(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str) and value.startswith(BEARER):
            return value.removeprefix(BEARER)
    return ""


def _refuse_password() -> str:
    raise ValueError("the key is encrypted: give one without a passphrase, readable by this user only")
