"""Stop signals: SIGTERM and Ctrl-C ask for a checkpoint and an orderly end; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Note stop signals while in a ``with`` block and restore the former handlers after it.

    requested: the number of the signal that arrived, or None; active: False outside the main thread, where Python
    allows no handlers and the block changes nothing. A second signal ends the process at once with exit code 128 plus
    its number.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.active = False
        self._former: dict[int, Handler] = {}

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, 0 where none came."""
        return 0 if self.requested is None else 128 + self.requested

    def __enter__(self) -> StopSignals:
        self.requested = None
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            for number in STOPPING:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self.active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            return
        self._restore()
        os._exit(128 + number)

    def _restore(self) -> None:
        for number, former in self._former.items():
            # None: a handler that C code had installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()
