"""What all executors share: a bounded queue, deadlines, retries, the circuit breaker, and failures as masks."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.cache import RewardCache
from flowrl.scoring.deadlines import Breaker, BusyClock, fulfil
from flowrl.scoring.executors.contract import CallFailed, failed_call
from flowrl.scoring.executors.settings import ExecutorSettings

_Task = tuple[RewardBatch, Future[RewardResult]]


class Caller(Protocol):
    """One way to call a reward: a thread, a process, a connection. Used by one thread at a time, but for ``close``."""

    def open(self, seconds: float | None) -> None:
        """Make ready (load, start, connect) if that is not done; raises CallFailed."""

    def call(self, batch: RewardBatch, seconds: float | None, last: bool = True) -> RewardResult:
        """Score one batch within so many seconds; last: no other one waits for now. Raises CallFailed."""

    def close(self) -> None:
        """End at once what can be ended; a call under way fails."""


@runtime_checkable
class Holding(Protocol):
    """A caller whose reward is in this process."""

    @property
    def nbytes(self) -> int: ...


class Executor:
    """Scores batches through its callers, ``settings.workers`` at a time. Use it as a context manager, or ``close`` it.

    Making it opens the first caller and raises UserError where that fails, so a reward that cannot be loaded or reached
    is found before a run starts. After that a reward's failure is a result without valid scores (FailedCall for a call
    that failed as a whole), never an exception and never a number.
    """

    def __init__(
        self, label: str, callers: Sequence[Caller], settings: ExecutorSettings, cache: RewardCache | None = None
    ) -> None:
        self.label = label
        self.settings = settings
        self._callers = callers
        self._cache = cache
        self._busy = BusyClock()
        self._breaker = Breaker(settings.breaker, settings.breaker_s)
        self._closing = threading.Event()
        self._queue: Queue[_Task | None] = Queue(settings.queue)
        self._threads: list[threading.Thread] = []
        try:
            callers[0].open(settings.start_s)
        except CallFailed as error:
            self.close()
            raise UserError(str(error)) from error

    def submit(self, batch: RewardBatch) -> Future[RewardResult]:
        """Score a batch in the background; waits where ``settings.queue`` batches wait already.

        ``result()`` raises nothing for a reward's fault; KeyboardInterrupt and SystemExit of a reward pass through it.
        Do not change the batch before that. Raises ValueError after ``close``.
        """
        self._refuse_when_closed()
        if not self._threads:
            for number, caller in enumerate(self._callers):
                name = f"flowrl-{self.label}-{number}"
                thread = threading.Thread(target=self._work, args=(caller,), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        future: Future[RewardResult] = Future()
        self._queue.put((batch, future))
        return future

    def score(self, batch: RewardBatch) -> RewardResult:
        """Submit one batch and wait for its result."""
        return self.submit(batch).result()

    @property
    def nbytes(self) -> int:
        """Bytes that its rewards say they hold in this process; one elsewhere holds none here."""
        return sum(caller.nbytes for caller in self._callers if isinstance(caller, Holding))

    def begin_iteration(self) -> None:
        """Start the seconds of ``settings.total_s`` anew."""
        self._busy.reset()

    def close(self, grace_s: float = 5.0) -> None:
        """Cancel what waits, end the callers, and wait up to ``grace_s`` seconds for calls that cannot be ended."""
        self._closing.set()
        self._drop()
        for _ in self._threads:
            with contextlib.suppress(Full):  # then its thread wakes for a late batch, and sees that it is to end
                self._queue.put_nowait(None)
        for caller in self._callers:
            caller.close()
        until = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_when_closed(self) -> None:
        if self._closing.is_set():
            raise ValueError(f"reward {self.label!r}: its executor is closed")

    def _drop(self) -> None:
        while not self._queue.empty():
            with contextlib.suppress(Empty):
                task = self._queue.get_nowait()
                if task is not None:
                    task[1].cancel()

    def _work(self, caller: Caller) -> None:
        while (task := self._queue.get()) is not None:
            batch, future = task
            if self._closing.is_set():
                future.cancel()
                return
            if future.set_running_or_notify_cancel():
                fulfil(future, partial(self._answer, caller, batch))
            del task, batch, future  # pictures must not live until the next batch

    def _answer(self, caller: Caller, batch: RewardBatch) -> RewardResult:
        if self._cache is None:
            return self._guarded(caller, batch)
        return self._cache.through(batch, lambda part: self._guarded(caller, part))

    def _guarded(self, caller: Caller, batch: RewardBatch) -> RewardResult:
        try:
            self._limit(None)
        except CallFailed as error:  # no fault of the call that is not made
            return failed_call(len(batch), str(error))
        refusal = self._breaker.refusal()
        if refusal:
            return failed_call(len(batch), f"{self.label}: {refusal}")
        try:
            result = self._tries(caller, batch)
        except CallFailed as error:
            self._breaker.failed(str(error))
            return failed_call(len(batch), str(error), fatal=error.fatal)
        except BaseException:
            self._breaker.failed("interrupted")
            raise
        self._breaker.succeeded()
        return result

    def _tries(self, caller: Caller, batch: RewardBatch) -> RewardResult:
        left = self.settings.retries
        pause = self.settings.backoff_s
        while True:
            try:
                with self._busy:
                    caller.open(self._limit(self.settings.start_s))
                    return caller.call(batch, self._limit(self.settings.timeout_s), self._queue.empty())
            except CallFailed as error:
                if not error.retry or not left or self._closing.is_set():
                    raise
            left -= 1
            with self._busy:  # jitter: callers that failed together do not come back together
                seconds = self._limit(pause * random.SystemRandom().uniform(0.5, 1.0))
                self._closing.wait(seconds)
            pause *= 2

    def _limit(self, seconds: float | None) -> float | None:
        """The seconds of one step, cut to what is left of the iteration; raises CallFailed where nothing is."""
        if self.settings.total_s is None:
            return seconds
        left = self.settings.total_s - self._busy.spent
        if left <= 0:
            raise CallFailed(
                f"{self.label}: the {self.settings.total_s:g} s that an iteration may spend on it (total_s) are used up"
            )
        return left if seconds is None else min(seconds, left)
