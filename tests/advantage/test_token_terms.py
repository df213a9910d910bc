"""KTAE and GTPO: worked numbers, scipy's Fisher test, plain-loop references, identities, bad input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.stats import fisher_exact as reference_fisher
from torch import Tensor

from flowrl.advantage.estimators import grpo
from flowrl.advantage.token_terms import fisher_exact, gtpo, ktae

from .local_cases import NAN, Case, close, defaults, on_steps, outcome_loop, ragged

FOUR = torch.zeros(4, dtype=torch.int64)
HALVES = torch.tensor([1.0, 1.0, 0.0, 0.0])


def _holding(right: int, wrong: int) -> Tensor:
    """Two right and two wrong rows; the first ``right`` and ``wrong`` of them hold token 7 once, the rest do not."""
    rows = [7 if i < right else 1 for i in range(2)] + [7 if i < wrong else 1 for i in range(2)]
    return torch.tensor(rows)[:, None]


@pytest.mark.parametrize(
    ("right", "wrong", "value"), [(2, 0, 0.5330), (0, 2, -0.5330), (2, 2, 0.0), (2, 1, 0.0610), (1, 2, -0.0610)]
)
def test_ktae_worked_numbers(right: int, wrong: int, value: float) -> None:
    token = _holding(right, wrong)
    out = ktae(HALVES, FOUR, torch.ones(4, 1, dtype=torch.bool), token, gamma=0.0)
    term = (out.advantage - grpo(HALVES, FOUR, ddof=1, eps=1e-6).advantage[:, None])[token == 7]
    close(term, [value] * len(term))
    assert (value == 0) == bool((term == 0).all())
    if (right, wrong) == (2, 0):
        close(out.advantage[:2], [[1.3990]] * 2)


def test_fisher_against_scipy() -> None:
    tables = [t for t in itertools.product(range(4), repeat=4) if sum(t)] + [
        (5, 2, 1, 7),
        (40, 60, 70, 30),
        (300, 9, 12, 280),
    ]
    got = fisher_exact(*(torch.tensor(x) for x in zip(*tables, strict=True)))
    wanted = [reference_fisher([[a, b], [c, d]]).pvalue for a, b, c, d in tables]
    assert got.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    assert float(got.max()) <= 1.0
    uneven = fisher_exact(*(torch.tensor(x) for x in ([0, 2], [1, 0], [0, 2], [7, 4])))  # margins (0, 8) and (4, 4)
    assert uneven.tolist() == pytest.approx([1.0, reference_fisher([[2, 0], [2, 4]]).pvalue])


def test_fisher_gives_mirror_images_the_same_bits() -> None:
    tables = [torch.tensor(x) for x in zip(*itertools.product(range(5), repeat=4), strict=True)]
    a, b, c, d = (x[sum(tables) > 0] for x in tables)
    assert torch.equal(fisher_exact(a, b, c, d), fisher_exact(b, a, d, c))


def _entropy(x: float, y: float) -> float:
    return -sum(p * math.log2(p) for p in (x / (x + y), y / (x + y)) if p > 0) if x + y else 0.0


def _key_value(case: Case, tokens: list[list[int]], g: int, v: int, gamma: float) -> float:
    """K of one token of one group, from the rows themselves."""
    mates = [b for b in range(case.rows) if case.group[b] == g and case.used[b]]
    kept = {b: [x for x, m in zip(tokens[b], case.mask[b], strict=True) if m] for b in mates}
    right, wrong = [b for b in mates if case.rewards[b] > 0], [b for b in mates if case.rewards[b] <= 0]
    if not right or not wrong:
        return 0.0
    a, b = sum(v in kept[i] for i in right), sum(v in kept[i] for i in wrong)
    c, d = len(right) - a, len(wrong) - b
    p = float(reference_fisher([[a, b], [c, d]]).pvalue)
    certain = math.exp(-2 * p) if p < 1 - 1e-9 else 0.0
    n = a + b + c + d
    gain = _entropy(a + c, b + d) - (a + b) / n * _entropy(a, b) - (c + d) / n * _entropy(c, d)
    x = math.asin(math.sqrt(a / (a + c))) - math.asin(math.sqrt(b / (b + d)))
    if gamma:
        size = [sum(len(kept[i]) for i in rows) for rows in (right, wrong)]
        share = [sum(kept[i].count(v) for i in rows) / max(s, 1) for rows, s in zip((right, wrong), size, strict=True)]
        tf = [f * 3 / (f + 2 * (0.5 + 0.5 * s / (sum(size) / 2))) for f, s in zip(share, size, strict=True)]
        x += gamma * (tf[0] / (tf[1] + 1e-5) - tf[1] / (tf[0] + 1e-5))
    return 1.7 * math.tanh((0.8 * certain + 1.3 * gain) * x / (0.8 + 1.3) / 2)


@pytest.mark.parametrize("gamma", [0.0, 1e-4, 0.6])
@pytest.mark.parametrize("seed", range(6))
def test_ktae_against_a_plain_loop(seed: int, gamma: float) -> None:
    case = ragged(seed)
    rewards, group, mask, _ = case.tensors()
    tokens = [[case.draw.choice([5, -9, 10**12, 3, 0]) for _ in range(case.steps)] for _ in range(case.rows)]
    got = ktae(
        rewards, group, mask, torch.tensor(tokens), torch.tensor(case.valid), alpha=0.8, beta=1.3, gamma=gamma,
        top=1.7, neutral=3, ddof=0, eps=1e-3,
    )  # fmt: skip
    outcome = outcome_loop(case, 0, 1e-3)
    known = {
        (g, v): _key_value(case, tokens, g, v, gamma) for g in set(case.group) for v in {x for r in tokens for x in r}
    }

    def value(b: int, t: int) -> float:
        return outcome[b] + (0.0 if tokens[b][t] == 3 else known[case.group[b], tokens[b][t]])

    close(got.advantage, on_steps(case, value), 1e-5)
    assert torch.equal(got.loss_mask, mask & torch.tensor(case.used)[:, None])
    assert torch.equal(got.weight, got.loss_mask.float())


@pytest.mark.parametrize("rewards", [[1.0, 2.0, 1.0, 3.0], [0.0, -1.0, 0.0, -2.0], [1.0, 1.0, 1.0, 1.0]])
def test_ktae_of_an_all_right_or_all_wrong_group_is_grpo(rewards: list[float]) -> None:
    token, mask = torch.tensor([[1, 2], [3, 4], [1, 1], [2, 2]]), torch.ones(4, 2, dtype=torch.bool)
    out = ktae(torch.tensor(rewards), FOUR, mask, token)
    plain = grpo(torch.tensor(rewards), FOUR, ddof=1, eps=1e-6).over_steps(mask)
    assert torch.equal(out.advantage, plain.advantage) and torch.equal(out.live, plain.live)


def test_ktae_exchange_of_right_and_wrong_flips_the_sign_exactly() -> None:
    case = ragged(3)
    _, group, mask, _ = case.tensors()
    token = torch.randint(0, 6, mask.shape, generator=torch.Generator().manual_seed(0))
    wins = torch.tensor([case.draw.choice([1.0, -1.0]) for _ in range(case.rows)])
    one, other = (ktae(r, group, mask, token, gamma=1e-3).advantage for r in (wins, -wins))
    assert torch.equal(one, -other) and one.abs().max() > 0


def test_ktae_token_everywhere_alike_is_zero_and_one_sided_tokens_saturate() -> None:
    token = torch.tensor([[7, 1], [7, 1], [7, 2], [7, 2]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    term = ktae(HALVES, FOUR, mask, token).advantage - grpo(HALVES, FOUR, ddof=1, eps=1e-6).advantage[:, None]
    assert bool((term[:, 0] == 0).all())
    close(term[:, 1], [1.0, 1.0, -1.0, -1.0])
    unheard = mask.clone()
    unheard[2:] = False  # the wrong rollouts have no trained token at all
    out = ktae(HALVES, FOUR, unheard, token)
    assert bool(out.advantage.isfinite().all()) and bool((out.advantage[:2] > 1.8).all())


def test_ktae_of_a_batch_without_a_trained_step() -> None:
    out = ktae(HALVES, FOUR, torch.zeros(4, 2, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.int64))
    assert bool((out.advantage == 0).all()) and not out.loss_mask.any()


TWO = torch.tensor([0, 0])
WINS = torch.tensor([1.0, 0.0])
FULL = torch.ones(2, 4, dtype=torch.bool)
SHARED = torch.tensor([[1, 2, 3, 9], [1, 2, 4, 9]])


def test_gtpo_worked_numbers() -> None:
    out = gtpo(WINS, TWO, FULL, SHARED)
    assert out.weight.tolist() == [[2, 2, 1, 2], [0, 0, 1, 0]]
    assert out.channels["conflict"].tolist() == [[1, 1, 0, 1]] * 2
    close(out.advantage, [[0.7070] * 4, [-0.7070] * 4])
    same = gtpo(WINS, TWO, FULL, SHARED[:1].expand(2, 4), factor=3.0)
    assert same.weight.tolist() == [[9.0] * 4, [0.0] * 4]
    divided = gtpo(WINS, TWO, FULL, SHARED, per_conflict=True).weight
    close(divided, [[2 / 3, 2 / 3, 1 / 3, 2 / 3], [0, 0, 1 / 3, 0]])
    broken = gtpo(WINS, TWO, FULL, torch.tensor([[5, 2, 3, 8], [6, 2, 3, 7]]))
    assert broken.weight.tolist() == [[1.0] * 4] * 2  # a shared token after the first that is not ends no run


def test_gtpo_entropy() -> None:
    entropy = torch.tensor([[0.2, 0.4, 0.6, 0.4], [0.9, 0.9, 0.3, 0.9]])
    out = gtpo(WINS, TWO, FULL, SHARED, entropy)
    close(out.advantage, [[0.7070 - 0.04] * 4, [0] * 4])
    assert out.weight.tolist() == [[2, 2, 1, 2], [0, 0, 0, 0]]
    assert out.loss_mask.tolist() == [[True] * 4, [False] * 4]
    assert out.channels["conflict"].tolist() == [[1, 1, 0, 1], [0] * 4]
    off = gtpo(WINS, TWO, FULL, SHARED, entropy, entropy_limit=math.inf, entropy_coef=0.2)
    close(off.advantage, [[0.7070 - 0.08] * 4, [-0.7070 - 0.15] * 4])
    at = gtpo(WINS, TWO, FULL, SHARED, torch.full((2, 4), 0.5), entropy_limit=0.5)
    assert at.loss_mask.all()
    strict = gtpo(WINS, TWO, FULL, SHARED, entropy * torch.tensor([[0.0], [1.0]]), entropy_limit=0.0)
    assert strict.loss_mask.tolist() == [[True] * 4, [False] * 4]
    dead = gtpo(torch.ones(2), TWO, FULL, SHARED, entropy)
    close(dead.advantage, [[-0.04] * 4, [0] * 4])
    assert dead.live.tolist() == [True, True] and bool((dead.weight[0] == 1).all())
    split = gtpo(torch.ones(2), torch.tensor([0, 1]), FULL, SHARED, entropy)
    assert split.live.tolist() == [True, False]
    assert not gtpo(torch.ones(2), TWO, FULL, SHARED, entropy, entropy_coef=0.0).live.any()


def _conflicts(case: Case, tokens: list[list[int]], sign: list[float], backward: bool) -> set[tuple[int, int]]:
    """Trained steps in the unbroken shared run of their row, one row at a time."""
    rows = {b: [t for t in range(case.steps) if case.mask[b][t]] for b in range(case.rows) if sign[b] != 0}
    rows = {b: on[::-1] if backward else on for b, on in rows.items()}
    out = set()
    for b, on in rows.items():
        for i, t in enumerate(on):
            mates = [j for j in rows if case.group[j] == case.group[b] and len(rows[j]) > i]
            holders = [j for j in mates if tokens[j][rows[j][i]] == tokens[b][t]]
            if not (any(sign[j] > 0 for j in holders) and any(sign[j] < 0 for j in holders)):
                break
            out.add((b, t))
    return out


@pytest.mark.parametrize("per_conflict", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_gtpo_against_a_plain_loop(seed: int, per_conflict: bool) -> None:
    case = ragged(seed, rewards=(0.0, 1.0, 0.5))
    rewards, group, mask, _ = case.tensors()
    tokens = [[case.draw.choice([5, 5, -(10**12)]) for _ in range(case.steps)] for _ in range(case.rows)]
    entropy = [[case.draw.random() for _ in range(case.steps)] for _ in range(case.rows)]
    got = gtpo(
        rewards, group, mask, torch.tensor(tokens), torch.tensor(entropy), torch.tensor(case.valid), factor=1.5,
        entropy_coef=0.3, entropy_limit=0.55, per_conflict=per_conflict, ddof=0, eps=1e-3,
    )  # fmt: skip
    outcome = outcome_loop(case, 0, 1e-3)
    sign = [0.0 if abs(x) < 1e-9 else x for x in outcome]
    ahead, back = (_conflicts(case, tokens, sign, x) for x in (False, True))
    mean = []
    for b in range(case.rows):
        on = [e for e, m in zip(entropy[b], case.mask[b], strict=True) if m]
        mean.append(math.fsum(on) / max(len(on), 1))
    case.used = [u and h <= 0.55 for u, h in zip(case.used, mean, strict=True)]

    def weight(b: int, t: int) -> float:
        on = 1.5 if sign[b] > 0 else 0.0
        number = len({c for c in ahead | back if c[0] == b}) if per_conflict else 1
        return (on if (b, t) in ahead else 1.0) * (on if (b, t) in back else 1.0) / max(number, 1)

    close(got.weight, on_steps(case, weight), 1e-6)
    close(got.advantage, on_steps(case, lambda b, t: outcome[b] - 0.3 * mean[b]), 1e-5)
    assert torch.equal(got.loss_mask, mask & torch.tensor(case.used)[:, None])
    close(got.channels["conflict"], on_steps(case, lambda b, t: float((b, t) in ahead | back)), 0)


def test_gtpo_without_conflicts_or_entropy_is_grpo() -> None:
    plain = grpo(WINS, TWO, ddof=1).over_steps(FULL)
    out = gtpo(WINS, TWO, FULL, torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]))
    assert torch.equal(out.advantage, plain.advantage) and torch.equal(out.weight, plain.weight)
    assert torch.equal(out.live, plain.live)
    for group in (torch.tensor([0, 1]), TWO):  # rows that share all their tokens, but not with a row of the other sign
        lone = gtpo(torch.ones(2), group, FULL, SHARED[:1].expand(2, 4))
        assert torch.equal(lone.weight, FULL.float()) and not lone.live.any() and not lone.channels["conflict"].any()
    apart = gtpo(torch.tensor([1.0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]), FULL.repeat(2, 1),
                 torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2], [1, 1, 1, 1]]))  # fmt: skip
    assert bool((apart.weight == 1).all())  # the other group's rows share them, which does not count


def test_gtpo_row_at_the_mean_takes_no_part() -> None:
    """0.1, 0.2, 0.3: the middle one is off the mean by rounding alone."""
    token = torch.tensor([[1, 2], [5, 5], [5, 5]])
    rewards = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    out = gtpo(rewards, torch.zeros(3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool), token)
    assert bool((out.weight == 1).all()) and not out.channels["conflict"].any()


def test_gtpo_positions_count_unmasked_steps() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 1, 0]]).bool()
    token = torch.tensor([[0, 1, 2, 0, 9], [1, 3, 0, 9, 0]])
    out = gtpo(WINS, TWO, mask, token)
    assert out.weight.tolist() == [[0, 2, 1, 0, 2], [0, 1, 0, 0, 0]]


CALLS: dict[str, Any] = {"ktae": ktae, "gtpo": gtpo}


def test_defaults_are_the_documented_ones() -> None:
    shared = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "top": 1.0, "neutral": None}
    assert defaults(ktae) == {**shared, "ddof": 1, "eps": 1e-6}
    shaping = {"factor": 2.0, "entropy_coef": 0.1, "entropy_limit": math.log(2.0), "per_conflict": False}
    assert defaults(gtpo) == {**shaping, "ddof": 1, "eps": 1e-4}


@pytest.mark.parametrize("name", CALLS)
def test_half_precision_and_no_gradient(name: str) -> None:
    more = {"entropy": torch.full((2, 4), 0.5, dtype=torch.bfloat16, requires_grad=True)} if name == "gtpo" else {}
    out = CALLS[name](WINS.bfloat16().requires_grad_(), TWO, FULL, SHARED, **more)
    assert out.advantage.dtype == out.weight.dtype == torch.float32
    assert not out.advantage.requires_grad and not out.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("ktae", {"token": SHARED.int()}, "token: expected int64"),
        ("ktae", {"token": SHARED[:1]}, "token: expected int64"),
        ("ktae", {"mask": FULL[:1]}, "mask: expected bool"),
        ("ktae", {"mask": FULL.long()}, "mask: expected bool"),
        ("ktae", {"rewards": torch.full((2,), NAN)}, "rewards: every"),
        ("ktae", {"alpha": -1.0}, "alpha: expected a finite number >= 0"),
        ("ktae", {"beta": NAN}, "beta: expected"),
        ("ktae", {"gamma": -1.0}, "gamma: expected"),
        ("ktae", {"top": -1.0}, "top: expected"),
        ("ktae", {"alpha": 0.0, "beta": 0.0}, "alpha, beta: expected one"),
        ("gtpo", {"token": SHARED.int()}, "token: expected int64"),
        ("gtpo", {"mask": FULL[:1]}, "mask: expected bool"),
        ("gtpo", {"factor": -1.0}, "factor: expected a finite number >= 0"),
        ("gtpo", {"entropy_coef": math.inf}, "entropy_coef: expected a finite"),
        ("gtpo", {"entropy_limit": -0.1}, "entropy_limit: expected"),
        ("gtpo", {"entropy_limit": NAN}, "entropy_limit: expected"),
        ("gtpo", {"entropy": torch.zeros(2, 3)}, "entropy: expected real"),
        ("gtpo", {"entropy": torch.full((2, 4), NAN)}, "entropy: 8 unmasked"),
    ],
)
def test_bad_input(name: str, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CALLS[name](**{"rewards": WINS, "group": TWO, "mask": FULL, "token": SHARED, **changed})
