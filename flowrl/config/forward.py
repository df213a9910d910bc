"""Settings of objectives that learn from re-noised samples, and their checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flowrl import registry
from flowrl.config.families import family_of

if TYPE_CHECKING:
    from flowrl.config.schema import Config

OWN_TIMES = frozenset({"stable_diffusion", "sdxl"})
"""Families whose noise level is known at their own timesteps alone."""
STEP_INPUTS = frozenset({"step", "node", "old_log_prob", "anchor", "node_path"})
"""What estimators read of transitions, which these objectives do not have."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How finished samples are noised anew, and which policy is the old one.

    draws: of (t, noise) a sample and pass. times: stratified (one draw in each equal part of [low, high]) | uniform |
    logit_normal (normal of ``location`` and ``spread`` through a sigmoid, cut to [low, high]) | grid (points of the
    sampling schedule, all equally often; the only rule for models whose noise is known at their timesteps). shared: the
    members of a group have the same draws. weight: of the denoising error in time, uniform | t | t2 | elbo (``(1 - t) / t``)
    | x0 | self; "" takes the objective's own.
    old_rate, old_limit, old_delay: after each iteration the old policy keeps ``min(old_rate (updates - old_delay),
    old_limit)`` of itself and takes the rest from the trained one; rate 0: it is the policy at the start of the iteration.
    sampler: which of the two draws the samples. anchor: what objective.kl pulls towards.
    """

    draws: int = 2
    times: Literal["stratified", "uniform", "logit_normal", "grid"] = "stratified"
    low: float = 0.0
    high: float = 1.0
    location: float = 0.0
    spread: float = 1.0
    shared: bool = False
    weight: Literal["", "uniform", "t", "t2", "elbo", "x0", "self"] = ""
    old_rate: float = 0.0
    old_limit: float = 0.5
    old_delay: int = 0
    sampler: Literal["old", "live"] = "old"
    anchor: Literal["reference", "old"] = "reference"


def problems(config: Config) -> Iterator[str]:
    """Say what is wrong with ``forward`` and what learning from re-noised samples asks of the rest, one line each."""
    name = config.objective.name
    offline = name == "dpo"
    if config.data.preferences and not offline:
        yield f"data.preferences: objective.name={name} draws its own samples; remove it, or use objective.name=dpo"
    if family_of(name) != "forward":
        if config.forward != Forward():
            yield f"forward: objective.name={name} noises no samples anew; remove the section, or use nft or awm"
        return
    yield from _ranges(config)
    yield from _rollout(config)
    yield from _objective(config)
    yield from _credit(config)
    if offline:
        yield from _preferences(config)


def _ranges(config: Config) -> Iterator[str]:
    f = config.forward
    if f.draws < 1:
        yield f"forward.draws: {f.draws} is out of range; use at least 1"
    if not 0 <= f.low < f.high <= 1:
        yield f"forward.low, forward.high: {f.low} and {f.high} are no part of [0, 1]; use 0 <= low < high <= 1"
    if not f.spread > 0:
        yield f"forward.spread: {f.spread} is out of range; use more than 0"
    for key in ("old_rate", "old_delay"):
        if vars(f)[key] < 0:
            yield f"forward.{key}: {vars(f)[key]} is out of range; use at least 0"
    if not 0 <= f.old_limit < 1:
        yield f"forward.old_limit: {f.old_limit} is out of range; use at least 0 and less than 1"
    if f.weight == "elbo" and f.low <= 0 and f.times != "grid":
        yield "forward.low: the weight elbo grows without bound towards t = 0; use more than 0, such as 0.02"
    if config.model.adapter in OWN_TIMES and f.times != "grid":
        yield (
            f"forward.times: {f.times} takes any t, and {config.model.adapter} knows its noise at its own timesteps; use grid"
        )
    if config.model.adapter in OWN_TIMES and f.weight == "elbo":
        yield f"forward.weight: elbo is the weight of straight paths, which {config.model.adapter} has not; use uniform"


def _rollout(config: Config) -> Iterator[str]:
    name, rollout = config.objective.name, config.rollout
    why = f"objective.name={name} learns from finished samples alone"
    if rollout.kernel.name != "ode":
        yield f"rollout.kernel.name: {why}, so no step draws noise; use ode (rollout.solver may be heun or dpmpp_2m)"
    if rollout.window.kind != "full" or rollout.window.fraction < 1:
        yield f"rollout.window: {why}, so a window has no meaning; use window.kind=full, window.first=0, fraction=1"
    if rollout.share_prefix or rollout.seeds > 1 or rollout.splits:
        yield (
            f"rollout.share_prefix: {why}, and members that share a start would be one sample; use share_prefix=false, seeds=1 "
            "and no splits"
        )


def _objective(config: Config) -> Iterator[str]:
    from flowrl.advantage.pipeline import check_options

    o, kl = config.objective, config.objective.kl
    for key, given in (("ratio", o.ratio), ("step_weight", o.step_weight)):
        if given:
            yield f"objective.{key}: {o.name} has no transitions for a {key}; remove it"
    if kl.form in ("paper", "no_dt"):
        yield f"objective.kl.form: {kl.form} compares transitions, and {o.name} has none; use velocity"
    form = registry.resolve("objective", o.name).get(o.name)
    if form is None:
        return
    if o.loss and not form.surrogate:
        yield f"objective.loss: {o.name} has its own loss; remove it, or use objective.name=awm"
    elif o.loss:
        yield from _surrogate(config)
    else:
        try:
            check_options(o.name, form.loss, o.loss_options)
        except ValueError as error:
            yield f"objective.loss_options: {error}"
    if form.pairs and config.batch.group_size < 2:
        yield f"batch.group_size: {o.name} compares two members; use at least 2"


def _surrogate(config: Config) -> Iterator[str]:
    """A policy loss on the denoising error: one of single draws, with known options."""
    from flowrl.advantage.catalogue import JOINT_LOSSES, METHODS
    from flowrl.advantage.pipeline import check_options
    from flowrl.config.engine import LOSS_INPUTS, refused

    o = config.objective
    known = {method.key: method for method in METHODS if method.kind == "policy_loss" and method.call is not None}
    if o.loss not in known:
        yield f"objective.loss: {registry.unknown('policy_loss', o.loss)}"
        return
    method = known[o.loss]
    call = method.call
    refusal = refused(method, call, LOSS_INPUTS) if call is not None else ""
    if refusal or call is None:
        yield f"objective.loss: {refusal}"
    elif o.loss in JOINT_LOSSES:
        yield f"objective.loss: {o.loss} looks at whole trajectories, and {o.name} has single draws; use ppo or bgpo"
    else:
        try:
            check_options(o.loss, call, o.loss_options)
        except ValueError as error:
            yield f"objective.loss_options: {error}"


def _credit(config: Config) -> Iterator[str]:
    name, a = config.objective.name, config.advantage
    if config.credit.values != "none" and name != "ac_flow":
        yield f"credit.values: {config.credit.values} scores transitions, and {name} has none; set it to none"
    if a.name in registry.names("advantage"):
        from flowrl.advantage import ESTIMATORS
        from flowrl.advantage.pipeline import inputs_of

        wanted = inputs_of(ESTIMATORS[a.name]) if a.name in ESTIMATORS else {}
        asked = sorted(key for key, required in wanted.items() if required and key in STEP_INPUTS)
        if asked:
            yield (
                f"advantage.name: {a.name} reads {', '.join(asked)} of transitions, and {name} has none; use grpo, dr_grpo, "
                "rloo or gdpo"
            )


def _preferences(config: Config) -> Iterator[str]:
    path, batch = config.data.preferences, config.batch
    if not path:
        yield "data.preferences: dpo learns from given pairs; name a jsonl file of prompt, chosen and rejected"
    elif not Path(path).is_file():
        yield f"data.preferences: no file {path!r}; check the path (it is relative to where you run)"
    if batch.group_size != 2:
        yield f"batch.group_size: {batch.group_size}, and a pair has two pictures; use 2 (batch.groups is pairs an iteration)"
    if batch.selection.name != "all" or batch.allocation.name != "fixed":
        yield "batch.selection, batch.allocation: dpo trains on every pair alike; use all and fixed"


def needs(config: Config) -> tuple[bool, bool]:
    """(whether an iteration calls the old policy, whether it calls the reference), for an objective of this family."""
    o = config.objective
    form = registry.resolve("objective", o.name)[o.name]
    found: tuple[bool, bool] = form.needs(o.loss, config.forward.anchor if o.kl.form != "none" else "")
    return found
