"""Learning from given pairs of pictures: no rollout and no reward; pictures are encoded once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.data.preferences import load_pictures, read_preferences
from flowrl.data.sampler import Drawn, draw_groups
from flowrl.records import Request, Trajectory
from flowrl.rollout.requests import request_of
from flowrl.training.batch import TrainingBatch, update_of
from flowrl.training.learners.base import Bench, Draw
from flowrl.training.learners.forward import ForwardLearner


class PreferenceLearner(ForwardLearner):
    """Diffusion DPO on ``data.preferences``: ``batch.groups`` pairs an iteration, each a group of two."""

    needs_rollout = False

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.pairs = read_preferences(Path(self.config.data.preferences))
        self.requests = [request_of(self.config, pair.row) for pair in self.pairs]
        self.latents: dict[int, Tensor] = {}

    def learn_from(self, draw: Draw) -> dict[str, Any]:
        visit, batch, backend = draw.visit, self.config.batch, self.bench.backend
        drawn = draw_groups(visit.seed, visit.iteration, batch.groups, len(self.pairs), None)
        mine = [drawn[i] for i in backend.share(len(drawn), self.config.objective.updates)]
        with self.bench.clock.phase("encode"):
            x0 = torch.cat([self._encoded(d.prompt_id) for d in mine])
            prompted = self.bench.policy.encode([self.requests[d.prompt_id] for d in mine])
        trajectory = self._trajectory(mine, x0, visit.policy_version)
        rows = len(x0)
        sign = torch.tensor([1.0, -1.0]).repeat(len(mine))[:, None]
        place = torch.arange(len(mine)).repeat_interleave(2)
        part = update_of(trajectory.group_id, batch, self.config.objective.updates)
        ones = torch.ones(rows, 1)
        made = TrainingBatch(trajectory, prompted, place, sign, ones, ones.bool(), part, visit=visit)
        return {"score/mean": None, "preference/pairs": batch.groups} | self.learn(made)

    @torch.no_grad()
    def _encoded(self, number: int) -> Tensor:
        """Latents of a pair, chosen first: float32 [2, ...] on the device; kept in main memory once made."""
        if number not in self.latents:
            request: Request = self.requests[number]
            pictures = torch.from_numpy(load_pictures(self.pairs[number], request.height, request.width))
            media = pictures.permute(0, 3, 1, 2).float() / 255
            self.latents[number] = self.bench.adapter.encode_media(media, request).float().cpu()
        return self.latents[number].to(self.bench.adapter.device)

    def _trajectory(self, drawn: list[Drawn], x0: Tensor, version: int) -> Trajectory:
        def twice(values: list[int]) -> Tensor:
            return torch.tensor(values).repeat_interleave(2)

        group, none = twice([d.group_id for d in drawn]), torch.zeros(len(x0), self.bench.policy.schedule.steps)
        return Trajectory(
            prompt_id=twice([d.prompt_id for d in drawn]),
            occurrence=twice([d.occurrence for d in drawn]),
            group_id=group,
            member=torch.tensor([0, 1]).repeat(len(drawn)),
            policy_version=version,
            schedule=self.bench.policy.schedule,
            kernel="ode",
            log_prob_reduction=self.config.objective.log_prob_reduction,
            storage_dtype=torch.float32,
            x0=x0,
            stochastic_mask=none.bool(),
            trained_mask=none.bool(),
            parent=group,
        )
