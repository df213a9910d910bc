"""Progress of a run: a bar on a terminal, one line an iteration elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """Show iterations done, the reward, the time left and the phase.

    total: iterations of the whole run; start: those done before (resume); write: takes one line of text, used without a
    terminal and for messages; stream: where the bar goes, standard error by default; it is a bar where ``stream`` is a
    terminal; enabled: False shows nothing but messages; clock: seconds, for the time left in lines.
    """

    def __init__(
        self,
        total: int,
        *,
        write: Callable[[str], object],
        start: int = 0,
        stream: TextIO | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._total, self._start, self._done = total, start, start
        self._write, self._clock, self._enabled = write, clock, enabled
        self._began = clock()
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        if enabled and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, file=stream, unit="it", dynamic_ncols=True, leave=True)

    def phase(self, name: str) -> None:
        """Show what the run is doing now, e.g. ``rollout``; lines do not show it."""
        if self._bar is not None:
            self._bar.set_description_str(name)

    def advance(self, reward: float | None, note: str = "") -> None:
        """Count one iteration. reward: its mean, None where no reward was valid; note: further short text."""
        self._done += 1
        shown = "-" if reward is None else f"{reward:.4g}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"reward {shown}" + (f", {note}" if note else ""), refresh=False)
            self._bar.update(1)
        elif self._enabled:
            pace = (self._clock() - self._began) / (self._done - self._start)
            left = duration(pace * max(self._total - self._done, 0))
            self._write(
                f"iteration {self._done}/{self._total}  reward {shown}  {pace:.2f} s/it  left {left}"
                + (f"  {note}" if note else "")
            )

    def message(self, text: str) -> None:
        """Show a line of text without tearing the bar."""
        if self._bar is None:
            self._write(text)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leave the bar as it stands; may be called twice."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Write a time as ``h:mm:ss``, rounded to a second."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
