"""The search that an evaluation is asked for, with the process reward that it names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from flowrl.config.schema import Config
from flowrl.evaluation.searching import Searching, pictures_of
from flowrl.protocols import PipelineAdapter
from flowrl.records import PromptRow, Schedule
from flowrl.rollout.policy import Policy
from flowrl.rollout.requests import request_of
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training.process import build_process


def searching_of(
    config: Config,
    adapter: PipelineAdapter,
    rewards: RewardRuntime,
    row: PromptRow,
    reference: Callable[[], AbstractContextManager[None]],
) -> Searching | None:
    """Make the search of ``search``; None for none. row: any prompt of the evaluation, for the schedule."""
    settings = config.evaluation
    if config.search.kind == "none":
        return None
    if not config.search.reward:
        return Searching(config, adapter, rewards)
    schedule = adapter.schedule(settings.steps, request_of(config, row))
    on_device = Schedule(*(v.to(adapter.device) for v in (schedule.t, schedule.alpha, schedule.sigma)))
    policy = Policy(adapter, on_device, "ode", 0.0, settings.guidance, guidance_low=settings.guidance_low)
    process = build_process(config, policy, rewards, lambda x, r: pictures_of(adapter, x, r), reference)
    if process is None:
        raise ValueError("search.reward: the config has no process rewards")
    return Searching(config, adapter, rewards, process[config.search.reward])
