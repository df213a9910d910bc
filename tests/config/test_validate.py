"""Checks across fields: what must pass, and that all is said at once. The messages are in tests/cli/test_bad_*.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from flowrl.config import Config, ConfigError, check, load, recipes, validate
from flowrl.config.schema import Batch
from flowrl.config.validate import WORLDS


def errors(*overrides: str, world_size: int = 1) -> list[str]:
    """Keys of the problems of the smallest recipe (4 steps, 2 groups of 4) with overrides."""
    return [problem.split(":")[0] for problem in validate(load("tiny_test", overrides), world_size)]


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_are_right(name: str) -> None:
    """Nothing to say but, for the recipes of real models, that the user's own prompt files are not here."""
    found = [
        problem for problem in validate(load(name)) if not re.match(r"(data|evaluation)\.prompts: no file ", problem)
    ]
    assert found == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.window={kind: random, size: 3, first: 0, last: 0}"],
        ["rollout.window={kind: sliding, size: 1, first: 2, last: 2}"],
        ["rollout.window={kind: full, size: 99, first: 0, last: 99}"],
        ["rollout.steps=2", "rollout.window.kind=full"],
        ["optimizer.lr=0"],
        ["rollout.kernel={name: cps, noise: 1}"],
        ["rollout.kernel={name: flow_sde, noise: 1.5}"],
        ["rollout.guidance=0"],
        ["objective.kl={form: paper, weight: 0.04}"],
        ["objective.updates=2"],
        ["batch.group_size=2"],
        ["failures.min_valid=4"],
        ["optimizer.warmup=1"],
        ["model.path=owner/name", "model.height=512", "model.width=512"],
        ["model.train=full", "model.lora.targets=[]"],
        ["seed=9223372036854775807"],
        ["rewards=[{name: jpeg, args: {quality: 50, scale: 1, sign: 1}}, {name: compositional, weight: 0}]"],
        ["checkpoint={every: 0, keep: 2}"],
    ],
    ids=" ".join,
)
def test_what_may_run_passes(overrides: list[str]) -> None:
    assert validate(load("tiny_test", overrides)) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.window={kind: random, size: 3, first: 0, last: 1}", "rollout.window.last"),
        ("rollout.window={kind: sliding, size: 4, first: 0, last: 0}", "rollout.window.size"),
        ("rewards=[{name: jpeg, args: {sign: true}}]", "rewards.0.args.sign"),
        ("rewards=[{name: jpeg, weight: 0}]", "rewards"),
        ("objective.updates=3", "objective.updates"),
        ("optimizer.warmup=2", "optimizer.warmup"),
        ("evaluation.rewards=[{name: jpeg}, {name: jpeg}]", "evaluation.rewards"),
        ("evaluation.rewards=[{name: nope}]", "evaluation.rewards.0.name"),
        ("model.path=/no/such/folder", "model.path"),
        ("failures.min_valid=1", "failures.min_valid"),
        ("optimizer.lr=-1e-9", "optimizer.lr"),
    ],
)
def test_just_outside_is_refused(override: str, key: str) -> None:
    assert errors(override) == [key]


@pytest.mark.parametrize(
    "key",
    [
        "iterations", "model.lora.rank", "batch.groups", "batch.group_size", "batch.micro_batch", "rollout.window.size",
        "rollout.window.every", "objective.updates", "objective.passes", "ema.every", "evaluation.count",
        "evaluation.per_prompt", "evaluation.steps", "evaluation.quick", "objective.clip_range", "optimizer.eps",
        "model.lora.alpha", "optimizer.max_grad_norm",
    ],
)  # fmt: skip
def test_zero_is_out_of_range(key: str) -> None:
    assert errors(f"{key}=0") == [key]


@pytest.mark.parametrize(
    "key",
    [
        "seed", "threads", "rollout.window.first", "rollout.guidance", "advantage.clip", "optimizer.lr",
        "optimizer.weight_decay", "optimizer.warmup", "ema.decay", "evaluation.seed", "evaluation.guidance",
        "evaluation.every", "evaluation.grid", "checkpoint.every", "failures.max_invalid_fraction",
        "objective.kl.weight",
    ],
)  # fmt: skip
def test_negative_is_out_of_range_and_zero_is_not(key: str) -> None:
    assert errors(f"{key}=-1") == [key]
    assert errors(f"{key}=0") == []


def test_groups_are_shared_out_over_the_processes() -> None:
    assert errors("batch.groups=6", world_size=3) == []
    assert errors("batch.groups=6", "objective.updates=1", world_size=4) == []  # uneven shares
    assert errors("batch.groups=3", "objective.updates=1", world_size=4) == ["batch.groups"]


def test_check_says_everything_at_once_and_types_first() -> None:
    config = load("tiny_test", ["batch.group_size=1", "objective.clip_range=0", "rewards.0.weight=0", "ema.decay=1"])
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert len(caught.value.problems) == 4
    assert str(caught.value).startswith("4 errors in the configuration:\n  ")
    made_in_python = dataclasses.replace(config, batch=Batch(groups="two"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"batch\.groups: expected a whole number, found 'two'"):
        check(made_in_python)


def test_check_returns_an_equal_config() -> None:
    config = load("tiny_test")
    assert check(config) == config and isinstance(check(config), Config)


def test_files_are_looked_for(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    assert errors(f"data.prompts={prompts}") == ["data.prompts"]
    prompts.write_text("a cat\n")
    assert errors(f"data.prompts={prompts}", f"model.path={tmp_path}") == []
    other = prompts.rename(tmp_path / "prompts.list")
    assert errors(f"data.prompts={other}") == ["data.format"]
    assert errors(f"data.prompts={other}", "data.format=lines") == []


def test_worlds_are_the_embedded_ones() -> None:
    from flowrl.worlds.prompts import WORLDS as EMBEDDED

    assert WORLDS == EMBEDDED
