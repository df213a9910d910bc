"""Text recipes are as strict as those of images: names, types, ranges, and what an estimator needs."""

from __future__ import annotations

import pytest

from flowrl.config import ConfigError, recipes, to_yaml
from flowrl.errors import UserError
from flowrl.text import TextConfig, load
from flowrl.text.config import FAMILY


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.brancing=tree", "rollout.brancing (override): unknown key; did you mean rollout.branching?"),
        ("seed=one", "seed (override): expected a whole number, found 'one' (text)"),
        ("rollout.branching=graph", "rollout.branching (override): expected one of none, chain, tree"),
        ("task.terms=2", "task.terms: 2 is out of range; use at least 3"),
        ("task.terms=13", "task.terms: 13 is out of range; use at most 12"),
        ("rollout.group_size=1", "rollout.group_size: 1 is out of range; use at least 2"),
        ("optimizer.max_grad_norm=0.0", "optimizer.max_grad_norm: 0.0 is out of range; use more than 0"),
        ("pretraining.slip=1.5", "pretraining.slip: 1.5 is out of range; use 0 to 1"),
        ("rollout.chain.max_probability=0.0", "rollout.chain.max_probability: 0.0 is out of range"),
        ("model.heads=3", "model.hidden: 64 does not split into 3 heads of an even size"),
        ("rollout.tree.branches=[4, 1]", "rollout.tree.branches: [4, 1]: every level needs at least 2 branches"),
        ("task.terms=3", "pretraining.batch: 64 distinct problems of 1000; use at most 62, or more task.terms"),
        ("advantage.name=gropo", "advantage.name: unknown method 'gropo'; did you mean grpo?"),
        ("advantage.options={lambda: 1}", "advantage.options: grpo: no option 'lambda'"),
        ("advantage.name=spo_tree", "advantage.name: spo_tree needs 'node_path'; set rollout.branching=tree"),
        ("advantage.name=spo_chain", "advantage.name: spo_chain needs 'segment_value'; set rollout.branching=chain"),
        ("advantage.name=poise", "advantage.name: poise needs 'probe'; a text run does not produce it"),
        ("objective.loss=pppo", "objective.loss: unknown method 'pppo'; did you mean ppo?"),
        ("objective.options={lo: 1}", "objective.options: ppo: no option 'lo'; did you mean 'low'?"),
        ("objective.aggregation=mean", "objective.aggregation: unknown aggregation 'mean'"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("text_outcome", [override])
    assert message in str(caught.value)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("text_ppo", ["tokens=0", "objective.updates=0", "advantage.name=nothing"])
    assert len(caught.value.problems) == 3


def test_the_families_of_recipes_are_kept_apart() -> None:
    own = {"text_outcome", "text_ppo", "text_spo_chain", "text_spo_tree", "text_turn"}
    assert own <= set(recipes(FAMILY)) and not set(recipes()) & set(recipes(FAMILY)) and "demo" in recipes()
    with pytest.raises(UserError, match=r"text_pp: no such file or recipe; did you mean text_ppo\? Shipped are text_"):
        load("text_pp")
    with pytest.raises(UserError, match="demo: no such file or recipe"):
        load("demo")


@pytest.mark.parametrize("recipe", recipes(FAMILY))
def test_a_recipe_reads_back_equal_and_differs_from_the_first_in_credit_alone(recipe: str) -> None:
    config, first = load(recipe), load("text_outcome")
    assert config == load(_parsed(config))
    for part in ("tokens", "task", "model", "pretraining", "objective", "optimizer", "evaluation", "seed"):
        assert vars(config)[part] == vars(first)[part]


def _parsed(config: TextConfig) -> dict[str, object]:
    from flowrl.config.dialect import parse

    value = parse(to_yaml(config), "made").value
    assert isinstance(value, dict)
    return value


def test_defaults_are_a_valid_run() -> None:
    assert load({}) == TextConfig()
