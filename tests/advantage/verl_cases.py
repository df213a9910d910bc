"""The numbers of verl 0.9.1 (scripts/record_verl.py), and what the engine's user writes for each of its functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import Advantage, aggregate, estimate, policy_loss
from flowrl.advantage.kl import kl_estimate
from flowrl.advantage.loss_record import PolicyLoss

GOLDEN = json.loads((Path(__file__).parent / "verl_golden.json").read_text())
MODES = {
    "token-mean": "step_mean",
    "token-sum": "step_sum",
    "seq-mean-token-sum": "seq_sum_mean",
    "seq-mean-token-sum-norm": "seq_sum_norm",
    "seq-mean-token-mean": "seq_mean_mean",
}


def tensor(entry: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(entry["values"], dtype=dtype).view(entry["shape"])


def numbered(labels: list[str]) -> Tensor:
    return torch.tensor([sorted(set(labels)).index(x) for x in labels])


def batch_of(case: str, rows: list[int] | None = None) -> dict[str, Tensor]:
    """One of verl's batches under the engine's names."""
    raw = GOLDEN["batches"][case]
    reward = tensor(raw["token_level_rewards"])
    mask = tensor(raw["response_mask"], torch.bool)
    found = {
        "step_reward": reward,
        "rewards": reward.sum(1),
        "mask": mask,
        "group": numbered(raw["index"]),
        "value": tensor(raw["values"]),
        "greedy_reward": tensor(raw["reward_baselines"]),
        "old_log_prob": tensor(raw["old_log_probs"]),
        "sum_pi_squared": tensor(raw["sum_pi_squared"]),
        "importance": tensor(raw["rollout_is_weights"]),
        "cost": mask.sum(1).float(),
    }
    return found if rows is None else {name: x[rows] for name, x in found.items()}


GRPO = {"ddof": 1, "eps": 1e-6, "singleton": "raw"}


def spread(x: Tensor, steps: int) -> Tensor:
    return x[:, None].expand(-1, steps)


def ours(name: str, options: Mapping[str, Any], given: dict[str, Tensor]) -> Advantage:
    """What the engine's user writes for verl's estimator ``name`` with ``options``."""
    by_std = options.get("norm_adv_by_std_in_grpo", True)
    if name == "gae":
        return estimate("gae", given, {**options, "whiten": True})
    if name in ("grpo", "grpo_vectorized"):
        return estimate("grpo", given, GRPO) if by_std else estimate("dr_grpo", given, {"singleton": "raw"})
    if name in ("rloo", "rloo_vectorized"):
        return estimate("rloo", given, {"singleton": "raw" if name == "rloo" else "zero"})
    if name == "opo":
        return estimate("opo", given, {"singleton": "raw"})
    if name == "reinforce_plus_plus":
        return estimate("reinforce_pp", given, options)
    if name == "reinforce_plus_plus_baseline":
        return estimate("reinforce_pp_baseline", given, {"dead": "whiten", "singleton": "raw"})
    if name == "remax":  # the return from each step on, against the greedy rollout: a critic that is constant on a row
        value = spread(given["greedy_reward"], given["mask"].shape[1])
        return estimate("gae", {**given, "value": value}, {"lam": 1.0})
    if name == "gpg":
        return estimate("gpg", given, {**options, "alpha": "verl", "singleton": "raw"})
    if name == "grpo_passk":
        return estimate("pass_at_k", given, {"scale": "std" if by_std else "none"})
    if name == "gdpo":
        return channels(given["rewards"][:, None], given["group"], None, given["mask"])
    if "rollout_is_weights" in options:
        given = {k: v for k, v in given.items() if k != "importance"}
    align = "rank" if name.startswith("tir_") else "column"
    chosen = {"align": align, "zero_tail": options["handle_zero_tail"], "singleton": "raw"}
    return estimate("otb", given, chosen)


def channels(rewards: Tensor, group: Tensor, weights: Tensor | None, mask: Tensor) -> Advantage:
    """verl's GDPO: whitened over steps, not over rows."""
    given = {"rewards": rewards, "group": group, "weights": weights, "mask": mask}
    return estimate("gdpo", given, {**GRPO, "batch_norm": False}, whiten="step")


def gaps(entry: Mapping[str, Any], made: Advantage, mask: Tensor) -> tuple[float, float]:
    """Greatest differences of advantages and of returns on unmasked steps."""
    advantage = (made.over_steps(mask).advantage - tensor(entry["advantages"]))[mask].abs().max()
    if made.returns is None:
        return float(advantage), 0.0
    return float(advantage), float((made.returns - tensor(entry["returns"]))[mask].abs().max())


LOSS_INPUTS = {k: tensor(v, torch.bool if k == "mask" else torch.float32) for k, v in GOLDEN["loss_inputs"].items()}
CLIP_DEFAULT = 0.2  # verl's config


def loss_of(entry: Mapping[str, Any], given: dict[str, Tensor]) -> PolicyLoss:
    """What the engine's user writes for verl's loss of that name and its actor config."""
    settings, name = entry["settings"], entry["name"]
    own = settings.get("policy_loss", {})
    clip = {x: settings.get(f"clip_ratio_{x}", CLIP_DEFAULT) for x in ("low", "high")}
    cap = settings.get("clip_ratio_c", 3.0)
    if name == "vanilla" or (name == "bypass_mode" and own["rollout_correction"]["loss_type"] == "ppo_clip"):
        return policy_loss("dual_clip", given, {**clip, "dual": cap})
    if name == "bypass_mode":  # REINFORCE with token ratios cut at 2
        return policy_loss("cispo", given, {"low": None, "high": 1.0})
    if name in ("dppo_tv", "dppo_kl"):
        return policy_loss("dppo", given, {**clip, "cap": cap, "kind": name[-2:]})
    if name == "gpg":  # REINFORCE: a ratio clipped to 1
        return policy_loss("cispo", given, {"low": 0.0, "high": 0.0})
    if name == "clip_cov":
        names = {"share": "clip_cov_ratio", "cov_low": "clip_cov_lb", "cov_high": "clip_cov_ub"}
        found = {ours: own[theirs] for ours, theirs in names.items() if theirs in own}
        return policy_loss(name, {**given, "uniform": draws(entry, given, clip, found)}, {**clip, **found})
    if name == "kl_cov":
        found = {"share": own.get("kl_cov_ratio", 2e-4), "coef": own.get("ppo_kl_coef", 0.1)}
        return policy_loss(name, given, found)
    if name == "sapo":
        return policy_loss(name, given, {x: settings[x] for x in ("tau_pos", "tau_neg") if x in settings})
    if name == "dro":
        return policy_loss(name, given, {"beta": own["dro_beta"]})
    return policy_loss({"geo_mean": "gmpo"}.get(name, name), given, clip)


def draws(
    entry: Mapping[str, Any], given: dict[str, Tensor], clip: Mapping[str, float], own: Mapping[str, float]
) -> Tensor:
    """Draws that rank verl's candidates as its permutation did; 0.5 elsewhere."""
    lp, a, mask = given["log_prob"].detach(), given["advantage"], given["mask"]
    rho = (lp - given["old_log_prob"]).exp()
    clipped = torch.where(a > 0, rho > 1 + clip["high"], rho < 1 - clip["low"]) & (a != 0)
    cov = (a - a[mask].mean()) * (lp - lp[mask].mean())
    inside = (cov < own.get("cov_high", 5.0)) & (cov > own.get("cov_low", 1.0)) & mask & ~clipped
    found = torch.full(mask.shape, 0.5)
    order = tensor(entry["drawn"], torch.int64) if "drawn" in entry else torch.zeros(0, dtype=torch.int64)
    assert len(order) == int(inside.sum())
    rank = torch.empty(len(order))
    rank[order] = torch.arange(len(order)) / max(1, len(order))
    found[inside] = rank
    return found


def reduced(entry: Mapping[str, Any], loss: Tensor, mask: Tensor) -> Tensor:
    """verl's agg_loss by ``aggregate``: rows without a step count nowhere, and dp_size undoes the mean over ranks."""
    shared, mode = entry.get("shared", {}), entry["mode"]
    ranks = shared.get("dp_size", 1)
    rows = shared.get("global_batch_size", int(mask.any(1).sum()))
    if mode == "token-sum":
        return aggregate(loss, mask, "step_sum") * ranks
    if mode == "token-mean":
        return aggregate(loss, mask, "step_mean", shared.get("batch_num_tokens")) * ranks
    size = shared.get("loss_scale_factor", mask.shape[1]) if mode.endswith("norm") else 1
    return aggregate(loss, mask, MODES[mode], rows * size) * ranks


def row_weights() -> Tensor:
    """What verl's geo_mean makes of weights by step: their geometric mean along the row."""
    mask, weights = LOSS_INPUTS["mask"], LOSS_INPUTS["weights"]
    return (torch.where(mask, weights.log(), 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()


def run_loss(entry: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Our loss and its gradient, under verl's aggregation."""
    log_prob = LOSS_INPUTS[entry.get("log_prob", "log_prob")].clone().requires_grad_()
    mask = LOSS_INPUTS["mask"]
    given = {
        "log_prob": log_prob,
        "old_log_prob": LOSS_INPUTS["old_log_prob"],
        "advantage": LOSS_INPUTS[entry["advantage"]],
        "mask": mask,
    }
    made = loss_of(entry, given).loss
    if entry.get("weights") and entry["name"] != "bypass_mode":  # which draws weights of its own
        made = made * (row_weights() if entry["name"] == "geo_mean" else LOSS_INPUTS["weights"])
    if entry["name"] == "sapo":  # verl averages it by rows whatever the mode
        total = reduced({**entry, "mode": "seq-mean-token-mean"}, made, mask)
    elif entry["name"] == "geo_mean":  # and this one over all rows, empty ones too
        total = aggregate(made, mask, "seq_mean_mean", len(mask))
    else:
        total = reduced(entry, made, mask)
    total.backward()
    assert log_prob.grad is not None
    return total.detach(), log_prob.grad


KL_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "low_var_kl+": "k3+", "k2+": "k2"}


def kl_gaps(entry: Mapping[str, Any]) -> tuple[float, float]:
    """Greatest differences of value and gradient."""
    log_prob = LOSS_INPUTS[entry["log_prob"]].clone().requires_grad_()
    made = kl_estimate(log_prob, LOSS_INPUTS["old_log_prob"], name=KL_NAMES.get(entry["kind"], entry["kind"]))
    made.sum().backward()
    assert log_prob.grad is not None
    slope = (log_prob.grad - tensor(entry["gradient"])).abs().max()
    return float((made.detach() - tensor(entry["value"])).abs().max()), float(slope)
