"""Serves one reward over HTTP: ``flowrl rewards serve NAME``.

``GET /health``: protocol, version, reward, its time limit and the largest request. ``POST /score``: a batch (see
``flowrl.scoring.wire``) in, a result out. Pictures come in the request; nothing in it names a file or an address. Loopback
by default, and with a bearer token anywhere else. Nothing is unpickled. An error is a JSON object with ``error``.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from flowrl import __version__
from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.protocols import Reward
from flowrl.scoring import wire
from flowrl.scoring.client import read_token
from flowrl.scoring.deadlines import Watchdog
from flowrl.scoring.executors import ExecutorSettings, FailedCall, make_executor
from flowrl.scoring.executors.remote import served_name

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """How a reward is served.

    host, port: where (port 0: any that is free); token_env: the environment variable with the bearer token, needed
    unless host is loopback; timeout_s: seconds a batch may take, which a client's own limit must exceed; read_s: seconds
    a request may take to arrive; workers: batches scored at a time, each with a reward of its own; requests: in progress
    at most, beyond which a client is told 503 and comes back; limits: of a request's size.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token_env: str = ""
    timeout_s: float = 100.0
    read_s: float = 30.0
    workers: int = 1
    requests: int = 16
    limits: wire.Limits = field(default_factory=wire.Limits)


class RewardService:
    """A reward behind a port, loaded and bound when it is made. Use it as a context manager, or call ``close``.

    source: a config entry, or a function that makes the reward (then ``name`` is what it is called). Raises UserError
    where the reward cannot be loaded, the address not bound, or another machine could call it without a token.
    """

    def __init__(
        self, source: RewardEntry | Callable[[], Reward], settings: ServiceSettings, name: str = "reward"
    ) -> None:
        token = read_token(settings.token_env)
        if not token and not _is_loopback(settings.host):
            raise UserError(
                f"rewards serve: host {settings.host} is open to other machines; set a token in an environment variable and "
                "name it with token_env, or serve on 127.0.0.1"
            )
        self.name = served_name(source.name) if isinstance(source, RewardEntry) else name
        scoring = ExecutorSettings(
            timeout_s=settings.timeout_s, total_s=None, workers=settings.workers, breaker=0, queue=settings.requests
        )
        self._serving = False
        self._executor = make_executor(self.name, source, scoring)
        try:
            self._server = _Server(settings, token, self._health(settings), self._score)
        except OSError as error:
            self._executor.close()
            raise UserError(
                f"rewards serve: {settings.host}:{settings.port} cannot be bound: {error}; choose another"
            ) from error

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}"

    def serve_forever(self) -> None:
        """Answer until ``close``, or KeyboardInterrupt."""
        self._serving = True
        self._server.serve_forever(poll_interval=0.05)

    def start(self) -> None:
        """Answer in a thread."""
        self._serving = True
        threading.Thread(target=self.serve_forever, name="flowrl-service", daemon=True).start()

    def close(self) -> None:
        """Stop answering; must not be called in the thread of ``serve_forever`` while that runs."""
        if self._serving:
            self._server.shutdown()
        self._server.server_close()
        self._executor.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _health(self, settings: ServiceSettings) -> dict[str, Any]:
        return {
            "protocol": wire.PROTOCOL,
            "flowrl": __version__,
            "reward": self.name,
            "timeout_s": settings.timeout_s,
            "body_bytes": settings.limits.body_bytes,
        }

    def _score(self, content_type: str, body: bytes, limits: wire.Limits) -> dict[str, Any]:
        result = self._executor.score(wire.unpack_http(content_type, body, limits))
        if isinstance(result, FailedCall):
            return {"protocol": wire.PROTOCOL, "failed": result.reason, "fatal": result.fatal}
        return {"protocol": wire.PROTOCOL, "result": wire.pack_result(result)}


def serve(
    source: RewardEntry | Callable[[], Reward], settings: ServiceSettings, announce: Callable[[str], None]
) -> None:
    """Serve a reward until interrupted. announce: is told the address once it answers. Raises UserError."""
    service = RewardService(source, settings)
    announce(f"{service.name} at {service.url}; Ctrl-C ends it")
    try:
        service.serve_forever()
    finally:
        service.close()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """The host of a Host header, without its port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


class _Refused(Exception):
    """A request that is not answered with a score."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self,
        settings: ServiceSettings,
        token: str,
        health: Mapping[str, Any],
        score: Callable[[str, bytes, wire.Limits], dict[str, Any]],
    ) -> None:
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        self.settings = settings
        self.token = token
        self.health = health
        self.score = score
        self.places = threading.BoundedSemaphore(settings.requests)
        super().__init__((settings.host, settings.port), _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server what this machine is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.settings.host, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the request a thread while there are places; the others are told to come back."""
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(1.0)
            request.sendall(_BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is its own affair; anything else is a fault here, and is logged."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            _LOG.error("a request from %s failed", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "flowrl"
    sys_version = ""

    def setup(self) -> None:
        self.request.settimeout(self.server.settings.read_s)
        super().setup()
        # The limit above counts from byte to byte; this one ends a request that trickles in.
        self._arriving = Watchdog(self.server.settings.read_s, self._hang_up)
        self._arriving.__enter__()

    def finish(self) -> None:
        self._arriving.cancel()
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().finish()

    def do_GET(self) -> None:
        self._answer("/health", self._health)

    def do_POST(self) -> None:
        self._answer("/score", self._score)

    def log_message(self, format: str, *args: Any) -> None:
        _LOG.info("%s %s", self.address_string(), format % args)

    def _answer(self, path: str, answer: Callable[[], Mapping[str, Any]]) -> None:
        try:
            self._check(path)
            self._reply(200, answer())
        except _Refused as error:
            self._reply(error.status, {"error": str(error)})
        except wire.WireError as error:
            self._reply(400, {"error": str(error)})

    def _check(self, path: str) -> None:
        """Who may ask, before anything of the request is read."""
        token = self.server.token
        if token and not hmac.compare_digest(
            self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()
        ):
            raise _Refused(401, "wrong or missing bearer token")
        if not token and not _is_loopback(_host(self.headers.get("Host", ""))):
            # A web page that made its own name point here would be let in by a browser.
            raise _Refused(403, "the Host header names another machine; call this service by 127.0.0.1")
        if self.path != path:
            raise _Refused(404, f"there is no {self.command} {self.path[:80]}; use GET /health or POST /score")

    def _health(self) -> Mapping[str, Any]:
        self._arriving.cancel()
        return self.server.health

    def _score(self) -> Mapping[str, Any]:
        limits = self.server.settings.limits
        if "Transfer-Encoding" in self.headers:
            raise _Refused(411, "a request in chunks; give its Content-Length")
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _Refused(411, "no Content-Length")
        size = int(text)
        if size > limits.body_bytes:
            raise _Refused(413, f"{size} bytes, at most {limits.body_bytes} are taken; send less at a time")
        body = self.rfile.read(size)
        self._arriving.cancel()
        if len(body) < size:
            raise _Refused(400, f"{len(body)} bytes of {size} arrived")
        return self.server.score(self.headers.get_content_type(), body, limits)

    def _reply(self, status: int, content: Mapping[str, Any]) -> None:
        data = wire.dumps(content)
        self.send_response(status)
        self.send_header("Content-Type", wire.JSON_TYPE)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


_BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"
    b'{"error":"busy; come back"}'
)
