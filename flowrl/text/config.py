"""Settings of a text run: frozen dataclasses, loaded as strictly as those of an image run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowrl.advantage import AGGREGATIONS, ESTIMATORS, POLICY_LOSSES
from flowrl.advantage.pipeline import check_options, inputs_of
from flowrl.config import ConfigError, load_as
from flowrl.config.build import nearest
from flowrl.config.schema import Advantage
from flowrl.text import tasks

FAMILY = "text_"
# What credit.py hands to an estimator: always, and with each kind of branching (which says what ``segment`` means).
SUPPLIED = frozenset(
    {"rewards", "group", "mask", "step_reward", "stage_reward", "segment", "old_log_prob", "entropy", "token", "length",
     "cost", "trajectory", "correct", "value"}
)  # fmt: skip
BRANCHED: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "chain": frozenset({"segment_value"}),
    "tree": frozenset({"node_path"}),
}
LOSS_INPUTS = frozenset({"log_prob", "old_log_prob", "advantage", "mask", "clip_scale", "entropy", "group"})


@dataclass(frozen=True, kw_only=True)
class Task:
    """name: sums ("3+8+5=" -> "11;16.") or sorting ("538=" -> "35;358."); terms: digits a problem."""

    name: Literal["sums", "sorting"] = "sums"
    terms: int = 5


@dataclass(frozen=True, kw_only=True)
class Model:
    """Size of the Llama that is trained."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Supervised start on solutions of a pupil who slips. steps: optimizer steps of ``batch`` problems.

    slip: how often the pupil's weak spot (see tasks.py) goes wrong; above 0.5 the most probable result is wrong there.
    seed: of weights and problems; equal settings give equal weights, which are kept in the folder ``cache`` ("" keeps
    none).
    """

    steps: int = 800
    batch: int = 64
    lr: float = 3e-3
    slip: float = 0.7
    seed: int = 0
    cache: str = "runs/text/base"


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Cut points where the policy is unsure, and rollouts that value them (``flowrl.advantage.trees.spo_cuts``).

    interval: unsure tokens a segment; max_probability: below it a token is unsure; max_cuts: at most so many segments;
    rollouts: continuations sampled from each cut point.
    """

    interval: int = 3
    max_probability: float = 0.9
    max_cuts: int = 4
    rollouts: int = 4


@dataclass(frozen=True, kw_only=True)
class Tree:
    """branches: continuations of each node, level by level; segment: tokens of a level, the last one runs to the end."""

    branches: tuple[int, ...] = (3, 3, 3)
    segment: int = 4


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """problems: an iteration; group_size: completions of each (a tree has its leaves). branching: what else is sampled."""

    problems: int = 32
    group_size: int = 8
    branching: Literal["none", "chain", "tree"] = "none"
    chain: Chain = field(default_factory=Chain)
    tree: Tree = field(default_factory=Tree)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """loss: a policy loss of flowrl.advantage with its ``options``. updates: minibatches of a pass; passes over the data."""

    loss: str = "ppo"
    options: dict[str, Any] = field(default_factory=dict)
    aggregation: str = "step_mean"
    updates: int = 2
    passes: int = 1


@dataclass(frozen=True, kw_only=True)
class Critic:
    """lr: of the value network, which exists where the estimator needs values. passes: over each rollout."""

    lr: float = 1e-3
    passes: int = 2


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Adam. warmup: iterations over which lr and critic.lr rise; schedule: over the budget, linear falls to 0."""

    lr: float = 2e-4
    warmup: int = 10
    schedule: Literal["constant", "linear"] = "linear"
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Greedy accuracy on held-out problems. points: evaluations after the first, evenly spaced in generated tokens."""

    problems: int = 512
    points: int = 12


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """One run. It ends once ``tokens`` were generated (branches and value rollouts count) or after ``iterations`` (0: any)."""

    run_dir: str = "runs/text/run"
    seed: int = 0
    tokens: int = 120_000
    iterations: int = 0
    threads: int = 1
    task: Task = field(default_factory=Task)
    model: Model = field(default_factory=Model)
    pretraining: Pretraining = field(default_factory=Pretraining)
    rollout: Rollout = field(default_factory=Rollout)
    advantage: Advantage = field(default_factory=Advantage)
    objective: Objective = field(default_factory=Objective)
    critic: Critic = field(default_factory=Critic)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TextConfig:
    """Load and check a recipe: a file, a shipped name such as text_outcome, or a mapping; overrides are key=value.

    Raises ConfigError with everything that is wrong.
    """
    config = load_as(TextConfig, source, overrides, FAMILY)
    problems = [line for check in _CHECKS for line in check(config)]
    if problems:
        raise ConfigError(problems)
    return config


_AT_LEAST: Mapping[int, tuple[str, ...]] = {
    0: ("seed", "iterations", "pretraining.steps", "evaluation.points", "optimizer.lr", "critic.lr", "optimizer.warmup"),
    1: (
        "tokens", "threads", "model.hidden", "model.layers", "model.heads", "pretraining.batch", "rollout.problems",
        "rollout.chain.interval", "rollout.chain.max_cuts", "rollout.chain.rollouts", "rollout.tree.segment",
        "objective.updates", "objective.passes", "critic.passes", "evaluation.problems",
    ),
    2: ("rollout.group_size",),
    3: ("task.terms",),
}  # fmt: skip


def _ranges(config: TextConfig) -> Iterator[str]:
    for least, keys in _AT_LEAST.items():
        for key in keys:
            value: Any = config
            for part in key.split("."):
                value = vars(value)[part]
            if value < least:
                yield f"{key}: {value} is out of range; use at least {least}"
    if config.task.terms > 12:
        yield f"task.terms: {config.task.terms} is out of range; use at most 12"
    if not 0 < config.optimizer.max_grad_norm:
        yield f"optimizer.max_grad_norm: {config.optimizer.max_grad_norm} is out of range; use more than 0"
    if not 0 <= config.pretraining.slip <= 1:
        yield f"pretraining.slip: {config.pretraining.slip} is out of range; use 0 to 1"
    if not 0 < config.rollout.chain.max_probability <= 1:
        yield f"rollout.chain.max_probability: {config.rollout.chain.max_probability} is out of range; use (0, 1]"


def _sizes(config: TextConfig) -> Iterator[str]:
    m, tree = config.model, config.rollout.tree
    if m.heads >= 1 and (m.hidden % m.heads or m.hidden // m.heads % 2):
        yield f"model.hidden: {m.hidden} does not split into {m.heads} heads of an even size"
    if not tree.branches or min(tree.branches) < 2:
        yield f"rollout.tree.branches: {list(tree.branches)}: every level needs at least 2 branches"
    if 3 <= config.task.terms <= 12:
        task = tasks.make(config.task.name, config.task.terms)
        most = task.count // 16
        for key, value in (
            ("pretraining.batch", config.pretraining.batch),
            ("rollout.problems", config.rollout.problems),
            ("evaluation.problems", config.evaluation.problems),
        ):
            if value > most:
                yield f"{key}: {value} distinct problems of {task.count}; use at most {most}, or more task.terms"


def _methods(config: TextConfig) -> Iterator[str]:
    a, o = config.advantage, config.objective
    supplied = SUPPLIED | BRANCHED[config.rollout.branching]
    yield from _method("advantage.name", "advantage.options", ESTIMATORS, a.name, a.options, supplied)
    yield from _method("objective.loss", "objective.options", POLICY_LOSSES, o.loss, o.options, LOSS_INPUTS)
    if o.aggregation not in AGGREGATIONS:
        yield f"objective.aggregation: unknown aggregation {o.aggregation!r}; use one of {', '.join(AGGREGATIONS)}"


def _method(
    name_key: str,
    option_key: str,
    table: Mapping[str, Callable[..., Any]],
    name: str,
    options: Mapping[str, Any],
    supplied: frozenset[str],
) -> Iterator[str]:
    if name not in table:
        near = nearest(name, table)
        yield f"{name_key}: unknown method {name!r}; {f'did you mean {near}?' if near else 'see docs/advantage.md'}"
        return
    missing = [key for key, needed in inputs_of(table[name]).items() if needed and key not in supplied]
    if missing:
        homes = [kind for kind, more in BRANCHED.items() if set(missing) <= more]
        advice = f"set rollout.branching={homes[0]}" if homes else "a text run does not produce it"
        yield f"{name_key}: {name} needs {', '.join(map(repr, missing))}; {advice}"
    try:
        check_options(name, table[name], options)
    except ValueError as error:
        yield f"{option_key}: {error}"


_CHECKS: tuple[Callable[[TextConfig], Iterator[str]], ...] = (_ranges, _sizes, _methods)
