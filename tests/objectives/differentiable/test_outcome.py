"""Losses on finished pictures, and path divergences: worked numbers, plain loops, bad input."""

from __future__ import annotations

import pytest
import torch

from flowrl.objectives.differentiable import alignprop_loss, ctrl_loss, draft_loss, refl_loss, step_kl


def test_refl_worked_numbers() -> None:
    reward = torch.tensor([-1.0, 0.5, 2.0, 3.0], requires_grad=True)
    loss = refl_loss(reward)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.003, 0.0015, 0.0, 0.0]))
    loss.sum().backward()
    assert reward.grad.tolist() == pytest.approx([-0.001, -0.001, 0.0, 0.0])
    assert refl_loss(torch.tensor(0.0), margin=1.0, scale=2.0) == 2


def test_draft_and_alignprop() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert draft_loss(rewards).tolist() == [-2.0, 1.0]
    assert alignprop_loss(rewards[0]).tolist() == [-1.0, -2.0]
    assert alignprop_loss(rewards[0], target=1.5).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="rewards have shape"):
        draft_loss(rewards[0])


def test_step_kl_against_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, ref = (torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std), torch.distributions.Normal(ref, std)
    ).sum((1, 2))
    torch.testing.assert_close(step_kl(mean, ref, std), expected)
    with pytest.raises(ValueError, match="std 0"):
        step_kl(mean, ref, std * 0)


def test_step_kl_is_girsanovs_for_euler_maruyama() -> None:
    """dt (1 + g^2 (1 - t) / 2t)^2 |dv|^2 / 2 g^2, summed over the latent."""
    g, t, dt, dv = 0.7, 0.6, 0.1, torch.tensor([[0.3, -0.2, 0.5]])
    beta = 1 + g**2 * (1 - t) / (2 * t)
    found = step_kl(-beta * dt * dv, torch.zeros(1, 3), torch.tensor([[g * dt**0.5]]))
    assert float(found) == pytest.approx(dt * beta**2 * float((dv**2).sum()) / (2 * g**2), rel=1e-5)


def test_ctrl_trades_likelihood_for_divergence() -> None:
    found = ctrl_loss(torch.tensor([-0.5, -2.0]), torch.tensor([0.1, 0.0]), 3.0)
    assert found.tolist() == pytest.approx([1.6, 6.0])
