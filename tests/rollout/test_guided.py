"""Guided rollouts on Gaussian data: exact shifts and weights, what zero changes (nothing), and failures that stay out."""

from __future__ import annotations

import pytest
import torch

from flowrl.dynamics.log_prob import log_prob
from flowrl.rollout.guided import Guide, effective_size, group_weights
from tests.rollout.doubles import Faulty, Linear, Zero, draw, guide_by, toy_policy
from tests.training.test_exact import chain


def drift(policy, guide: Guide, b_of_t, start: int = 0) -> float:
    """Shift of x0 that guidance by a gradient independent of x makes: d_(k+1) = A_k d_k + a_k grad R / beta, float64."""
    kernel, noise = policy.kernel, policy.noise
    factor, std, slope = chain(policy.adapter, kernel, noise)
    t, after = policy.adapter.grid[:-1].double(), policy.adapter.grid[1:].double()
    shift = 0.0
    for k in range(len(t)):
        a = 0.0
        if guide.first <= k <= guide.last:
            if guide.mode == "exact_tilt":
                a = float(-slope[k] * t[k] / (1 - t[k]))
            elif std[k] > 0 and kernel == "flow_sde":
                a = float(std[k] ** 2 / 2)
            elif std[k] > 0:
                a = float(t[k] * after[k] * (1 - (1 - (std[k] / after[k]) ** 2).clamp(min=0).sqrt()))
        shift = float(factor[k]) * shift + a * guide.scale * float(b_of_t(t[k]))
    return shift


@pytest.mark.parametrize("kernel", ["precise", "flow_sde"])
@pytest.mark.parametrize("mode", ["langevin", "exact_tilt"])
def test_every_sample_moves_as_the_affine_recursion_says(kernel: str, mode) -> None:
    """F7 (iii): the same noise with and without guidance differs by the recursion of 1.5 with the extra drift."""
    policy = toy_policy(10, kernel, mean=0.3, spread=0.6)
    reward = Linear(b=1.5, m=0.3, s=0.6)
    guide = guide_by(reward, mode, scale=0.8, first=1)
    plain, guided = draw(policy).x0, draw(policy, guide).x0
    expected = drift(policy, guide, lambda t: reward.weight(t))
    torch.testing.assert_close(guided - plain, torch.full_like(plain, expected), rtol=1e-4, atol=1e-5)


def test_exact_tilt_reaches_the_tilted_mean_and_langevin_falls_short() -> None:
    """T-RL1: N(m + b s^2 / lambda, s^2). langevin has the continuous share of it that its kernel gives."""
    reward = Linear(b=1.0, s=0.7)
    policy = toy_policy(80, "flow_sde", spread=0.7)
    exact = guide_by(reward, "exact_tilt", scale=2.0, first=1)
    plain = draw(policy, groups=1, size=1).x0
    reached = float((draw(policy, exact, groups=1, size=1).x0 - plain).mean())
    assert reached == pytest.approx(2.0 * 0.7**2, rel=0.03)
    short = float((draw(policy, guide_by(reward, "langevin", scale=2.0, first=1), groups=1, size=1).x0 - plain).mean())
    assert 0 < short < 0.5 * reached
    assert short == pytest.approx(drift(policy, guide_by(reward, scale=2.0, first=1), reward.weight), rel=1e-3)


@pytest.mark.parametrize("slope", [None, lambda t: 1 - t])
def test_weighted_langevin_samples_stand_for_the_tilted_law(slope) -> None:
    """Feynman-Kac weights correct what langevin leaves: mean m + b s^2 / lambda, for the value and for another R_t."""
    policy = toy_policy(20, "precise", mean=0.5, spread=0.8)
    guide = guide_by(Linear(1.0, 0.5, 0.8, slope), "langevin_weighted", scale=1.5)
    made = draw(policy, guide, groups=1, size=1000)
    weights = group_weights(made.log_weight, made.group_id, made.sound)
    x0 = made.x0.flatten()
    wanted = 0.5 + 1.5 * 0.8**2
    error = float((weights * (x0 - wanted)).square().sum().sqrt()) / len(x0)
    assert float((weights * x0).mean()) == pytest.approx(wanted, abs=3 * error + 0.03)
    assert float(x0.mean()) < wanted - 0.15
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
    variance = float((weights * (x0 - wanted).square()).mean())
    assert variance == pytest.approx(0.8**2, rel=0.25)


def test_weights_by_a_plain_loop() -> None:
    """log w = [R(x_1, 1) + sum_k R(x_k after the ODE step, t_(k+1)) - R(x_k, t_k)] / beta."""
    policy, reward = toy_policy(4, "dance_sde", 0.5), Linear(slope=lambda t: 1 - 0.6 * t)
    made = draw(policy, guide_by(reward, "langevin_weighted", scale=0.7))
    t = policy.adapter.grid
    states = [*made.x.unbind(1), made.x_next[:, -1]]
    value = lambda x, k: reward.score(x, t[k].expand(len(x)), None).values  # noqa: E731
    total = value(states[0], 0)
    for k, x in enumerate(states):
        carried = x - (t[k] - t[k + 1]) * policy.adapter.network(x, t[k].expand(len(x))).detach()
        total = total + value(carried, k + 1) - value(x, k)
    torch.testing.assert_close(made.log_weight, 0.7 * total, rtol=1e-4, atol=1e-5)


def test_zero_scale_asks_nothing_and_a_zero_gradient_changes_no_bit() -> None:
    policy = toy_policy(6)
    plain = draw(policy, shared=True)
    silent = Linear()
    for guide in (guide_by(silent, scale=0.0), guide_by(Zero()), guide_by(Zero(), gradient="spsa")):
        made = draw(policy, guide, shared=True)
        for name in ("x0", "x", "x_next", "old_log_prob", "std"):
            assert torch.equal(getattr(made, name), getattr(plain, name)), name
        assert torch.equal(made.behaviour_log_prob, plain.old_log_prob)
        assert not made.pull.any() and bool(made.sound.all())
    assert not silent.seen


def test_log_probs_of_the_policy_and_of_the_guided_gaussian() -> None:
    """Stored: log N(x'; plain mean) as the policy's own, log N(x'; guided mean) as behaviour; their ratio is the weight."""
    policy = toy_policy(5, "flow_sde", shape=(2, 1, 1))
    guide = guide_by(Linear(), scale=0.7, first=1, last=2)
    made = draw(policy, guide, keep=frozenset({"reward_gradient"}))
    for k in range(4):
        step = policy.step(made.x[:, k], made.step[:, k], None or policy.encode([]))
        own = log_prob(made.x_next[:, k], step.mean, step.std, "sum")
        torch.testing.assert_close(made.old_log_prob[:, k], own)
        t = float(policy.adapter.grid[k])
        on = 1 <= k <= 2
        gradient = float(Linear().weight(torch.tensor(t))) if on else 0.0
        torch.testing.assert_close(made.reward_gradient[:, k], torch.full((8, 2, 1, 1), gradient))
        shift = 0.7 * gradient * step.std**2 / 2
        guided = log_prob(made.x_next[:, k], step.mean + shift, step.std, "sum")
        torch.testing.assert_close(made.behaviour_log_prob[:, k], guided)
        torch.testing.assert_close(made.pull[:, k], (shift / step.std).flatten().expand(8))


def test_only_the_window_is_guided_and_calls_are_counted() -> None:
    """langevin asks at stochastic steps of its window alone; exact_tilt at all; members that share a latent ask once."""
    policy = toy_policy(6)
    for mode, gradient, expected in (
        ("langevin", "autograd", [(2, 1), (8, 2)]),
        ("langevin", "spsa", [(2, 1)] * 4 + [(8, 2)] * 4),
        ("exact_tilt", "autograd", [(2, 1), (8, 2), (8, 3)]),
        ("langevin_weighted", "autograd", [(2, 1), (2, 2), (8, 2), (8, 3), (8, 3), (8, 4)]),
    ):
        reward = Linear()
        guide = guide_by(reward, mode, first=1, last=3, gradient=gradient, draws=2)
        draw(policy, guide, shared=True, steps=[1, 2])
        found = [(n, round((1 - t) * 6)) for n, t in reward.seen]
        assert found == expected, mode
        assert guide.calls() * {"langevin": 2}.get(mode, 3) == len(found)


def test_guidance_before_a_shared_start_ends_is_the_same_for_all_members() -> None:
    policy = toy_policy(6)
    guide = guide_by(Linear(), "exact_tilt", scale=0.5, first=1)
    shared = draw(policy, guide, shared=True, steps=[3])
    assert torch.equal(shared.x[:4, 0], shared.x[:1, 0].expand(4, 1, 1, 1))
    moved = shared.x[:, 0] - draw(policy, shared=True, steps=[3]).x[:, 0]
    assert float(moved.min()) > 0.01


@pytest.mark.parametrize("how", ["nan", "invalid", "gradient"])
@pytest.mark.parametrize("gradient", ["autograd", "spsa"])
def test_a_failing_member_is_marked_and_left_alone(how: str, gradient) -> None:
    """It is drawn without guidance from there on, exactly as the others would be drawn without it."""
    if how == "gradient" and gradient == "spsa":
        return  # values alone: nothing is wrong with them
    policy = toy_policy(4)
    plain, made = draw(policy, steps=[0]), draw(policy, guide_by(Faulty(how), gradient=gradient), steps=[0])
    bad = made.x[:, 0].flatten() > (0.49 if gradient == "spsa" else 0.5)
    assert 0 < int(bad.sum()) < 8
    assert torch.equal(made.sound, ~bad)
    assert torch.equal(made.x_next[bad], plain.x_next[bad])
    assert bool((made.x_next[~bad] != plain.x_next[~bad]).all())
    assert bool(torch.isfinite(made.x0).all())


def test_a_wrong_number_of_values_marks_the_whole_call() -> None:
    policy = toy_policy(4)
    made = draw(policy, guide_by(Faulty("length")), steps=[0])
    assert not bool(made.sound.any())
    assert torch.equal(made.x0, draw(policy, steps=[0]).x0)


def test_failure_of_a_shared_latent_marks_all_its_members() -> None:
    policy = toy_policy(4)
    made = draw(policy, guide_by(Faulty("nan", -9.0)), shared=True, steps=[1, 2])
    assert not bool(made.sound.any())


def test_spsa_noise_is_keyed() -> None:
    """The same draws at any chunking, other draws at another iteration; shared latents share them."""
    policy = toy_policy(5, shape=(1, 2, 2))
    guide = guide_by(Linear(), gradient="spsa", draws=2)
    whole, parts = draw(policy, guide, shared=True), draw(policy, guide, shared=True, chunk=3)
    assert torch.equal(whole.x0, parts.x0)
    # A linear reward under SPSA: the estimate depends on the directions alone, so it differs between latents.
    kept = draw(policy, guide, keep=frozenset({"reward_gradient"}))
    assert kept.reward_gradient[:, 1].flatten(1).unique(dim=0).shape[0] > 1
    other = draw(policy, guide, keep=frozenset({"reward_gradient"}), iteration=1)
    assert not torch.equal(kept.reward_gradient, other.reward_gradient)


def test_unit_gradients_have_norm_one() -> None:
    policy = toy_policy(5, shape=(1, 2, 2))
    made = draw(policy, guide_by(Linear(b=7.0), unit=True), keep=frozenset({"reward_gradient"}))
    norms = made.reward_gradient[:, 1:].flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_group_weights_and_effective_size() -> None:
    log_weight = torch.tensor([0.0, 0.0, 1.0, 5.0])
    weights = group_weights(log_weight, torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(
        effective_size(torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])), torch.tensor([4.0, 1]).double()
    )
