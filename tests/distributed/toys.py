"""Small trainers for several processes: an exact toy policy, whose rewards no rounding can change."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.config.schema import Config
from flowrl.distributed.backend import Backend
from flowrl.records import PromptRow
from flowrl.training.trainer import Trainer
from tests.training.toy import GaussianAdapter, LatentReward, reference_offsets, rows, toy_config

SHAPE = (2, 3, 3)


def signs(latents: torch.Tensor) -> torch.Tensor:
    """0 to 7 from the signs of three elements: the same whatever the last bits of the latents."""
    flat = latents.flatten(1)[:, :3] > 0
    return (flat * torch.tensor([1.0, 2.0, 4.0])).sum(1)


def config_of(**changes: Any) -> Config:
    base = {
        "rollout.steps": 4, "batch.groups": 4, "batch.group_size": 4, "batch.micro_batch": 4, "optimizer.lr": 0.05,
        "advantage.name": "grpo", "objective.log_prob_reduction": "mean", "rollout.window.kind": "random",
        "rollout.window.size": 2, "rollout.window.first": 0, "rollout.window.last": 1, "rollout.share_prefix": False,
    }  # fmt: skip
    return toy_config(**(base | changes))


def trainer_of(config: Config, reward=signs, backend: Backend | None = None) -> Trainer:
    adapter = GaussianAdapter(config.rollout.steps, shape=SHAPE)
    prompts: list[PromptRow] = rows(8)
    return Trainer(
        config, adapter, LatentReward(reward), prompts, reference=reference_offsets(adapter.network),
        backend=backend or Backend(),
    )  # fmt: skip


def seen(trainer: Trainer, iterations: int) -> dict[str, Any]:
    """What each iteration was about, in this process, and what came of it."""
    kept: list[dict[str, Any]] = []

    def look(collected: Any, batch: Any) -> dict[str, Any]:
        t = collected.trajectory
        found = {
            "prompt": t.prompt_id, "group": t.group_id, "member": t.member, "occurrence": t.occurrence, "step": t.step,
            "stochastic": t.stochastic_mask, "trained": t.trained_mask, "x": t.x, "x0": t.x0,
            "score": batch.score, "advantage": batch.advantage, "weight": batch.weight, "element": batch.element,
            "update": batch.minibatch,
        }  # fmt: skip
        kept.append({name: tensor for name, tensor in found.items() if tensor is not None})
        return {}

    trainer.observer = look
    metrics = [trainer.iterate() for _ in range(iterations)]
    weights = {
        name: p.detach().clone() for name, p in trainer.adapter.trainable().named_parameters() if p.requires_grad
    }
    return {"batches": kept, "metrics": metrics, "weights": weights}


def together(parts: list[dict[str, Any]], iteration: int) -> dict[str, torch.Tensor]:
    """All processes' samples of one iteration, in the order of group and member."""
    batches = [part["batches"][iteration] for part in parts]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = sorted(range(len(whole["group"])), key=lambda i: (int(whole["group"][i]), int(whole["member"][i])))
    return {name: rows[order] for name, rows in whole.items()}
