"""The same seed gives the same trajectories however a rollout is cut into calls (entry 28 of the bench)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowrl.records import Request, Trajectory
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import Groups, RolloutPlan, concatenate, rollout
from tests.training.toy import GaussianAdapter

GROUPS, SIZE, STEPS = 3, 4, 10


def drawn(chunk: int, seed: int = 0, only: int | None = None, **changes: object) -> Trajectory:
    """All groups in calls of ``chunk`` samples, or group number ``only`` alone, as another process would have it."""
    adapter = GaussianAdapter(STEPS, mean=1.0, spread=0.5, shape=(2, 3, 3))
    policy = Policy(adapter, adapter.schedule(STEPS, None), "flow_sde", 0.7)
    ids = torch.arange(GROUPS) if only is None else torch.tensor([only])
    prompted = policy.encode([Request(f"prompt {i}", i, 1, 1) for i in ids.tolist()])
    plan = RolloutPlan((2, 3, 3), [0, 2, 3], False, chunk, torch.float32, "sum", seed=seed, iteration=5)
    groups = Groups(ids, torch.zeros_like(ids), ids, prompted, SIZE)
    return concatenate(list(rollout(policy, groups, replace(plan, **changes))))


@pytest.mark.parametrize(
    "changes", [{}, {"shared": True}, {"shared": True, "splits": {0: 2, 3: 2}}, {"neighbours": 0.3}]
)
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_trajectories_do_not_depend_on_the_split(chunk: int, changes: dict[str, object]) -> None:
    whole, parts = drawn(GROUPS * SIZE, **changes), drawn(chunk, **changes)
    for name in ("x", "x_next", "x0", "step", "group_id", "member", "prompt_id"):
        torch.testing.assert_close(vars(parts)[name], vars(whole)[name], rtol=1e-5, atol=1e-6)
    alone = drawn(GROUPS * SIZE, only=1, **changes)
    torch.testing.assert_close(alone.x0, whole.x0[SIZE : 2 * SIZE], rtol=1e-5, atol=1e-6)
    if not changes:
        assert torch.equal(parts.x[:, 0], whole.x[:, 0]), "start noise is keyed, so its bits are the same"


def test_another_seed_and_iteration_draw_other_noise() -> None:
    whole = drawn(12)
    for other in (drawn(12, seed=1), drawn(12, iteration=6)):
        assert float((other.x0 - whole.x0).abs().min()) > 0
    assert len(whole.x[:, 0].flatten(1).unique(dim=0)) == GROUPS * SIZE
