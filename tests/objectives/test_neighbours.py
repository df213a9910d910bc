"""Neighbor GRPO: the noises' law, the softmax and its gradient, what the loss does to an anchor, the quasi-norm."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.advantage import grpo, policy_loss
from flowrl.objectives.neighbours import neighbour_log_prob, neighbour_noise, quasi_norm_advantage


def test_noises_are_standard_normal_and_as_near_as_sigma_says() -> None:
    g = torch.Generator().manual_seed(0)
    base, fresh = torch.randn(40_000, generator=g), torch.randn(3, 40_000, generator=g)
    noise = neighbour_noise(base, fresh, 0.6)
    assert torch.allclose(noise, 0.8 * base + 0.6 * fresh, atol=1e-6)
    spread = torch.corrcoef(noise) - torch.where(torch.eye(3, dtype=torch.bool), 1.0, 1 - 0.6**2)
    assert spread.abs().max() < 4 / math.sqrt(40_000)
    assert (noise.var(1) - 1).abs().max() < 4 * math.sqrt(2 / 40_000)
    assert torch.equal(neighbour_noise(base, fresh, 0.0), base.expand(3, -1))
    assert torch.equal(neighbour_noise(base, fresh, 1.0), fresh)
    assert torch.allclose(neighbour_noise(base, fresh), math.sqrt(0.91) * base + 0.3 * fresh, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_softmax_over_distances_by_a_plain_loop(temperature: float) -> None:
    g = torch.Generator().manual_seed(1)
    members, anchor = torch.randn(4, 2, 3, generator=g), torch.randn(2, 2, 3, generator=g)
    found = neighbour_log_prob(members, anchor, temperature)
    assert found.shape == (2, 4) and found.dtype == torch.float32
    for k in range(2):
        weights = []
        for i in range(4):
            pairs = zip(members[i].flatten().tolist(), anchor[k].flatten().tolist(), strict=True)
            weights.append(math.exp(-sum((a - b) ** 2 for a, b in pairs) / temperature))
        for i in range(4):
            assert found[k, i].item() == pytest.approx(math.log(weights[i] / sum(weights)), abs=1e-4)


def test_gradient_leads_from_the_mean_member_to_the_chosen_one() -> None:
    g = torch.Generator().manual_seed(2)
    members, anchor = torch.randn(5, 3, generator=g), torch.randn(2, 3, generator=g, requires_grad=True)
    members.requires_grad_()
    found = neighbour_log_prob(members, anchor, 4.0)
    for chosen in range(5):
        (slope,) = torch.autograd.grad(found[:, chosen].sum(), anchor, retain_graph=True)
        mean = found.exp() @ members
        assert torch.allclose(slope, 0.5 * (members[chosen] - mean), atol=1e-6)
    found.sum().backward()
    assert members.grad is None


def test_order_of_members_and_anchors_does_not_matter() -> None:
    g = torch.Generator().manual_seed(3)
    members, anchor = torch.randn(6, 4, generator=g), torch.randn(3, 4, generator=g)
    order, rows = torch.randperm(6, generator=g), torch.tensor([2, 0, 1])
    whole = neighbour_log_prob(members, anchor)
    assert torch.allclose(neighbour_log_prob(members[order], anchor[rows]), whole[rows][:, order], atol=1e-6)
    assert torch.allclose(whole.exp().sum(1), torch.ones(3), atol=1e-6)
    shift = torch.full((4,), 3.0)
    assert torch.allclose(neighbour_log_prob(members + shift, anchor + shift), whole, atol=1e-4)


def test_a_step_on_the_loss_brings_the_anchor_to_better_members() -> None:
    """On policy ratio 1; with advantages that sum to 0, descent moves along sum_i A_i x_i."""
    g = torch.Generator().manual_seed(4)
    members = 0.3 * torch.randn(6, 8, generator=g)
    advantage = torch.randn(6, generator=g)
    advantage = advantage - advantage.mean()
    anchor = members[:2].clone().requires_grad_()
    now = neighbour_log_prob(members, anchor)
    inputs = {
        "log_prob": now,
        "old_log_prob": now.detach(),
        "advantage": advantage.expand(2, 6),
        "mask": torch.ones(2, 6, dtype=torch.bool),
    }
    made = policy_loss("ppo", inputs)
    made.loss.sum().backward()
    assert torch.allclose(made.loss, -inputs["advantage"]) and not made.low.any()
    assert torch.allclose(-anchor.grad, 2 * (advantage[:, None] * members).sum(0).expand(2, 8), atol=1e-5)


def test_quasi_norm_by_a_plain_loop() -> None:
    advantage = torch.tensor([1.0, -1.0, 0.5, 2.0, -2.0, 0.0, math.nan, 3.0])
    group = torch.tensor([4, 4, 4, 9, 9, 9, 9, 1])
    valid = torch.tensor([True, True, True, True, True, True, False, True])
    found = quasi_norm_advantage(advantage, group, valid)
    first = sum(abs(x) ** 0.8 for x in (1.0, -1.0, 0.5)) ** 1.25
    second = (2 * 2.0**0.8) ** 1.25
    expected = [1 / first, -1 / first, 0.5 / first, 2 / second, -2 / second, 0.0, 0.0, 1.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-6) and found.dtype == torch.float32
    wide = quasi_norm_advantage(advantage.double(), group, valid)
    assert wide.dtype == torch.float64 and wide.tolist() == pytest.approx(expected, rel=1e-12)


def test_quasi_norm_with_power_two_is_the_usual_normalisation_over_the_root_of_the_size() -> None:
    rewards, group = torch.tensor([0.1, 0.9, 0.4, 0.7]), torch.zeros(4, dtype=torch.int64)
    usual = grpo(rewards, group, eps=0.0).advantage
    assert torch.allclose(quasi_norm_advantage(usual, group, power=2.0), usual / 2, atol=1e-6)


def test_quasi_norm_holds_back_many_moderate_advantages_and_ignores_scale() -> None:
    dense, peaked = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([2**0.5, -(2**0.5), 0.0, 0.0])
    group = torch.zeros(4, dtype=torch.int64)
    norms = [quasi_norm_advantage(a, group).square().sum().item() for a in (dense, peaked)]
    assert norms[0] < 0.5 * norms[1], "both have the same Euclidean norm"
    for scale in (1e-300, 1e-30, 1e30, 1e300):
        scaled = quasi_norm_advantage(scale * dense.double(), group)
        assert torch.allclose(scaled, quasi_norm_advantage(dense.double(), group))
    assert not quasi_norm_advantage(0 * dense, group).any()


def test_bad_input_is_named() -> None:
    group = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"sigma: expected a number in \[0, 1\], got 1.5"):
        neighbour_noise(torch.zeros(3), torch.zeros(2, 3), 1.5)
    with pytest.raises(ValueError, match=r"fresh: expected \[G, ...\] over base \[3\], got \[3\]"):
        neighbour_noise(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"fresh: expected \[G, ...\] over base \[3\], got \[2, 1\]"):
        neighbour_noise(torch.zeros(3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        neighbour_log_prob(torch.zeros(2, 3), torch.zeros(1, 3), 0.0)
    for members, anchor in ((torch.zeros(2, 3), torch.zeros(1, 2)), (torch.zeros(0, 3), torch.zeros(1, 3))):
        with pytest.raises(ValueError, match="members, anchor: expected"):
            neighbour_log_prob(members, anchor)
    with pytest.raises(ValueError, match=r"power: expected a number in \(0, 2\], got 2.5"):
        quasi_norm_advantage(torch.zeros(2), group, power=2.5)
    with pytest.raises(ValueError, match=r"power: expected a number in \(0, 2\]"):
        quasi_norm_advantage(torch.zeros(2), group, power=0.0)
    with pytest.raises(ValueError, match=r"group: expected int64 \[2\]"):
        quasi_norm_advantage(torch.zeros(2), group.float())
    with pytest.raises(ValueError, match="advantage: expected finite numbers"):
        quasi_norm_advantage(torch.tensor([1.0, math.nan]), group)
