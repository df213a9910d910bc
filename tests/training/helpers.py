"""Small runs on the tiny random SD3 pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowrl.config import load
from flowrl.config.schema import Config
from flowrl.distributed.backend import Backend
from flowrl.training.build import build
from flowrl.training.trainer import Trainer


def small_config(model: Path, **changes: Any) -> Config:
    """Four steps, two of them stochastic, 2 groups of 4; a sliding window, KL and EMA are on by choice of the test."""
    base: dict[str, Any] = {
        "model.path": str(model), "model.lora.rank": 4, "model.lora.alpha": 8.0, "rollout.steps": 4,
        "rollout.window.size": 2, "rollout.window.first": 0, "rollout.window.last": 1, "batch.groups": 2,
        "batch.group_size": 4, "batch.micro_batch": 4, "iterations": 6, "optimizer.lr": 1e-2,
        "evaluation.count": 4, "evaluation.per_prompt": 1, "evaluation.steps": 2, "evaluation.grid": 4,
        "tracking.progress": False, "checkpoint.every": 1,
    }  # fmt: skip
    tree: dict[str, Any] = {"rewards": [{"name": "tests.training.helpers:brightness"}]}
    for key, value in (base | changes).items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return load(tree)


def brightness(images, prompts):
    """A reward with signal on random pipelines: the mean of the red channel."""
    return images[..., 0].mean((1, 2)) / 255.0


def make(config: Config) -> Trainer:
    return build(config, Backend()).trainer


def tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested state by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    if isinstance(state, dict):
        pairs = state.items()
    elif isinstance(state, (list, tuple)):
        pairs = enumerate(state)
    else:
        return {}
    return {name: t for key, value in pairs for name, t in tensors(value, f"{prefix}/{key}").items()}


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))}
