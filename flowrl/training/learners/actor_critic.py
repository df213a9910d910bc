"""AC-Flow: re-noised samples weighted by a critic's advantage, behind a gate that opens when the critic explains something.

An iteration: shape the rewards; value every draw (x_t, t) of every sample with the critic as it was before these samples;
judge it on them; update the policy if the gate is open; then train the critic. The policy's update is `ForwardLearner`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowrl.credit.critic import CriticBatch, Recent, Standard, draw_key
from flowrl.credit.networks import pooled_text
from flowrl.dynamics.interpolants import interpolate
from flowrl.objectives.actor_critic import centred_advantage, critic_advantage, shaped_reward
from flowrl.training.batch import TrainingBatch, Visit
from flowrl.training.critics import fit_together, in_order, make_critic, make_view, say_stopped
from flowrl.training.learners.base import Bench
from flowrl.training.learners.forward import Call, ForwardLearner, Inputs


class ActorCriticLearner(ForwardLearner):
    """``objective.name: ac_flow``."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.settings = self.config.actor_critic
        options = dict(self.config.objective.loss_options)
        self.weighting = str(options.get("weighting", "exponential"))
        self.temperature = float(options.get("temperature", 1.0))
        self.view = make_view(self.config, bench.policy, bench.rows[0], bench.reference)
        self.critic = make_critic(self.config, self.view)
        self.recent = Recent(self.config.critic.buffer)
        self.standard = Standard()
        self.advantages = torch.zeros(0)
        self.current = 0

    # -- an iteration ----------------------------------------------------------------------------------------------

    def learn(self, batch: TrainingBatch) -> dict[str, Any]:
        if batch.visit is None or batch.score is None:
            raise ValueError(
                "ac_flow: this batch does not say how its samples were scored, or which iteration it is of"
            )
        was = self.critic.stopped
        shaped = self._shaped(batch.score, batch.trajectory.group_id)
        known = shaped.isfinite()
        text = pooled_text(batch.prompted.positive)[batch.row]
        with self.bench.clock.phase("critic"):
            seen = self._draws(batch, batch.visit, text)
            values = torch.stack([self.critic.value(rows.x, rows.t, text).cpu() for rows in seen])
            t = torch.stack([rows.t.cpu() for rows in seen])
            gathered = [
                self.bench.backend.gather(v.flatten().contiguous()) for v in (values, shaped.expand_as(values), t)
            ]
            self.critic.judge(*gathered)
        row: dict[str, Any]
        gate = self.critic.gate
        if gate == "open" or self.config.critic.closed == "outcome":
            self.advantages = self._advantages(shaped, values if gate == "open" else torch.zeros_like(values), known)
            row = super().learn(replace(batch, element=batch.element & known[:, None]))
        else:
            row = {"update/steps": 0, "optimizer/lr": self.bench.rate}
        with self.bench.clock.phase("critic"):
            row["critic/loss"] = self._fit(batch, batch.visit, shaped, seen)
        say_stopped(self.critic, was, "ac_flow's critic")
        row["memory/critic_mb"] = (self.critic.nbytes + self.recent.nbytes) / 2**20
        return row | self.critic.as_metrics()

    def _shaped(self, score: Tensor, group: Tensor) -> Tensor:
        """Shaped rewards float32 [B], NaN where there is none."""
        s = self.settings
        if s.scale == "none":
            return score.float()
        everywhere = in_order(self.bench.backend, group, {"score": score})["score"]
        if bool(everywhere.isfinite().any()):
            self.standard.add(everywhere)
        scale = (self.standard.mean, self.standard.std) if s.scale == "running" else None
        return shaped_reward(score, group, limit=s.reward_limit, scale=scale)

    def _draws(self, batch: TrainingBatch, visit: Visit, text: Tensor) -> list[CriticBatch]:
        """What the critic reads of every sample at each of the update's draws; targets are not known yet."""
        found = []
        rows = torch.arange(len(batch.trajectory))
        for draw in range(self.config.forward.draws):
            at = self.renoiser.draw(batch.trajectory, visit.seed, visit.iteration, rows, draw)
            found.append(CriticBatch(self.view(at.x, at.t, batch.prompted.positive, batch.row), at.t, text, at.t))
        return found

    def _advantages(self, shaped: Tensor, values: Tensor, known: Tensor) -> Tensor:
        """What the loss takes for its advantage: float32 [draws, B]; the value itself with critic_only weights."""
        if self.weighting == "critic_only":
            made = values.clone()
        else:
            limit = self.settings.advantage_limit
            made = torch.stack([critic_advantage(torch.where(known, shaped, 0.0), v, limit=limit) for v in values])
        if self.settings.mean_one and self.weighting != "linear":
            weights = (self.temperature * made[:, known].double()).exp()
            sums = torch.stack([weights.sum(), torch.tensor(float(weights.numel()), dtype=torch.float64)])
            total, count = self.bench.backend.total(sums).tolist()
            made = centred_advantage(made, total, count, self.temperature) if count else made
        return made

    def _call(self, batch: TrainingBatch, rows: Tensor, draw: int) -> Call:
        self.current = draw
        return super()._call(batch, rows, draw)

    def _inputs(
        self, batch: TrainingBatch, rows: Tensor, call: Call, old: Tensor | None, reference: Tensor | None
    ) -> Inputs:
        given = super()._inputs(batch, rows, call, old, reference)
        return given | {"advantage": self.advantages[self.current, rows].to(call.value.device)}

    # -- the critic ------------------------------------------------------------------------------------------------

    def _fit(self, batch: TrainingBatch, visit: Visit, shaped: Tensor, seen: list[CriticBatch]) -> float | None:
        known = shaped.isfinite()
        group = batch.trajectory.group_id[known]
        device = batch.trajectory.x0.device
        here, target = known.to(device), shaped[known].to(device)
        if self.view.features:  # what it saw of the update's draws: other times would be further network calls
            own = {name: torch.cat([getattr(rows, name)[here] for rows in seen]) for name in ("x", "t", "text")}
            own["target"], group = target.repeat(len(seen)), group.repeat(len(seen))
        else:
            own = {"x0": batch.trajectory.x0[here].float(), "text": seen[0].text[here], "target": target}
        gathered = in_order(self.bench.backend, group, own)
        if len(gathered["target"]):
            self.recent.push(gathered)
        if not len(self.recent):
            return None

        def draw(step: int) -> CriticBatch:
            seed = draw_key(visit.seed, visit.iteration, step)
            rows = self.recent.draw(seed, self.config.critic.batch)
            return CriticBatch(**rows) if self.view.features else self._noised(rows, seed)

        return fit_together(self.critic, self.bench.backend, draw, self.config.critic.batch)

    def _noised(self, rows: dict[str, Tensor], seed: int) -> CriticBatch:
        """Finished samples at fresh times with fresh noise, as the update's draws are distributed."""
        x0 = rows["x0"]
        generator = torch.Generator().manual_seed(seed + 1)
        x1 = torch.randn(x0.shape, generator=generator).to(x0.device)
        uniform = torch.rand(len(x0), generator=generator)
        draws = self.config.forward.draws
        path = torch.zeros(3, len(x0), device=x0.device)
        for number in range(min(draws, len(x0))):
            made = self.renoiser.path(uniform[number::draws].tolist(), number)
            path[:, number::draws] = torch.stack(made).to(x0.device)
        wide = (-1, *[1] * (x0.ndim - 1))
        x = interpolate(x0, x1, path[1].reshape(wide), path[2].reshape(wide))
        return CriticBatch(x, path[0], rows["text"], rows["target"])

    def replicas(self) -> dict[str, Tensor]:
        return super().replicas() | {f"critic.{name}": p for name, p in self.critic.network.named_parameters()}

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "old": super().state(), "critic": self.critic.state(), "recent": self.recent.parts, "standard": self.standard.sums,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        if "critic" not in state:
            raise ValueError("checkpoint: holds no critic, and ac_flow has one; was objective.name changed?")
        self.critic.load(state["critic"])
        super().load_state(state["old"])
        self.recent.parts = [dict(part) for part in state["recent"]]
        self.standard.sums = state["standard"].clone()
