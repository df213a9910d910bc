"""Critics: losses by plain loops, the value of Gaussian data down to its floor, the gate, and state."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch

from flowrl.config.process import Critic
from flowrl.credit.critic import CriticBatch, Recent, Standard, ValueCritic, draw_key
from flowrl.credit.critic_losses import (
    bin_edges,
    critic_loss,
    critic_value,
    explained_variance,
    hl_gauss_target,
    lambda_returns,
)


def test_squared_and_huber_by_hand() -> None:
    output, target = torch.tensor([[0.0], [0.0]]), torch.tensor([0.5, 3.0])
    assert critic_loss("squared", output, target).tolist() == [0.125, 4.5]
    assert critic_loss("huber", output, target, delta=1.0).tolist() == [0.125, 2.5]
    with pytest.raises(ValueError, match="critic loss 'hl_gauss'"):
        critic_loss("hl_gauss", output, target)


def test_hl_gauss_against_a_plain_loop() -> None:
    edges = bin_edges(-1.0, 1.0, 5)
    target = torch.tensor([0.13, -0.9, 2.0])
    output = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = critic_loss("hl_gauss", output, target, edges=edges)
    for i, y in enumerate([0.13, -0.9, 1.0]):
        sigma = 0.75 * 0.4
        phi = [0.5 * (1 + math.erf((float(e) - y) / (sigma * math.sqrt(2)))) for e in edges]
        mass = [b - a for a, b in pairwise(phi)]
        mass = [m / sum(mass) for m in mass]
        logits = output[i].tolist()
        log_z = math.log(sum(math.exp(v) for v in logits))
        assert float(found[i]) == pytest.approx(
            -sum(m * (v - log_z) for m, v in zip(mass, logits, strict=True)), rel=1e-5
        )
    torch.testing.assert_close(hl_gauss_target(target, edges).sum(1), torch.ones(3))
    # the mean of the histogram of an interior target is the target, and so is that of logits that fit it
    fine = bin_edges(-1.0, 1.0, 51)
    histogram = hl_gauss_target(torch.tensor([0.13]), fine)
    assert float(critic_value("hl_gauss", histogram.log(), fine)) == pytest.approx(0.13, abs=1e-4)


def test_explained_variance() -> None:
    y = torch.tensor([1.0, 2.0, 3.0, torch.nan])
    assert explained_variance(torch.tensor([6.0, 7.0, 8.0, 0.0]), y) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(4), y) == pytest.approx(0.0)
    assert explained_variance(-y, y) == pytest.approx(-3.0)
    assert explained_variance(torch.full((4,), torch.inf), y) == -math.inf
    assert explained_variance(y, torch.ones(4)) is None


def test_lambda_returns_between_outcome_and_next_value() -> None:
    value = torch.tensor([[0.1, 0.4, 0.7]])
    outcome = torch.tensor([2.0])
    torch.testing.assert_close(lambda_returns(value, outcome, 1.0), torch.tensor([[2.0, 2.0, 2.0]]))
    torch.testing.assert_close(lambda_returns(value, outcome, 0.0), torch.tensor([[0.4, 0.7, 2.0]]))
    half = [0.5 * 0.4 + 0.5 * (0.5 * 0.7 + 0.5 * 2.0), 0.5 * 0.7 + 0.5 * 2.0, 2.0]
    torch.testing.assert_close(lambda_returns(value, outcome, 0.5), torch.tensor([half]))


M, S = 1.0, 0.5


def gaussian_batch(seed: int, count: int) -> CriticBatch:
    """x_t of N(M, S^2) at uniform times, with the standardised reward of x0 for target."""
    generator = torch.Generator().manual_seed(seed)
    x0 = M + S * torch.randn(count, 1, 1, 1, generator=generator)
    t = torch.rand(count, generator=generator)
    x1 = torch.randn(count, 1, 1, 1, generator=generator)
    tt = t.reshape(-1, 1, 1, 1)
    return CriticBatch((1 - tt) * x0 + tt * x1, t, torch.zeros(count, 0), ((x0 - M) / S).flatten())


def nothing(parameters) -> None:
    return None


@pytest.mark.parametrize("loss", ["squared", "huber", "hl_gauss"])
def test_a_critic_learns_the_posterior_mean_down_to_its_floor(loss: str) -> None:
    """V* = s (1 - t) / D (x - (1 - t) m), with mean squared error E[t^2 / D] of the standardised reward."""
    settings = Critic(
        loss=loss, steps=250, lr=5e-3, ema=0.95, warmup=1, min_explained=0.2, below=1.0, delta=3.0, width=8, blocks=1
    )
    critic = ValueCritic(settings, 1, 0, seed=0)
    fit = critic.fit(lambda step: gaussian_batch(step, 256), nothing)
    test = gaussian_batch(10_000, 4096)
    value = critic.value(test.x, test.t, test.text)
    d = (1 - test.t) ** 2 * S**2 + test.t**2
    best = S * (1 - test.t) / d * (test.x.flatten() - (1 - test.t) * M)
    floor = float((test.t**2 / d).mean())
    error = float((value - test.target).square().mean())
    assert fit is not None and floor < error < floor + 0.06
    assert float((value - best).square().mean()) < 0.05
    critic.judge(value, test.target, test.t)
    assert critic.explained == pytest.approx(1 - floor, abs=0.1) and critic.open and critic.gate == "open"


def test_the_gate_waits_for_warm_up_and_for_explained_variance() -> None:
    critic = ValueCritic(Critic(warmup=2, min_explained=0.5, steps=1, below=0.3), 1, 0, seed=0)
    target = torch.linspace(-1, 1, 8)
    late = torch.full((8,), 0.1)
    critic.judge(target, target, late)
    assert critic.explained == pytest.approx(1.0) and not critic.open  # not trained yet
    for step in range(2):
        critic.fit(lambda _, step=step: gaussian_batch(step, 8), nothing)
    assert critic.open
    critic.judge(torch.zeros(8), target, late)
    assert not critic.open and critic.gate == "closed"
    mixed = torch.cat([late, torch.full((8,), 0.9)])  # what it says at t >= below does not count
    critic.judge(torch.cat([target, -target]), torch.cat([target, target]), mixed)
    assert critic.open
    critic.judge(target, torch.ones(8), late)  # targets alike say nothing
    assert critic.open


def test_a_diverging_critic_is_stopped_for_good() -> None:
    critic = ValueCritic(Critic(warmup=0, steps=1), 1, 0, seed=0)
    target = torch.linspace(-1, 1, 8)
    for count in range(3):
        assert not critic.stopped, count
        critic.judge(-5 * target, target, torch.zeros(8))
    assert "three" not in critic.stopped and "3 iterations in a row" in critic.stopped
    critic.judge(target, target, torch.zeros(8))
    assert not critic.open and critic.gate == "stopped"
    before = [p.detach().clone() for p in critic.network.parameters()]
    assert critic.fit(lambda step: gaussian_batch(step, 8), nothing) is None
    assert all(torch.equal(a, b) for a, b in zip(before, critic.network.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_it_and_changes_no_weight() -> None:
    critic = ValueCritic(Critic(steps=2), 1, 0, seed=0)
    before = [p.detach().clone() for p in critic.network.parameters()]
    bad = gaussian_batch(0, 8)
    batch = CriticBatch(bad.x, bad.t, bad.text, torch.full((8,), torch.nan))
    assert critic.fit(lambda step: batch, nothing) is None and "its gradient is nan" in critic.stopped
    assert all(torch.equal(a, b) for a, b in zip(before, critic.network.parameters(), strict=True))


def test_state_goes_on_bit_for_bit() -> None:
    critic = ValueCritic(Critic(steps=3), 1, 0, seed=0)
    critic.fit(lambda step: gaussian_batch(step, 16), nothing)
    other = ValueCritic(Critic(steps=3), 1, 0, seed=99)
    other.load(copy.deepcopy(critic.state()))
    for c in (critic, other):
        c.fit(lambda step: gaussian_batch(100 + step, 16), nothing)
    test = gaussian_batch(7, 16)
    assert torch.equal(critic.value(test.x, test.t, test.text), other.value(test.x, test.t, test.text))
    assert other.trained == 2
    with pytest.raises(ValueError, match="does not fit this run"):
        ValueCritic(Critic(width=8), 1, 0, seed=0).load(critic.state())


def test_first_weights_are_keyed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, three = (ValueCritic(Critic(), 2, 3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    weights = [torch.cat([p.flatten() for p in c.network.parameters()]) for c in (one, two, three)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_recent_rows_and_running_scale() -> None:
    recent = Recent(2)
    for value in (1.0, 2.0, 3.0):
        recent.push({"a": torch.full((4,), value), "b": torch.arange(4.0)})
    assert len(recent) == 8
    drawn = recent.draw(draw_key(0, 0, 0), 64)
    assert set(drawn["a"].tolist()) == {2.0, 3.0} and torch.equal(drawn["a"], recent.draw(draw_key(0, 0, 0), 64)["a"])
    standard = Standard(decay=0.5)
    assert (standard.mean, standard.std) == (0.0, 1.0)
    standard.add(torch.tensor([0.0, 2.0, torch.nan]))
    assert (standard.mean, standard.std) == (1.0, 1.0)
    standard.add(torch.tensor([4.0]))  # counts 1 and 1: mean of {0, 2 halved} and 4
    assert standard.mean == pytest.approx((0.5 * 2 + 4) / 2)
    torch.testing.assert_close(standard.back(standard.forward(torch.tensor([7.0]))), torch.tensor([7.0]))
