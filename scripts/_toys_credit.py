"""A11: a chain whose reward is the noise of one step, and how well each way of assigning credit finds that step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _toys import Affine, ToyAdapter, uniform
from torch import Tensor

from flowrl.advantage import Advantage, estimate
from flowrl.dynamics.log_prob import log_prob
from flowrl.objectives.flow_grpo import flow_grpo_loss
from flowrl.performance.counting import CallCounter
from flowrl.records import Request, Trajectory
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import Groups, RolloutPlan, concatenate, rollout

STEPS, PAID, BATCHES, GROUPS, MEMBERS = 8, 3, 24, 4, 16
TREE = {0: 2, 2: 2, 3: 2, 5: 2}
Credit = Callable[[Tensor, Trajectory, Tensor], Advantage]


def _rolled(policy: Policy, seed: int, batch: int, splits: dict[int, int]) -> Trajectory:
    requests = [Request(f"prompt {i}", i, 1, 1) for i in range(GROUPS)]
    ids = torch.arange(GROUPS)
    groups = Groups(ids, torch.zeros_like(ids), ids, policy.encode(requests), MEMBERS)
    plan = RolloutPlan(
        (1,), list(range(STEPS - 1)), bool(splits), 512, torch.float32, "sum", seed=seed, iteration=batch, splits=splits
    )
    return concatenate(list(rollout(policy, groups, plan)))


def _gradient(policy: Policy, network: Affine, trajectory: Trajectory, credit: Advantage) -> Tensor:
    """The update's descent direction for the offset of each step, [T - 1]: the real loss through the real kernels."""
    x, x_next, step, old = trajectory.x, trajectory.x_next, trajectory.step, trajectory.old_log_prob
    if x is None or x_next is None or step is None or old is None:
        raise ValueError("A11: the rollout kept no transitions")
    network.zero_grad()
    prompted = policy.encode([Request("", 0, 1, 1)])
    live = credit.loss_mask.double()
    for k in range(STEPS - 1):
        made = policy.step(x[:, k], step[:, k], prompted)
        now = log_prob(x_next[:, k], made.mean, made.std, "sum")
        weight = (credit.weight[:, k] * live[:, k] / live.sum()).float()
        flow_grpo_loss(now, old[:, k], credit.advantage[:, k], 0.2, None, 0.0, weight).loss.backward()
    if network.offset.grad is None:
        raise ValueError("A11: no gradient")
    return -network.offset.grad[: STEPS - 1, 0].double()


def _values(reward: Tensor, spread: float, seed: int) -> dict[str, Tensor]:
    """What is known of the reward after each step: nothing before the paid one, all of it from there on; and an error."""
    known = (torch.arange(STEPS - 1) >= PAID).double()
    generator = torch.Generator().manual_seed(seed)
    error = spread * torch.randn(len(reward), STEPS, generator=generator).double()
    step = known * reward[:, None] + error[:, 1:]
    step[:, -1] = reward  # the outcome itself
    return {"step_value": step, "start_value": error[:, 0]}


def _by_values(options: dict[str, Any], spread: float) -> Credit:
    def credit(reward: Tensor, trajectory: Trajectory, mask: Tensor) -> Advantage:
        found = _values(reward, spread, int(reward.abs().sum() * 1e6) % 2**31)
        inputs = {"group": trajectory.group_id, "mask": mask, **found}
        return estimate("step_credit", inputs, options).over_steps(mask)

    return credit


def _uniform(reward: Tensor, trajectory: Trajectory, mask: Tensor) -> Advantage:
    return estimate("grpo", {"rewards": reward, "group": trajectory.group_id}).over_steps(mask)


def _branch(reward: Tensor, trajectory: Trajectory, mask: Tensor) -> Advantage:
    inputs = {"rewards": reward, "node": trajectory.node, "group": trajectory.group_id, "mask": mask}
    return estimate("branch_grpo", inputs).over_steps(mask)


def _parent(reward: Tensor, trajectory: Trajectory, mask: Tensor) -> Advantage:
    if trajectory.node is None:
        raise ValueError("A11: the rollout kept no tree")
    path = torch.cat([trajectory.parent[:, None], trajectory.node], 1)
    segment = torch.arange(STEPS - 1).expand(len(reward), -1)
    return estimate("spo_tree", {"rewards": reward, "node_path": path, "segment": segment, "mask": mask}).over_steps(
        mask
    )


# name -> (credit, tree, values scored a sample)
WAYS: dict[str, tuple[Credit, dict[int, int], int]] = {
    "uniform": (_uniform, {}, 0),
    "cumulative": (_by_values({"shaping": "cumulative"}, 0.0), {}, STEPS - 2),
    "value": (_by_values({"shaping": "value"}, 0.0), {}, STEPS - 2),
    "gain": (_by_values({"shaping": "gain"}, 0.0), {}, STEPS - 1),
    "gain, values off by 0.5": (_by_values({"shaping": "gain", "normaliser": "joint"}, 0.5), {}, STEPS - 1),
    "tree, over the depth": (_branch, TREE, 0),
    "tree, over the parent": (_parent, TREE, 0),
}


def a11(seed: int) -> Iterator[dict[str, Any]]:
    network = Affine(uniform(STEPS), 1, 0.0, 1.0)
    adapter = ToyAdapter(network, uniform(STEPS), 1)
    policy = Policy(adapter, adapter.schedule(STEPS), "precise", 0.7)
    true = torch.zeros(STEPS - 1).double()
    true[PAID] = -1.0  # velocity up, next latent down
    for name, (credit, splits, values) in WAYS.items():
        started, found = time.process_time(), []
        with CallCounter(network) as counter:
            for batch in range(BATCHES):
                trajectory = _rolled(policy, seed, batch, splits)
                reward = _noise(policy, trajectory)
                mask = torch.ones(len(reward), STEPS - 1, dtype=torch.bool)
                forward = counter.counts.forward_samples
                found.append(_gradient(policy, network, trajectory, credit(reward, trajectory, mask)))
                counter.counts.forward_samples = forward
        gradients = torch.stack(found)
        mean, variance = gradients.mean(0), gradients.var(0)
        signal = max(0.0, float(mean.square().sum() - variance.sum() / BATCHES))
        cosine = torch.nn.functional.cosine_similarity(gradients, true[None], dim=1)
        yield {
            "variant": name, "snr": signal / float(variance.sum()), "cosine": float(cosine.mean()),
            "noise_at_other_steps": 1 - float(variance[PAID] / variance.sum()),
            "share_by_step": [round(v, 4) for v in (mean / mean.norm()).tolist()],
            "reward_calls": BATCHES * GROUPS * MEMBERS * (1 + values),
            "forward_samples": counter.counts.forward_samples - BATCHES * GROUPS * MEMBERS,
            "backward_samples": counter.counts.backward_samples,
            "cpu_seconds": round(time.process_time() - started, 2),
        }  # fmt: skip


@torch.no_grad()
def _noise(policy: Policy, trajectory: Trajectory) -> Tensor:
    """The noise that the paid step drew: float64 [B]."""
    if trajectory.x is None or trajectory.x_next is None or trajectory.step is None:
        raise ValueError("A11: the rollout kept no transitions")
    made = policy.step(trajectory.x[:, PAID], trajectory.step[:, PAID], policy.encode([Request("", 0, 1, 1)]))
    return ((trajectory.x_next[:, PAID] - made.mean) / made.std)[:, 0].double()
