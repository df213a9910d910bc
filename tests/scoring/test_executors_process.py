"""Rewards in processes: death, hang, prints, broken frames, another interpreter; no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowrl.errors import UserError
from flowrl.scoring import wire
from flowrl.scoring.executors import CallFailed, Executor, ExecutorSettings, FailedCall, gather, make_executor
from flowrl.scoring.executors.process import ProcessCaller, foreign_command, own_command, own_environment

from .executor_tools import REWARDS, batch, entry
from .test_executors import all_failed, same

PROCESS = ExecutorSettings(kind="process", timeout_s=20.0, retries=0, breaker=0)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with make_executor("faulty", entry("faulty"), PROCESS) as made:
        yield made


def gone(pid: int) -> bool:
    """Whether a process ends within a second (one that is dead and not yet waited for counts as ended)."""
    until = time.perf_counter() + 1
    while time.perf_counter() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_process_that_dies_masks_its_batch_and_is_started_again(executor: Executor) -> None:
    first, dead, last = gather([executor.submit(b) for b in (batch(3), batch(1, 2, prompt="die"), batch(200, 7))])
    same(first, 3.0)
    all_failed(dead, 2, "faulty: its process ended with 7", "out of memory, says the reward")
    assert isinstance(dead, FailedCall) and not dead.fatal
    same(last, 200.0, 7.0)


@pytest.mark.wall_clock
def test_what_a_reward_prints_goes_to_standard_error(executor: Executor, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    same(executor.score(batch(5, prompt="print")), 5.0)
    time.sleep(0.05)
    out, err = capfd.readouterr()
    assert out == "" and "to standard output" in err and "and to its file descriptor" in err


def test_a_death_is_tried_again_where_retries_allow(tmp_path: Path) -> None:
    settings = ExecutorSettings(kind="process", retries=1, backoff_s=0.01)
    with make_executor("once", entry("dies_once", mark=str(tmp_path / "mark")), settings) as once:
        same(once.score(batch(4, 5)), 4.0, 5.0)


@pytest.mark.wall_clock
def test_a_process_killed_from_outside_and_one_that_hangs() -> None:
    with make_executor("id", entry("process_id"), PROCESS) as ids:
        caller = ids._callers[0]
        assert isinstance(caller, ProcessCaller) and caller._process is not None
        first = caller._process.pid
        assert first != os.getpid()
        same(ids.score(batch(1)), first % 100000)
        os.kill(first, signal.SIGKILL)
        all_failed(ids.score(batch(1)), 1, "its process ended by signal 9")
        caller.open(20.0)
        second = caller._process.pid
        assert second != first
        os.kill(second, signal.SIGSTOP)  # hangs in earnest: not even its reader runs
        start = time.perf_counter()
        big = batch(1)
        big = type(big)(np.zeros((1, 400, 400, 3), np.uint8), big.prompts, big.metadata)
        with pytest.raises(CallFailed, match=r"id: no result within 0\.2 s; its process was ended"):
            caller.call(big, 0.2)
        assert time.perf_counter() - start < 0.7 and gone(second)


@pytest.mark.wall_clock
def test_the_worker_ends_with_its_input_even_in_a_call() -> None:
    command = own_command(f"{REWARDS}:faulty")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own_environment()) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        frame = wire.read_frame(worker.stdout, wire.LOCAL_LIMITS)
        assert frame is not None and frame[0]["type"] == "hello" and frame[0]["protocol"] == wire.PROTOCOL
        wire.write_frame(worker.stdin, {"type": "load", "label": "x", "args": {}, "opponents": 0})
        frame = wire.read_frame(worker.stdout, wire.LOCAL_LIMITS)
        assert frame is not None and frame[0] == {"type": "ready"}
        header, body = wire.pack(batch(1, prompt="hang"), "png")
        wire.write_frame(worker.stdin, {"type": "score", "id": 1, "batch": header}, body)
        time.sleep(0.05)
        start = time.perf_counter()
        worker.stdin.close()
        assert worker.wait(5) == 0
        assert time.perf_counter() - start < 1.0  # the reward hangs for 3 s


def test_metadata_that_is_not_json_masks_the_batch(executor: Executor) -> None:
    result = executor.score(batch(1, metadata=[{"box": np.zeros(2)}]))
    all_failed(result, 1, "faulty: cannot be sent as JSON", "ndarray")
    same(executor.score(batch(6)), 6.0)


FAKE = """
import json, struct, subprocess, sys, time
def send(header, raw=None):
    text = json.dumps(header).encode() if raw is None else raw
    sys.stdout.buffer.write(struct.pack(">4sIQ", b"FRW1", len(text), 0) + text); sys.stdout.buffer.flush()
def take():
    magic, head, body = struct.unpack(">4sIQ", sys.stdin.buffer.read(16))
    header = json.loads(sys.stdin.buffer.read(head)); sys.stdin.buffer.read(body); return header
def result(scores, valid=(True, True), number=1):
    send({"type": "result", "id": number, "result": {"scores": scores, "valid": list(valid), "errors": [None] * 2,
          "components": {}, "details": []}})
"""
START = "send({'type': 'hello', 'protocol': 1}); take(); send({'type': 'ready'}); take()\n"


def fake(script: str) -> ProcessCaller:
    """A caller whose process speaks like a worker, up to a point."""
    limits = wire.Limits(header_bytes=1000, body_bytes=0)
    return ProcessCaller("fake", [sys.executable, "-S", "-c", FAKE + script], {}, encoding="safetensors", limits=limits)


@pytest.mark.wall_clock
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("result([1.5])", "scores is 1 values, expected 2 numbers"),
        ("result([1.5, 'x'])", "something other than numbers"),
        ("result([1.5, None])", "a valid sample has no finite score"),
        ("result([1.5, float('nan')])", "malformed JSON: NaN is not JSON"),
        ("result([1.5, 2.5], number=7)", "it answers call 7, not 1"),
        ("result([1.5, 2.5], valid=(1, 0))", "valid is not 2 of true or false"),
        ("send({}, b'{not json')", "malformed JSON"),
        ("send({}, b'[1]')", "expected a JSON object, got list"),
        ("send({}, b' ' * 2000)", "frame of 2000 + 0 bytes, at most 1000 + 0 are taken"),
        ("sys.stdout.write('Loading weights...'); sys.stdout.flush()", "malformed frame: starts with b'Loading '"),
        ("sys.stdout.buffer.write(b'FRW1'); sys.stdout.flush()", "malformed frame"),
    ],
)
def test_a_process_that_breaks_the_format_is_ended(script: str, words: str) -> None:
    caller = fake(START + script + "; sys.stdout.close()")
    caller.open(5.0)
    assert caller._process is not None
    pid = caller._process.pid
    with pytest.raises(CallFailed, match="its process broke the format and was ended") as caught:
        caller.call(batch(1, 2), 5.0)
    assert words in str(caught.value)
    assert gone(pid) and caller._process is None


def test_a_good_fake_is_understood() -> None:
    caller = fake(START + "result([1.5, 2.5]); time.sleep(5)")
    caller.open(5.0)
    same(caller.call(batch(1, 2), 5.0), 1.5, 2.5)
    caller.close()
    with pytest.raises(CallFailed, match="closed"):
        caller.open(5.0)


@pytest.mark.wall_clock
def test_slow_bytes_do_not_outlast_the_limit() -> None:
    caller = fake(START + "for _ in range(50): sys.stdout.write('F'); sys.stdout.flush(); time.sleep(0.1)")
    caller.open(5.0)
    start = time.perf_counter()
    with pytest.raises(CallFailed, match=r"no result within 0\.3 s"):
        caller.call(batch(1, 2), 0.3)
    assert time.perf_counter() - start < 0.8


@pytest.mark.wall_clock
def test_what_a_process_started_ends_with_it() -> None:
    script = (
        "child = subprocess.Popen(['sleep', '60']); send({'type': 'failed', 'id': 1, 'error': str(child.pid)}); take()"
    )
    caller = fake(START + script)
    caller.open(5.0)
    with pytest.raises(CallFailed) as caught:
        caller.call(batch(1, 2), 5.0)
    assert not gone(int(str(caught.value))) or pytest.fail("the child ended by itself")
    caller.close()
    assert gone(int(str(caught.value)))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("send({'type': 'hello', 'protocol': 2})", "speaks protocol 2, this one 1"),
        ("send({'type': 'hello'})", "speaks protocol None"),
        ("sys.exit('no numpy here')", "its process ended with 1; it said: no numpy here"),
        ("time.sleep(5)", r"not started within 0\.4 s"),
        ("send({'type': 'hello', 'protocol': 1}); time.sleep(5)", r"not loaded within 0\.4 s"),
    ],
)
def test_a_process_that_does_not_start_is_said(script: str, words: str) -> None:
    with pytest.raises(CallFailed, match=words):
        fake(script + "; sys.stdin.read()").open(0.4)


def test_the_interpreter_must_be_a_program(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is not a program; give the path of an interpreter"):
        make_executor("x", entry("faulty"), ExecutorSettings(kind="worker", python=str(tmp_path)))


def test_another_interpreter_needs_no_flowrl_of_its_own(tmp_path: Path) -> None:
    """A fresh environment with numpy and safetensors alone, where this one's packages are not seen."""
    venv.create(tmp_path / "other", with_pip=False, symlinks=True)
    python = tmp_path / "other/bin/python"
    (own,) = (tmp_path / "other/lib").glob("python*/site-packages")
    for package in ("numpy", "safetensors", "yaml"):
        (own / package).symlink_to(Path(sys.modules[package].__file__ or "").parent)
    for libraries in Path(np.__file__).parents[1].glob("numpy.libs"):
        (own / libraries.name).symlink_to(libraries)
    assert "torch" not in foreign_command(str(python), "x")[2]
    settings = ExecutorSettings(kind="worker", python=str(python), timeout_s=20.0)
    with make_executor("prefix", entry("prefix", expected=str(tmp_path / "other")), settings) as other:
        same(other.score(batch(1, 2)), 1.0, 1.0)
