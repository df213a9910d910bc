"""Each credit on a batch small enough to work out by hand; all go through the engine's ``estimate``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage import ESTIMATORS
from flowrl.config.schema import Advantage
from flowrl.text import credit, load, tasks
from flowrl.text.config import BRANCHED, SUPPLIED

from .parts import by_hand

SUMS = tasks.Sums(3)
PROBLEM = SUMS.problem(385)  # 11;16.
# Right, wrong from the first result on, wrong at the answer.
THREE = by_hand(SUMS, [PROBLEM] * 3, ["11;16.", "12;17.", "11;15."], [7, 7, 7])


def advantages(name: str, made: Any, value: Tensor | None = None, **options: Any) -> Any:
    return credit.assign(Advantage(name=name, options=options, clip=0.0), made, value)


def test_the_outcome_is_spread_over_all_tokens() -> None:
    found = advantages("grpo", THREE, ddof=0, eps=0.0).advantage
    high, low = (1 - 1 / 3) / (2 / 9) ** 0.5, (0 - 1 / 3) / (2 / 9) ** 0.5
    assert torch.allclose(found, torch.tensor([[high], [low], [low]]).expand(3, 6), atol=1e-5)


def test_turns_are_credited_with_what_comes_of_them() -> None:
    """Right results from the turn on: turn 0 has 2, 0, 1; turn 1 has 1, 0, 0. Each turn is standardised in the group."""
    found = advantages("rubricem", THREE, decay=1.0, eps=0.0).advantage
    first = torch.tensor([1.0, -1.0, 0.0]) / (2 / 3) ** 0.5
    second = torch.tensor([2 / 3, -1 / 3, -1 / 3]) / (2 / 9) ** 0.5
    assert torch.allclose(found[:, :3], first[:, None].expand(3, 3), atol=1e-5)
    assert torch.allclose(found[:, 3:], second[:, None].expand(3, 3), atol=1e-5)


def test_two_turns_of_the_published_example() -> None:
    """Turn rewards [1, 0], outcomes [0, 1]: 0 before the answer, -0.707 and 0.707 on it (MT-GRPO)."""
    made = by_hand(SUMS, [PROBLEM] * 2, ["11;15.", "12;16."], [0, 0])
    found = advantages("mt_grpo", made).advantage
    assert torch.allclose(found[:, :3], torch.zeros(2, 3), atol=1e-3)
    assert torch.allclose(found[:, 3:], torch.tensor([[-0.7071], [0.7071]]).expand(2, 3), atol=1e-3)


def test_two_turns_where_a_row_has_one_result_only() -> None:
    made = by_hand(SUMS, [PROBLEM] * 2, ["16.", "11;17."], [0, 0])
    given = credit.inputs("mt_grpo", made, None)
    assert given["segment"].tolist() == [[0, 0, 0, -1, -1, -1], [0, 0, 0, 1, 1, 1]]
    assert given["rewards"].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert credit.inputs("grpo", made, None)["rewards"].tolist() == [1.0, 0.0]


def test_a_chain_of_the_published_example() -> None:
    """V = .4, .6, .2 at the cuts and outcome 1: gains .2, -.4, .8 (SPO-chain)."""
    made = replace(
        by_hand(SUMS, [PROBLEM], ["11;16."], [0]),
        segment=torch.tensor([[0, 0, 1, 1, 2, 2]]), segment_value=torch.tensor([[0.4, 0.6, 0.2, 1.0]]),
    )  # fmt: skip
    found = advantages("spo_chain", made, whiten=False)
    assert torch.allclose(found.advantage, torch.tensor([[0.2, 0.2, -0.4, -0.4, 0.8, 0.8]]), atol=1e-6)
    assert torch.allclose(found.weight, torch.ones(1, 6))


def test_a_tree_of_the_published_example() -> None:
    """Leaves A: (1, 0), B: (0, 0): edges +.25 and -.25, below A +.5 and -.5, below B 0 (SPO-tree)."""
    texts = ["11;16.", "11;17.", "12;17.", "12;18."]
    made = replace(
        by_hand(SUMS, [PROBLEM] * 4, texts, [0] * 4),
        segment=torch.tensor([[0, 0, 0, 1, 1, 1]] * 4), node_path=torch.tensor([[0, 0], [0, 0], [0, 1], [0, 1]]),
    )  # fmt: skip
    found = advantages("spo_tree", made)
    wanted = torch.tensor([[0.25, 0.5], [0.25, -0.5], [-0.25, 0.0], [-0.25, 0.0]])
    assert torch.allclose(found.advantage, wanted.repeat_interleave(3, 1), atol=1e-6)
    assert torch.allclose(found.weight[:2], torch.tensor([0.5, 1.0]).repeat_interleave(3).expand(2, 6))
    assert not found.loss_mask[2:, 3:].any()


def test_a_critic_of_the_published_example() -> None:
    """Reward 1 at the last token, V = .5, .6, .8 there: lambda .95 gives .4705, .39, .2, and 0 past the end."""
    made = by_hand(SUMS, [PROBLEM, PROBLEM], ["16.", "11;16."], [0, 0])
    value = torch.tensor([[0.5, 0.6, 0.8, 9.0, 9.0, 9.0], [0.0] * 6])
    found = advantages("gae", made, value, gamma=1.0, lam=0.95)
    assert torch.allclose(found.advantage[0], torch.tensor([0.4705, 0.39, 0.2, 0, 0, 0]), atol=1e-5)
    assert torch.allclose(found.advantage[1], 0.95 ** torch.arange(5, -1, -1.0), atol=1e-5)
    assert found.returns is not None
    assert torch.allclose(found.returns[0, :3], torch.tensor([0.9705, 0.99, 1.0]), atol=1e-5)


def test_which_estimators_need_a_critic() -> None:
    assert credit.needs_value("gae") and credit.needs_value("mt_ppo")
    assert not any(credit.needs_value(name) for name in ("grpo", "rubricem", "mt_grpo", "spo_chain", "spo_tree"))


def test_what_is_promised_is_supplied() -> None:
    given = credit.inputs("grpo", THREE, torch.zeros(3, 6))
    assert given["correct"].tolist() == [True, False, False] and given["length"].tolist() == [6, 6, 6]
    assert set(given) == SUPPLIED and BRANCHED["none"] == frozenset()
    tree = replace(THREE, node_path=torch.zeros(3, 1, dtype=torch.int64), segment_value=torch.zeros(3, 3))
    assert set(credit.inputs("grpo", tree, None)) == (SUPPLIED - {"value"}) | BRANCHED["chain"] | BRANCHED["tree"]


@pytest.mark.parametrize("recipe", ["outcome", "turn", "spo_chain", "spo_tree", "ppo"])
def test_the_recipes_name_estimators_of_the_engine(recipe: str) -> None:
    assert load(f"text_{recipe}").advantage.name in ESTIMATORS
