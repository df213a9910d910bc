"""Settings of a run on several processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flowrl.config.families import family_of

if TYPE_CHECKING:
    from flowrl.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Several processes, started by torchrun or accelerate launch.

    processes: how many the run must have, or it stops at once; null: as many as the launcher started. timeout_s: seconds
    that a process waits for the others before it gives up. sharding: none (each process holds a whole copy of the trained
    network) | fsdp2 (its weights, and in full fine-tuning their optimizer state and average, lie in parts in all processes) |
    zero1, zero2, zero3 (DeepSpeed's stages: the optimizer's state in parts, gradients too, weights too). gather: how long
    fsdp2's weights stay whole once they are: block (for one call of one block: least memory) | rollout (but for the update) |
    iteration (always; only what the optimizer holds is then in parts).
    """

    processes: int | None = None
    timeout_s: float = 1800.0
    sharding: Literal["none", "fsdp2", "zero1", "zero2", "zero3"] = "none"
    gather: Literal["block", "rollout", "iteration"] = "rollout"


def distributed_problems(distributed: Distributed, groups: int, updates: int, world: int) -> Iterator[str]:
    """What is wrong with a run of ``groups`` groups and ``updates`` updates on ``world`` processes."""
    if distributed.processes is not None and distributed.processes < 1:
        yield f"distributed.processes: {distributed.processes} processes; use at least 1, or null for the launcher's number"
    if not distributed.timeout_s > 0:
        yield f"distributed.timeout_s: {distributed.timeout_s:g} seconds; use more than 0"
    if 1 <= groups < world:
        yield (
            f"batch.groups: {groups} groups cannot be shared out over {world} processes, each of which needs one; "
            f"use at least {world}, or fewer processes"
        )
    elif world > 1 and updates > groups // world >= 1 and updates <= groups:
        yield (
            f"objective.updates: each of {updates} updates needs a group of every process, and {world} processes have "
            f"{groups // world} each; use at most {groups // world} updates, or batch.groups={updates * world}"
        )


def sharding_problems(config: Config) -> Iterator[str]:
    """What cannot be done with a network in shards."""
    distributed, model = config.distributed, config.model
    if distributed.sharding == "none":
        return
    if family_of(config.objective.name) == "direct":
        yield (
            f"distributed.sharding: {config.objective.name} differentiates whole chains of network calls, which runs with "
            "whole copies only; set none"
        )
    meets = _calls_that_meet(distributed)
    if config.rollout.guidance_low is not None and meets:
        yield (
            f"{meets} the network's layers in one order in all processes, and a model with two experts "
            "(rollout.guidance_low) runs them in turn; use zero1, or fsdp2 with distributed.gather=iteration"
        )
    if distributed.sharding == "zero3" and model.compile != "none":
        yield f"model.compile: {model.compile} was not tried with the hooks of DeepSpeed's stage 3; use none, or fsdp2"
    if distributed.sharding == "zero3" and model.train == "lora":
        yield (
            "distributed.sharding: zero3 gathers frozen layers at other times in a process that has fewer calls to make, so "
            "model.train=lora could wait for ever; use fsdp2 with distributed.gather=block, which splits them, or zero2"
        )
    if model.train == "full" and model.dtype == "fp16":
        yield "distributed.sharding: fp16 scales gradients of whole weights; use model.dtype=bf16, or model.train=lora"
    yield from _pictures_problems(config)


def _pictures_problems(config: Config) -> Iterator[str]:
    """What is wrong with pictures of the training, for which the first process alone calls the reference."""
    if not config.tracking.pictures.enabled:
        return
    if config.distributed.sharding == "fsdp2" and config.model.train == "full":
        yield (
            "tracking.pictures.enabled: compares with the base in the first process alone, which holds a part of it "
            "under fsdp2 with model.train=full; set false"
        )
    if config.distributed.sharding == "zero3":
        yield (
            "tracking.pictures.enabled: compares with the base in the first process alone, which zero3 cannot do; set "
            "false, or use fsdp2, zero1 or zero2"
        )


def _calls_that_meet(distributed: Distributed) -> str:
    """The setting under which processes must run, or go back through, the same layers at once; "" where they need not."""
    if distributed.sharding == "fsdp2" and distributed.gather != "iteration":
        return f"distributed.gather: {distributed.gather} gathers"
    return (
        f"distributed.sharding: {distributed.sharding} meets in" if distributed.sharding in ("zero2", "zero3") else ""
    )
