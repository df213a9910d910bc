"""Network calls an iteration, counted by hooks, against literal numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

from tests.training.helpers import make, small_config


def calls(config) -> dict[str, int]:
    row = make(config).iterate()
    return {k.removeprefix("calls/"): v for k, v in row.items() if k.startswith("calls/")}


def test_window_with_shared_prefix(tiny_sd3: Path) -> None:
    """2 groups of 4 in chunks of 4, 4 steps, window at steps 1 and 2.

    Prefix: step 0 once a group: 1 call, 2 samples. Steps 1 to 3: 2 chunks x 3 steps = 6 calls; the members still share
    step 1's latent, so 2 + 8 + 8 samples. Update: 2 chunks x 2 steps = 4 calls, 2 + 8 samples, forward and backward.
    """
    config = small_config(tiny_sd3, **{"rollout.window.first": 1, "rollout.window.last": 1})
    assert calls(config) == {
        "forward": 11, "forward_samples": 30, "forward_grad": 4, "forward_grad_samples": 10, "backward": 4,
        "backward_samples": 10,
    }  # fmt: skip


def test_full_window_with_guidance_and_kl(tiny_sd3: Path) -> None:
    """Guidance doubles all forwards: rollout 2 x 2 chunks x 4 steps = 16 calls, 64 samples; reference and update, 3 trained
    steps: 2 x 2 x 3 = 12 calls, 48 samples each; both branches carry gradient: 12 backwards."""
    config = small_config(tiny_sd3, **{
        "rollout.window.kind": "full", "rollout.share_prefix": False, "rollout.guidance": 3.0,
        "objective.kl.form": "paper", "objective.kl.weight": 0.1,
    })  # fmt: skip
    assert calls(config) == {
        "forward": 40, "forward_samples": 160, "forward_grad": 12, "forward_grad_samples": 48, "backward": 12,
        "backward_samples": 48,
    }  # fmt: skip


def test_two_passes_with_a_detached_branch_and_velocity_kl(tiny_sd3: Path) -> None:
    """cfg_gradient conditional: the unconditional forwards of the update carry no gradient. Window at steps 0 and 1, step 0
    from one latent a group: rollout 2 x 2 x 4 = 16 calls, 2 x (2 + 3 x 8) = 52 samples; reference once, 2 x 2 x 2 = 8 calls,
    2 x (2 + 8) = 20; update 2 passes x 8 = 16 calls, 40 samples, half of them with gradient."""
    config = small_config(tiny_sd3, **{
        "rollout.window.last": 0, "rollout.guidance": 2.0, "rollout.cfg_gradient": "conditional", "objective.passes": 2,
        "objective.kl.form": "velocity", "objective.kl.weight": 0.1,
    })  # fmt: skip
    assert calls(config) == {
        "forward": 40, "forward_samples": 112, "forward_grad": 8, "forward_grad_samples": 20, "backward": 8,
        "backward_samples": 20,
    }  # fmt: skip


def test_silent_groups_cost_no_update(tiny_sd3: Path) -> None:
    """A constant reward leaves nothing to learn: the rollout's 8 calls (no prefix) and no others, and no weight moves."""
    rewards = [{"name": "tests.training.test_calls:Constant"}]
    trainer = make(small_config(tiny_sd3, **{"rollout.window.last": 0, "rewards": rewards}))
    before = [p.detach().clone() for p in trainer.weights.parameters]
    row = trainer.iterate()
    assert (row["calls/forward"], row["calls/backward"], row["update/steps"]) == (8, 0, 0)
    assert all((a == b).all() for a, b in zip(before, trainer.weights.parameters, strict=True))


class Constant:
    name = "constant"

    def score(self, batch):
        import numpy as np

        from flowrl.records import RewardResult

        n = len(batch)
        return RewardResult(np.full(n, 0.5, np.float32), np.ones(n, bool), [None] * n)


def test_a_prompt_drawn_twice_is_encoded_once(tiny_sd3: Path) -> None:
    trainer = make(small_config(tiny_sd3, **{"batch.groups": 4}))
    trainer.rows = trainer.collector.rows = trainer.rows[:3]
    trainer.row_weights = None
    seen: list[int] = []
    encode = trainer.policy.encode
    trainer.collector.policy = Spy(trainer.policy, lambda requests: seen.append(len(requests)) or encode(requests))
    found = trainer._collect()
    assert seen == [3] and len(found.prompted.positive) == 4
    twice = [
        i
        for i, a in enumerate(found.trajectory.prompt_id.tolist())
        if found.trajectory.prompt_id.tolist().count(a) == 8
    ]
    assert len(twice) == 8


class Spy:
    """A policy with its own encode."""

    def __init__(self, policy, encode) -> None:
        self._policy, self.encode = policy, encode

    def __getattr__(self, name):
        return getattr(self._policy, name)


def test_the_plan_foretells_the_calls(tiny_sd3: Path) -> None:
    """flowrl plan's own arithmetic agrees with the hooks on the first recipe (the literal numbers above hold both)."""
    from flowrl.plan import plan

    config = small_config(tiny_sd3, **{"rollout.window.first": 1, "rollout.window.last": 1})
    made, counted = plan(config), calls(config)
    assert (made.forward.calls.mean, made.forward.samples.mean) == (counted["forward"], counted["forward_samples"])
    assert (made.update_backward.calls.mean, made.update_backward.samples.mean) == (4, 10)
