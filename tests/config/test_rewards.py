"""The checks of rewards: labels, roles, shaping, gates, backbones, executors, and that right ones pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flowrl.config import load, validate
from flowrl.config.rewards import Shape, concise, judging, labels, read_shaping, scope_of, short_name, split_preset
from flowrl.config.schema import Executor, Failures, RewardEntry
from flowrl.scoring.executors.settings import ExecutorSettings

HERE = __name__


class Clip:
    backbone = "vit-h"

    def score(self, batch: Any) -> Any: ...


class OtherClip(Clip):
    pass


class Plain:
    def score(self, batch: Any) -> Any: ...


def judge(first: Any, second: Any) -> Any: ...


def grouped(images: Any) -> Any: ...


grouped.scope = "group"  # type: ignore[attr-defined]


def errors(rewards: str, *more: str) -> list[str]:
    return validate(load("tiny_test", [f"rewards={rewards}".replace("HERE", HERE), *more]))


@pytest.mark.parametrize(
    "rewards",
    [
        "[{name: jpeg, label: a}, {name: jpeg, label: b, weight: 0.5}]",
        "[{name: jpeg/26}]",
        "[{name: jpeg, shaping: [{affine: [2, 1]}, {clip: [0, 1]}, {sigmoid: [0, 0.5]}, {rank: {}}]}]",
        "[{name: jpeg, shaping: [{gate: {by: w, at_most: 1}}]}, {name: compositional, label: w, role: monitor}]",
        (
            "[{name: jpeg, shaping: [{gate: {by: w, at_least: 0, at_most: 1, otherwise: mask}}]}, {name: "
            "compositional, label: w}]"
        ),
        "[{name: jpeg}, {name: compositional, role: gold}]",
        "[{name: 'HERE:Clip'}, {name: 'HERE:Plain', role: gold}]",
        "[{name: 'HERE:Plain'}, {name: jpeg, role: gold}]",
        "[{name: jpeg, executor: {kind: process, timeout_s: 2, workers: 3}}]",
        "[{name: 'HERE:judge', opponents: 4}]",
    ],
)
def test_what_may_run(rewards: str) -> None:
    assert errors(rewards) == []


@pytest.mark.parametrize(
    ("rewards", "problem"),
    [
        (
            "[{name: jpeg, role: gold}]",
            "rewards: none has role train, so nothing is trained on; give one that role and a weight",
        ),
        (
            "[{name: jpeg, role: monitor}]",
            "rewards: none has role train, so nothing is trained on; give one that role and a weight",
        ),
        ("[{name: jpeg}, {name: jpeg}]", "rewards: jpeg is given 2 times; keep one, or give each a label of its own"),
        (
            "[{name: jpeg, label: a}, {name: compositional, label: a}]",
            "rewards: a is given 2 times; keep one, or give each a label of its own",
        ),
        ("[{name: jpeg, label: a/b}]", "rewards.0.label: 'a/b' cannot name a metric; use letters, digits, _ . and -"),
        (
            "[{name: jpeg, label: compositional}, {name: compositional}]",
            "rewards.1.label: compositional is the label of another reward; give this one a label too",
        ),
        (
            "[{name: jpeg}, {name: compositional, role: gold, weight: 0}]",
            "rewards.1.weight: 0 leaves a gold reward out of the gold score; give it a weight, or use role: monitor",
        ),
        (
            "[{name: jpeg, opponents: -1}]",
            "rewards.0.opponents: -1 is out of range; use 0 for all members, or a number of them",
        ),
        (
            "[{name: jpeg/third}]",
            "rewards.0.name: jpeg has no preset 'third'; use none, or jpeg/26 to divide its scores by 26",
        ),
        ("[{name: jpg/26}]", "rewards.0.name: unknown reward 'jpg'; did you mean jpeg?"),
        (
            "[{name: jpeg, shaping: [{afine: [1, 2]}]}]",
            "rewards.0.shaping.0: unknown step 'afine'; use affine, clip, sigmoid, rank, gate",
        ),
        (
            "[{name: jpeg, shaping: [{clip: [0, 1], rank: {}}]}]",
            (
                "rewards.0.shaping.0: expected one step, found 2 keys; write each step as an item of its own, "
                "as in {clip: [0, 1]}"
            ),
        ),
        (
            "[{name: jpeg, shaping: [{gate: {by: other, at_most: 1}}]}]",
            "rewards.0.shaping.0.gate.by: no reward is called 'other'; use one of jpeg",
        ),
        (
            "[{name: jpeg, shaping: [{rank: {}}, {gate: {by: jpeg, at_most: 1}}]}]",
            "rewards.0.shaping.1.gate.by: jpeg would gate itself; name another reward, or use clip",
        ),
        (
            "[{name: jpeg, shaping: [{gate: {by: compositional, at_most: 1}}]}, {name: compositional, role: gold}]",
            (
                "rewards.0.shaping.0.gate.by: compositional is gold, and a gold reward must not shape what is "
                "trained on; add a monitor"
            ),
        ),
        (
            "[{name: jpeg}, {name: jpeg, label: g, role: gold}]",
            "rewards.1.role: jpeg is trained on as well, so it is no gold; name another reward",
        ),
        ("[{name: jpeg, executor: {kind: worker}}]", "rewards.0.executor: kind worker needs python"),
        ("[{name: jpeg, executor: {kind: http}}]", "rewards.0.executor: kind http needs url"),
        (
            "[{name: jpeg, executor: {workers: 0, queue: 0}}]",
            "rewards.0.executor: workers is 0; use 1 or more; queue is 0; use 1 or more",
        ),
    ],
)
def test_what_is_refused(rewards: str, problem: str) -> None:
    (found,) = errors(rewards)
    assert found.startswith(problem)


def test_gold_on_a_trained_network_is_refused_unless_allowed() -> None:
    rewards = "[{name: 'HERE:Clip'}, {name: 'HERE:OtherClip', role: gold}]"
    (found,) = errors(rewards)
    assert found == (
        f"rewards.1.role: {HERE}:OtherClip stands on vit-h, as the trained {HERE}:Clip does, so it cannot show that one being "
        "hacked; choose a gold reward on another network, or set failures.allow_shared_backbone=true"
    )
    assert errors(rewards, "failures.allow_shared_backbone=true") == []
    gold = f"evaluation.rewards=[{{name: jpeg}}, {{name: '{HERE}:OtherClip', role: gold}}]"
    (found,) = errors("[{name: 'HERE:Clip'}]", gold)
    assert found.startswith("evaluation.rewards.1.role: ")
    assert (
        errors(
            "[{name: 'HERE:Clip', weight: 0}, {name: jpeg}]", gold.replace("{name: jpeg}, ", "{name: compositional}, ")
        )
        == []
    )


def test_a_monitor_that_gates_is_trained_on() -> None:
    gated = "[{name: jpeg, shaping: [{gate: {by: m, at_most: 1}}]}, {name: compositional, label: m, role: monitor}, "
    gated += "{name: compositional, label: g, role: gold}]"
    (found,) = errors(gated)
    assert found == "rewards.2.role: compositional is trained on as well, so it is no gold; name another reward"


def test_values_of_states_need_rewards_of_single_samples() -> None:
    value = ["advantage={name: vgpo, options: {}, clip: 5.0}", "credit.values=x0"]
    for rewards in (
        "[{name: 'HERE:judge'}]",
        "[{name: 'HERE:grouped'}]",
        "[{name: compositional, shaping: [{rank: {}}]}]",
    ):
        found = [
            problem for problem in errors(rewards, *value) if problem.startswith("credit.values: x0 scores states")
        ]
        assert len(found) == 1, rewards
    assert not any("scores states" in problem for problem in errors("[{name: compositional}]", *value))


@pytest.mark.parametrize(
    "override",
    [
        "failures.timeout_s=0",
        "failures.total_s=-1",
        "alarm.level=1",
        "alarm.level=0",
        "alarm.patience=-1",
        "alarm.diversity_fall=1.5",
        "failures.breaker=-1",
    ],
)
def test_ranges(override: str) -> None:
    (problem,) = errors("[{name: jpeg}]", override)
    assert problem.startswith(override.split("=")[0] + ": ")


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({"affine": [1]}, "expected [scale, offset], two numbers, found [1]"),
        ({"affine": [1, float("nan")]}, "expected [scale, offset], two numbers, found [1, nan]"),
        ({"clip": [1, 1]}, "low 1 is not below high 1; give them in order"),
        ({"clip": [True, 2]}, "expected [low, high], two numbers, found [True, 2]"),
        ({"sigmoid": [0, 0]}, "width 0 is not above 0; scale by affine: [-1, 0] first to turn the curve round"),
        ({"rank": 3}, "rank takes nothing, found 3; write {rank: {}}"),
        ({"gate": 0.5}, "gate needs by: the label of another reward, as in {gate: {by: nsfw, at_most: 0.5}}"),
        (
            {"gate": {"by": "x"}},
            "gate needs at_least, at_most or both, as numbers: the scores between which it is open",
        ),
        (
            {"gate": {"by": "x", "at_most": "1"}},
            "gate needs at_least, at_most or both, as numbers: the scores between which it is open",
        ),
        ({"gate": {"by": "x", "at_least": 2, "at_most": 1}}, "gate is never open: at_least 2 is above at_most 1"),
        (
            {"gate": {"by": "x", "at_most": 1, "below": 2}},
            "gate has no 'below'; it takes by, at_least, at_most, otherwise",
        ),
        (
            {"gate": {"by": "x", "at_most": 1, "otherwise": "nan"}},
            "gate.otherwise is 'nan'; give the score of closed samples, or mask to leave them out",
        ),
    ],
)
def test_steps_that_are_wrong(step: dict[str, Any], problem: str) -> None:
    assert read_shaping([{"rank": {}}, step]) == ((Shape("rank"),), [f"1: {problem}"])


def test_steps_that_are_read() -> None:
    shapes, wrong = read_shaping(
        [
            {"affine": [2, -1.5]},
            {"gate": {"by": "x", "at_least": 1, "otherwise": -3}},
            {"gate": {"by": "y", "at_most": 2, "otherwise": "mask"}},
        ]
    )
    inf = float("inf")
    assert not wrong and shapes == (
        Shape("affine", (2.0, -1.5)),
        Shape("gate", (), "x", 1.0, inf, -3.0),
        Shape("gate", (), "y", -inf, 2.0, None),
    )


def test_names() -> None:
    assert split_preset("pickscore/26") == ("pickscore", "26") and split_preset("a/b.py:f/2") == ("a/b.py:f/2", "")
    assert short_name("pickscore/26") == "pickscore" and short_name("a/b.py:f") == "f"
    entries = [
        RewardEntry(name="pickscore/26"),
        RewardEntry(name="pickscore/mixgrpo", label="other"),
        RewardEntry(name="x:pickscore"),
    ]
    assert labels(entries) == ["pickscore", "other", "pickscore_2"]
    assert [scope_of(RewardEntry(name=f"{HERE}:{n}")) for n in ("Clip", "judge", "grouped")] == [
        "sample",
        "pair",
        "group",
    ]
    assert scope_of(RewardEntry(name=f"{HERE}:judge", executor=Executor(kind="http", url="x"))) == "sample"


def test_duties_and_judges() -> None:
    duties = [RewardEntry(name="x", role=r, weight=w).duty for r in ("train", "gold", "monitor") for w in (1.0, 0.0)]
    assert duties == ["train", "monitor", "gold", "gold", "monitor", "monitor"]
    config = load("tiny_test", ["rewards=[{name: jpeg}, {name: compositional, role: gold}]"])
    assert judging(config) == config.rewards
    own = dataclasses.replace(config.evaluation, rewards=(RewardEntry(name="own"),))
    assert [e.name for e in judging(dataclasses.replace(config, evaluation=own))] == ["own", "compositional"]
    assert concise(RewardEntry(name="x", role="gold")) == {"name": "x", "weight": 1.0, "args": {}, "role": "gold"}


def test_the_executor_section_is_the_executors_own_settings() -> None:
    """Every field with the same default, but those that failures gives to all rewards."""
    ours, theirs = ({f.name: f.default for f in dataclasses.fields(c)} for c in (Executor, ExecutorSettings))
    shared = {name: vars(Failures())[name] for name, value in ours.items() if value is None}
    assert set(shared) == {"timeout_s", "total_s", "breaker", "breaker_s"}
    assert ours | shared == theirs
