"""Numbers of one iteration, under the names of the run directory's contract."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.advantage import Advantage
from flowrl.distributed.backend import Backend
from flowrl.objectives.flow_grpo import LossTerms, merge_terms
from flowrl.scoring.runtime import Scored


def finite_rows(x: Tensor) -> Tensor:
    """bool [B] on CPU: which samples have only finite elements."""
    return torch.isfinite(x).flatten(1).all(1).cpu()


def _mean(values: Tensor, mask: Tensor, backend: Backend) -> float | None:
    total, count = (float(backend.total(v)) for v in (values[mask].double().sum(), mask.double().sum()))
    return total / count if count else None


def of_rewards(scored: Scored, credit: Advantage, backend: Backend) -> dict[str, Any]:
    """Means over the valid samples of all processes, and how much signal the groups carry."""
    valid = torch.from_numpy(scored.valid)
    row: dict[str, Any] = {"score/mean": _mean(torch.from_numpy(scored.scores), valid, backend)}
    for name, result in scored.per_reward.items():
        mask = torch.from_numpy(result.valid)
        row[f"reward/{name}/mean"] = _mean(torch.from_numpy(result.scores), mask, backend)
        row[f"reward/{name}/invalid"] = int(backend.total((~mask).sum()))
        for part, values in result.components.items():
            have = mask & torch.from_numpy(np.isfinite(values))
            row[f"reward/{name}/{part}"] = _mean(torch.from_numpy(values), have, backend)
    row["score/invalid"] = int(backend.total((~valid).sum()))
    trained = credit.loss_mask.any(dim=1)
    row["group/live_fraction"] = float(credit.live[trained].float().mean()) if bool(trained.any()) else 0.0
    if credit.group_std is not None:
        row["group/std_mean"] = float(credit.group_std[trained].mean()) if bool(trained.any()) else None
    return row


def of_update(
    seen: Sequence[tuple[int, LossTerms]], norms: Sequence[float], lr: float, updates: int, backend: Backend
) -> dict[str, Any]:
    """Loss, ratio, clipping and KL over all updates and processes; ratio and clipping by step are this process's own."""
    names = ("ratio_mean", "clip_fraction", "approx_kl")
    sums = torch.zeros(3 + len(names), dtype=torch.float64)
    if seen:
        whole = merge_terms([terms for _, terms in seen])
        means = [getattr(whole, name) * whole.count for name in names]
        sums = torch.stack([v.double().cpu() for v in (whole.loss, whole.kl, whole.count, *means)])
    loss, kl, count, *means = backend.total(sums).tolist()
    if not count:
        return {"update/steps": 0, "optimizer/lr": lr}
    row: dict[str, Any] = {"policy/loss": _finite(loss / updates), "policy/kl": _finite(kl / updates)}
    row |= {f"policy/{name}": _finite(value / count) for name, value in zip(names, means, strict=True)}
    if seen:
        row["policy/ratio_max_deviation"] = _finite(float(whole.ratio_max_deviation))
    row |= {
        "optimizer/grad_norm": _finite(float(torch.tensor(norms).mean())),
        "optimizer/lr": lr,
        "update/steps": updates,
    }
    by_step: dict[int, list[LossTerms]] = defaultdict(list)
    for step, terms in seen:
        by_step[step].append(terms)
    for step, parts in sorted(by_step.items()):
        merged = merge_terms(parts)
        row[f"policy/ratio_mean/step_{step}"] = _finite(float(merged.ratio_mean))
        row[f"policy/clip_fraction/step_{step}"] = _finite(float(merged.clip_fraction))
    return row


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def of_memory() -> dict[str, float]:
    """Peak resident memory of this process in MB, and of the device where there is one."""
    scale = 1024 if sys.platform != "darwin" else 1024 * 1024
    row = {"memory/rss_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}
    if torch.cuda.is_available():
        row["memory/device_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row
