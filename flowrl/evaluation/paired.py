"""Paired evaluation: the same prompts, noise, steps and guidance for every set of weights.

Several processes take turns with whole batches, the same ones that a single process would make, and every process ends up
with all rows and pictures in the order of a single one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flowrl import rng
from flowrl.config.schema import Config
from flowrl.credit.networks import pooled_text
from flowrl.distributed.backend import Backend
from flowrl.evaluation.searching import Draw
from flowrl.protocols import PipelineAdapter
from flowrl.records import PromptRow, Request, RewardBatch, Schedule
from flowrl.rollout.policy import Policy
from flowrl.rollout.requests import request_of
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
    backend: Backend | None = None,
    draw: Draw | None = None,
) -> Evaluated:
    """Sample ``evaluation.per_prompt`` pictures a prompt by the ODE with the weights as they are now, and score them.

    The start noise of a picture depends on evaluation.seed, its prompt id and its number alone. backend: processes that
    share the work, all of which call this; None: this process alone. draw: takes the place of plain sampling (a search).
    A row of samples.jsonl holds

        iteration, which, prompt_id, prompt, tag, member, seed   what was asked of which weights, with which noise
        scores       {label: score or None}, on each reward's own scale
        score        what is trained for; None where a reward of it failed
        gold         sum of weight * score over gold rewards; None without any, or where one failed
        components   {label: {name: number or None}}, such as strict and dense, exact and edit
        strict       bool, the component of that name of the first reward that has it; None for none
        errors       {label: text} of the rewards that failed
        detail       what a report shows beside the picture
    """
    import numpy as np

    settings = config.evaluation
    requests = [(request_of(config, row), member) for row in prompts for member in range(settings.per_prompt)]
    schedule = adapter.schedule(settings.steps, requests[0][0])
    on_device = Schedule(*(v.to(adapter.device) for v in (schedule.t, schedule.alpha, schedule.sigma)))
    policy = Policy(adapter, on_device, "ode", 0.0, settings.guidance, guidance_low=settings.guidance_low)
    size = config.batch.micro_batch
    # Rewards that compare the members of a prompt need all of them in one batch.
    whole = max(1, size // settings.per_prompt) * settings.per_prompt if rewards.needs_groups else size
    batches = [requests[start : start + whole] for start in range(0, len(requests), whole)]
    world, rank = (backend.world, backend.rank) if backend else (1, 0)
    rows: list[dict[str, Any]] = []
    images: list[npt.NDArray[np.uint8]] = []
    for turn in range(math.ceil(len(batches) / world)):
        mine = batches[turn * world + rank] if turn * world + rank < len(batches) else []
        made: list[dict[str, Any]] = []
        media = None
        if mine:
            parts = [
                _draw(adapter, policy, mine[at : at + size], settings.seed, draw) for at in range(0, len(mine), size)
            ]
            batch = _batch([request for request, _ in mine], parts)
            media = batch.images
            made = list(_rows(mine, rewards.score(batch), rewards.gold, which, iteration, settings.seed))
        for found, pictures in _exchange(made, media, backend):
            rows += found
            images.append(pictures)
    return Evaluated(rows, np.concatenate(images))


def _batch(
    asked: Sequence[Request], parts: Sequence[tuple[npt.NDArray[np.uint8], torch.Tensor, torch.Tensor]]
) -> RewardBatch:
    """What rewards see of requests, drawn in parts (pictures, latents, pooled text)."""
    import numpy as np

    media = np.concatenate([part[0] for part in parts])
    latents, text = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    prompts, metadata, ids = [r.prompt for r in asked], [r.metadata for r in asked], [r.prompt_id for r in asked]
    return RewardBatch(media, prompts, metadata, ids, latents, text=text)


def _draw(
    adapter: PipelineAdapter, policy: Policy, part: Sequence[tuple[Request, int]], seed: int, draw: Draw | None
) -> tuple[npt.NDArray[np.uint8], torch.Tensor, torch.Tensor]:
    """Pictures uint8 [B, H, W, 3], or videos [B, F, H, W, 3], their latents, and the pooled text of their prompts."""
    asked = [request for request, _ in part]
    keys = [rng.key(seed, 0, r.prompt_id, member=m, stream="evaluation") for r, m in part]
    prompted = policy.encode(asked)
    if draw is None:
        x0 = sample(policy, prompted, rng.normal(keys, adapter.latent_shape(asked[0])))
    else:
        x0 = draw(policy, prompted, part, seed)
    with torch.no_grad():
        decoded = (adapter.decode(x0, asked[0]).nan_to_num(0.0) * 255).round().to(torch.uint8)
    return decoded.movedim(1, -1).cpu().numpy(), x0, pooled_text(prompted.positive)


def _exchange(
    rows: list[dict[str, Any]], media: npt.NDArray[np.uint8] | None, backend: Backend | None
) -> Iterator[tuple[list[dict[str, Any]], npt.NDArray[np.uint8]]]:
    """Every process's rows and pictures of one turn, in the order of processes; those that had none are left out.

    Rows travel as JSON and pictures as bytes, whose counts may differ: nothing hangs where the last turn is not full.
    """
    import numpy as np

    if backend is None or backend.world == 1:
        if media is not None:
            yield rows, media
        return
    head = json.dumps({"rows": rows, "shape": [] if media is None else list(media.shape)}, allow_nan=False)
    texts = _gather_bytes(np.frombuffer(head.encode(), np.uint8), backend)
    raw = _gather_bytes(np.zeros(0, np.uint8) if media is None else media.ravel(), backend)
    for text, pixels in zip(texts, raw, strict=True):
        found = json.loads(text.tobytes())
        if found["rows"]:
            yield found["rows"], pixels.reshape(found["shape"])


def _gather_bytes(mine: npt.NDArray[np.uint8], backend: Backend) -> list[npt.NDArray[np.uint8]]:
    """Every process's bytes, in the order of processes."""
    import numpy as np

    everything = backend.gather(torch.tensor(mine)).numpy()
    return np.split(everything, np.cumsum(backend.counts(len(mine)))[:-1])


def _rows(
    part: Sequence[tuple[Request, int]],
    scored: Scored,
    gold: Mapping[str, float],
    which: str,
    iteration: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    for i, (request, member) in enumerate(part):
        scores = {name: float(r.scores[i]) if r.valid[i] else None for name, r in scored.per_reward.items()}
        components = {
            name: {key: _number(values[i]) if r.valid[i] else None for key, values in r.components.items()}
            for name, r in scored.per_reward.items()
            if r.components
        }
        strict = [
            r.components["strict"][i] for r in scored.per_reward.values() if "strict" in r.components and r.valid[i]
        ]
        details = [r.details[i] for r in scored.per_reward.values() if r.details]
        yield {
            "iteration": iteration, "which": which, "prompt_id": request.prompt_id, "prompt": request.prompt,
            "tag": str(request.metadata.get("tag", "all")), "member": member, "seed": seed, "scores": scores,
            "score": float(scored.scores[i]) if scored.valid[i] else None,
            "gold": _gold(scores, gold), "strict": bool(strict[0]) if strict else None, "components": components,
            "errors": {name: str(r.errors[i]) for name, r in scored.per_reward.items() if not r.valid[i]},
            "detail": details[0] if details else None,
        }  # fmt: skip


def _gold(scores: Mapping[str, float | None], gold: Mapping[str, float]) -> float | None:
    parts = [(weight, scores.get(label)) for label, weight in gold.items()]
    known = [weight * score for weight, score in parts if score is not None]
    return sum(known) if parts and len(known) == len(parts) else None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
