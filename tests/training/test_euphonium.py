"""Euphonium through the real trainer on Gaussian data: its reductions, its two surrogates, its distillate, its failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowrl.errors import UserError
from flowrl.objectives.flow_grpo import flow_grpo_loss
from flowrl.training.collection import StateValues
from flowrl.training.trainer import Trainer
from tests.rollout.doubles import Faulty, Linear, Zero, guide_by
from tests.training.test_exact import chain, later
from tests.training.toy import GaussianAdapter, LatentReward, reference_offsets, rows, toy_config

SMALL = {"rollout.steps": 5, "batch.groups": 2, "batch.group_size": 8, "batch.micro_batch": 8, "iterations": 4}


def bench(guide=None, values=None, b: float = 1.0, check: bool = True, **changes) -> Trainer:
    """A trainer on the toy. guide: takes the place of the one that the config names; values: of the rollout's states."""
    config = toy_config(**(SMALL | changes))
    adapter = GaussianAdapter(config.rollout.steps, mean=0.2, spread=0.8)
    trainer = Trainer(
        config, adapter, LatentReward(lambda x0: b * x0.flatten(1).sum(1)), rows(2),
        reference=reference_offsets(adapter.network),
    )  # fmt: skip
    trainer.collector.guide = guide
    if values is not None:
        collect = trainer._collect

        def collect_with() -> object:
            collected = collect()
            return replace(collected, values=values(collected))

        trainer._collect = collect_with
    return trainer


def after_x(collected) -> StateValues:
    """The states themselves as their values."""
    trajectory = collected.trajectory
    return StateValues(trajectory.x[:, 0].flatten().double(), trajectory.x_next.flatten(1).double())


def delta(trainer: Trainer) -> torch.Tensor:
    return trainer.adapter.network.delta.detach().clone()


def gradient(trainer: Trainer) -> torch.Tensor:
    """The gradient of the first update, not taken."""
    trainer._step = lambda: 0.0
    trainer.iterate()
    return trainer.adapter.network.delta.grad.clone()


@pytest.mark.parametrize(("kernel", "name"), [("flow_sde", "flow_grpo"), ("dance_sde", "dance_grpo")])
def test_zero_guidance_is_flow_grpo_and_dance_grpo_bit_for_bit(kernel: str, name: str) -> None:
    """F7 (i), (v): no pull and A^P = 0 leave whole iterations as they are: rollout, log-probs, gradient, weights."""
    common = {"rollout.kernel.name": kernel}
    plain = bench(**common, **{"objective.name": name})
    own = {"objective.name": "euphonium"}
    others = [
        bench(**common, **own, **{"euphonium.process": 0.0}),
        bench(guide_by(Zero()), **common, **own, **{"euphonium.process": 0.0}),
        bench(guide_by(Linear(), scale=0.0), **common, **{"objective.name": name}),
        bench(guide_by(Zero()), lambda c: StateValues(torch.zeros(16), torch.zeros(16, 4)), **common, **own),
        bench(guide_by(Zero()), **common, **own, **{
            "rollout.guide": {"reward": "toy", "log_prob": "guided"}, "euphonium.process": 0.0}),
    ]  # fmt: skip
    rows_of = [[t.iterate() for _ in range(2)] for t in (plain, *others)]
    for other, seen in zip(others, rows_of[1:], strict=True):
        assert torch.equal(delta(other), delta(plain))
        for a, b in zip(rows_of[0], seen, strict=True):
            assert all(b[key] == value for key, value in a.items() if key.startswith(("policy/", "score", "optimizer")))


def test_two_surrogates_are_summed() -> None:
    """L = mean clip(rho, A^O) + w mean clip(rho, A^P), by a plain loop; where signs differ it is not clip(rho, A^O + A^P)."""
    weights = {"euphonium.outcome": 0.7, "euphonium.process": 1.3}
    trainer = bench(values=after_x, **{"objective.name": "euphonium", "objective.clip_range": 0.01}, **weights)
    trainer.adapter.network.delta.data += 0.05
    held = {}
    learn = trainer.learner.learn

    def spy(batch):
        held["batch"] = batch
        # Weights move between rollout and update, so that ratios leave 1 and the clips act.
        trainer.learner.checked = True
        trainer.adapter.network.delta.data += 0.02 * torch.arange(5)
        return learn(batch)

    trainer.learner.learn, trainer._step = spy, lambda: 0.0
    trainer.iterate()
    batch, trajectory = held["batch"], held["batch"].trajectory
    process = batch.process_advantage
    values = trajectory.x_next.flatten(1).reshape(2, 8, 4).double()
    expected = (values - values.mean(1, True)) / (values.std(1, keepdim=True, unbiased=False) + 1e-4)
    torch.testing.assert_close(process, expected.reshape(16, 4).float(), rtol=1e-4, atol=1e-5)
    assert bool((process * batch.advantage < 0).any())
    found = trainer.adapter.network.delta.grad.clone()
    trainer.adapter.network.delta.grad = None
    policy, total = trainer.policy, torch.zeros(())
    for k in range(4):
        step = policy.step(trajectory.x[:, k], trajectory.step[:, k], batch.prompted[batch.row])
        now = -((trajectory.x_next[:, k] - step.mean) ** 2 / (2 * step.std**2)).flatten() - step.std.flatten().log()
        rho = (now - 0.5 * torch.log(torch.tensor(2 * torch.pi)) - trajectory.old_log_prob[:, k]).exp()
        for scale, advantage in ((0.7, batch.advantage[:, k]), (1.3, process[:, k])):
            clipped = torch.maximum(-advantage * rho, -advantage * rho.clamp(0.99, 1.01))
            total = total + scale * clipped.sum() / 64
    total.backward()
    torch.testing.assert_close(found, trainer.adapter.network.delta.grad, rtol=1e-3, atol=1e-6)
    together = flow_grpo_loss(
        now, now.detach() - 0.5, batch.advantage[:, 0] + process[:, 0], 0.01, None, 0.0, torch.ones(16)
    )
    apart = [flow_grpo_loss(now, now.detach() - 0.5, a, 0.01, None, 0.0, torch.ones(16)).loss
             for a in (batch.advantage[:, 0], process[:, 0])]  # fmt: skip
    assert float(together.loss.detach()) != pytest.approx(float(sum(apart).detach()), rel=1e-3)


def test_process_only_and_states() -> None:
    """outcome = 0 learns from the values alone; ``before`` takes those of the states that the steps started from."""
    own = {"objective.name": "euphonium", "euphonium.outcome": 0.0}
    after, before = bench(values=after_x, **own), bench(values=after_x, **own, **{"euphonium.state": "before"})
    silent = bench(values=after_x, b=0.0, **own)
    moved = gradient(after)
    assert float(moved.norm()) > 0 and torch.equal(moved, gradient(silent))
    shifted = {}
    learn = before.learner.learn
    before.learner.learn = lambda batch: shifted.update(batch=batch) or learn(batch)
    before.iterate()
    trajectory = shifted["batch"].trajectory
    values = torch.cat([trajectory.x[:, :1], trajectory.x_next[:, :-1]], 1).flatten(1).reshape(2, 8, 4).double()
    expected = (values - values.mean(1, True)) / (values.std(1, keepdim=True, unbiased=False) + 1e-4)
    found = shifted["batch"].process_advantage
    torch.testing.assert_close(found[:, 1:], expected.reshape(16, 4)[:, 1:].float(), rtol=1e-4, atol=1e-5)
    assert not found[:, 0].any()  # one shared latent before the first step


def test_guided_log_prob_makes_the_ratio_an_importance_weight() -> None:
    """rho = N(x'; plain) / N(x'; guided) at the first update, and 1 with log_prob=unguided."""
    guide = guide_by(Linear(m=0.2, s=0.8), scale=0.4, first=1)
    settings = {"objective.name": "euphonium", "euphonium.process": 0.0}
    held = {}
    for kind in ("unguided", "guided"):
        section = {"rollout.guide": {"reward": "toy", "log_prob": kind, "first": 1}}
        trainer = bench(guide, **settings, **section)
        learn = trainer.learner.learn
        trainer.learner.learn = lambda batch, learn=learn: held.update(batch=batch) or learn(batch)
        row = trainer.iterate()
        trajectory = held["batch"].trajectory
        ratio = (trajectory.old_log_prob - trajectory.behaviour_log_prob).exp()
        expected = float(ratio[held["batch"].element].mean()) if kind == "guided" else 1.0
        assert row["policy/ratio_mean"] == pytest.approx(expected, rel=1e-5)
        assert row["guide/pull"] > 0
    assert expected != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("mode", ["exact_tilt", "langevin"])
@pytest.mark.parametrize("target", ["reference", "rollout"])
def test_distillation_moves_towards_the_guided_step(mode, target: str) -> None:
    """The gradient at the start is that of |v - (v_0 - kappa grad R / beta)|^2: 2 kappa grad R / beta over the steps."""
    reward = Linear(m=0.2, s=0.8)
    guide = guide_by(reward, mode, scale=0.5, first=1)
    section = {"rollout.guide": {"reward": "toy", "mode": mode, "scale": 0.5, "first": 1}}
    only = {"objective.name": "euphonium", "euphonium.outcome": 0.0, "euphonium.process": 0.0, "euphonium.distil": 3.0}
    trainer = bench(guide, **only, **section, **{"euphonium.target": target, "rollout.kernel.name": "flow_sde"})
    found = gradient(trainer)
    t = trainer.adapter.grid[:-1]
    share = t / (1 - t)
    pull = 0.5 * reward.weight(t) * (share if mode == "exact_tilt" else share * 0.7**2 / (2 + 0.7**2))
    pull[0] = pull[-1] = 0.0  # not guided; not trained
    torch.testing.assert_close(found, 3.0 * 2 * pull / 4, rtol=1e-4, atol=1e-6)


def test_distillate_of_the_exact_tilt_reaches_its_mean_without_a_reward() -> None:
    """T-RL1 by the real trainer: offsets -kappa grad V / beta, and unguided samples at the tilted mean, as the chain says."""
    reward, scale = Linear(m=0.2, s=0.8), 0.6
    guide = guide_by(reward, "exact_tilt", scale=scale, first=1)
    section = {"rollout.guide": {"reward": "toy", "mode": "exact_tilt", "scale": scale, "first": 1}}
    only = {"objective.name": "euphonium", "euphonium.outcome": 0.0, "euphonium.process": 0.0, "euphonium.distil": 1.0}
    trainer = bench(guide, **only, **section, **{
        "rollout.steps": 10, "iterations": 60, "optimizer.lr": 0.15, "optimizer.schedule": "linear",
        "optimizer.max_grad_norm": 1e6, "batch.group_size": 2,
    })  # fmt: skip
    for _ in range(60):
        row = trainer.iterate()
    assert row["euphonium/distil_loss"] < 2e-4
    t = trainer.adapter.grid[:-1].double()
    pull = scale * reward.weight(t) * t / (1 - t)
    found = delta(trainer).double()
    torch.testing.assert_close(found[1:-1], -pull[1:-1], rtol=0.02, atol=0.01)
    factor, _, slope = chain(trainer.adapter, "precise", 0.7)
    after = later(factor)
    student = float((slope * found * after).sum())
    teacher = float((-slope * pull * after)[1:-1].sum())
    assert student == pytest.approx(teacher, rel=0.02)
    # What the 10 steps leave of the continuous answer: the first and last step are not trained.
    assert student == pytest.approx(scale * 0.8**2, rel=0.2)


def test_weights_count_members() -> None:
    """langevin_weighted: a member's loss weighs n softmax(log w) of its group."""
    guide = guide_by(Linear(m=0.2, s=0.8), "langevin_weighted", scale=0.7)
    section = {"rollout.guide": {"reward": "toy", "mode": "langevin_weighted", "scale": 0.7}}
    trainer = bench(guide, **{"objective.name": "euphonium", "euphonium.process": 0.0}, **section)
    held = {}
    train = trainer.learner._guided
    trainer.learner._guided = lambda batch: held.setdefault("after", train(held.setdefault("before", batch)))
    row = trainer.iterate()
    before, after = held["before"], held["after"]
    for g in range(2):
        here = before.trajectory.group_id == g
        share = 8 * before.trajectory.log_weight[here].softmax(0)
        torch.testing.assert_close(after.weight[here], before.weight[here] * share[:, None])
    assert 0 < row["guide/effective_size"] < 1


@pytest.mark.parametrize("how", ["nan", "gradient", "length"])
def test_failures_of_the_process_reward_never_reach_the_actor(how: str) -> None:
    """Members it failed for are masked, counted, and out of the statistics: the update is that of the others alone."""
    guide = guide_by(Faulty(how, above=1.2), scale=0.1)
    changes = {"failures.max_invalid_fraction": 1.0, "rollout.share_prefix": False, "objective.name": "euphonium",
               "euphonium.process": 0.0, "batch.micro_batch": 4}  # fmt: skip
    trainer = bench(guide, **changes)
    held = {}
    learn = trainer.learner.learn
    trainer.learner.learn = lambda batch: held.update(batch=batch) or learn(batch)
    row = trainer.iterate()
    batch = held["batch"]
    sound = batch.trajectory.sound
    assert 0 < row["guide/failed"] == int((~sound).sum()) < 16
    assert not batch.element[~sound].any() and batch.element[sound].any()
    assert bool(torch.isfinite(delta(trainer)).all()) and row["update/skipped"] == 0
    for g in range(2):
        here = (batch.trajectory.group_id == g) & sound
        if int(here.sum()) > 1:
            assert float(batch.advantage[here].sum()) == pytest.approx(0.0, abs=1e-4)


def test_too_many_failures_stop_the_run() -> None:
    trainer = bench(guide_by(Faulty("nan", above=-99.0)))
    with pytest.raises(
        UserError, match=r"rollout.guide: the process reward failed for 16 of 16 members.*first error: toy"
    ):
        trainer.iterate()


def test_resume_is_bit_exact() -> None:
    section = {"rollout.guide": {"reward": "toy", "scale": 0.4, "first": 1, "gradient": "spsa"}}
    own = {"objective.name": "euphonium", "euphonium.distil": 0.5}

    def make() -> Trainer:
        guide = guide_by(Linear(), scale=0.4, first=1, gradient="spsa")
        return bench(guide, after_x, **own, **section)

    whole, first, second = make(), make(), make()
    for _ in range(3):
        whole.iterate()
    first.iterate()
    second.load_state(first.state())
    second.iterate()
    second.iterate()
    assert torch.equal(delta(whole), delta(second))
