"""Rewards that compare: who meets whom, both orders, ties, what fails, and groups that are handed over whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.adapt import as_reward
from flowrl.scoring.scopes import draw_pairs, win_rates

NAN = float("nan")


def batch(levels: list[int], groups: list[int]) -> RewardBatch:
    images = np.stack([np.full((2, 2, 3), v, np.uint8) for v in levels])
    return RewardBatch(images, [f"p{g}" for g in groups], [{} for _ in groups], groups)


def level(part: RewardBatch) -> np.ndarray:
    return part.images[:, 0, 0, 0].astype(float)


def brighter(first: RewardBatch, second: RewardBatch) -> Any:
    return np.where(level(first) == level(second), 0.5, level(first) > level(second)).astype(float)


def test_all_pairs_once() -> None:
    pairs = draw_pairs(5, 0, key=1)
    assert len(pairs) == 10 and len({frozenset(p) for p in pairs.tolist()}) == 10
    assert draw_pairs(1, 0, key=1).shape == (0, 2) and draw_pairs(2, 3, key=1).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("count", "opponents", "met"), [(8, 2, 2), (8, 3, 4), (8, 6, 6), (9, 4, 4), (5, 4, 4), (6, 99, 5)]
)
def test_a_random_few_give_everyone_equally_many(count: int, opponents: int, met: int) -> None:
    pairs = draw_pairs(count, opponents, key=3)
    assert len({frozenset(p) for p in pairs.tolist()}) == len(pairs) == count * met // 2
    assert all(a != b for a, b in pairs.tolist())
    assert set(Counter(pairs.ravel().tolist()).values()) == {met}
    np.testing.assert_array_equal(pairs, draw_pairs(count, opponents, key=3))
    if met < count - 1:
        assert {frozenset(p) for p in pairs.tolist()} != {
            frozenset(p) for p in draw_pairs(count, opponents, key=4).tolist()
        }


def test_win_rates_by_hand() -> None:
    pairs = np.array([[0, 1], [0, 2], [1, 2]])
    # 0 beats 1 in both orders; 0 and 2 each win when shown first (a liking for the first place: a tie); 2 beats 1.
    found = win_rates(pairs, np.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]), 3)
    np.testing.assert_allclose(found, [0.75, 0.0, 0.75])


def test_a_pair_with_one_order_missing_does_not_count() -> None:
    pairs = np.array([[0, 1], [0, 2], [1, 2]])
    found = win_rates(pairs, np.array([1.0, NAN, 0.5]), np.array([0.0, 1.0, 0.5]), 4)
    np.testing.assert_allclose(found, [1.0, 0.25, 0.5, NAN])


def test_a_judge_of_pairs_gives_win_rates_within_groups() -> None:
    reward = as_reward(brighter, "brighter", {})
    result = reward.score(batch([3, 9, 5, 5, 1, 2], [7, 7, 7, 7, 8, 8]))
    np.testing.assert_allclose(result.scores, [0, 1, 0.5, 0.5, 0, 1])
    assert result.valid.all() and list(result.errors) == [None] * 6


def test_a_liking_for_the_first_place_cancels() -> None:
    result = as_reward(lambda first, second: np.ones(len(first)), "biased", {}).score(batch([3, 9, 5], [0, 0, 0]))
    assert result.scores.tolist() == [0.5] * 3


def test_classes_compare_too_and_meet_few() -> None:
    shown: list[int] = []

    class Judge:
        def compare(self, first: RewardBatch, second: RewardBatch) -> RewardResult:
            shown.append(len(first))
            assert list(first.prompts) == list(second.prompts), "members of one group"
            scores = np.asarray(brighter(first, second), np.float32)
            return RewardResult(scores, np.ones(len(first), np.bool_), [None] * len(first))

    reward = as_reward(Judge(), "judge", {}, opponents=2)
    result = reward.score(batch(list(range(16)), [0] * 8 + [1] * 8))
    assert shown == [32], "2 groups x 8 pairs x 2 orders, in one call"
    assert result.scores[0] == 0 and result.scores[15] == 1


def test_what_a_judge_cannot_decide_is_masked() -> None:
    def shy(first: RewardBatch, second: RewardBatch) -> list[float | None]:
        return [None if 9 in pair else 1.0 for pair in zip(level(first), level(second), strict=True)]

    result = as_reward(shy, "shy", {}).score(batch([1, 9, 3, 4], [0, 0, 0, 1]))
    assert result.valid.tolist() == [True, False, True, False]
    assert result.errors[1] == "shy: returned no value (None or NaN)"
    assert result.errors[3] == "shy: a group of one has nothing to be compared with"
    alone = as_reward(shy, "shy", {}).score(batch([1], [0]))
    assert not alone.valid.any()


@pytest.mark.parametrize(
    ("value", "message"),
    [(1.5, "compare.. returned 1.5; return how much better"), (-0.1, "compare.. returned -0.1")],
)
def test_preferences_lie_between_0_and_1(value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_reward(lambda first, second: np.full(len(first), value), "judge", {}).score(batch([1, 2], [0, 0]))


def test_a_judge_says_what_it_cannot_have() -> None:
    with pytest.raises(UserError, match="a judge of pairs has no images"):
        as_reward(lambda first, second, images: [0.5], "judge", {}).score(batch([1, 2], [0, 0]))
    with pytest.raises(UserError, match="the metadata of a prompt has no 'target'"):
        as_reward(lambda first, second, target: [0.5], "judge", {}).score(batch([1, 2], [0, 0]))


def test_a_group_reward_sees_one_whole_group_at_a_time() -> None:
    def spread(images: Any, group_ids: Any) -> tuple[list[float], dict[str, Any]]:
        assert len(set(group_ids)) == 1
        return [float(np.ptp(images))] * len(images), {"size": [len(images)] * len(images)}

    spread.scope = "group"  # type: ignore[attr-defined]
    reward = as_reward(spread, "spread", {})
    result = reward.score(batch([1, 5, 2, 9, 9], [4, 3, 4, 3, 6]))
    assert result.scores.tolist() == [1, 4, 1, 4, 0]
    assert result.components["size"].tolist() == [2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="a reward of scope pair or group needs them"):
        reward.score(RewardBatch(batch([1], [0]).images, ["p"], [{}]))


def test_a_group_reward_keeps_its_contract() -> None:
    class Short:
        name = "short"
        scope = "group"
        count: int | None = 1

        def score(self, batch: RewardBatch) -> Any:
            if self.count is None:
                return [0.0] * len(batch)
            return RewardResult(np.zeros(1, np.float32), np.ones(1, np.bool_), [None])

    made = Short()
    reward = as_reward(made, "short", {})
    assert reward.score(batch([1, 2], [0, 1])).valid.all()
    for made.count in (1, None):
        with pytest.raises(
            UserError, match=r"score.. of a group of 2 did not return a RewardResult with as many scores"
        ):
            reward.score(batch([1, 2], [0, 0]))


def test_scopes_that_do_not_fit() -> None:
    def f(images: Any) -> list[float]:
        return [0.0] * len(images)

    f.scope = "pair"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="scope is pair, so it needs compare"):
        as_reward(f, "f", {})
    f.scope = "batch"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="scope is 'batch'; use sample, pair or group"):
        as_reward(f, "f", {})
