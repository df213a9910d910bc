"""Batches, entries and servers for the tests of executors."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.config.schema import RewardEntry
from flowrl.records import RewardBatch

REWARDS = Path(__file__).with_name("executor_rewards.py")


def entry(name: str, **args: Any) -> RewardEntry:
    return RewardEntry(name=f"{REWARDS}:{name}", args=args)


def batch(*pixels: int, prompt: str = "ok", frames: int = 0, metadata: Sequence[dict[str, Any]] = ()) -> RewardBatch:
    """One 4x6 picture a value (a video of ``frames``), whose first pixel it is; the others differ."""
    shape = (frames, 4, 6, 3) if frames else (4, 6, 3)
    images = np.stack([(np.arange(np.prod(shape)).reshape(shape) + pixel).astype(np.uint8) for pixel in pixels])
    return RewardBatch(images, [prompt] * len(pixels), list(metadata) or [{"row": i} for i in range(len(pixels))])


Answer = Callable[[socket.socket], None]


def reply(status: int, body: bytes, *headers: str, length: int | None = None) -> Answer:
    """An HTTP answer; length: a Content-Length that differs from the truth."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.0 {status} X", "Content-Type: application/json", f"Content-Length: {size}", *headers]
    data = ("\r\n".join(lines) + "\r\n\r\n").encode() + body

    def send(connection: socket.socket) -> None:
        connection.sendall(data)

    return send


@contextmanager
def scripted_server(answers: Sequence[Answer], read: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives each request the next answer, the last one for ever; yields its URL and the requests.

    read: whether it reads a request before it answers.
    """
    seen: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def answer_one(connection: socket.socket, answer: Answer) -> None:
        with connection:
            try:
                if read:
                    seen.append(read_request(connection))
                answer(connection)
            except OSError:
                return  # the client gave up, as some tests want

    def run() -> None:
        number = 0
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            answer = answers[min(number, len(answers) - 1)]
            number += 1
            threading.Thread(target=answer_one, args=(connection, answer), daemon=True).start()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(2)


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return data
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.lower() == b"content-length":
            while len(body) < int(value):
                body += connection.recv(65536)
    return head + b"\r\n\r\n" + body
