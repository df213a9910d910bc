"""Test-time search in an evaluation: what ``search`` of a config means, and the noise and rewards that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.config.schema import Config
from flowrl.credit.networks import pooled_text
from flowrl.credit.process.combine import ProcessMember
from flowrl.distributed.backend import Backend
from flowrl.protocols import PipelineAdapter
from flowrl.records import Prompted, Request, RewardBatch, Schedule
from flowrl.rollout.policy import Policy
from flowrl.rollout.search import Judge, Search, Searcher, Spent
from flowrl.scoring.runtime import RewardRuntime

Draw = Callable[[Policy, Prompted, Sequence[tuple[Request, int]], int], Tensor]
"""(the evaluation's policy, conditioning and (what is asked, number of the picture) of B pictures, seed) -> x0 [B, ...]."""


def search_of(config: Config) -> Search:
    """What ``search`` asks for, on the schedule of the evaluation."""
    s, steps = config.search, config.evaluation.steps
    branch = frozenset(s.at or range(steps - 1)) if s.kind != "best_of" else frozenset()
    if s.kind == "none":
        raise ValueError("search.kind: none asks for no search")
    return Search(s.kind, s.width, s.children, branch, s.scale, s.threshold, s.pick)


def pictures_of(adapter: PipelineAdapter, x: Tensor, request: Request) -> Tensor:
    """Decode latents: uint8 [B, H, W, 3] on CPU (videos [B, F, H, W, 3])."""
    pictures = (adapter.decode(x, request).nan_to_num(0.0) * 255).round().to(torch.uint8)
    return pictures.movedim(1, -1).contiguous().cpu()


def outcome_judge(adapter: PipelineAdapter, rewards: RewardRuntime, size: int) -> Judge:
    """The score of an evaluation's rewards, of decoded pictures in calls of at most ``size``."""

    def ask(x: Tensor, k: int, prompted: Prompted) -> Tensor:
        text = pooled_text(prompted.positive)
        chunks = [slice(at, at + size) for at in range(0, len(x), size)]
        return torch.cat([part(x[rows], prompted.requests[rows], text[rows]) for rows in chunks])

    def part(x: Tensor, asked: Sequence[Request], text: Tensor) -> Tensor:
        batch = RewardBatch(
            pictures_of(adapter, x, asked[0]).numpy(), [r.prompt for r in asked],
            [r.metadata for r in asked], [r.prompt_id for r in asked], x, text=text,
        )  # fmt: skip
        found = rewards.score(batch)
        scores = torch.from_numpy(found.scores).double()
        return torch.where(torch.from_numpy(found.valid), scores, torch.nan)

    return Judge(ask, of_estimate=True)


def process_judge(member: ProcessMember, schedule: Schedule) -> Judge:
    """A process reward, of latents as they are."""

    def ask(x: Tensor, k: int, prompted: Prompted) -> Tensor:
        found = member.ask(x, schedule.t[k].expand(len(x)), prompted)
        return torch.where(found.valid, found.values, torch.nan)

    return Judge(ask, of_estimate=False)


class Searching:
    """Draws the pictures of an evaluation by search; takes the place of plain sampling in ``evaluate``.

    member: the process reward that ``search.reward`` names; None: the outcome, by ``rewards``.
    """

    def __init__(
        self, config: Config, adapter: PipelineAdapter, rewards: RewardRuntime, member: ProcessMember | None = None
    ) -> None:
        self.config, self.adapter, self.rewards, self.member = config, adapter, rewards, member
        self.search = search_of(config)
        self.spent = Spent()

    def draw(self, policy: Policy, prompted: Prompted, part: Sequence[tuple[Request, int]], seed: int) -> Tensor:
        """x0 [B, ...] of B pictures. policy: that of the evaluation; noise is drawn by the kernel of the rollout."""
        kernel, size = self.config.rollout.kernel, self.config.batch.micro_batch
        own = Policy(
            self.adapter, policy.schedule, kernel.name, kernel.noise, policy.guidance, guidance_low=policy.guidance_low
        )
        if self.member is None:
            judge = outcome_judge(self.adapter, self.rewards, size)
        else:
            judge = process_judge(self.member, policy.schedule)
        searcher = Searcher(own, self.search, judge, self.spent)
        # best_of goes slot by slot in the batches of plain sampling; the others hold all candidates at once.
        count = len(part) if self.search.kind == "best_of" else max(1, size // self.search.slots)
        chunks = torch.split(torch.arange(len(part)), count)
        return torch.cat(
            [self._some(searcher, prompted[rows], [part[i] for i in rows.tolist()], seed) for rows in chunks]
        )

    def facts(self, backend: Backend | None = None) -> dict[str, Any]:
        """What evaluation.json says of a search: its kind and what it cost, of all processes."""
        names = list(self.spent.as_facts())
        spent = torch.tensor([float(self.spent.as_facts()[name]) for name in names], dtype=torch.float64)
        total = (spent if backend is None else backend.total(spent)).tolist()
        s = self.config.search
        return {"kind": s.kind, "width": s.width, "reward": s.reward or "score"} | {
            name: int(value) for name, value in zip(names, total, strict=True)
        }

    def _some(self, searcher: Searcher, prompted: Prompted, part: Sequence[tuple[Request, int]], seed: int) -> Tensor:
        shape = self.adapter.latent_shape(part[0][0])

        def noise(draw: int, stream: str) -> Tensor:
            # Slot 0 of the start noise is that of plain sampling.
            keys = [
                rng.key(seed, 0, r.prompt_id, slot, m, draw, "evaluation" if stream == "initial" else stream)
                for r, m in part
                for slot in range(self.search.slots)
            ]
            return rng.normal(keys, shape)

        def uniform(picture: int, state: int) -> float:
            request, member = part[picture]
            return rng.uniform(rng.key(seed, 0, request.prompt_id, member=member, step=state, stream="sampler"))

        return searcher.run(prompted, noise, uniform)
