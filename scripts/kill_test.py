"""Kill a process with SIGKILL in the middle of saving checkpoints, many times, and count what survives.

Each child loads the newest checkpoint and goes on saving. Every other one is killed from outside after a random time;
the rest kill themselves at a random line of the checkpoint code (or of a delete), so that any gap between two steps can
be hit. After each kill the newest checkpoint must load, verify, hold the content of its iteration, and be no older than
the last save that had returned; after the next save nothing half-written may be left.

    python scripts/kill_test.py --kills 20 --seed 0 --output result.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flowrl.checkpoint import store

NUMBERS = 200_000
TIMEOUT_S = 60.0


@dataclass
class Result:
    """What was counted.

    kills: SIGKILLs delivered; inside_save: those that left a half-written or half-deleted directory; most_lost: saves
    that had returned and were lost, at worst; failures: what went wrong, empty if all is well.
    """

    seed: int
    kills: int = 0
    by_time: int = 0
    by_line: int = 0
    inside_save: int = 0
    most_lost: int = 0
    stale_left: int = 0
    final_iteration: int = 0
    seconds: float = 0.0
    python: str = platform.python_version()
    torch: str = torch.__version__
    failures: list[str] = field(default_factory=list)


def content(iteration: int) -> dict[str, Any]:
    """The state of an iteration: a function of its number, so that any mixture of two is seen."""
    generator = torch.Generator().manual_seed(iteration)
    return {
        "policy": {"weight": torch.randn(NUMBERS, generator=generator)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(iteration))}}},
        "trainer": {"iteration": iteration, "beta": 1.0 / (iteration + 1)},
    }


def is_content(state: dict[str, Any], iteration: int) -> bool:
    """Whether a loaded state is wholly that of its iteration."""
    expected = content(iteration)
    return (
        torch.equal(state["policy"]["weight"], expected["policy"]["weight"])
        and torch.equal(state["optimizer"]["state"][0]["step"], expected["optimizer"]["state"][0]["step"])
        and state["trainer"] == expected["trainer"]
    )


def save(root: Path, iteration: int) -> None:
    """Save the content of an iteration."""
    store.save(root, iteration, content(iteration), info={"test": "kill"})


def die_at_line(number: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that kills this process when the given number of lines of the save path have run."""
    ours = {str(Path(store.__file__).parent), shutil.__file__}
    left = number

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if name not in ours and str(Path(name).parent) not in ours:
            return None
        left -= event == "line"
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def count_lines(root: Path) -> int:
    """Lines of the save path in one save that replaces the pointer and prunes."""
    for iteration in (1, 2, 3):
        save(root, iteration)
    lines = 0
    ours = {str(Path(store.__file__).parent), shutil.__file__}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        name = frame.f_code.co_filename
        if name not in ours and str(Path(name).parent) not in ours:
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    save(root, 4)
    sys.settrace(None)
    return lines


def child(root: Path, pipe: int, die_at: int | None) -> None:
    """Load, then save iteration after iteration, telling the parent of each save that returned."""
    iteration = store.load(root).iteration
    while True:
        iteration += 1
        if die_at is not None:
            sys.settrace(die_at_line(die_at))
        save(root, iteration)
        sys.settrace(None)
        os.write(pipe, f"{iteration}\n".encode())


def run_child(root: Path, die_at: int | None, delay: float) -> tuple[int, bool]:
    """Start a child and see it die. Returns the last iteration whose save had returned (0: none), and: by SIGKILL?"""
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        try:
            child(root, writer, die_at)
        finally:
            os._exit(1)
    os.close(writer)
    told = b""
    if die_at is None:
        told = os.read(reader, 4096)
        time.sleep(delay)
        os.kill(number, signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT_S
    while not (ended := os.waitpid(number, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
        time.sleep(0.001)
    while more := os.read(reader, 4096):
        told += more
    os.close(reader)
    done = [int(line) for line in told.split()]
    killed = os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) == signal.SIGKILL
    return (done[-1] if done else 0), killed


def check(root: Path, returned: int, result: Result) -> None:
    """Load after a kill and note what is wrong."""
    label = f"kill {result.kills}"
    result.inside_save += any(root.glob(".tmp-*"))
    loaded = store.load(root)
    result.most_lost = max(result.most_lost, returned - loaded.iteration)
    if loaded.iteration not in (returned, returned + 1):
        result.failures.append(f"{label}: iteration {returned} was saved, {loaded.iteration} was loaded")
    if loaded.warnings:
        result.failures.append(f"{label}: {loaded.warnings}")
    if not is_content(loaded.state, loaded.iteration):
        result.failures.append(f"{label}: the content is not that of iteration {loaded.iteration}")
    save(root, loaded.iteration + 1)
    stale = [path.name for path in root.glob(".tmp-*")]
    result.stale_left += len(stale)
    if stale:
        result.failures.append(f"{label}: left behind after the next save: {stale}")
    pointer = (root / "LATEST").read_text().strip()
    if pointer != f"iteration-{loaded.iteration + 1:08d}":
        result.failures.append(f"{label}: LATEST names {pointer}")


def run(kills: int, seed: int, root: Path) -> Result:
    """Kill that many children one after the other over one checkpoint directory."""
    torch.set_num_threads(1)
    began = time.monotonic()
    draws = random.Random(seed)  # noqa: S311
    result = Result(seed)
    lines = count_lines(root)
    clock = time.monotonic()
    save(root, 5)
    duration = time.monotonic() - clock
    newest = 5
    for number in range(kills):
        by_line = number % 2 == 0
        die_at = draws.randrange(1, lines + 1) if by_line else None
        returned, killed = run_child(root, die_at, draws.uniform(0, 3 * duration))
        result.kills += 1
        if not killed:
            result.failures.append(f"kill {result.kills}: the child ended by itself")
        result.by_line += by_line
        result.by_time += not by_line
        check(root, returned or newest, result)
        newest = store.load(root).iteration
    result.final_iteration = newest
    result.seconds = round(time.monotonic() - began, 2)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments.kills, arguments.seed, Path(folder) / "checkpoints")
    text = json.dumps(asdict(result), indent=2)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if result.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
