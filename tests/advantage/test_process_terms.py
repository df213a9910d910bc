"""OPRL, PRL, ProRAG: worked numbers, plain-loop references, identities, pairs, gradients, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.estimators import dr_grpo, grpo, rloo
from flowrl.advantage.process_terms import oprl, oprl_pair_loss, prl, prorag
from flowrl.advantage.steps import reverse_scan

from .local_cases import NAN, Case, close, defaults, on_steps, outcome_loop, ragged, standardise

PAIR = torch.tensor([0, 0])
WINS = torch.tensor([1.0, 0.0])
STEPS = torch.tensor([[0, 1, 2], [0, 1, -1]])
KEPT = STEPS >= 0
SCORE = torch.tensor([[0.3, -0.1, 0.2], [-0.4, 0.0, 0.0]])


def _oprl(**options: Any) -> Any:
    return oprl(WINS, PAIR, KEPT, STEPS, SCORE, torch.zeros(2, 3), beta=1.0, **options)


def test_oprl_worked_numbers() -> None:
    base = torch.tensor([[1.0, 1, 1], [-1, -1, 0]])
    close(_oprl().advantage - base, [[0.375, -0.125, 0.25], [-0.5, 0, 0]])
    halved = _oprl(baseline="mean")
    close(halved.advantage - base / 2, [[0.3, -0.1, 0.2], [-0.4, 0, 0]])
    close(_oprl(step_mean="first").advantage - base, [[0.7, -0.1, 0.5], [-0.7, 0.1, 0]])
    close(_oprl(step_weight=2.0).advantage - base, [[0.75, -0.25, 0.5], [-1.0, 0, 0]])
    close(_oprl(baseline="std", step_weight=0.0).advantage, [[0.7071] * 3, [-0.7071, -0.7071, 0]])


def test_oprl_first_step_baseline_with_a_deviation_or_one_episode() -> None:
    std = math.sqrt(0.5 * 0.7**2)  # of .3 and -.4, ddof 1
    term = (
        _oprl(baseline="std", step_mean="first", eps=0.0).advantage - _oprl(baseline="std", step_weight=0.0).advantage
    )
    close(term, [[0.35 / std, -0.05 / std, 0.25 / std], [-0.35 / std, 0.05 / std, 0]])
    alone = oprl(WINS, torch.tensor([0, 1]), KEPT, STEPS, SCORE, torch.zeros(2, 3), step_mean="first")
    assert bool((alone.advantage == 0).all()) and not alone.live.any()
    same = SCORE.clone()
    same[1, 0] = 0.3  # the first steps agree: their mean is a baseline, their deviation divides nothing
    args = (WINS, PAIR, KEPT, STEPS, same, torch.zeros(2, 3))
    close(oprl(*args, beta=1.0, step_mean="first").advantage, [[1.0, 0.2, 0.8], [-1.0, -1.6, 0]])
    close(oprl(*args, beta=1.0, step_mean="first", baseline="std").advantage, [[0.7071] * 3, [-0.7071, -0.7071, 0]])


def _reward_loop(case: Case, ratio: list[list[float]], columns: int) -> dict[tuple[int, int], float]:
    """Sum of the log-ratio over the trained steps of each segment that has one."""
    cells = [(b, k) for b in range(case.rows) for k in range(columns) if case.size(b, k)]
    return {
        (b, k): math.fsum(r for r, m, s in zip(ratio[b], case.mask[b], case.segment[b], strict=True) if m and s == k)
        for b, k in cells
    }


@pytest.mark.parametrize("step_mean", ["all", "first"])
@pytest.mark.parametrize("baseline", ["loo", "mean", "std"])
@pytest.mark.parametrize("seed", range(6))
def test_oprl_against_a_plain_loop(seed: int, baseline: str, step_mean: str) -> None:
    case = ragged(seed)
    case.used = [not math.isnan(r) for r in case.rewards]
    rewards, group, mask, segment = case.tensors()
    model, old = case.table(case.steps), case.table(case.steps)
    got = oprl(
        rewards, group, mask, segment, torch.tensor(model), torch.tensor(old), beta=0.5, step_weight=0.8,
        baseline=baseline, step_mean=step_mean, eps=1e-3,
    )  # fmt: skip
    ratio = [[m - o for m, o in zip(a, b, strict=True)] for a, b in zip(model, old, strict=True)]
    reward = {c: 0.5 * r for c, r in _reward_loop(case, ratio, case.steps).items()}
    term = {}
    for b, k in reward:
        mates = [c for c in reward if case.group[c[0]] == case.group[b]]
        pool = [c for c in mates if step_mean == "all" or not any((c[0], j) in reward for j in range(c[1]))]
        mean, n = math.fsum(reward[c] for c in pool) / len(pool), len(pool)
        std = math.sqrt(math.fsum((reward[c] - mean) ** 2 for c in pool) / max(n - 1, 1))
        scale = {"loo": n / max(n - 1, 1), "mean": 1.0, "std": 1 / (std + 1e-3)}[baseline]
        term[b, k] = (reward[b, k] - mean) * scale if n > 1 else 0.0
    estimator: Any = {"loo": rloo, "mean": dr_grpo, "std": grpo}[baseline]
    outcome = estimator(rewards, group, ddof=1, eps=1e-3).advantage.tolist()
    close(got.advantage, on_steps(case, lambda b, t: outcome[b] + 0.8 * term.get((b, case.segment[b][t]), 0.0)), 1e-5)
    assert torch.equal(got.loss_mask, mask & ~rewards.isnan()[:, None])
    for b in range(case.rows):
        moved = any(x != 0 for c, x in term.items() if case.group[c[0]] == case.group[b])
        assert bool(got.live[b]) == (moved or outcome[b] != 0 or bool(estimator(rewards, group).live[b]))


def test_oprl_without_the_step_term_is_rloo() -> None:
    for seed in range(4):
        case = ragged(seed)
        rewards, group, mask, segment = case.tensors()
        noise = torch.tensor(case.table(case.steps))
        got = oprl(rewards, group, mask, segment, noise, -noise, step_weight=0.0)
        plain = rloo(rewards, group, ddof=1)
        spread = plain.over_steps(mask)
        assert torch.equal(got.advantage, spread.advantage) and torch.equal(got.live, spread.live)
        assert torch.equal(got.weight, spread.weight) and torch.equal(got.loss_mask, spread.loss_mask)
        for mine, theirs in ((got.group_mean, plain.group_mean), (got.group_std, plain.group_std)):
            assert mine is not None and theirs is not None
            assert torch.equal(mine.nan_to_num(9.0), theirs.nan_to_num(9.0))


def test_oprl_step_rewards_add_up_to_the_log_ratio_of_the_episode() -> None:
    """Two rows, nothing taken off: what is left of a lone group is the reward itself, times n / (n - 1) per segment."""
    ratio = torch.randn(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twin = torch.cat([ratio, -ratio])  # the mean of the step rewards is 0
    segment = torch.tensor([[0, 0, 1, 1, 1, 2]]).expand(2, 6)
    out = oprl(torch.ones(2), PAIR, segment >= 0, segment, twin, torch.zeros(2, 6), beta=0.05, baseline="mean")
    first = out.advantage[0, [0, 2, 5]].sum()
    assert float(first) == pytest.approx(0.05 * float(ratio.sum()), abs=1e-6)


def test_oprl_counts_an_episode_of_several_rows_once() -> None:
    """The worked example with a turn a row: three rows of one episode, two of the other."""
    rows = torch.tensor([[0.3], [-0.1], [0.2], [-0.4], [0.0]])
    wins, episode = torch.tensor([1.0, 1, 1, 0, 0]), torch.tensor([90, 90, 90, -4, -4])
    group, segment = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 1, dtype=torch.int64)
    args = (wins, group, segment >= 0, segment, rows, torch.zeros(5, 1), episode)
    base = torch.tensor([[1.0], [1], [1], [-1], [-1]])
    close(oprl(*args, beta=1.0).advantage - base, [[0.375], [-0.125], [0.25], [-0.5], [0]])
    close(oprl(*args, beta=1.0, step_mean="first").advantage - base, [[0.7], [-0.1], [0.5], [-0.7], [0.1]])
    assert oprl(*args).live.all()
    empty = (segment >= 0).clone()
    empty[0] = False  # the first row of the episode is not trained: its second is the first seen
    got = oprl(wins, group, empty, segment, *args[4:], beta=1.0, step_mean="first").advantage - base * empty
    close(got, [[0], [0.3], [0.9], [-0.3], [0.5]])
    lost = wins.clone()
    lost[1] = NAN  # one row without a value: the episode keeps its outcome, the row is not trained
    out = oprl(lost, *args[1:], beta=1.0, step_weight=0.0)
    close(out.advantage, [[1], [0], [1], [-1], [-1]])
    assert out.loss_mask[:, 0].tolist() == [True, False, True, True, True]


def test_pair_loss_worked_numbers() -> None:
    score = torch.tensor([[0.3, -0.1, 0.2], [-0.4, 0.0, 7.0]])
    wins = torch.tensor([True, False])
    assert float(oprl_pair_loss(score, torch.zeros(2, 3), KEPT, PAIR, wins, beta=1.0)) == pytest.approx(
        0.3711, abs=1e-4
    )
    expected = -math.log(1 / (1 + math.exp(-(0.4 / 3 + 0.2))))
    mean = oprl_pair_loss(score, torch.zeros(2, 3), KEPT, PAIR, wins, None, STEPS, beta=1.0, seq_reduce="mean")
    assert float(mean) == pytest.approx(expected, abs=1e-6)
    assert float(oprl_pair_loss(score * 20, torch.zeros(2, 3), KEPT, PAIR, wins)) == pytest.approx(0.3711, abs=1e-4)


@pytest.mark.parametrize("seq_reduce", ["sum", "mean"])
@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_pair_loss_against_a_plain_loop(seed: int, by_segment: bool, seq_reduce: str) -> None:
    case = ragged(seed)
    _, group, mask, segment = case.tensors()
    model, old = case.table(case.steps), case.table(case.steps)
    correct = [case.draw.random() < 0.5 for _ in range(case.rows)]
    episode = [case.group[b] * 3 + case.draw.randrange(3) for b in range(case.rows)]
    x = torch.tensor(model, dtype=torch.float64, requires_grad=True)
    loss = oprl_pair_loss(
        x, torch.tensor(old), mask, group, torch.tensor(correct), torch.tensor(episode),
        segment if by_segment else None, beta=0.7, seq_reduce=seq_reduce,
    )  # fmt: skip
    total, parts, right, owner = {}, {}, {}, {}
    for b, e in enumerate(episode):
        on = [t for t in range(case.steps) if case.mask[b][t] and (not by_segment or case.segment[b][t] >= 0)]
        total[e] = total.get(e, 0.0) + math.fsum(0.7 * (model[b][t] - old[b][t]) for t in on)
        parts[e] = parts.get(e, 0) + len({case.segment[b][t] if by_segment else t for t in on})
        right[e], owner[e] = right.get(e, False) or correct[b], case.group[b]
    if seq_reduce == "mean":
        total = {e: s / max(parts[e], 1) for e, s in total.items()}
    pairs = [(i, j) for i in total for j in total if owner[i] == owner[j] and right[i] and not right[j]]
    expected = math.fsum(math.log1p(math.exp(total[j] - total[i])) for i, j in pairs) / max(len(pairs), 1)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert x.grad is not None and bool((x.grad[~mask] == 0).all())
    for b, e in enumerate(episode):
        push = sum(1 / (1 + math.exp(total[e] - total[j])) for i, j in pairs if i == e)
        pull = sum(1 / (1 + math.exp(total[i] - total[e])) for i, j in pairs if j == e)
        scale = 0.7 / max(len(pairs), 1) / (max(parts[e], 1) if seq_reduce == "mean" else 1)
        close(x.grad[b][mask[b]], [(pull - push) * scale] * int(mask[b].sum()), 1e-6)


def test_pair_loss_without_a_pair_is_zero() -> None:
    x = torch.full((3, 2), 5.0, dtype=torch.bfloat16, requires_grad=True)
    mask, group = torch.ones(3, 2, dtype=torch.bool), torch.tensor([0, 0, 1])
    for wins in ([True, True, False], [False, False, True], [False] * 3, [True] * 3):
        loss = oprl_pair_loss(x, torch.zeros(3, 2), mask, group, torch.tensor(wins))
        assert loss.dtype == torch.float32 and float(loss.detach()) == 0
        loss.backward()
    assert x.grad is not None and bool((x.grad == 0).all())
    junk = torch.full((3, 2), NAN)
    junk[:, 0] = 1.0
    y = junk.clone().requires_grad_()
    mask[:, 1] = False
    oprl_pair_loss(y, junk, mask, torch.zeros(3, dtype=torch.int64), torch.tensor([True, False, False])).backward()
    assert y.grad is not None and bool(y.grad.isfinite().all()) and bool((y.grad[:, 1] == 0).all())


ROW = torch.tensor([[0.2, -0.1, 0.3, 0.0]])


def test_prl_worked_numbers() -> None:
    """A group of one with the raw policy has the reward itself as its outcome advantage."""
    one, mask = torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool)
    args = (torch.ones(1), one, mask, ROW, torch.zeros(1, 4))
    options: dict[str, Any] = {"eta": 2.0, "eps": 0.0, "singleton": "raw"}
    close(prl(*args, **options, block=1).advantage, [[0.8, 0.9, 0.85, 1.0]])
    close(prl(*args, torch.arange(4)[None], **options).advantage, [[0.8, 0.9, 0.85, 1.0]])
    close(prl(*args, **options, block=2).advantage, [[0.9, 0.9, 1.0, 1.0]])
    close(prl(*args, **{**options, "eta": 0.5}, block=1).advantage, [[0.2, 0.6, 0.4, 1.0]])
    close(prl(*args, **options, block=3).advantage, [[0.85, 0.85, 0.85, 1.0]])
    last = torch.tensor([[0.2, -0.1, 0.3, 0.5]])
    close(prl(args[0], one, mask, last, args[4], **options).advantage, [[0.75] * 4])


@pytest.mark.parametrize("block", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_prl_against_a_plain_loop(seed: int, block: int) -> None:
    case = ragged(seed)
    rewards, group, mask, segment = case.tensors()
    old, ref = case.table(case.steps), case.table(case.steps)
    got = prl(
        rewards, group, mask, torch.tensor(old), torch.tensor(ref), segment if block == 0 else None,
        torch.tensor(case.valid), eta=3.0, block=block or 256, eps=1e-3,
    )  # fmt: skip
    outcome = outcome_loop(case, 1, 1e-3)

    def value(b: int, t: int) -> float:
        on = [s for s in range(case.steps) if case.mask[b][s]]
        part = {s: case.segment[b][s] if block == 0 else i // block for i, s in enumerate(on)}
        end = max(s for s in on if part[s] == part[t])
        return outcome[b] - math.fsum(old[b][s] - ref[b][s] for s in on if s >= end) / 3.0

    close(got.advantage, on_steps(case, value), 1e-5)
    assert torch.equal(got.loss_mask, mask & torch.tensor(case.used)[:, None])


@pytest.mark.parametrize("seed", range(4))
def test_prl_with_a_step_a_segment_is_gae_on_rewards_with_kl(seed: int) -> None:
    case = ragged(seed)
    rewards, group, mask, _ = case.tensors()
    ratio = torch.tensor(case.table(case.steps), dtype=torch.float64)
    got = prl(rewards, group, mask, ratio, torch.zeros_like(ratio), eta=5.0, block=1)
    outcome = grpo(rewards, group, ddof=1, eps=1e-6)
    step_reward = -ratio / 5.0 * mask
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    step_reward = step_reward + last * outcome.advantage[:, None]
    step_reward = torch.where(outcome.loss_mask[:, None], step_reward, 0.0)
    assert torch.allclose(got.advantage, reverse_scan(step_reward, 1.0, mask).float(), atol=1e-6)
    for b in range(case.rows):  # GAE with value 0 and gamma = lambda = 1, step by step
        carried = 0.0
        for t in reversed(range(case.steps)):
            if case.mask[b][t]:
                carried = float(step_reward[b, t]) + 1.0 * 0.0 - 0.0 + 1.0 * 1.0 * carried
                assert float(got.advantage[b, t]) == pytest.approx(carried, abs=1e-5)


def test_prl_with_an_endless_eta_is_grpo() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    ratio = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    got = prl(WINS, PAIR, mask, ratio, torch.zeros(2, 2), eta=math.inf)
    assert torch.equal(got.advantage, grpo(WINS, PAIR, ddof=1, eps=1e-6).over_steps(mask).advantage)
    constant = prl(torch.ones(2), PAIR, mask, ratio, torch.zeros(2, 2), eta=math.inf)
    assert not constant.live.any() and bool((constant.advantage == 0).all())
    dear = prl(torch.ones(2), PAIR, mask, ratio, torch.zeros(2, 2))
    assert dear.live.all()
    close(dear.advantage, [[-4 / 200] * 2, [-6 / 200] * 2], 1e-6)


def test_prorag_worked_numbers() -> None:
    segment = torch.tensor([[0, 0, 1, 1], [0, 0, 0, -1]])
    score = torch.tensor([[1.0, -1.0], [1.0, NAN]])
    out = prorag(WINS, PAIR, segment >= 0, segment, score)
    close(out.advantage, [[0.8967, 0.8967, 0.2327, 0.2327], [-0.5173] * 3 + [0]])
    assert abs(float(out.advantage[0].sum() - 4 * 0.707)) > 0.1  # the process term of a row need not add up to 0


@pytest.mark.parametrize("seed", range(6))
def test_prorag_against_a_plain_loop(seed: int) -> None:
    case = ragged(seed)
    score = case.table(case.steps, 0.15)
    rewards, group, mask, segment = case.tensors()
    got = prorag(
        rewards, group, mask, segment, torch.tensor(score), torch.tensor(case.valid), beta=0.4, ddof=0, eps=1e-3,
        step_eps=1e-2,
    )  # fmt: skip
    at = [(b, t) for b in range(case.rows) for t in range(case.steps) if case.used[b] and case.mask[b][t]]
    told = {(b, t): score[b][case.segment[b][t]] if case.segment[b][t] >= 0 else NAN for b, t in at}
    scored = [c for c in at if not math.isnan(told[c])]
    term = dict(zip(scored, standardise([(case.group[c[0]], told[c], 1.0) for c in scored], 0, 1e-2), strict=True))
    outcome = outcome_loop(case, 0, 1e-3)
    close(got.advantage, on_steps(case, lambda b, t: outcome[b] + 0.4 * term.get((b, t), 0.0)), 1e-5)


def test_prorag_without_the_process_term_is_grpo() -> None:
    rewards, group, mask, segment = ragged(2).tensors()
    score = torch.randn(len(group), mask.shape[1], generator=torch.Generator().manual_seed(1))
    plain = grpo(rewards, group, ddof=1, eps=1e-4).over_steps(mask)
    for out in (
        prorag(rewards, group, mask, segment, score, beta=0.0),
        prorag(rewards, group, mask, segment, torch.full_like(score, 0.3)),
    ):
        assert torch.equal(out.advantage, plain.advantage) and torch.equal(out.live, plain.live)


GOOD: dict[str, dict[str, Any]] = {
    "oprl": {"segment": STEPS, "process_log_prob": SCORE, "old_log_prob": SCORE * 0},
    "prl": {"old_log_prob": SCORE, "reference_log_prob": SCORE * 0},
    "prorag": {"segment": STEPS, "stage_reward": SCORE},
}
CALLS: dict[str, Any] = {"oprl": oprl, "prl": prl, "prorag": prorag}


def test_defaults_are_the_documented_ones() -> None:
    assert defaults(oprl) == {"beta": 0.05, "step_weight": 1.0, "baseline": "loo", "step_mean": "all", "eps": 1e-6}
    assert defaults(oprl_pair_loss) == {"beta": 0.05, "seq_reduce": "sum"}
    assert defaults(prl) == {"eta": 200.0, "block": 256, "ddof": 1, "eps": 1e-6, "singleton": "zero"}
    assert defaults(prorag) == {"beta": 0.3, "ddof": 1, "eps": 1e-4, "step_eps": 1e-8, "singleton": "zero"}


@pytest.mark.parametrize("name", CALLS)
def test_half_precision_and_no_gradient(name: str) -> None:
    half: dict[str, Tensor] = {
        k: v.bfloat16().requires_grad_() if v.is_floating_point() else v for k, v in GOOD[name].items()
    }
    out = CALLS[name](rewards=WINS.bfloat16(), group=PAIR, mask=KEPT, **half)
    assert out.advantage.dtype == torch.float32 and not out.advantage.requires_grad and out.live.all()
    assert bool((out.advantage[~KEPT] == 0).all()) and bool((out.advantage[KEPT] != 0).all())


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("oprl", {"beta": NAN}, "beta: expected a finite"),
        ("oprl", {"step_weight": NAN}, "step_weight: expected a finite"),
        ("oprl", {"baseline": "max"}, "baseline: expected one of loo, mean, std"),
        ("oprl", {"step_mean": "one"}, "step_mean: expected one of all, first"),
        ("oprl", {"trajectory": PAIR.int()}, "trajectory: expected int64"),
        ("oprl", {"trajectory": PAIR}, "rewards: rows of one trajectory have different outcomes"),
        ("oprl", {"trajectory": PAIR, "group": torch.tensor([0, 1])}, "trajectory: rows .* different groups"),
        ("oprl", {"process_log_prob": SCORE[:, :2]}, r"process_log_prob: expected real \[2, 3\]"),
        ("oprl", {"process_log_prob": SCORE / 0}, "process_log_prob: 5 unmasked steps|process_log_prob: . unmasked"),
        ("oprl", {"old_log_prob": SCORE[:1]}, "old_log_prob: expected real"),
        ("oprl", {"segment": STEPS + 3}, "segment: expected ids"),
        ("oprl", {"mask": KEPT[:1]}, "mask: expected bool"),
        ("oprl", {"rewards": WINS[:1]}, "group: expected int64"),
        ("prl", {"eta": 0.0}, "eta: expected a number > 0"),
        ("prl", {"eta": NAN}, "eta: expected a number > 0"),
        ("prl", {"block": 0}, "block: expected at least one"),
        ("prl", {"reference_log_prob": SCORE[:1]}, "reference_log_prob: expected real"),
        ("prl", {"old_log_prob": SCORE[:1]}, "old_log_prob: expected real"),
        ("prl", {"segment": STEPS.int()}, "segment: expected int64"),
        ("prl", {"mask": KEPT[:1]}, "mask: expected bool"),
        ("prorag", {"stage_reward": SCORE[0]}, r"stage_reward: expected real \[2, S\]"),
        ("prorag", {"stage_reward": SCORE[:, :2]}, "segment: expected ids in -1 .. 1"),
        ("prorag", {"beta": math.inf}, "beta: expected a finite"),
        ("prorag", {"step_eps": -1.0}, "eps"),
        ("prorag", {"mask": KEPT[:1]}, "mask: expected bool"),
    ],
)
def test_bad_input(name: str, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CALLS[name](**{"rewards": WINS, "group": PAIR, "mask": KEPT, **GOOD[name], **changed})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"beta": NAN}, "beta"),
        ({"seq_reduce": "max"}, "seq_reduce: expected one of sum, mean"),
        ({"mask": KEPT.float()}, "mask"),
        ({"group": PAIR[:1]}, "group"),
        ({"correct": PAIR}, "correct: expected bool"),
        ({"process_log_prob": SCORE[:1]}, "process_log_prob"),
        ({"old_log_prob": SCORE[:1]}, "old_log_prob"),
        ({"trajectory": PAIR[:1]}, "trajectory"),
        ({"segment": STEPS[:1]}, "segment"),
    ],
)
def test_bad_input_of_the_pair_loss(changed: dict[str, Any], told: str) -> None:
    good = {"process_log_prob": SCORE, "old_log_prob": SCORE, "mask": KEPT, "group": PAIR, "correct": PAIR > 0}
    with pytest.raises(ValueError, match=told):
        oprl_pair_loss(**{**good, **changed})
