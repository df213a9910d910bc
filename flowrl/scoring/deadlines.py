"""Time limits for calls of foreign code: threads that may be left behind, watchdogs, busy time, a circuit breaker.

Seconds are of a monotonic clock throughout.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Late(Exception):
    """A call did not end within its time."""


class Runner:
    """One daemon thread that runs calls one after another.

    Python cannot stop a thread: a call that is late is left behind with its thread, which ends when the call does, and
    the next call gets a new one. A call keeps its thread for the sake of libraries with state per thread (OpenMP).
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] | None = None

    def run(self, work: Callable[[], T], seconds: float | None) -> T:
        """Return what ``work`` returns, or raise what it raises, KeyboardInterrupt and SystemExit too.

        seconds: how long to wait; None waits for ever. Raises Late.
        """
        future: Future[T] = Future()
        with self._lock:  # a close of another thread comes before the call or after it, never between
            if self._tasks is None:
                self._tasks = SimpleQueue()
                threading.Thread(target=_serve, args=(self._tasks,), name=self._name, daemon=True).start()
            self._tasks.put((work, future))
        try:
            return future.result(seconds)
        except TimeoutError as error:
            if future.done():  # the work's own TimeoutError, or one that came in at the last moment
                return future.result()
            self.close()
            raise Late from error

    def close(self) -> None:
        """Let the thread end after its call. A call that comes later starts another."""
        with self._lock:
            if self._tasks is not None:
                self._tasks.put(None)
                self._tasks = None


def _serve(tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
    while (task := tasks.get()) is not None:
        work, future = task
        fulfil(future, work)
        del task, work, future  # what was scored must not live until the next call


def fulfil(future: Future[T], work: Callable[[], T]) -> None:
    """Run ``work`` and put what it returns or raises, of whatever kind, into ``future``, whose ``result`` raises it."""
    try:
        value = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(value)


class Watchdog:
    """Calls ``action`` once when its ``with`` block is not left in time: it ends what a blocking read waits for.

    ``fired`` says afterwards whether it did. seconds: None never fires.
    """

    def __init__(self, seconds: float | None, action: Callable[[], None]) -> None:
        self.fired = False
        self._action = action
        self._timer = None if seconds is None else threading.Timer(max(seconds, 0.0), self._fire)

    def __enter__(self) -> Self:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self.fired = True
        self._action()


class BusyClock:
    """Seconds since ``reset`` in which at least one ``with`` block was open, in whatever thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open = 0
        self._since = 0.0
        self._spent = 0.0

    def reset(self) -> None:
        with self._lock:
            self._spent, self._since = 0.0, self._clock()

    @property
    def spent(self) -> float:
        with self._lock:
            return self._spent + (self._clock() - self._since if self._open else 0.0)

    def __enter__(self) -> Self:
        with self._lock:
            if not self._open:
                self._since = self._clock()
            self._open += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._spent += self._clock() - self._since


class Breaker:
    """Stops calling what fails: open after ``failures`` in a row, for ``open_s`` seconds, then one call tries.

    That call closes the breaker by success and opens it again by failure. failures = 0: it never opens.
    """

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._lock = threading.Lock()
        self._row = 0
        self._until = 0.0
        self._trying = False
        self._last = ""

    def refusal(self) -> str:
        """Why a call may not go now, or "" where it may; the caller then reports ``succeeded`` or ``failed``."""
        with self._lock:
            if not self._limit or self._row < self._limit:
                return ""
            left = self._until - self._clock()
            if left <= 0 and not self._trying:
                self._trying = True
                return ""
            when = f"the next try is in {left:.3g} s" if left > 0 else "one call is trying now"
            return f"not called: {self._row} calls in a row failed, {when}; the last one: {self._last}"

    def succeeded(self) -> None:
        with self._lock:
            self._row, self._trying = 0, False

    def failed(self, text: str) -> None:
        with self._lock:
            self._row += 1
            self._trying = False
            self._last = text
            self._until = self._clock() + self._open_s
