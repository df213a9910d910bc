"""Critics and AC-Flow through the real trainer: warm-up, known shifts, failures, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl.checkpoint import store
from flowrl.training.trainer import Trainer
from tests.training.helpers import comparable, make, small_config, tensors
from tests.training.toy import GaussianAdapter, LatentReward, reference_offsets, rows, toy_config

PLAIN = {
    "rollout.kernel.name": "ode", "rollout.share_prefix": False, "rollout.window.first": 0, "objective.name": "ac_flow",
    "advantage.name": "grpo", "forward.times": "grid", "forward.draws": 10,
}  # fmt: skip
OPEN = {"critic.warmup": 1, "critic.min_explained": 0.1, "critic.below": 1.0, "critic.lr": 1e-2, "critic.steps": 60,
        "critic.width": 4, "critic.blocks": 1, "critic.ema": 0.5}  # fmt: skip
SPREAD = 0.5


def linear(x0: torch.Tensor) -> torch.Tensor:
    return x0.flatten(1).sum(1)


def trainer_of(reward=linear, **changes: object) -> Trainer:
    adapter = GaussianAdapter(10, mean=0.5, spread=SPREAD)
    config = toy_config(**(PLAIN | changes))
    return Trainer(config, adapter, LatentReward(reward), rows(4), reference=reference_offsets(adapter.network))


def remember_draws(trainer: Trainer) -> dict:
    """Every pass has the same draws: make each of them once. Returns them as they come."""
    draw, known = trainer.learner.renoiser.draw, {}

    def remembered(trajectory, seed, iteration, rows, number):
        key = (iteration, number, int(rows[0]), len(rows))
        if key not in known:
            known[key] = draw(trajectory, seed, iteration, rows, number)
        return known[key]

    trainer.learner.renoiser.draw = remembered
    return known


def residual(trainer: Trainer, known: dict) -> torch.Tensor:
    """Mean of u - v over the drawn samples at each time of the grid: what sampling alone would move the velocity by."""
    network = trainer.adapter.network
    step = torch.cat([(network.times[None, :-1] - at.t[:, None]).abs().argmin(1) for at in known.values()])
    with torch.no_grad():
        off = torch.cat([(at.x1 - at.x0 - network(at.x, at.t)).flatten() for at in known.values()]).double()
    total = torch.zeros(10, dtype=torch.float64).index_add_(0, step, off)
    return total / torch.bincount(step, minlength=10)


def shift(trainer: Trainer) -> torch.Tensor:
    return trainer.adapter.network.delta.detach().double()


def predicted(scale: float) -> torch.Tensor:
    """Rewards are standardised in groups, so b = 1 / s: the tilt of scale tau moves v by -tau s t / D."""
    t = GaussianAdapter(10).grid[:-1].double()
    return -scale * SPREAD * t / ((1 - t) ** 2 * SPREAD**2 + t**2)


FIT = {"batch.group_size": 256, "batch.micro_batch": 1024, "objective.passes": 60, "iterations": 1, "optimizer.lr": 0.08,
       "optimizer.schedule": "linear", "rollout.solver": "heun",
       "actor_critic.reward_limit": 0.0, "actor_critic.advantage_limit": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "scale"),
    [({"weighting": "linear", "temperature": 0.5, "alpha": 0.0}, 0.5),
     ({"weighting": "linear", "temperature": 0.5, "alpha": 1.0}, 0.25),
     ({"weighting": "exponential", "temperature": 0.5, "alpha": 0.0}, 0.5),
     ({"weighting": "critic_only", "temperature": 2.0, "alpha": 0.0}, 0.0),
     ({"weighting": "linear", "regulariser": "adaptive", "temperature": 0.5, "alpha": 2.0}, 0.25)],
)  # fmt: skip
def test_first_iteration_moves_by_its_predicted_tilt(options: dict, scale: float) -> None:
    """T-RL1: Delta v = -(b s^2 / lambda) t / D with 1 / lambda = tau / (1 + alpha), tau, 0, tau / alpha; any critic."""
    # Linear weights have mean 1 without a critic; the others take an untrained one, and must not care.
    warmup = 99 if options["weighting"] == "linear" and "regulariser" not in options else 0
    changes = {"objective.loss_options": options, "critic.closed": "outcome", "critic.warmup": warmup}
    trainer = trainer_of(**FIT, **changes, **{"critic.min_explained": -1e9, "critic.width": 4, "critic.blocks": 1})
    known = remember_draws(trainer)
    row = trainer.iterate()
    assert row["update/steps"] == 60
    learnt = shift(trainer).clone()
    trainer.adapter.network.delta.data.zero_()
    share = 0.0 if options.get("regulariser") == "adaptive" else 1 / (1 + options["alpha"])
    found, expected = learnt - share * residual(trainer, known), predicted(scale)
    trainer.adapter.network.delta.data.copy_(learnt)
    assert float((found - expected).abs().max()) < 0.06 + 0.1 * float(expected.abs().max())
    if scale:
        assert float(expected.abs().max()) > 0.19
    mean = float(trainer._collect().trajectory.x0.mean())
    moved = mean - 0.5
    assert moved > 0.05 if scale else abs(moved) < 0.06


def test_a_closed_gate_leaves_the_policy_bit_identical() -> None:
    """Warm-up trains the critic alone; once it explains enough the policy moves."""
    trainer = trainer_of(**OPEN, **{"optimizer.lr": 0.02, "forward.draws": 2})
    seen = []
    for _ in range(6):
        before = shift(trainer).clone()
        row = trainer.iterate()
        moved = not torch.equal(before, shift(trainer))
        assert moved == (row["update/steps"] > 0) and (row["critic/explained_variance"] is not None)
        seen.append(moved)
    assert seen[0] is False and any(seen)
    assert row["critic/open"] == 1 and row["critic/explained_variance"] > 0.1 and row["critic/stopped"] == 0


def test_a_diverging_critic_is_stopped_and_nothing_reaches_the_actor() -> None:
    trainer = trainer_of(**(OPEN | {"critic.lr": 1e12, "critic.max_grad_norm": 1e12, "critic.loss": "squared"}))
    with pytest.warns(UserWarning, match="ac_flow's critic was stopped"):
        rows_seen = [trainer.iterate() for _ in range(5)]
    assert rows_seen[-1]["critic/stopped"] == 1 and rows_seen[-1]["update/count"] == 0
    assert not bool(shift(trainer).any())


def test_failed_rewards_leave_critic_and_policy() -> None:
    """A score that is not a number is no target and no sample; the others go on."""

    def reward(x0: torch.Tensor) -> torch.Tensor:
        scores = linear(x0).clone()
        scores[3] = torch.nan
        return scores

    trainer = trainer_of(reward, **OPEN, **{"critic.closed": "outcome"})
    row = trainer.iterate()
    assert row["update/steps"] == 1 and row["critic/loss"] is not None and row["policy/loss"] is not None
    assert len(trainer.learner.recent) == 4 * 64 - 4  # one a chunk of 64


BASELINE = {"rollout.share_prefix": False, "credit.values": "critic", "critic.warmup": 1, "critic.min_explained": 0.1,
            "critic.below": 1.0, "critic.lr": 1e-2, "critic.steps": 60, "critic.width": 4, "critic.blocks": 1, "critic.ema": 0.5,
            "optimizer.lr": 0.02}  # fmt: skip


@pytest.mark.parametrize("name", ["gae", "t_ppo", "pdppo", "poise"])
def test_a_critic_is_the_baseline_of_the_engines_estimators(name: str) -> None:
    adapter = GaussianAdapter(10, mean=0.5, spread=SPREAD)
    trainer = Trainer(toy_config(**(BASELINE | {"advantage.name": name})), adapter, LatentReward(linear), rows(4))
    first = trainer.iterate()
    assert first["update/steps"] == 0 and not bool(adapter.network.delta.any())
    found = [trainer.iterate() for _ in range(8)]
    assert found[-1]["critic/open"] == 1 and found[-1]["update/steps"] == 1
    assert found[-1]["score/mean"] > first["score/mean"] + 0.05
    assert ("critic_post/loss" in first) == (name == "pdppo")


def test_values_of_the_critic_are_in_units_of_the_score_and_of_the_state_before_each_step() -> None:
    adapter = GaussianAdapter(10, mean=0.5, spread=SPREAD)
    reward = LatentReward(lambda x0: 100 + 7 * linear(x0))
    trainer = Trainer(toy_config(**(BASELINE | {"advantage.name": "gae"})), adapter, reward, rows(4))
    for _ in range(4):
        trainer.iterate()
    found = trainer._collect()
    outcome = torch.from_numpy(found.scored.scores).double()
    whole = torch.cat([found.values.start[:, None], found.values.step], 1)
    assert whole.shape == (256, 10) and torch.equal(whole[:, -1], outcome)
    errors = (whole - outcome[:, None]).square().mean(0)
    assert float(errors[8]) < 0.5 * float(errors[0]) and abs(float(whole[:, 0].mean() - outcome.mean())) < 2
    values = trainer.critics.values(found.trajectory, found.prompted, found.row)
    torch.testing.assert_close(values.start, found.values.start)


def test_until_it_opens_plain_advantages_may_take_its_place() -> None:
    """closed=outcome: the update of iteration 1 is grpo's, bit for bit."""
    deltas = []
    for changes in ({"advantage.name": "gae", **BASELINE, "critic.closed": "outcome"},
                    {"advantage.name": "grpo", "rollout.share_prefix": False, "optimizer.lr": 0.02}):  # fmt: skip
        adapter = GaussianAdapter(10, mean=0.5, spread=SPREAD)
        Trainer(toy_config(**changes), adapter, LatentReward(linear), rows(4)).iterate()
        deltas.append(adapter.network.delta.detach().clone())
    assert torch.equal(*deltas) and bool(deltas[0].any())


@pytest.mark.parametrize(
    "changes",
    [{**PLAIN, **OPEN, "forward.draws": 2}, {**BASELINE, "advantage.name": "pdppo"}],
    ids=["ac_flow", "pdppo"],
)
def test_resume_is_bit_exact_with_critic_optimizer_and_buffer(tmp_path: Path, changes: dict) -> None:
    def fresh() -> Trainer:
        adapter = GaussianAdapter(10, mean=0.5, spread=SPREAD)
        return Trainer(
            toy_config(**changes), adapter, LatentReward(linear), rows(4), reference=reference_offsets(adapter.network)
        )

    straight = fresh()
    for _ in range(2):
        straight.iterate()
    store.save(tmp_path, 2, straight.state(), info={}, keep=2)
    expected = [comparable(straight.iterate()) for _ in range(3)]
    other = fresh()
    other.load_state(store.load(tmp_path).state)
    assert [comparable(other.iterate()) for _ in range(3)] == expected
    a, b = tensors(straight.state()), tensors(other.state())
    assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == []
    assert any("recent" in name for name in a) and any("optimizer" in name and "critic" in name for name in a)


def test_ac_flow_on_a_transformer_costs_what_the_plan_says(tiny_sd3: Path) -> None:
    """2 groups of 4 in calls of 4, 4 steps: rollout 8 calls, 32 samples; reference and update 2 draws x 8 samples each."""
    from flowrl.plan import plan

    config = small_config(tiny_sd3, **{
        "objective.name": "ac_flow", "rollout.kernel.name": "ode", "rollout.window.kind": "full", "rollout.share_prefix": False,
        "critic.closed": "outcome", "critic.steps": 2, "critic.width": 4,
    })  # fmt: skip
    trainer, made = make(config), plan(config)
    row = trainer.iterate()
    row = trainer.iterate()
    assert (row["calls/forward"], row["calls/forward_samples"]) == (8 + 4 + 4, 32 + 16 + 16)
    assert (row["calls/backward"], row["calls/backward_samples"]) == (4, 16)
    assert (made.forward.calls.mean, made.forward.samples.mean) == (16, 64)
    critic, text = trainer.learner.critic, trainer.learner.critic.network.text
    weights = sum(p.numel() for p in critic.network.parameters())
    # Weights, average, gradients, two moments; 16 samples of x0, text and target.
    held = 4 * (5 * weights + 16 * (4 * 9 * 9 + text + 1))
    assert row["critic/loss"] is not None and row["memory/critic_mb"] * 2**20 == held
