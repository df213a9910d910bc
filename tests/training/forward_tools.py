"""Small runs of objectives on re-noised samples, and a toy on which their fixed points are known."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowrl.training.trainer import Trainer
from tests.training.affine import Affine, AffineAdapter
from tests.training.helpers import small_config
from tests.training.toy import LatentReward, rows, toy_config

ONLINE = ("nft", "awm", "orw", "ram", "dpo_online", "dgpo", "crd")
PLAIN = {"rollout.kernel.name": "ode", "rollout.window.kind": "full", "rollout.share_prefix": False}
OWN: dict[str, dict[str, Any]] = {
    "nft": {"forward.old_rate": 0.1},
    "dpo_online": {"objective.loss_options": {"beta": 50.0}},
}


def forward_config(model: Path, name: str, **changes: Any):
    """2 groups of 4, 4 steps, calls of 4, 2 draws."""
    return small_config(model, **(PLAIN | {"objective.name": name} | OWN.get(name, {}) | changes))


def write_pairs(folder: Path, count: int) -> Path:
    """Random pictures of 36 x 36 in pairs: the chosen one bright, the rejected one dark."""
    generator = np.random.default_rng(0)
    lines = []
    for i in range(count):
        for name, top in (("chosen", 255), ("rejected", 80)):
            pixels = generator.integers(0, top, (36, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
        lines.append(
            json.dumps({"prompt": f"a red circle {i}", "chosen": f"chosen{i}.png", "rejected": f"rejected{i}.png"})
        )
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def toy_trainer(
    name: str, reward, steps: int = 8, network: Affine | None = None, **changes: Any
) -> tuple[Trainer, Affine]:
    """The real trainer on scalar latents; network: None for N(0.4, 0.8^2), the exact velocity plus a learned shift and tilt a
    step."""
    network = network or Affine(torch.linspace(1, 0, steps + 1), 0.4, 0.8)
    base = PLAIN | {
        "rollout.steps": steps, "objective.name": name, "forward.times": "grid", "forward.draws": steps,
        "batch.groups": 2, "batch.group_size": 64, "batch.micro_batch": 128, "optimizer.lr": 0.05,
        "optimizer.schedule": "linear", "optimizer.max_grad_norm": 1e9, "objective.skip_silent": False,
    }  # fmt: skip
    adapter = AffineAdapter(network, (1, 1, 1))
    config = toy_config(**(base | changes))
    return Trainer(
        config, adapter, LatentReward(lambda x0: reward(x0.flatten(1).sum(1))), rows(2), reference=adapter.reference
    ), network  # fmt: skip


def drawn_moments(network: Affine) -> tuple[float, float]:
    """Mean and variance of x0 under Euler steps of the pre-trained velocity, exact."""
    mean, factor = 0.0, 1.0
    for now, after in pairwise(network.times.double()):
        constant, whole = (float(network.exact(torch.tensor(x, dtype=torch.float64), now)) for x in (0.0, 1.0))
        slope, dt = whole - constant, float(now - after)
        mean, factor = mean - dt * (constant + slope * mean), factor * (1 - dt * slope)
    return mean, factor**2
