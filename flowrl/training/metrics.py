"""Numbers of one iteration, under the names of the run directory's contract."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.advantage import Advantage
from flowrl.distributed.backend import Backend
from flowrl.evaluation.paired import Evaluated
from flowrl.evaluation.statistics import bootstrap_mean
from flowrl.objectives.flow_grpo import LossTerms, merge_terms
from flowrl.scoring.alarm import DIVERSITY, Judged, spread
from flowrl.scoring.combine import variance_parts
from flowrl.scoring.picture_statistics import measure
from flowrl.scoring.runtime import Scored
from flowrl.scoring.shaping import Values
from flowrl.training.batch import TrainingBatch

MAX_ERROR = 300
"""Letters of a reward's first error that a row of metrics keeps."""


def finite_rows(x: Tensor) -> Tensor:
    """bool [B] on CPU: which samples have only finite elements."""
    return torch.isfinite(x).flatten(1).all(1).cpu()


class _Means:
    """Means over the samples of all processes, by name, in two meetings of the processes however many names there are."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        self.sums[name] = (float(values[mask].double().sum()), float(mask.sum()))

    def over(self, backend: Backend) -> dict[str, float | None]:
        """Every name that any process has: a reward that failed in one process has no components there."""
        names = backend.names(self.sums)
        sums = torch.tensor([self.sums.get(name, (0.0, 0.0)) for name in names], dtype=torch.float64)
        totals = backend.total(sums).tolist()
        return {name: total / count if count else None for name, (total, count) in zip(names, totals, strict=True)}


def of_rewards(scored: Scored, credit: Advantage, backend: Backend) -> dict[str, Any]:
    """Means over the valid samples of all processes, and how much signal the groups carry."""
    valid = torch.from_numpy(scored.valid)
    means, errors = _Means(), {}
    means.add("score/mean", torch.from_numpy(scored.scores), valid)
    invalid = {f"reward/{name}/invalid": int((~result.valid).sum()) for name, result in scored.per_reward.items()}
    for name, result in scored.per_reward.items():
        mask = torch.from_numpy(result.valid)
        means.add(f"reward/{name}/mean", torch.from_numpy(result.scores), mask)
        error = next((text for text in result.errors if text), None)
        if error:
            errors[f"reward/{name}/error"] = error[:MAX_ERROR]
        for part, values in result.components.items():
            have = mask & torch.from_numpy(np.isfinite(values))
            means.add(f"reward/{name}/{part}", torch.from_numpy(values), have)
    for name, values in scored.shaped.items():
        means.add(f"reward/{name}/shaped", torch.from_numpy(values), torch.from_numpy(np.isfinite(values)))
    if scored.gated is not None:
        invalid["score/gated"] = int(scored.gated.sum())
    invalid["score/invalid"] = int((~valid).sum())
    *counts, whole = backend.total(torch.tensor([*invalid.values(), len(valid)])).tolist()
    row: dict[str, Any] = means.over(backend) | dict(zip(invalid, counts, strict=True)) | errors
    row["score/invalid_fraction"] = row["score/invalid"] / whole
    trained = credit.loss_mask.any(dim=1)
    row["group/live_fraction"] = float(credit.live[trained].float().mean()) if bool(trained.any()) else 0.0
    if credit.group_std is not None:
        row["group/std_mean"] = float(credit.group_std[trained].mean()) if bool(trained.any()) else None
    return row


def of_shares(scored: Scored, group_id: Tensor, backend: Backend) -> dict[str, Any]:
    """Each trained reward's share of the variance of the score within groups; they add up to 1, and may be negative.

    Nothing for a single reward. group_id: int64 [B]; groups are whole in each process, so the parts add up.
    """
    names = list(scored.weights)
    if len(names) < 2:
        return {}
    channels = np.stack([scored.channel(name).astype(np.float64) for name in names], 1)
    channels[~scored.valid] = np.nan
    parts, whole = variance_parts(channels, list(scored.weights.values()), group_id.numpy())
    *sums, total = backend.total(torch.tensor([*parts, whole], dtype=torch.float64)).tolist()
    shares = {name: part / total if total else None for name, part in zip(names, sums, strict=True)}
    return {f"reward/{name}/variance_share": share for name, share in shares.items()}


def of_credit(batch: TrainingBatch, backend: Backend) -> dict[str, Any]:
    """``advantage/abs_mean/step_<k>``: mean size of the advantages of all processes' trained transitions at each step."""
    trajectory = batch.trajectory
    if trajectory.step is None or trajectory.x is None:
        return {}
    steps, element = trajectory.step.cpu(), batch.element.cpu()
    sums = torch.zeros(2, trajectory.schedule.steps, dtype=torch.float64)
    sums[0].index_add_(0, steps[element], batch.advantage.cpu()[element].abs().double())
    sums[1].index_add_(0, steps[element], torch.ones(int(element.sum()), dtype=torch.float64))
    total, count = backend.total(sums).tolist()
    return {f"advantage/abs_mean/step_{k}": total[k] / n for k, n in enumerate(count) if n}


def of_update(
    seen: Sequence[tuple[int, LossTerms]], norms: Sequence[float], lr: float, updates: int, backend: Backend
) -> dict[str, Any]:
    """Loss, ratio, clipping and KL over all updates and processes; ratio and clipping by step are this process's own."""
    names = ("ratio_mean", "clip_fraction", "clip_fraction_low", "clip_fraction_high", "approx_kl")
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


def judged(evaluated: Evaluated, gold: Mapping[str, float]) -> Judged:
    """What the alarm looks at: the score, gold scores and diversity of each picture. gold: label -> weight."""
    rows = evaluated.rows
    prompt_ids = np.array([row["prompt_id"] for row in rows], np.int64)
    several = len(np.unique(prompt_ids)) < len(rows)
    watched = {f"gold/{label}": _column([row["scores"].get(label) for row in rows]) for label in gold}
    watched |= {DIVERSITY: spread(evaluated.images, prompt_ids if several else np.zeros_like(prompt_ids))}
    means = {label: _mean_of(watched[f"gold/{label}"]) for label in gold}
    known = [(gold[label], mean) for label, mean in means.items() if mean is not None]
    total = sum(weight * mean for weight, mean in known) if known else None
    return Judged(int(rows[0]["iteration"]), prompt_ids, _column([row["score"] for row in rows]), watched, total)


def of_evaluation(evaluated: Evaluated, seen: Judged, gold: Mapping[str, float]) -> dict[str, Any]:
    """Means of an evaluation with intervals: strict, score, each reward, gold, diversity and picture statistics."""
    rows = evaluated.rows
    series = {"eval/strict": _column([row["strict"] for row in rows]), "eval/score": seen.proxy}
    labels = list(rows[0]["scores"])
    plain = [label for label in labels if label not in gold]
    for label in plain if len(plain) > 1 else ():
        series.setdefault(f"eval/{label}", _column([row["scores"][label] for row in rows]))
    series |= {f"{name if name != DIVERSITY else 'eval/diversity'}": values for name, values in seen.watched.items()}
    found: dict[str, Any] = {}
    for name, values in series.items():
        if not np.isnan(values).all():
            interval = bootstrap_mean(values, seen.prompt_ids, seed=0)
            found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    if seen.gold is not None:
        found["gold/score"] = seen.gold
    pictures = evaluated.images.reshape(-1, *evaluated.images.shape[-3:])
    return found | {f"picture/{name}": float(values.mean()) for name, values in measure(pictures).items()}


def _column(values: Sequence[float | bool | None]) -> Values:
    return np.array([np.nan if value is None else float(value) for value in values], np.float64)


def _mean_of(values: Values) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def of_memory() -> dict[str, float]:
    """Peak resident memory of this process in MB, and of the device where there is one."""
    scale = 1024 if sys.platform != "darwin" else 1024 * 1024
    row = {"memory/rss_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale}
    if torch.cuda.is_available():
        row["memory/device_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row
