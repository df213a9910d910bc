"""A critic for credit on trajectories: values of the states before each trained step, learnt from the run's own samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.config.schema import Config
from flowrl.credit.critic import CriticBatch, Recent, Standard, ValueCritic, draw_key
from flowrl.credit.critic_losses import lambda_returns
from flowrl.credit.networks import pooled_text
from flowrl.distributed.backend import Backend
from flowrl.records import Prompted, PromptRow, Trajectory
from flowrl.rollout.policy import Policy
from flowrl.rollout.requests import request_of
from flowrl.training.batch import Visit
from flowrl.training.critic_view import Reference, View


@dataclass(frozen=True)
class CriticValues:
    """In units of the score. start: float64 [B], of the first trained state; step: float64 [B, K - 1], of the states after
    the trained steps but the last; post: float64 [B, K], of the mean of each transition, before its noise, or None; open:
    whether they may be used.
    """

    start: Tensor
    step: Tensor
    post: Tensor | None
    open: bool


def make_view(config: Config, policy: Policy, row: PromptRow, reference: Reference | None) -> View:
    """What a run's critics read of its states."""
    return View(policy.adapter, config.critic.features, reference, config.batch.micro_batch, request_of(config, row))


def make_critic(config: Config, view: View, member: int = 0) -> ValueCritic:
    """A new critic for a run's states. member: number of the critic, which its first weights are keyed by."""
    seed = rng.key(config.seed, 0, member=member, stream="perturb")
    return ValueCritic(config.critic, view.reads, view.text, seed, view.adapter.device)


def say_stopped(critic: ValueCritic, was: str, name: str) -> None:
    """Warn, once, that a critic was stopped."""
    if critic.stopped and not was:
        warnings.warn(f"{name} was stopped: {critic.stopped}; the policy gets nothing of it any more", stacklevel=2)


def in_order(backend: Backend, group: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All processes' rows as a single process would have them: sorted by the group that each belongs to.

    group: int64 [N]; rows: by name, [N, ...]. Each process gets all of them.
    """
    order = backend.gather(group.cpu()).argsort(stable=True)
    gathered = {name: backend.gather(value.contiguous()) for name, value in rows.items()}
    return {name: value[order.to(value.device)] for name, value in gathered.items()}


def fit_together(critic: ValueCritic, backend: Backend, draw: Callable[[int], CriticBatch], count: int) -> float | None:
    """Fit a critic on draws of ``count`` states that are the same everywhere: each process takes its part of them."""

    def part(step: int) -> CriticBatch:
        return draw(step)[backend.rank :: backend.world]

    loss = critic.fit(part, backend.add_gradients, count)
    return None if loss is None else float(backend.total(torch.tensor(loss, dtype=torch.float64)))


class CreditCritic:
    """The critic of ``credit.values: critic``; with ``post`` a second one, of transitions' means (pdppo)."""

    def __init__(self, config: Config, policy: Policy, view: View, backend: Backend, post: bool = False) -> None:
        self.config, self.policy, self.view, self.backend = config, policy, view, backend
        self.critics = {"critic": make_critic(config, view)}
        if post:
            self.critics["critic_post"] = make_critic(config, view, 1)
        self.seen: tuple[Trajectory | None, dict[str, tuple[Tensor, Tensor, Tensor]]] = (None, {})
        self.recent = {name: Recent(config.critic.buffer) for name in self.critics}
        self.standard = Standard()

    @property
    def open(self) -> bool:
        return all(critic.open for critic in self.critics.values())

    def values(self, trajectory: Trajectory, prompted: Prompted, row: Tensor) -> CriticValues:
        """Values under the critic as it is, before it sees how these samples ended."""
        found = {}
        for name, critic in self.critics.items():
            value = critic.value(*(v.flatten(0, 1) for v in self._views(name, trajectory, prompted, row)))
            value = value.reshape(len(trajectory), -1)
            found[name] = self.standard.back(value.double().cpu())
        own = found["critic"]
        return CriticValues(own[:, 0], own[:, 1:], found.get("critic_post"), self.open)

    def learn(
        self, trajectory: Trajectory, prompted: Prompted, row: Tensor, score: Tensor, visit: Visit
    ) -> dict[str, Any]:
        """Judge the critic on samples that it has not seen, then train it on them. score: float64 [B], NaN for none."""
        metrics: dict[str, Any] = {}
        everywhere = in_order(self.backend, trajectory.group_id, {"score": score})["score"]
        before = [critic.stopped for critic in self.critics.values()]
        if bool(everywhere.isfinite().any()):
            self.standard.add(everywhere)
        known = score.isfinite()
        target = self.standard.forward(score)[known].float()
        for number, (name, critic) in enumerate(self.critics.items()):
            views = [v[known.to(v.device)] for v in self._views(name, trajectory, prompted, row)]
            count, steps = views[1].shape
            flat = [v.flatten(0, 1) for v in views]
            value = critic.value(*flat).reshape(count, steps).cpu() if count else torch.zeros(0, steps)
            outcome = target[:, None].expand(-1, steps)
            returns = lambda_returns(value, target, critic.settings.lam) if count else outcome
            made = {"x": flat[0], "t": flat[1], "text": flat[2], "target": returns.flatten().to(flat[0].device)}
            made |= {"value": value.flatten(), "outcome": outcome.flatten()}
            group = trajectory.group_id[known].repeat_interleave(steps)
            seen = in_order(self.backend, group, made)
            critic.judge(seen.pop("value"), seen.pop("outcome"), seen["t"].cpu())
            if len(seen["t"]):
                self.recent[name].push(seen)
            metrics[f"{name}/loss"] = self._fit(name, visit, number)
            metrics |= critic.as_metrics(name)
            say_stopped(critic, before[number], f"critic: {name}")
        self.seen = (None, {})
        held = sum(c.nbytes for c in self.critics.values()) + sum(r.nbytes for r in self.recent.values())
        return metrics | {"memory/critic_mb": held / 2**20}

    def _fit(self, name: str, visit: Visit, number: int) -> float | None:
        recent, critic = self.recent[name], self.critics[name]
        if not len(recent):
            return None

        def draw(step: int) -> CriticBatch:
            seed = draw_key(visit.seed, visit.iteration, step + number * critic.settings.steps)
            return CriticBatch(**recent.draw(seed, critic.settings.batch))

        return fit_together(critic, self.backend, draw, critic.settings.batch)

    def _views(
        self, name: str, trajectory: Trajectory, prompted: Prompted, row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the critic reads of each state [B, K, ...], times [B, K] and text [B, K, D]; made once a trajectory."""
        if self.seen[0] is not trajectory:
            self.seen = (trajectory, {})
        if name not in self.seen[1]:
            x, t = self._states(name, trajectory)
            steps = x.shape[1]
            rows = row.repeat_interleave(steps)
            view = self.view(x.flatten(0, 1), t.flatten(), prompted.positive, rows)
            text = pooled_text(prompted.positive)[rows].reshape(len(x), steps, -1)
            self.seen[1][name] = (view.reshape(len(x), steps, *view.shape[1:]), t, text)
        return self.seen[1][name]

    def _states(self, name: str, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """Latents float32 [B, K, ...] and their times [B, K]."""
        x, step = trajectory.x, trajectory.step
        if x is None or step is None:
            raise ValueError("critic: this trajectory holds no transitions")
        if name == "critic":
            return x.float(), self.policy.schedule.t[step]
        if trajectory.value is None:
            raise ValueError("critic: the rollout kept no network outputs to take means of")
        flat = (x.flatten(0, 1).float(), step.flatten(), trajectory.value.flatten(0, 1))
        mean = self.policy.made_of(*flat, trajectory.kind).mean.reshape(x.shape)
        return mean.float(), self.policy.schedule.t[step + 1]

    def replicas(self) -> dict[str, Tensor]:
        """The networks' parameters, by name."""
        return {
            f"{name}.{own}": parameter
            for name, critic in self.critics.items()
            for own, parameter in critic.network.named_parameters()
        }

    def state(self) -> dict[str, Any]:
        return {
            "critics": {name: critic.state() for name, critic in self.critics.items()},
            "recent": {name: recent.parts for name, recent in self.recent.items()},
            "standard": self.standard.sums,
        }

    def load(self, state: dict[str, Any]) -> None:
        if set(state.get("critics", {})) != set(self.critics):
            raise ValueError("checkpoint: its critics are not those of this run; was credit.values changed?")
        for name, critic in self.critics.items():
            critic.load(state["critics"][name])
            self.recent[name].parts = [dict(part) for part in state["recent"][name]]
        self.standard.sums = state["standard"].clone()


def build_critics(
    config: Config, policy: Policy, rows: Sequence[PromptRow], backend: Backend, reference: Reference | None
) -> CreditCritic | None:
    """The critics of ``credit.values: critic``; None for another setting."""
    if config.credit.values != "critic":
        return None
    view = make_view(config, policy, rows[0], reference)
    return CreditCritic(config, policy, view, backend, post=config.advantage.name == "pdppo")
