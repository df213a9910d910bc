"""Windows that slide by a strategy, windows of one's own for each group, and the share of steps that is trained."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from flowrl import rng
from flowrl.dynamics import WindowRule, check_window, group_windows, shared_window, step_masks, trained_steps

MIX = WindowRule(kind="sliding", size=4, first=0, last=20, every=25)  # 25 steps, MixGRPO's numbers


def walk(rule: WindowRule, steps: int, iterations: int) -> list[int]:
    return [shared_window(rule, steps, iteration, 0)[0] for iteration in range(iterations)]


def counted(tau: dict[int, float], iterations: int) -> list[int]:
    """The schedule as a loop with a counter: move on once the counter reaches tau, and return after the last start."""
    starts, place, count, seen = sorted(tau), 0, 0, []
    for _ in range(iterations):
        seen.append(starts[place])
        count += 1
        if count >= tau[starts[place]]:
            count, place = 0, (place + 1) % len(starts)
    return seen


def test_progressive_windows_visit_every_start_and_return() -> None:
    assert walk(MIX, 25, 1100) == counted({start: 25 for start in range(21)}, 1100)
    strided = replace(MIX, stride=4, every=2)
    assert walk(strided, 25, 14) == [0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 0, 0]


def test_decaying_windows_hurry_linearly() -> None:
    rule = WindowRule(kind="sliding", size=2, first=1, last=5, every=5, strategy="decaying", least=1)
    assert Counter(walk(rule, 8, 15)) == {1: 5, 2: 4, 3: 3, 4: 2, 5: 1}
    assert walk(rule, 8, 45) == sorted(walk(rule, 8, 15)) * 3
    uneven = replace(rule, every=6, least=2, last=4)  # tau = 6, 4.67, 3.33, 2
    assert walk(uneven, 8, 40) == counted({1: 6, 2: 6 - 4 / 3, 3: 6 - 8 / 3, 4: 2}, 40)
    assert walk(replace(rule, last=1), 8, 9) == [1] * 9


def test_exponential_windows_hurry_after_a_threshold() -> None:
    rule = replace(MIX, strategy="exponential", rate=0.1, threshold=13)
    stays = Counter(walk(rule, 25, 14 * 25 + 123))
    assert [stays[start] for start in range(12, 21)] == [25, 25, 23, 21, 19, 17, 16, 14, 13]
    tau = {start: 25 * math.exp(-0.1 * max(start - 13, 0)) for start in range(21)}
    assert walk(rule, 25, 1000) == counted(tau, 1000)
    assert walk(replace(rule, rate=9.0, threshold=-1), 25, 21) == list(range(21))  # one iteration is the least


def test_random_strategy_draws_anew_at_every_move() -> None:
    rule = replace(MIX, strategy="random", every=3)
    starts = walk(rule, 25, 300)
    assert starts[::3] == starts[1::3] == starts[2::3] and len(set(starts)) > 15
    once = replace(rule, every=1)
    assert walk(once, 25, 50) == walk(replace(once, kind="random"), 25, 50)


@pytest.mark.parametrize("strategy", ["progressive", "random", "decaying", "exponential"])
@pytest.mark.parametrize("last", [0, 7, 20])
def test_no_window_is_ever_empty_or_beyond_the_schedule(strategy: str, last: int) -> None:
    rule = replace(MIX, strategy=strategy, last=last)
    for iteration in [*range(60), *range(495, 540), 599, 10**6]:
        window = shared_window(rule, 25, iteration, 0)
        assert len(window) == 4 and window == list(range(window[0], window[0] + 4))
        assert 0 <= window[0] <= last and window[-1] <= 23


# One window a group.

ISO = WindowRule(kind="iso_temporal", size=1, first=0, last=9)


def ids(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count) // 2, torch.arange(count) % 2


def test_each_group_draws_its_own_start_evenly() -> None:
    prompt, occurrence = ids(4000)
    stochastic, trained = group_windows(ISO, 20, 3, 7, prompt, occurrence)
    assert stochastic.shape == (4000, 20) and stochastic.dtype is torch.bool
    assert torch.equal(stochastic, trained) and bool((stochastic.sum(1) == 1).all())
    counts = stochastic.sum(0)
    assert bool(((counts[:10] - 400).abs() < 80).all()) and int(counts[10:].sum()) == 0
    pairs = stochastic.reshape(2000, 2, 20)
    assert (
        0.86 < float((pairs[:, 0] != pairs[:, 1]).any(1).float().mean()) < 0.94
    )  # a prompt's second group: a new draw


def test_iso_temporal_starts_come_from_the_groups_key() -> None:
    prompt, occurrence = ids(30)
    rule = replace(ISO, size=3, first=2, last=6, stride=2)
    stochastic, _ = group_windows(rule, 12, 5, 9, prompt, occurrence)
    for row, p, o in zip(stochastic, prompt.tolist(), occurrence.tolist(), strict=True):
        first = 2 + 2 * int(3 * rng.uniform(rng.key(9, 5, p, o, stream="window")))
        assert row.nonzero().flatten().tolist() == [first, first + 1, first + 2]


@pytest.mark.parametrize("rule", [ISO, replace(ISO, size=5, fraction=0.6), WindowRule(kind="full", fraction=0.5)])
def test_a_groups_row_depends_on_its_own_ids_alone(rule: WindowRule) -> None:
    prompt, occurrence = ids(40)
    whole = group_windows(rule, 20, 3, 7, prompt, occurrence)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:13]
    for full, part in zip(whole, group_windows(rule, 20, 3, 7, prompt[order], occurrence[order]), strict=True):
        assert torch.equal(full[order], part)
    for iteration, seed in ((4, 7), (3, 8)):
        assert not torch.equal(group_windows(rule, 20, iteration, seed, prompt, occurrence)[1], whole[1])


def test_shared_kinds_give_every_group_the_same_window() -> None:
    prompt, occurrence = ids(6)
    for rule in (WindowRule(kind="random", size=2, last=4), WindowRule(kind="sliding", size=2, last=4)):
        for iteration in range(8):
            stochastic, trained = group_windows(rule, 8, iteration, 1, prompt, occurrence)
            assert torch.equal(stochastic, trained)
            for row in stochastic:
                assert row.nonzero().flatten().tolist() == shared_window(rule, 8, iteration, 1)
    with pytest.raises(ValueError, match="iso_temporal has no shared window"):
        shared_window(ISO, 20, 0, 0)


# The share that is trained.


def test_dance_grpo_trains_nine_of_fifteen_steps() -> None:
    prompt, occurrence = ids(2000)
    stochastic, trained = group_windows(WindowRule(kind="full", fraction=0.6), 16, 0, 0, prompt, occurrence)
    assert bool((stochastic[:, :15]).all()) and not bool(stochastic[:, 15].any())
    assert bool((trained.sum(1) == 9).all()) and not bool((trained & ~stochastic).any())
    share = trained[:, :15].float().mean(0)
    assert bool(((share - 0.6).abs() < 0.05).all())
    assert len({tuple(row) for row in trained.tolist()}) > 1500


def test_trained_steps_are_the_head_of_a_keyed_permutation() -> None:
    stochastic = [3, 4, 5, 6, 7, 8]
    for prompt, occurrence in ((0, 0), (5, 0), (5, 1)):
        order = rng.permutation(rng.key(2, 4, prompt, occurrence, step=1, stream="window"), 6)
        expected = sorted(3 + i for i in order[:3])
        assert trained_steps(stochastic, 0.5, 4, 2, prompt, occurrence) == expected
    assert trained_steps([5, 3], 1.0, 0, 0, 0, 0) == [3, 5]


@pytest.mark.parametrize(("fraction", "count", "left"), [(0.29, 100, 29), (0.6, 15, 9), (0.7, 10, 7), (0.34, 3, 1)])
def test_the_count_is_rounded_down_from_the_decimal_number(fraction: float, count: int, left: int) -> None:
    assert len(trained_steps(list(range(count)), fraction, 0, 0, 0, 0)) == left


# Refusals.


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            replace(MIX, strategy="fast"),
            "rollout.window.strategy: unknown strategy 'fast'; use one of progressive, random",
        ),
        (replace(MIX, strategy="decaying", least=0), "rollout.window.least: 0 iterations is not between 1 and"),
        (replace(MIX, strategy="decaying", least=26), "26 iterations is not between 1 and window.every = 25"),
        (replace(MIX, strategy="exponential", rate=-0.1), "rollout.window.rate: -0.1 does not decay"),
        (replace(MIX, strategy="exponential", rate=math.inf), "rollout.window.rate: inf does not decay"),
        (replace(MIX, stride=0), "rollout.window.stride: 0 does not move a window on; use at least 1"),
        (replace(MIX, every=0), "rollout.window.every: a sliding window cannot move every 0 iterations"),
        (replace(MIX, last=21), "4 steps from last = 21 reach step 24"),
        (replace(MIX, first=20, last=21), "lower window.last to 20 or less, or raise"),
        (replace(ISO, last=24), "1 steps from last = 24 reach step 24"),
        (replace(ISO, size=0), "rollout.window.size: 0 leaves nothing to train"),
        (replace(ISO, first=-1), "starts from first = -1"),
        (
            replace(ISO, kind="iso"),
            "rollout.window.kind: unknown kind 'iso'; use one of full, random, sliding, iso_temporal",
        ),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule: WindowRule, message: str) -> None:
    for check in (
        lambda: check_window(rule, 25),
        lambda: group_windows(rule, 25, 0, 0, torch.tensor([0]), torch.tensor([0])),
    ):
        with pytest.raises(ValueError) as caught:
            check()
        assert message in str(caught.value)


def test_rules_on_the_edge_pass() -> None:
    for rule in (MIX, replace(ISO, last=23), replace(MIX, strategy="decaying", least=25), WindowRule(kind="full")):
        check_window(rule, 25)
    check_window(WindowRule(kind="full"), 2)
    with pytest.raises(ValueError, match=r"rollout\.steps: 1 leaves no stochastic step"):
        check_window(WindowRule(kind="full"), 1)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, math.nan])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"rollout\.window\.fraction: .* is no share of steps"):
        trained_steps([0, 1, 2], fraction, 0, 0, 0, 0)


def test_a_share_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.3 of 3 stochastic steps leaves none to train; raise it or widen"):
        trained_steps([0, 1, 2], 0.3, 0, 0, 0, 0)


def test_ids_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        group_windows(ISO, 20, 0, 0, torch.arange(3), torch.zeros(2, dtype=torch.int64))


def test_masks_have_equal_counts_and_no_last_step() -> None:
    assert step_masks([[0, 2], [1, 2]], 4).int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert step_masks([], 4).shape == (0, 4)
    with pytest.raises(ValueError, match=r"unequal numbers of steps \[2, 1\]"):
        step_masks([[0, 2], [1]], 4)
    for outside in (3, 4, -1):
        with pytest.raises(ValueError, match="only steps 0 to 2 of 4 can be stochastic"):
            step_masks([[0, outside]], 4)
