"""Wall time by phase, each second counted once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Accumulate wall seconds by phase name.

    A phase inside another one pauses the outer one, so the phases are disjoint and sum to at most the total:
    ``sum_p seconds[p] + other = total``.

    clock: a monotonic clock in seconds. synchronize: called before each reading, for work that a device runs later
    than it is asked for (``torch.cuda.synchronize``); it makes the phases true and costs the overlap between them.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, synchronize: Callable[[], object] | None = None
    ) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._open: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forget all seconds and start the total anew. Raises RuntimeError inside a phase."""
        if self._open:
            raise RuntimeError(f"Stopwatch.reset: phase {self._open[-1]!r} is still running; reset between iterations")
        self._seconds: dict[str, float] = {}
        self._start = self._mark = self._read()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far, without the stretch that is running now."""
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block for ``name``, less that of phases opened within.

        Raises ValueError for the names ``iteration`` and ``other``, which `as_metrics` writes itself.
        """
        if name in ("iteration", "other"):
            raise ValueError(f"Stopwatch.phase: {name!r} is computed, not measured; use another name")
        self._settle()
        self._open.append(name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def as_metrics(self, total: float | None = None) -> dict[str, float]:
        """Return ``time/<phase>_s`` for each phase, ``time/iteration_s`` and ``time/other_s``, in seconds.

        total: wall seconds of the iteration; by default the time since the last reset.
        """
        self._settle()
        whole = self._mark - self._start if total is None else total
        metrics = {f"time/{name}_s": value for name, value in self._seconds.items()}
        metrics["time/iteration_s"] = whole
        metrics["time/other_s"] = max(0.0, whole - sum(self._seconds.values()))
        return metrics

    def _read(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()

    def _settle(self) -> None:
        """Give the time since the last mark to the innermost open phase, if there is one."""
        now = self._read()
        if self._open:
            self._seconds[self._open[-1]] += now - self._mark
        self._mark = now
