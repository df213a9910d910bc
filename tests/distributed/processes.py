"""Real processes for tests: forked from one that has imported everything, joined by gloo, ended by a time limit."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.preload"])


@dataclass(frozen=True)
class Ended:
    """How one process ended. code: its exit code, None where the time limit ended it; value: what the function returned."""

    code: int | None
    value: Any
    error: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(environment: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Any) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    code, message = 0, ("ok", None)
    try:
        message = ("ok", function(*arguments))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first process holds the store that the others may still ask
    except SystemExit as end:
        code, message = int(end.code or 0), ("ok", None)
    except BaseException:
        code, message = 1, ("error", traceback.format_exc())
    pipe.send_bytes(pickle.dumps(message))
    pipe.close()
    os._exit(code)  # without waiting for threads of a group whose other members are gone


@functools.cache
def warm() -> None:
    """Have everything imported, once a session: that takes seconds of processor time, and no time limit is about it."""
    process = CONTEXT.Process(target=free_port, daemon=True)
    process.start()
    process.join(300)


def start(world: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, Any]]:
    """Start ``world`` processes that call ``function(*arguments)``; returns (process, pipe) of each."""
    warm()
    port = free_port()
    started = []
    for rank in range(world):
        receive, send = CONTEXT.Pipe(duplex=False)
        environment = {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        process = CONTEXT.Process(target=_child, args=(environment, function, arguments, send), daemon=True)
        process.start()
        send.close()
        started.append((process, receive))
    return started


def wait(started: list[tuple[Any, Any]], limit: float = 90.0) -> list[Ended]:
    """How every process ended; those that are there after ``limit`` seconds are ended, with code None."""
    end = time.monotonic() + limit
    found = []
    for process, pipe in started:
        kind, value = "", None
        try:
            if pipe.poll(max(0.0, end - time.monotonic())):
                kind, value = pickle.loads(pipe.recv_bytes())
        except EOFError:
            pass  # killed before it could say anything
        process.join(max(0.0, end - time.monotonic()))
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        found.append(Ended(code, value if kind == "ok" else None, value if kind == "error" else ""))
    return found


def run(world: int, function: Callable[..., Any], *arguments: Any, limit: float = 240.0) -> list[Any]:
    """What ``function`` returned in each of ``world`` processes, in rank order; fails where one failed or hung."""
    ended = wait(start(world, function, *arguments), limit)
    for rank, one in enumerate(ended):
        assert one.code == 0, f"process {rank} of {world}: code {one.code}\n{one.error}"
    return [one.value for one in ended]


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
