"""Noising finished samples anew: which time and which noise each draw has, by key."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl import rng
from flowrl.config.forward import Forward
from flowrl.dynamics.interpolants import interpolate, prediction_from_endpoints
from flowrl.errors import UserError
from flowrl.objectives.forward import x0_scale
from flowrl.records import PredictionKind, Schedule, Trajectory


@dataclass(frozen=True)
class Noised:
    """Samples at one draw. x, x0, x1: float32 [N, ...]; t: float32 [N]; alpha, sigma: float32 [N, 1, ...]."""

    x: Tensor
    x0: Tensor
    x1: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def target(self, kind: PredictionKind) -> Tensor:
        """The network output that leads back to x0: [N, ...]."""
        return prediction_from_endpoints(self.x0, self.x1, kind, self.alpha, self.sigma)

    def scale(self, kind: PredictionKind) -> Tensor:
        """How far the clean estimate moves for a unit of that output: [N]."""
        return x0_scale(kind, self.alpha, self.sigma).flatten()


def draw_time(forward: Forward, number: int, u: float) -> float:
    """Time of draw ``number`` of a sample, from u uniform in [0, 1): by every rule but the grid."""
    low, width = forward.low, forward.high - forward.low
    match forward.times:
        case "stratified":
            return low + width * (number + u) / forward.draws
        case "logit_normal":
            normal = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * u - 1, dtype=torch.float64).clamp(-1 + 1e-12)))
            made = 1 / (1 + math.exp(-(forward.location + forward.spread * normal)))
            return min(max(made, low), forward.high)
    return low + width * u


class Renoiser:
    """Gives every sample its draws. schedule: the rollout's, whose points the rule ``grid`` takes.

    shared: the members of a group have the same draws. Raises UserError for a rule that asks for the path at any t where
    only the schedule's points are known (a variance-preserving model), and for a grid without a point in [low, high].
    """

    def __init__(self, forward: Forward, schedule: Schedule, shared: bool) -> None:
        self.forward, self.shared = forward, shared or forward.shared
        self.schedule = schedule
        t = schedule.t[:-1].cpu()
        self.points = ((t >= forward.low) & (t <= forward.high)).nonzero().flatten()
        straight = bool(torch.allclose(schedule.alpha, 1 - schedule.t, atol=1e-6))
        if forward.times == "grid" and not len(self.points):
            raise UserError(
                f"forward.low, forward.high: no point of the sampling grid lies in [{forward.low}, {forward.high}]; widen it"
            )
        if forward.times != "grid" and not straight:
            raise UserError(
                f"forward.times: {forward.times} takes any t in [0, 1], and this model's noise is known at its own timesteps; "
                "use grid"
            )

    def draw(self, trajectory: Trajectory, seed: int, iteration: int, rows: Tensor, number: int) -> Noised:
        """Noise samples ``rows`` (int64 [N]) for the ``number``-th time."""
        ids = [trajectory.prompt_id, trajectory.occurrence, trajectory.member]
        keys: list[list[int]] = torch.stack([i[rows] for i in ids], 1).tolist()
        if self.shared:
            keys = [[prompt, occurrence, 0] for prompt, occurrence, _ in keys]
        times = [rng.uniform(rng.key(seed, iteration, key[0], key[1], key[2], number, "timestep")) for key in keys]
        x0 = trajectory.x0[rows].float()
        x1 = rng.normal(
            [rng.key(seed, iteration, key[0], key[1], key[2], number, "renoise") for key in keys],
            x0.shape[1:],
            x0.device,
        )
        t, alpha, sigma = self.path(times, number)
        wide = (-1, *[1] * (x0.ndim - 1))
        t, alpha, sigma = (v.to(x0.device) for v in (t, alpha.reshape(wide), sigma.reshape(wide)))
        return Noised(interpolate(x0, x1, alpha, sigma), x0, x1, t, alpha, sigma)

    def path(self, uniforms: list[float], number: int) -> tuple[Tensor, Tensor, Tensor]:
        """(t, alpha, sigma), float32 [N], of draw ``number`` for uniform numbers in [0, 1)."""
        if self.forward.times == "grid":
            count, draws = len(self.points), self.forward.draws
            places = [min(int(count * (number + u) / draws), count - 1) for u in uniforms]
            step = self.points[places].to(self.schedule.t.device)
            return self.schedule.t[step], self.schedule.alpha[step], self.schedule.sigma[step]
        t = torch.tensor([draw_time(self.forward, number, u) for u in uniforms])
        return t, 1 - t, t
