"""Estimates of the finished picture at intermediate states of a rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.config.schema import Config, Credit
from flowrl.config.trajectory import reads_start
from flowrl.credit.values import ValuedStates, ode_value, which_states
from flowrl.records import Prediction, Prompted, Trajectory
from flowrl.rollout.policy import Policy


def valued_states(trajectory: Trajectory, config: Config) -> tuple[ValuedStates, bool]:
    """(which states have a value of their own, whether the first of them is asked for)."""
    if trajectory.step is None:
        raise ValueError("values: this trajectory holds no transitions")
    return which_states(trajectory.step[0].tolist(), config.credit.stride), reads_start(config)


def state_at(trajectory: Trajectory, rows: Tensor, slot: int, after: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(latents [N, ...], their steps of the schedule int64 [N]) of samples ``rows`` at one state; slots as in `estimates`."""
    if trajectory.x is None or trajectory.x_next is None or trajectory.step is None:
        raise ValueError("values: this trajectory holds no transitions")
    if slot == 0:
        return trajectory.x[rows, 0], trajectory.step[rows, 0]
    return trajectory.x_next[rows, after[slot - 1]], trajectory.step[rows, after[slot - 1]] + 1


@torch.no_grad()
def estimates(
    policy: Policy,
    credit: Credit,
    trajectory: Trajectory,
    prompted: Prompted,
    row: Tensor,
    rows: Tensor,
    slot: int,
    after: Sequence[int],
) -> Tensor:
    """Estimate x0 of samples ``rows`` at one state: float32 [N, ...].

    slot 0 is the state before the first trained transition, slot j the one after trained transition ``after[j - 1]``.
    "x0": the one-step estimate that the rollout kept. "ode": a deterministic run of ``credit.ode_steps`` steps to the end.
    """
    if credit.values == "x0":
        if trajectory.x0_hat is None:
            raise ValueError("values: the rollout kept no one-step estimates")
        return trajectory.x0_hat[rows, 0 if slot == 0 else after[slot - 1] + 1]
    x, step = state_at(trajectory, rows, slot, after)

    def predict(x: Tensor, step: Tensor, places: Tensor) -> Prediction:
        return policy.predict(x, step, prompted[row[rows[places]]])

    return ode_value(predict, x.float(), step, trajectory.schedule, credit.ode_steps)[0]
