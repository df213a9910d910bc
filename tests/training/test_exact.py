"""The real rollout, objective and trainer against closed forms (flow_algorithms 2.3, T-RL3 and T-RL4)."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.dynamics.kernels import StepPoint, mean_slope
from flowrl.training.trainer import Trainer
from tests.training.toy import GaussianAdapter, LatentReward, reference_offsets, rows, toy_config


def chain(adapter: GaussianAdapter, kernel: str, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Affine coefficient A_k, std_k and |dmean/dv|_k of every step, from the kernels' definition written out here."""
    t, s = adapter.grid[:-1].double(), adapter.grid[1:].double()
    k = adapter.network.slope(t)
    if kernel == "precise":
        rho = ((s * (1 - t)) / (t * (1 - s))) ** (noise**2 / 2)
        factor = (1 - s) * (1 - t * k) + s * rho * (1 + (1 - t) * k)
        std = s * (1 - rho**2).sqrt()
        slope = -(1 - s) * t + s * rho * (1 - t)
    else:  # Euler-Maruyama with Flow-GRPO's g
        gg = noise**2 * t / (1 - torch.where(t == 1, t[1], t))
        beta = 1 + gg * (1 - t) / (2 * t)
        factor = 1 - gg * (t - s) / (2 * t) - k * beta * (t - s)
        std, slope = (gg * (t - s)).sqrt(), -beta * (t - s)
    std[-1] = 0.0  # the last step is walked by the ODE
    factor[-1], slope[-1] = 1 - k[-1] * (t[-1] - s[-1]), -(t[-1] - s[-1])
    return factor, std, slope


def later(factor: torch.Tensor) -> torch.Tensor:
    """Product of A_j over j > k."""
    return torch.tensor([factor[k + 1 :].prod() for k in range(len(factor))])


@pytest.mark.parametrize("kernel", ["precise", "flow_sde"])
def test_policy_gradient_of_a_chain(kernel: str) -> None:
    """T-RL3: the update's gradient for an offset at step k is -b (dmean/dv)_k prod_{j>k} A_j / (trained steps)."""
    adapter = GaussianAdapter(10)
    config = toy_config(
        **{"rollout.kernel.name": kernel, "batch.groups": 32, "batch.group_size": 128, "batch.micro_batch": 4096}
    )
    b = 1.0
    trainer = Trainer(config, adapter, LatentReward(lambda x0: b * x0.flatten(1).sum(1)), rows(32))
    gradients = []
    for iteration in range(4):
        trainer.iteration, trainer._step = iteration, lambda: 0.0
        trainer.iterate()
        gradients.append(adapter.network.delta.grad.clone())
        adapter.network.delta.grad = None
    found = torch.stack(gradients).double()
    factor, _, slope = chain(adapter, kernel, 0.7)
    expected = -b * slope * later(factor) / 9
    # dr_grpo centres by the group mean, own sample included: the expectation carries (G - 1) / G.
    expected = expected * 127 / 128
    error = (found.mean(0) - expected)[:-1]
    assert float(error.abs().max()) < 0.12 * float(expected.abs().max())
    assert float(torch.nn.functional.cosine_similarity(found.mean(0)[:-1], expected[:-1], dim=0)) > 0.998


def test_mean_slope_agrees_with_the_chain() -> None:
    adapter = GaussianAdapter(10)
    schedule = adapter.schedule(10, None)
    for kernel in ("precise", "flow_sde"):
        point = StepPoint.of(schedule, torch.arange(9), 1)
        _, _, slope = chain(adapter, kernel, 0.7)
        torch.testing.assert_close(mean_slope(kernel, 0.7, point).double(), slope[:-1].abs(), atol=1e-5, rtol=1e-4)


def test_trainer_reaches_the_optimum_under_path_kl() -> None:
    """T-RL4: max E[b x0] - lambda sum_k KL_k has E*[x0] - E[x0] = b Var(x0 | x1) / lambda."""
    b, penalty = 1.0, 2.0
    adapter = GaussianAdapter(6)
    config = toy_config(**{
        "rollout.steps": 6, "iterations": 160, "batch.groups": 2, "batch.group_size": 192, "batch.micro_batch": 384,
        "objective.kl.form": "paper", "objective.kl.weight": penalty, "optimizer.lr": 0.05, "optimizer.schedule": "linear",
    })  # fmt: skip
    trainer = Trainer(
        config, adapter, LatentReward(lambda x0: b * x0.flatten(1).sum(1)), rows(2),
        reference=reference_offsets(adapter.network),
    )  # fmt: skip
    rows_seen = [trainer.iterate() for _ in range(config.iterations)]
    factor, std, slope = chain(adapter, "precise", 0.7)
    after = later(factor)
    best = b * std**2 * after / penalty / slope  # offset of the velocity whose mean shift is b std^2 prod A / lambda
    found = adapter.network.delta.detach().double()
    gain = float((slope * found * after)[:-1].sum())
    optimum = float((b * (std * after) ** 2 / penalty).sum())
    assert gain == pytest.approx(optimum, rel=0.1)
    torch.testing.assert_close((slope * found)[:-1], (slope * best)[:-1], atol=0.06, rtol=0.15)
    kl = float(((slope * best)[:-1] ** 2 / (2 * std[:-1] ** 2)).mean())
    assert rows_seen[-1]["policy/kl"] == pytest.approx(kl, rel=0.3)


def test_published_value_of_the_optimum() -> None:
    """flow_algorithms 2.3: Var(x0 | x1) is .852452 for the clamped Flow-GRPO chain of ten steps at a = .7, s = 1."""
    adapter = GaussianAdapter(10)
    factor, std, _ = chain(adapter, "flow_sde", 0.7)
    t, s = adapter.grid[:-1].double(), adapter.grid[1:].double()
    k, gg = adapter.network.slope(t), 0.49 * t / (1 - t)
    factor[-1] = 1 - gg[-1] * 0.1 / (2 * t[-1]) - k[-1] * (1 + gg[-1] * (1 - t[-1]) / (2 * t[-1])) * (t[-1] - s[-1])
    std[-1] = math.sqrt(gg[-1] * (t[-1] - s[-1]))  # the published chain keeps its last step stochastic
    assert float(((std * later(factor)) ** 2).sum()) == pytest.approx(0.852452, abs=2e-6)
