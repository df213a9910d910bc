"""Ways to execute a reward: inline, in a thread, in a process of this or another interpreter, over HTTP.

``make_executor(label, source, settings)`` makes one; ``Executor.submit(batch)`` gives a future of a RewardResult. A failure is a
mask with the reason, never a number and never an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future

from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.protocols import Reward
from flowrl.records import RewardResult
from flowrl.scoring.adapt import load_reward
from flowrl.scoring.cache import RewardCache
from flowrl.scoring.executors.base import Caller, Executor
from flowrl.scoring.executors.contract import CallFailed, FailedCall, checked, failed_call, score_checked
from flowrl.scoring.executors.process import ProcessCaller, foreign_command, own_command, own_environment
from flowrl.scoring.executors.remote import HttpCaller, served_name
from flowrl.scoring.executors.settings import ExecutorSettings
from flowrl.scoring.executors.threads import InlineCaller, InlineExecutor, ThreadCaller
from flowrl.scoring.wire import Limits

__all__ = [
    "CallFailed",
    "Executor",
    "ExecutorSettings",
    "FailedCall",
    "checked",
    "failed_call",
    "gather",
    "make_executor",
    "score_checked",
]


def make_executor(
    label: str,
    source: RewardEntry | Callable[[], Reward],
    settings: ExecutorSettings,
    cache: RewardCache | None = None,
) -> Executor:
    """Make the executor of one reward and its first reward, process or connection.

    label: its name in error texts; source: a config entry, or (inline and thread) a function that makes the reward anew
    each time; cache: for a deterministic reward of scope ``sample``. Raises UserError where the reward cannot be loaded,
    its process not started, or its service not reached.
    """
    if not isinstance(source, RewardEntry) and settings.kind not in ("inline", "thread"):
        raise UserError(f"executor: kind {settings.kind} needs a reward by name, not one that is made already")
    callers = [_caller(source, settings, label) for _ in range(settings.workers)]
    kind = InlineExecutor if settings.kind == "inline" else Executor
    return kind(label, callers, settings, cache)


def gather(futures: Iterable[Future[RewardResult]]) -> list[RewardResult]:
    """Wait for results, in the order of the futures, whichever ended first."""
    return [future.result() for future in futures]


def _caller(source: RewardEntry | Callable[[], Reward], settings: ExecutorSettings, label: str) -> Caller:
    offload = False
    if not isinstance(source, RewardEntry):
        factory = source
    else:
        entry, offload = source, source.offload
        if settings.kind in ("process", "worker"):
            return _process(entry, settings, label)
        if settings.kind == "http":
            return _service(entry, settings, label)

        def factory() -> Reward:
            return load_reward(entry)

    return (InlineCaller if settings.kind == "inline" else ThreadCaller)(label, factory, offload)


def _process(entry: RewardEntry, settings: ExecutorSettings, label: str) -> ProcessCaller:
    own = settings.kind == "process"
    return ProcessCaller(
        label,
        own_command(entry.name) if own else foreign_command(settings.python, entry.name),
        {"args": entry.args, "opponents": entry.opponents, "offload": entry.offload},
        encoding=settings.encoding,
        limits=Limits(header_bytes=settings.body_bytes, body_bytes=0),
        environment=own_environment() if own else None,
    )


def _service(entry: RewardEntry, settings: ExecutorSettings, label: str) -> HttpCaller:
    given = [*entry.args, *(["opponents"] if entry.opponents else [])]
    if given:
        raise UserError(f"reward {entry.name!r}: {', '.join(given)} belongs to its service; give it there")
    from flowrl.scoring.client import ScoreClient  # here: it stands on this package, and loads http and ssl

    client = ScoreClient(
        label,
        settings.url,
        token_env=settings.token_env,
        allow=settings.allow,
        max_bytes=settings.body_bytes,
        encoding=settings.encoding,
    )
    return HttpCaller(label, client, served_name(entry.name), settings.timeout_s)
