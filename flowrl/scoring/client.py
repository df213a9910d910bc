"""The client of a scoring service: it goes where the config says and nowhere else, and gives up in time.

A host is resolved once a call, every address is checked (``flowrl.scoring.endpoints``), and the connection goes to what
was checked. Redirects are not followed, proxies of the environment are not used, and a token is sent without TLS only to
this machine or to what ``allow`` lists. No text that leaves here has the token in it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring import endpoints, wire
from flowrl.scoring.deadlines import Late, Runner, Watchdog
from flowrl.scoring.executors.contract import CallFailed, checked
from flowrl.scoring.redact import hide

_PASSING = (408, 429)
_CHUNK = 1 << 16


class ScoreClient:
    """Calls one service. Used by one thread at a time, but for ``close``.

    url: http(s)://host[:port][/path]; token_env: the environment variable with the bearer token, "" for none; allow: see
    ``endpoints``; max_bytes: the largest answer taken; encoding: how pictures travel, "png" or "safetensors".
    Raises UserError for a URL, list or token that cannot be used.
    """

    def __init__(
        self,
        label: str,
        url: str,
        *,
        token_env: str = "",
        allow: Sequence[str] = (),
        max_bytes: int = 16 << 20,
        encoding: str = "png",
    ) -> None:
        self._label = label
        self._endpoint = endpoints.parse(url, allow)
        self._token = read_token(token_env)
        self._token_env = token_env
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._resolver = Runner(f"flowrl-{label}-resolve")
        self._socket: socket.socket | None = None
        self._takes: int | None = None
        self._closed = False

    def health(self, seconds: float | None) -> dict[str, Any]:
        """What the service says of itself: protocol, flowrl, reward, timeout_s, body_bytes. Raises CallFailed."""
        answer = self._request("GET", "/health", "", b"", seconds)
        try:
            wire.check_protocol(answer)
        except wire.WireError as error:
            raise self._failed(str(error), fatal=True) from error
        self._takes = answer["body_bytes"] if type(answer.get("body_bytes")) is int else None
        return answer

    def score(self, batch: RewardBatch, seconds: float | None) -> RewardResult:
        """Score a batch there. Raises CallFailed."""
        try:
            content_type, body = wire.pack_http(batch, self._encoding)
        except wire.WireError as error:
            raise self._failed(str(error)) from error
        if self._takes is not None and len(body) > self._takes:
            raise self._failed(
                f"a batch of {len(body)} bytes, and the service takes {self._takes}; send less at a time"
            )
        answer = self._request("POST", "/score", content_type, body, seconds)
        try:
            wire.check_protocol(answer)
            if "failed" in answer:
                raise self._failed(f"the service: {answer['failed']}", fatal=answer.get("fatal") is True)
            result = wire.unpack_result(answer.get("result"), len(batch))
        except wire.WireError as error:
            raise self._failed(str(error)) from error
        return checked(self._label, result, len(batch))

    def close(self) -> None:
        """End a call that is under way."""
        self._closed = True
        self._resolver.close()
        if self._socket is not None:
            _shut(self._socket)

    def _failed(self, text: str, *, retry: bool = False, fatal: bool = False) -> CallFailed:
        return CallFailed(f"{self._label}: {self._clean(text)}", retry=retry, fatal=fatal)

    def _clean(self, text: str) -> str:
        return hide(text, self._token)

    def _cleaned(self, value: Any) -> Any:
        """An answer whose texts and keys are clean: they go to files that people share."""
        if isinstance(value, str):
            return self._clean(value)
        if isinstance(value, dict):
            return {self._clean(key): self._cleaned(item) for key, item in value.items()}
        return [self._cleaned(item) for item in value] if isinstance(value, list) else value

    def _request(self, method: str, path: str, content_type: str, body: bytes, seconds: float | None) -> dict[str, Any]:
        until = None if seconds is None else time.monotonic() + seconds
        self._socket = own = self._connect(until)
        with contextlib.closing(own), Watchdog(_left(until), lambda: _shut(own)) as watchdog:
            try:
                status, data = self._talk(own, method, path, content_type, body)
            except (OSError, http.client.HTTPException) as error:
                if watchdog.fired:
                    raise self._failed(f"no complete answer within {seconds:.3g} s", retry=True) from error
                kind = type(error).__name__
                passing = not isinstance(error, ssl.SSLCertVerificationError)
                raise self._failed(f"the connection failed: {kind}: {error}", retry=passing) from error
            finally:
                self._socket = None
        if watchdog.fired:  # the answer ended because the connection was shut
            raise self._failed(f"no complete answer within {seconds:.3g} s", retry=True)
        return self._content(status, data)

    def _connect(self, until: float | None) -> socket.socket:
        endpoint = self._endpoint
        where = f"{endpoint.host}:{endpoint.port}"
        try:
            found = self._resolver.run(lambda: endpoints.resolve(endpoint.host, endpoint.port), _left(until))
        except Late as error:
            raise self._failed(f"{where} is not resolved in time", retry=True) from error
        except (OSError, UnicodeError) as error:
            raise self._failed(f"{where} is not resolved: {error}", retry=True) from error
        refused = next((text for text in map(endpoint.refusal, found) if text), "")
        if refused:
            raise self._failed(f"not called: {refused}", fatal=True)
        last: OSError | None = None
        for address in found:
            if self._closed:
                break
            try:
                connected = socket.create_connection((address, endpoint.port), _left(until))
                connected.settimeout(None)  # from here on the watchdog counts, and the handshake comes under it
                if not endpoint.secure:
                    return connected
                tls = ssl.create_default_context()
                return tls.wrap_socket(connected, server_hostname=endpoint.host, do_handshake_on_connect=False)
            except OSError as error:
                last = error
        raise self._failed(f"no connection to {where}: {last or 'closed'}", retry=True) from last

    def _talk(self, own: socket.socket, method: str, path: str, content_type: str, body: bytes) -> tuple[int, bytes]:
        """Send a request and return the status and the content; more than ``max_bytes`` of it raises CallFailed."""
        endpoint = self._endpoint
        headers = {"Accept": wire.JSON_TYPE, "Connection": "close"}
        headers |= {"Content-Type": content_type} if content_type else {}
        headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if self._token and not (endpoint.secure or endpoint.local or endpoint.listed or endpoint.networks):
            raise self._failed("a token is not sent without TLS; use https, or list the host in allow", fatal=True)
        if isinstance(own, ssl.SSLSocket):
            own.do_handshake()
        connection = http.client.HTTPConnection(endpoint.host, endpoint.port)
        connection.auto_open = 0
        connection.sock = own
        with contextlib.closing(connection):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have answered before it hung up
                connection.request(method, endpoint.path + path, body or None, headers)
            response = connection.getresponse()
            return response.status, self._content_of(response)

    def _content_of(self, response: http.client.HTTPResponse) -> bytes:
        chunks = []
        size = 0
        while chunk := response.read(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > self._max_bytes:
                raise self._failed(f"the answer has more than {self._max_bytes} bytes")
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(chunks)

    def _content(self, status: int, data: bytes) -> dict[str, Any]:
        if status == 200:
            try:
                answer: dict[str, Any] = self._cleaned(wire.loads(data))
            except wire.WireError as error:
                raise self._failed(str(error)) from error
            return answer
        if 300 <= status < 400:
            raise self._failed(f"the service answers {status}, a redirect, which is not followed; give its own url")
        if status == 401:
            hint = f"the token of {self._token_env}" if self._token_env else "a call without token; set token_env"
            raise self._failed(f"the service refuses {hint}")
        raise self._failed(f"the service answers {status}{self._said(data)}", retry=status in _PASSING or status >= 500)

    def _said(self, data: bytes) -> str:
        """The error text of a service's answer, if it has one."""
        try:
            text = wire.loads(data[:_CHUNK]).get("error")
        except wire.WireError:
            return ""
        # Clean before it is cut: half a token is a secret, too.
        return f": {self._clean(text)[:300]}" if isinstance(text, str) else ""


def read_token(variable: str) -> str:
    """The token in an environment variable; "" for no variable. Raises UserError where it is not set or malformed."""
    if not variable:
        return ""
    token = os.environ.get(variable, "")
    if not token:
        raise UserError(f"token_env names {variable}, which is not set in the environment; set it")
    if any(not "!" <= char <= "~" for char in token):
        raise UserError(f"the token in {variable} has spaces or characters beyond ASCII; mend it")
    return token


def _left(until: float | None) -> float | None:
    return None if until is None else max(until - time.monotonic(), 0.001)


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not SSLSocket's own, which would also drop its state under a thread that reads.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
