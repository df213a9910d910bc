"""verl's trainers with the engine's estimators and policy losses, under the names flowrl_<key>.

    VERL_USE_EXTERNAL_MODULES=flowrl.integrations.verl python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=flowrl_rloo +algorithm.flowrl.options.singleton=raw \\
        actor_rollout_ref.actor.policy_loss.loss_mode=flowrl_gppo

The variable (set on every node) makes verl import this module in each process, which then registers all that verl can
serve; a module of one's own that calls ``register`` does as well. Written against verl 0.9.1, whose functions are the
reference that ``tests/advantage/test_verl_golden.py`` holds the engine to.

Estimators: the outcome is the sum of a row's token rewards, rows of one uid are a group. Options stand in
``algorithm.flowrl``: ``options``, and ``whiten`` and ``clip`` as in ``estimate``. verl computes advantages on all rows
of a step in one process, so statistics of the batch are global.

Losses: options stand in ``policy_loss.flowrl``, which needs ``policy_loss._target_`` to be
flowrl.integrations.verl.policy_loss_config. What verl's actor config has a field for is read from there otherwise
(FOLLOWED: clip_ratio_low, clip_ratio_high, tau_pos ...), as verl's own losses do: its clip range of 0.2 is far too wide
for gspo and luspo. verl's ``agg_loss`` makes one number of a loss, so micro-batches and ranks add up as in verl.
Statistics within a loss (bapo, clip_cov, kl_cov) are those of a micro-batch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import ESTIMATORS, POLICY_LOSSES, estimate, log_ratio, policy_loss
from flowrl.advantage.pipeline import check_options, inputs_of
from flowrl.errors import UserError

PREFIX = "flowrl_"
# What verl hands to a registered function, by the engine's names.
ESTIMATOR_INPUTS = frozenset(
    {"rewards", "step_reward", "mask", "group", "greedy_reward", "trajectory", "length", "cost"}
)
LOSS_INPUTS = frozenset({"log_prob", "old_log_prob", "advantage", "mask", "uniform"})
# Methods whose inputs have defaults, and that are of no use without them.
_UNSERVED = {
    "gdpo": "gdpo needs rewards by channel, which verl hands to its own gdpo alone",
    "otb": "otb needs log-probs and sum_pi_squared, which verl hands to its own optimal_token_baseline alone",
}
_RANGE = {"low": ("clip_ratio_low", "clip_ratio"), "high": ("clip_ratio_high", "clip_ratio")}
# Option of a loss -> the fields of verl's actor config that stand for it; the first that is set counts.
FOLLOWED: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "ppo": _RANGE,
        "dual_clip": {**_RANGE, "dual": ("clip_ratio_c",)},
        "gppo": _RANGE,
        "gspo": _RANGE,
        "luspo": _RANGE,
        "gmpo": _RANGE,
        "cispo": _RANGE,
        "dppo": {**_RANGE, "cap": ("clip_ratio_c",)},
        "sapo": {"tau_pos": ("tau_pos",), "tau_neg": ("tau_neg",)},
        "dro": {"beta": ("policy_loss.dro_beta",)},
        "kl_cov": {"share": ("policy_loss.kl_cov_ratio",), "coef": ("policy_loss.ppo_kl_coef",)},
        "clip_cov": {
            **_RANGE,
            "share": ("policy_loss.clip_cov_ratio",),
            "cov_low": ("policy_loss.clip_cov_lb",),
            "cov_high": ("policy_loss.clip_cov_ub",),
        },
    }
)


@dataclass(frozen=True)
class Registered:
    """What ``register`` did: names of estimators and losses in verl's registries, and why the others are not there."""

    estimators: tuple[str, ...]
    losses: tuple[str, ...]
    refused: Mapping[str, str]


def refusal(key: str, calls: Mapping[str, Callable[..., Any]], supplied: frozenset[str]) -> str:
    """Say why verl cannot serve the method ``key`` of ``calls``, "" where it can."""
    if key in _UNSERVED:
        return _UNSERVED[key]
    missing = [name for name, required in inputs_of(calls[key]).items() if required and name not in supplied]
    return f"{key} needs {', '.join(missing)}, which verl does not hand over" if missing else ""


def _check(kind: str, key: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for a method that is unknown or that verl cannot serve, or an option that it does not have."""
    calls: Mapping[str, Callable[..., Any]] = ESTIMATORS if kind == "estimator" else POLICY_LOSSES
    if key not in calls:
        raise UserError(f"flowrl.integrations.verl: no {kind} is called {key!r}; flowrl methods lists them")
    reason = refusal(key, calls, ESTIMATOR_INPUTS if kind == "estimator" else LOSS_INPUTS)
    if reason:
        raise UserError(f"flowrl.integrations.verl: {reason}; call flowrl.advantage from a trainer of your own")
    try:
        check_options(key, calls[key], options)
    except ValueError as error:
        raise UserError(f"flowrl.integrations.verl: {error}") from error


def _section(config: Mapping[str, Any] | None, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Read the block ``flowrl`` of one of verl's configs: {} where there is none."""
    found = None if config is None else config.get("flowrl")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise UserError(f"{where}.flowrl: expected a block, got {found}")
    unknown = set(found) - set(known) if known else set()
    if unknown:
        raise UserError(f"{where}.flowrl: expected a block of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return dict(found)


def group_ids(index: Any) -> Tensor:
    """Number the labels of an array or tensor [B] (uids, mostly strings) in order of appearance: int64 [B]."""
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(label, len(known)) for label in index.tolist()], dtype=torch.int64)


def place(rewards: Tensor, mask: Tensor) -> Tensor:
    """Move what lies on masked steps to the unmasked step before it, or else the first: [B, T], rows keep their sum.

    An outcome lies on the last token of a response, which a mask of tool output or rejected tokens may exclude. A row
    without an unmasked step keeps nothing.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    before = torch.where(mask, position, -1).cummax(1).values
    first = mask.int().argmax(1, keepdim=True)
    moved = torch.zeros_like(rewards).scatter_add_(1, torch.where(before < 0, first, before), rewards)
    return torch.where(mask, moved, 0.0)


@dataclass(frozen=True)
class Estimator:
    """The estimator ``key`` with verl's signature: gives (advantages, returns), float32 [B, T], 0 where masked.

    The method's weights multiply its advantages; returns are the advantages where the method has none. Raises
    UserError for a method that verl cannot serve, and when called with what it cannot use.
    """

    key: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("estimator", self.key, self.options)

    def __call__(
        self,
        token_level_rewards: Tensor,
        response_mask: Tensor,
        config: Mapping[str, Any] | None = None,
        index: Any = None,
        reward_baselines: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take advantages as verl asks for them; index: the uids, an array [B]; reward_baselines: [B]."""
        mask = response_mask.bool()
        section = _section(config, "algorithm", ("options", "whiten", "clip"))
        length = mask.sum(1).float()
        inputs = {
            "rewards": token_level_rewards.double().sum(1),
            "step_reward": place(token_level_rewards, mask),
            "mask": mask,
            "trajectory": torch.arange(len(mask), device=mask.device),
            "length": length,
            "cost": length,
            "greedy_reward": reward_baselines,
            "group": None if index is None else group_ids(index).to(mask.device),
        }
        options = {**self._followed(config), **self.options, **dict(section.get("options") or {})}
        known = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        try:
            made = estimate(
                self.key, known, options, whiten=section.get("whiten", "none"), clip=section.get("clip", 0.0)
            ).over_steps(mask)
        except ValueError as error:
            raise UserError(f"{PREFIX}{self.key}: {error}") from error
        advantage = made.advantage * made.weight
        return advantage, advantage if made.returns is None else made.returns

    def _followed(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        if config is None:
            return {}
        if self.key == "grpo" and config.get("norm_adv_by_std_in_grpo") is False:
            raise UserError(f"algorithm.norm_adv_by_std_in_grpo=false: take {PREFIX}dr_grpo in place of {PREFIX}grpo")
        gamma = config.get("gamma")
        return {"gamma": float(gamma)} if self.key == "reinforce_pp" and gamma is not None else {}


@dataclass(frozen=True)
class Loss:
    """The policy loss ``key`` with verl's signature: gives (loss, metrics). Raises as ``Estimator``."""

    key: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("policy loss", self.key, self.options)

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Mapping[str, Any] | None = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Take the loss as verl asks for it; every tensor is [B, T], and rollout_is_weights multiply the steps."""
        mask = response_mask.bool()
        inputs = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantage": advantages, "mask": mask}
        if "uniform" in inputs_of(POLICY_LOSSES[self.key]):
            inputs["uniform"] = torch.rand(mask.shape, device=mask.device)
        try:
            made = policy_loss(self.key, inputs, {**_followed(self.key, config), **self.options, **_own(config)})
        except ValueError as error:
            raise UserError(f"{PREFIX}{self.key}: {error}") from error
        loss = made.loss
        if rollout_is_weights is not None:
            loss = loss * torch.where(mask, rollout_is_weights, 0.0)
        shared = {} if config is None else config.get("global_batch_info") or {}
        total: Tensor = _core().agg_loss(loss_mat=loss, loss_mask=mask, loss_agg_mode=loss_agg_mode, **shared)
        with torch.no_grad():
            number = mask.sum().clamp(min=1)
            moved = torch.where(mask, log_ratio(log_prob, old_log_prob), 0.0)
            metrics = {"actor/ppo_kl": float(-moved.sum() / number)}
            if made.low is not None and made.high is not None:
                metrics["actor/pg_clipfrac"] = float((made.low | made.high).sum() / number)
                metrics["actor/pg_clipfrac_low"] = float(made.low.sum() / number)
        return total, metrics


def _own(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Read the block ``flowrl`` of policy_loss."""
    return _section(None if config is None else config.get("policy_loss"), "policy_loss", ())


def _followed(key: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Read the options that verl's actor config has fields for."""
    found: dict[str, Any] = {}
    for option, paths in FOLLOWED.get(key, {}).items():
        for path in paths:
            block, _, name = path.rpartition(".")
            holder = config if not block or config is None else config.get(block)
            value = None if holder is None else holder.get(name)
            if value is not None:
                found[option] = float(value)
                break
    return found


def policy_loss_config(
    *,
    flowrl: Mapping[str, Any] | None = None,
    loss_mode: str = "vanilla",
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    kl_cov_ratio: float = 0.0002,
    ppo_kl_coef: float = 0.1,
    dro_beta: float | None = None,
    rollout_correction: Any = None,
) -> Any:
    """Make verl's PolicyLossConfig with one more block, ``flowrl``: options of a flowrl_ loss.

        actor_rollout_ref.actor.policy_loss._target_=flowrl.integrations.verl.policy_loss_config
        +actor_rollout_ref.actor.policy_loss.flowrl.high=0.3

    Its other arguments are the fields of verl 0.9.1.
    """
    more = {} if rollout_correction is None else {"rollout_correction": rollout_correction}
    made = import_module("verl.workers.config").PolicyLossConfig(
        loss_mode=loss_mode,
        clip_cov_ratio=clip_cov_ratio,
        clip_cov_lb=clip_cov_lb,
        clip_cov_ub=clip_cov_ub,
        kl_cov_ratio=kl_cov_ratio,
        ppo_kl_coef=ppo_kl_coef,
        dro_beta=dro_beta,
        **more,
    )
    made.flowrl = dict(flowrl or {})
    return made


def _core() -> ModuleType:
    """Import the module of verl's registries. Raises UserError where verl, or something that it needs, is missing."""
    try:
        return import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        raise UserError(
            f"flowrl.integrations.verl needs verl ({error}): pip install verl==0.9.1, in an environment of its own, "
            "since its versions of transformers are older than those that flowrl is tested with"
        ) from error


def register(
    estimators: Mapping[str, Mapping[str, Any]] | None = None, losses: Mapping[str, Mapping[str, Any]] | None = None
) -> Registered:
    """Register every estimator and policy loss that verl can serve with verl, as flowrl_<key>.

    estimators, losses: key -> options, for those that are to have other defaults; options of verl's config win over
    them. Calling it again with the same options changes nothing. Raises UserError where verl is missing or an old
    release (whose losses return four numbers), for an unknown key or option, for a method that verl cannot serve, and
    for an estimator that is registered with other options already.
    """
    core = _core()
    kept = str(inspect.signature(core.get_policy_loss_fn("vanilla")).return_annotation)
    if "dict" not in kept:
        raise UserError(f"flowrl.integrations.verl: verl's losses return {kept} here; verl 0.9.1 or newer is needed")
    chosen, wanted = dict(estimators or {}), dict(losses or {})
    for kind, settings in (("estimator", chosen), ("policy loss", wanted)):
        for key, options in settings.items():
            _check(kind, key, options)
    names: tuple[list[str], list[str]] = ([], [])
    refused = {}
    for key in ESTIMATORS:
        reason = refusal(key, ESTIMATORS, ESTIMATOR_INPUTS)
        if reason:
            refused[PREFIX + key] = reason
            continue
        try:
            core.register_adv_est(PREFIX + key)(Estimator(key, chosen.get(key, {})))
        except ValueError as error:
            raise UserError(f"flowrl.integrations.verl: register once for each process: {error}") from error
        names[0].append(PREFIX + key)
    for key in POLICY_LOSSES:
        reason = refusal(key, POLICY_LOSSES, LOSS_INPUTS)
        if reason:
            refused[PREFIX + key] = reason
            continue
        core.register_policy_loss(PREFIX + key)(Loss(key, wanted.get(key, {})))
        names[1].append(PREFIX + key)
    return Registered(estimators=tuple(names[0]), losses=tuple(names[1]), refused=refused)


# verl imports the modules of this variable for what the import does.
if __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    register()
