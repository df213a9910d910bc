"""Paired evaluation: the same prompts, noise, steps and guidance for every set of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flowrl import rng
from flowrl.config.schema import Config
from flowrl.protocols import PipelineAdapter
from flowrl.records import PromptRow, Request, RewardBatch, Schedule
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import sample
from flowrl.scoring.runtime import RewardRuntime, Scored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Evaluated:
    """rows: one object a sample for samples.jsonl; images: uint8 [N, H, W, 3] in the same order."""

    rows: list[dict[str, Any]]
    images: npt.NDArray[np.uint8]


def evaluate(
    config: Config,
    adapter: PipelineAdapter,
    rewards: RewardRuntime,
    prompts: Sequence[PromptRow],
    which: str,
    iteration: int,
) -> Evaluated:
    """Sample ``evaluation.per_prompt`` pictures a prompt by the ODE with the weights as they are now, and score them.

    The start noise of a picture depends on evaluation.seed, its prompt id and its number alone.
    """
    import numpy as np

    settings, model = config.evaluation, config.model
    requests = [
        (Request(row.prompt, row.prompt_id, model.height, model.width, metadata=row.metadata), member)
        for row in prompts
        for member in range(settings.per_prompt)
    ]
    schedule = adapter.schedule(settings.steps, requests[0][0])
    on_device = Schedule(*(v.to(adapter.device) for v in (schedule.t, schedule.alpha, schedule.sigma)))
    policy = Policy(adapter, on_device, "ode", 0.0, settings.guidance)
    rows: list[dict[str, Any]] = []
    images = []
    for part in _split(requests, config.batch.micro_batch):
        asked = [request for request, _ in part]
        keys = [rng.key(settings.seed, 0, r.prompt_id, member=m, stream="evaluation") for r, m in part]
        noise = rng.normal(keys, adapter.latent_shape(asked[0]))
        x0 = sample(policy, policy.encode(asked), noise)
        with torch.no_grad():
            decoded = (adapter.decode(x0, asked[0]).nan_to_num(0.0) * 255).round().to(torch.uint8)
        pixels = decoded.permute(0, 2, 3, 1).cpu().numpy()
        batch = RewardBatch(
            pixels, [r.prompt for r in asked], [r.metadata for r in asked], [r.prompt_id for r in asked], x0
        )
        rows += _rows(part, rewards.score(batch), which, iteration, settings.seed)
        images.append(pixels)
    return Evaluated(rows, np.concatenate(images))


def _split(requests: Sequence[tuple[Request, int]], size: int) -> Iterator[Sequence[tuple[Request, int]]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _rows(
    part: Sequence[tuple[Request, int]], scored: Scored, which: str, iteration: int, seed: int
) -> Iterator[dict[str, Any]]:
    for i, (request, member) in enumerate(part):
        scores = {name: float(r.scores[i]) if r.valid[i] else None for name, r in scored.per_reward.items()}
        strict = [
            r.components["strict"][i] for r in scored.per_reward.values() if "strict" in r.components and r.valid[i]
        ]
        details = [r.details[i] for r in scored.per_reward.values() if r.details]
        yield {
            "iteration": iteration, "which": which, "prompt_id": request.prompt_id, "prompt": request.prompt,
            "tag": str(request.metadata.get("tag", "all")), "member": member, "seed": seed, "scores": scores,
            "score": float(scored.scores[i]) if scored.valid[i] else None,
            "strict": bool(strict[0]) if strict else None, "detail": details[0] if details else None,
        }  # fmt: skip
