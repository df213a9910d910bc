"""Settings of a run on several processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Several processes, started by torchrun or accelerate launch.

    processes: how many the run must have, or it stops at once; null: as many as the launcher started. timeout_s: seconds
    that a process waits for the others before it gives up.
    """

    processes: int | None = None
    timeout_s: float = 1800.0


def distributed_problems(distributed: Distributed, groups: int, updates: int, world: int) -> Iterator[str]:
    """What is wrong with a run of ``groups`` groups and ``updates`` updates on ``world`` processes."""
    if distributed.processes is not None and distributed.processes < 1:
        yield f"distributed.processes: {distributed.processes} processes; use at least 1, or null for the launcher's number"
    if not distributed.timeout_s > 0:
        yield f"distributed.timeout_s: {distributed.timeout_s:g} seconds; use more than 0"
    if groups >= 1 and groups % world:
        fit = max(1, round(groups / world)) * world
        yield (
            f"batch.groups: {groups} groups cannot be shared out over {world} processes; "
            f"use a multiple of {world}, such as {fit}"
        )
    elif world > 1 and updates > groups // world >= 1 and updates <= groups:
        yield (
            f"objective.updates: each of {updates} updates needs a group of every process, and {world} processes have "
            f"{groups // world} each; use at most {groups // world} updates, or batch.groups={updates * world}"
        )
