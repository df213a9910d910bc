"""Checks of guidance by a process reward, of the objective that learns from it, and of search."""

from __future__ import annotations

from collections.abc import Iterator

from flowrl import registry
from flowrl.config.families import family_of
from flowrl.config.guide import Euphonium, Guide, Search
from flowrl.config.rewards import declared, labels
from flowrl.config.schema import Config


def problems(config: Config) -> Iterator[str]:
    """Say what is wrong with ``rollout.guide``, ``euphonium`` and ``search``, one line each."""
    if config.rollout.guide.reward:
        yield from _guide(config)
    elif config.rollout.guide != Guide():
        yield "rollout.guide.reward: is empty, so nothing is guided; give the label of an entry of process"
    yield from _euphonium(config)
    yield from _search(config)


def _labelled(config: Config, key: str, label: str) -> Iterator[str]:
    known = labels(config.process)
    if label not in known:
        advice = f"use one of {', '.join(known)}" if known else "there is none; add an entry to process"
        yield f"{key}: no process reward has the label {label!r}; {advice}"


def _guide(config: Config) -> Iterator[str]:
    g, o, steps = config.rollout.guide, config.objective, config.rollout.steps
    yield from _labelled(config, "rollout.guide.reward", g.reward)
    if family_of(o.name) != "trajectory" or o.name == "neighbor_grpo":
        yield f"rollout.guide: {o.name} draws its samples without noise, and guidance moves noise; remove the section"
    if g.scale < 0:
        yield f"rollout.guide.scale: {g.scale} would lead away from the reward; use at least 0"
    last = steps - 1 if g.last is None else g.last
    if not 0 <= g.first <= last < steps:
        yield f"rollout.guide.first, last: {g.first} to {last} is no range of steps; use 0 to {steps - 1}"
    if g.gradient == "spsa" and (g.radius <= 0 or g.draws < 1):
        yield "rollout.guide.radius, draws: spsa needs a radius above 0 and at least one draw"
    if g.gradient == "autograd":
        yield from _differentiable(config, g.reward)
    if g.mode == "exact_tilt" and g.first == 0 and config.model.adapter != "stable_diffusion":
        yield (
            "rollout.guide.first: exact_tilt has no share at pure noise, where step 0 of a flow starts; use at least 1"
        )
    if g.mode != "langevin" and config.rollout.solver != "euler":
        yield f"rollout.solver: {g.mode} guides steps without noise too, one at a time; use euler"
    yield from _learnable(config)


def _differentiable(config: Config, label: str) -> Iterator[str]:
    for own, entry in zip(labels(config.process), config.process, strict=True):
        if own != label or entry.name not in registry.names("process_reward"):
            continue
        if not vars(registry.resolve("process_reward", entry.name)).get("differentiable", True):
            yield (
                f"rollout.guide.gradient: the process reward {label} has no gradient (its picture is rounded on the way); "
                "use spsa"
            )


def _learnable(config: Config) -> Iterator[str]:
    """What an objective must be to learn from samples whose mean was moved."""
    g, o = config.rollout.guide, config.objective
    for key, value, plain in (("log_prob", g.log_prob, "unguided"), ("mode", g.mode, "langevin")):
        if o.name != "euphonium" and value in ("guided", "langevin_weighted"):
            yield (
                f"rollout.guide.{key}: {value} is learned from by objective.name=euphonium alone, and it is {o.name}; "
                f"use {plain}, or that objective"
            )
    if g.log_prob == "guided" and o.ratio not in ("", "plain"):
        yield f"objective.ratio: {o.ratio} compares means of one kernel; with rollout.guide.log_prob=guided use plain"


def _euphonium(config: Config) -> Iterator[str]:
    e, o, g = config.euphonium, config.objective, config.rollout.guide
    if o.name != "euphonium":
        if e != Euphonium():
            yield f"euphonium: objective.name={o.name} does not read it; remove the section, or use euphonium"
        return
    for key in ("outcome", "process", "distil"):
        if vars(e)[key] < 0:
            yield f"euphonium.{key}: {vars(e)[key]} would learn the opposite; use at least 0"
    if e.outcome == e.process == e.distil == 0:
        yield "euphonium: outcome, process and distil are all 0, so nothing is learned; set one"
    if e.process > 0 and config.credit.values == "none":
        yield (
            "credit.values: euphonium.process learns from values of intermediate states; set credit.values=process (or x0, "
            "ode), or euphonium.process=0"
        )
    if e.distil > 0 and not g.active:
        yield "euphonium.distil: there is no guidance to bring into the network; set rollout.guide, or distil=0"
    if o.loss and o.loss != "ppo":
        from flowrl.advantage.catalogue import JOINT_LOSSES

        if o.loss in JOINT_LOSSES:
            yield f"objective.loss: {o.loss} looks at whole trajectories, and euphonium sums losses of steps; use ppo"


def _search(config: Config) -> Iterator[str]:
    s, steps = config.search, config.evaluation.steps
    if s.kind == "none":
        if s != Search():
            yield "search.kind: none, yet other settings of search are given; choose best_of, beam or particles"
        return
    if s.width < 1:
        yield f"search.width: {s.width} is out of range; use at least 1"
    if s.kind == "beam" and s.children < 2:
        yield f"search.children: a beam of {s.children} children has nothing to choose from; use at least 2"
    if s.kind == "best_of" and s.at:
        yield "search.at: best_of draws no noise on the way; remove it, or use beam"
    for step in s.at:
        if not 0 <= step < steps - 1:
            yield f"search.at: step {step} draws no noise; use 0 to {steps - 2} (evaluation.steps={steps})"
    if s.scale < 0:
        yield f"search.scale: {s.scale} would look for the worst; use at least 0"
    if not 0 <= s.threshold <= 1:
        yield f"search.threshold: {s.threshold} is out of range; use 0 to 1"
    if s.reward:
        yield from _labelled(config, "search.reward", s.reward)
    else:
        yield from _compares(config)


def _compares(config: Config) -> Iterator[str]:
    for entry in config.evaluation.rewards or config.rewards:
        ranked = any("rank" in step for step in entry.shaping)
        if entry.duty == "train" and (ranked or declared(entry.name, "scope") in ("group", "pair")):
            yield (
                f"search.reward: {entry.name} compares the members of a group, and candidates of a search are none; name a "
                "process reward, or judge by other evaluation.rewards"
            )
