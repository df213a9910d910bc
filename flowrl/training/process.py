"""Process rewards in a run: made from the config, asked at intermediate states, measured against the outcomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from flowrl import registry
from flowrl.config.rewards import labels
from flowrl.config.schema import Config, Executor, RewardEntry
from flowrl.credit.networks import module_bytes
from flowrl.credit.process import NeedsContext, ProcessContext, ProcessMember, ProcessSet
from flowrl.credit.process.combine import LEVELS, observed
from flowrl.credit.process.context import Outcome
from flowrl.credit.process.learned import FeatureReward, LatentReward
from flowrl.data.pictures import references
from flowrl.distributed.backend import Backend
from flowrl.errors import UserError
from flowrl.protocols import ProcessReward
from flowrl.records import ProcessScore, Prompted, Request, RewardBatch
from flowrl.rollout.policy import Policy
from flowrl.scoring.runtime import RewardRuntime

Pixels = Callable[[Tensor, Request], Tensor]
LEARNED = (LatentReward, FeatureReward)


class FunctionReward:
    """A plain function ``(x, t, prompted) -> [B]`` as a process reward; autograd may reach its latents."""

    differentiable = True

    def __init__(self, function: Callable[..., Tensor], args: Mapping[str, Any]) -> None:
        self.function, self.args = function, dict(args)

    def score(self, x: Tensor, t: Tensor, prompted: Prompted) -> ProcessScore:
        values = self.function(x, t, prompted, **self.args)
        return ProcessScore(values, values.detach().isfinite())


def outcome_scorer(
    config: Config, rewards: RewardRuntime, pixels: Pixels
) -> Callable[[str, Mapping[str, Any]], Outcome]:
    """How finished latents are scored for process rewards: by the run's rewards (name ""), or by one of their own."""

    def choose(name: str, args: Mapping[str, Any]) -> Outcome:
        own = RewardEntry(name=name, args=dict(args), executor=Executor(kind="inline")) if name else None
        runtime = rewards if own is None else RewardRuntime([own], config.failures)

        def score(x0: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
            parts = [pixels(part, requests[0]) for part in torch.split(x0, config.batch.micro_batch)]
            batch = RewardBatch(
                images=torch.cat(parts).numpy(),
                prompts=[r.prompt for r in requests],
                metadata=[r.metadata for r in requests],
                group_ids=list(range(len(requests))),
                latents=x0,
                reference=references(requests),
            )
            found = runtime.submit(batch).result()
            return torch.from_numpy(found.scores).to(x0.device), torch.from_numpy(found.valid).to(x0.device)

        return score

    return choose


def build_process(
    config: Config,
    policy: Policy,
    rewards: RewardRuntime,
    pixels: Pixels,
    reference: Callable[[], AbstractContextManager[None]] | None,
) -> ProcessSet | None:
    """Make the process rewards of a config, bound to this run; None where it names none."""
    if not config.process:
        return None
    context = ProcessContext(
        policy.adapter,
        policy.schedule,
        policy.predict,
        reference or nullcontext,
        outcome_scorer(config, rewards, pixels),
    )
    members = []
    for label, entry in zip(labels(config.process), config.process, strict=True):
        reward = _make(entry.name, entry.args)
        if isinstance(reward, NeedsContext):
            reward.bind(context)
        levels, known = _known(reward)
        members.append(ProcessMember(label, reward, entry.weight, entry.temperature, entry.min_accuracy, levels, known))
    return ProcessSet(members)


def _make(name: str, args: Mapping[str, Any]) -> ProcessReward:
    target = registry.resolve("process_reward", name)
    try:
        made = target(**args) if isinstance(target, type) else target
    except ValueError as error:
        raise UserError(f"process: {name}: {error}") from error
    if isinstance(made, ProcessReward):
        return made
    if callable(made):
        return FunctionReward(made, args)
    raise UserError(f"process: {name}: neither a ProcessReward (differentiable, score) nor a function (x, t, prompted)")


def _known(reward: ProcessReward) -> tuple[int, Sequence[tuple[float, int]]]:
    """(number of noise levels, accuracy and pairs of each by the report that came with a trained reward)."""
    if not isinstance(reward, LatentReward | FeatureReward):
        return LEVELS, ()
    rows = reward.card.quality
    known = [(float(q["accuracy"] or 0.5), int(q["pairs"])) for q in rows] if len(rows) == reward.card.levels else []
    return reward.card.levels, known


def credited_values(
    process: ProcessSet, x: Tensor, t: Tensor, prompted: Prompted, place: Tensor, outcome: Tensor, group: Tensor,
    *, facts: dict[str, Any], chunk: int,
) -> Tensor:  # fmt: skip
    """Values of one state of every sample: float64 [B], NaN where a process reward failed.

    x, t, prompted: the distinct latents at it, all at one time; place: int64 [B], which of them each sample passed; outcome:
    float64 [B], NaN where there is none; group: int64 [B]. Where no process reward may give credit at this time, every
    member has its group's mean outcome, so that no comparison within a group rests on it. Quality is measured, and written
    to ``facts``.
    """
    parts = [
        process.values(x[rows], t[rows.to(t.device)], prompted[rows])
        for rows in torch.split(torch.arange(len(x)), chunk)
    ]
    at = float(t[0])
    for member in process.credited:
        value = torch.cat([part.by_label[member.label] for part in parts])[place]
        counts, seen = observed(value, outcome, group)
        process.observe(member.label, at, counts)
        level = min(int(at * member.levels), member.levels - 1)
        facts |= {f"process/{member.label}/{name}/{level}": number for name, number in seen.items()}
    if process.usable(at):
        return torch.cat([part.total for part in parts])[place]
    return group_mean(outcome, group)


def group_mean(outcome: Tensor, group: Tensor) -> Tensor:
    """Each sample's group mean over known outcomes: float64 [B], NaN in a group that has none."""
    _, index = torch.unique(group, return_inverse=True)
    known = outcome.isfinite()
    total = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(
        0, index, torch.where(known, outcome, 0.0)
    )
    count = torch.zeros_like(total).index_add_(0, index, known.double())
    return (total / count)[index]


def process_memory(process: ProcessSet | None) -> dict[str, float]:
    """``memory/process_mb``: what the weights of trained process rewards take; empty where a run has none."""
    rewards = [] if process is None else [member.reward for member in process.members]
    modules = [r.network if isinstance(r, LatentReward) else r.head for r in rewards if isinstance(r, LEARNED)]
    held = sum(module_bytes(module) for module in modules)
    return {"memory/process_mb": held / 2**20} if modules else {}


def reward_memory(rewards: RewardRuntime) -> dict[str, float]:
    """``memory/reward_mb``: what the rewards of this process say that they hold (``nbytes``); empty where none says it."""
    return {"memory/reward_mb": rewards.nbytes / 2**20} if rewards.nbytes else {}


def process_metrics(process: ProcessSet, backend: Backend) -> dict[str, Any]:
    """End an iteration: running pair accuracy of every noise level (0 the cleanest), which are left out, values that failed.

    Raises UserError where all values of a process reward failed.
    """
    row: dict[str, Any] = {}
    process.settle(backend.total)
    everywhere = int(backend.total(torch.tensor(process.asked)))
    for member in process.credited:
        label = member.label
        failed = int(backend.total(torch.tensor(process.invalid[label])))
        if everywhere and failed == everywhere:
            raise UserError(
                f"process: {label}: none of {everywhere} latents has a value; first error: "
                f"{process.first_error or 'in another process, see its log'}; mend it"
            )
        row[f"process/{label}/invalid"] = failed
        for level, accuracy in enumerate(process.accuracy(label)):
            if accuracy is not None:
                row[f"process/{label}/accuracy/{level}"] = accuracy
                left_out = member not in process.usable((level + 0.5) / member.levels)
                row[f"process/{label}/left_out/{level}"] = int(left_out)
    return row
