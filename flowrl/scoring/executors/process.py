"""A reward in a process of its own, of this interpreter or of another one, which is killed when it hangs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring import wire
from flowrl.scoring.deadlines import Watchdog
from flowrl.scoring.executors.contract import CallFailed, checked

_MODULE = "flowrl.scoring.worker_main"
# Another interpreter sees flowrl, and none of the packages that are installed beside it here.
_PACKAGES = ("flowrl", "flowrl.rewards")
_BOOT = """
import importlib.util, json, runpy, sys
FOLDERS = json.loads(sys.argv.pop(1))
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in FOLDERS:
            return None
        folder = FOLDERS[name]
        return importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
sys.meta_path.insert(0, Finder)
runpy.run_module("flowrl.scoring.worker_main", run_name="__main__", alter_sys=True)
"""


def own_command(reward: str) -> list[str]:
    """The command of a worker of this interpreter."""
    return [sys.executable, "-m", _MODULE, reward]


def foreign_command(python: str, reward: str) -> list[str]:
    """The command of a worker of another interpreter (3.11 or newer, with numpy, and Pillow or safetensors).

    flowrl need not be installed there. Raises UserError where ``python`` is no program.
    """
    if not (Path(python).is_file() and os.access(python, os.X_OK)):
        raise UserError(f"executor: python is {python!r}, which is not a program; give the path of an interpreter")
    folders = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folders[name] = str(Path(next(iter(spec.submodule_search_locations))).resolve())
    return [python, "-c", _BOOT, json.dumps(folders), reward]


def own_environment() -> dict[str, str]:
    """The environment of a worker of this interpreter: what can be imported here can be imported there."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class ProcessCaller:
    """A reward in a child process, over its standard input and output (see ``flowrl.scoring.wire``).

    A call that is late, or an answer that breaks the format, ends the process and what it started; the next call starts
    a new one. The reward's own prints appear on standard error.
    """

    def __init__(
        self,
        label: str,
        command: Sequence[str],
        made_with: Mapping[str, Any],
        *,
        encoding: str,
        limits: wire.Limits,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._label = label
        self._command = list(command)
        self._made_with = dict(made_with)
        self._encoding = encoding
        self._limits = limits
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[str] = deque(maxlen=8)
        self._calls = 0
        self._lock = threading.Lock()
        self._closed = False

    def open(self, seconds: float | None) -> None:
        """Start the process and load the reward there."""
        if self._process is not None:
            return
        process = self._process = self._start()
        hello = self._exchange(process, b"", b"", seconds, "not started")
        try:
            wire.check_protocol(hello)
        except wire.WireError as error:
            self.kill()
            raise CallFailed(f"{self._label}: {self._command[0]}: {error}", fatal=True) from error
        head = wire.frame_head({"type": "load", "label": self._label, **self._made_with}, 0)
        ready = self._exchange(process, head, b"", seconds, "not loaded")
        if ready.get("type") != "ready":
            self.kill()
            raise CallFailed(str(ready.get("error") or f"{self._label}: cannot be loaded"), fatal=True)

    def call(self, batch: RewardBatch, seconds: float | None, last: bool = True) -> RewardResult:
        process = self._process
        if process is None:
            raise CallFailed(f"{self._label}: closed")
        self._calls += 1
        try:
            header, body = wire.pack(batch, self._encoding)
            head = wire.frame_head({"type": "score", "id": self._calls, "last": last, "batch": header}, len(body))
        except wire.WireError as error:
            raise CallFailed(f"{self._label}: {error}") from error
        answer = self._exchange(process, head, body, seconds, "no result")
        if answer.get("id") != self._calls:
            raise self._broken(f"it answers call {str(answer.get('id'))[:20]}, not {self._calls}")
        if answer.get("type") == "failed":
            raise CallFailed(str(answer.get("error")), fatal=answer.get("fatal") is True)
        try:
            return checked(self._label, wire.unpack_result(answer.get("result"), len(batch)), len(batch))
        except wire.WireError as error:
            raise self._broken(str(error)) from error

    def close(self) -> None:
        self._closed = True
        self.kill()

    def kill(self) -> None:
        """End the process and everything it started."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            _end(process)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was not sent cannot be flushed
                        stream.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self._said.clear()
        if self._closed:
            raise CallFailed(f"{self._label}: closed")
        try:
            # A session of its own: Ctrl-C stops the run in good order, and the run stops the worker.
            process = subprocess.Popen(  # noqa: S603
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            raise CallFailed(f"{self._label}: {self._command[0]} cannot be started: {error}", fatal=True) from error
        self._relay = threading.Thread(target=_relay, args=(process.stderr, self._said), daemon=True)
        self._relay.start()
        return process

    def _exchange(
        self, process: subprocess.Popen[bytes], head: bytes, body: bytes, seconds: float | None, what: str
    ) -> dict[str, Any]:
        """Send a frame, unless it is empty, and return the header of the next one. Raises CallFailed."""
        if process.stdin is None or process.stdout is None:
            raise ValueError("the process has no pipes")
        frame, fault = None, ""
        with Watchdog(seconds, partial(_end, process)) as watchdog:
            try:
                process.stdin.write(head)
                process.stdin.write(body)
                process.stdin.flush()
                frame = wire.read_frame(process.stdout, self._limits)
            except OSError as error:
                fault = f" ({error})"
            except ValueError as error:  # a malformed frame, or pipes that ``close`` has closed
                fault = f" ({error})"
                if not watchdog.fired and not self._closed:
                    raise self._broken(str(error)) from error
        if frame is not None:
            return frame[0]
        if watchdog.fired:
            self.kill()
            raise CallFailed(f"{self._label}: {what} within {seconds:.3g} s; its process was ended")
        raise self._died(process, fault)

    def _broken(self, text: str) -> CallFailed:
        self.kill()
        return CallFailed(f"{self._label}: its process broke the format and was ended: {text}")

    def _died(self, process: subprocess.Popen[bytes], fault: str) -> CallFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        code = process.returncode
        self._relay.join(0.2)
        self.kill()
        ending = (
            "closed its output" if code is None else f"ended by signal {-code}" if code < 0 else f"ended with {code}"
        )
        said = f"; it said: {' | '.join(self._said)}" if self._said else ""
        return CallFailed(f"{self._label}: its process {ending}{fault}{said}", retry=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and, where the system has process groups, what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def _relay(stream: IO[bytes], said: deque[str]) -> None:
    """Pass on what a worker says on standard error, and keep its last lines."""
    with stream:
        while line := stream.readline(4096):
            text = line.decode(errors="replace")
            if text.strip():
                said.append(text.strip()[:300])
            with contextlib.suppress(ValueError, AttributeError):  # closed, or there is none
                sys.stderr.write(text)
