"""Terms and weights from the identity of the actions: which token stands where, in right and in wrong rows.

What the methods share (a NaN reward, masked steps, float32) is in ``local_terms``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .checks import check_number
from .estimators import grpo
from .inputs import check_ids, check_mask, read_steps
from .local_terms import combine
from .method import Method
from .record import Advantage
from .segments import Groups

ALIKE = 1e-7  # two tables of equal probability differ by rounding: this part of it is let pass
CERTAIN = 1e-9  # a p-value this close to 1 is 1
ROUNDING = 1e-9  # an advantage below this is 0: the row's reward is the mean of its group
TF_SATURATION, TF_LENGTH, TF_FLOOR = 2.0, 0.5, 1e-5  # k1 and b of BM25, and what keeps the ratio finite


def _log_factorials(most: int, like: Tensor) -> Tensor:
    """log k! for k = 0 .. most, float64."""
    return torch.lgamma(torch.arange(1, most + 2, dtype=torch.float64, device=like.device))


def fisher_exact(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Give the two-sided p-value of Fisher's exact test for tables [[a, b], [c, d]]: int64 [P] >= 0 -> float64 [P].

    The sum of the hypergeometric probabilities, margins fixed, that are no greater than that of the table. Work and
    memory grow with the number of distinct margins times the smaller column sum, not with P.
    """
    n1, n2, r = a + c, b + d, a + b
    turn = n1 > n2  # one of the two mirror images, so that both get the same bits
    n1, n2, a = torch.where(turn, n2, n1), torch.where(turn, n1, n2), torch.where(turn, b, a)
    margins, which = torch.unique(torch.stack([n1, n2, r]), dim=1, return_inverse=True)
    n1, n2, r = (m[:, None] for m in margins)
    k = torch.arange(int(n1.max()) + 1, device=a.device)
    inside = (k <= n1) & (k <= r) & (r - k <= n2)
    log = _log_factorials(int((n1 + n2).max()), a)

    def ways(n: Tensor, chosen: Tensor) -> Tensor:
        chosen = chosen.clamp(min=0)
        return log[n] - log[chosen] - log[(n - chosen).clamp(min=0)]

    chance = torch.where(inside, (ways(n1, k) + ways(n2, r - k) - ways(n1 + n2, r)).exp(), 0.0)
    ordered = chance.sort(dim=1).values
    at = torch.searchsorted(ordered, chance * (1.0 + ALIKE), right=True) - 1
    return ordered.cumsum(dim=1).gather(1, at).clamp(max=1.0)[which, a]


def _bits(x: Tensor, y: Tensor) -> Tensor:
    """Entropy in bits of a choice with counts x and y; 0 where both are 0."""
    p, q = x / (x + y).clamp(min=1), y / (x + y).clamp(min=1)
    return -(torch.xlogy(p, p) + torch.xlogy(q, q)) / math.log(2.0)


def _information_gain(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Bits that the presence of a token tells of correctness; every argument float64 [P]."""
    held = (a + b) / (a + b + c + d)
    return _bits(a + c, b + d) - (held * _bits(a, b) + (1.0 - held) * _bits(c, d))


def _frequency(count: Tensor, length: Tensor, average: Tensor) -> Tensor:
    """Saturated frequency of a token among the tokens of a class (BM25's term)."""
    share = count / length.clamp(min=1)
    discount = TF_SATURATION * (1.0 - TF_LENGTH + TF_LENGTH * length / average)
    return share * (TF_SATURATION + 1.0) / (share + discount)


def _places(key: Tensor, index: Tensor, number: int) -> tuple[Tensor, int]:
    """Number the distinct pairs of ``key`` (int64 [N]) and ``index`` (int64 [N] in 0 .. number - 1)."""
    compact = torch.unique(key, return_inverse=True)[1]
    ids, pair = torch.unique(compact * number + index, return_inverse=True)
    return pair, len(ids)


def _count(index: Tensor, number: int, flags: Tensor) -> Tensor:
    """int64 [number]: how many ``flags`` (bool [N]) hold at each ``index`` (int64 [N])."""
    return torch.zeros(number, dtype=torch.int64, device=index.device).index_add_(0, index, flags.long())


def _key_token_values(
    token: Tensor, row: Tensor, groups: Groups, correct: Tensor, weights: tuple[float, ...]
) -> Tensor:
    """K of every kept step, float64 [N], before the factor; token, row: int64 [N]; groups.valid, correct: [B]."""
    alpha, beta, gamma = weights
    of_row = groups.index[row]
    pair, number = _places(token, of_row, groups.number)
    owner = torch.zeros(number, dtype=torch.int64, device=row.device).scatter_(0, pair, of_row)
    seen = torch.unique(pair * len(correct) + row)
    holder, inside = correct[seen % len(correct)], seen // len(correct)
    a, b = _count(inside, number, holder), _count(inside, number, ~holder)
    right, wrong = (_count(groups.index, groups.number, groups.valid & x)[owner] for x in (correct, ~correct))
    c, d = right - a, wrong - b
    p = fisher_exact(a, b, c, d)
    certainty = torch.where(p < 1.0 - CERTAIN, (-2.0 * p).exp(), 0.0)
    a, b, c, d = (x.double() for x in (a, b, c, d))
    effect = (a / (a + c)).sqrt().asin() - (b / (b + d)).sqrt().asin()
    if gamma != 0:
        length = [_count(of_row, groups.number, x)[owner].double() for x in (correct[row], ~correct[row])]
        average = (length[0] + length[1]) / 2
        tf_right = _frequency(_count(pair, number, correct[row]).double(), length[0], average)
        tf_wrong = _frequency(_count(pair, number, ~correct[row]).double(), length[1], average)
        effect = effect + gamma * (tf_right / (tf_wrong + TF_FLOOR) - tf_wrong / (tf_right + TF_FLOOR))
    z = (alpha * certainty + beta * _information_gain(a, b, c, d)) * effect / (alpha + beta)
    return torch.where((right > 0) & (wrong > 0), (z / 2.0).tanh(), 0.0)[pair]


def ktae(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    token: Tensor,
    valid: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    top: float = 1.0,
    neutral: int | None = None,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Advantage:
    """Add to GRPO a value for each token: how far its presence goes with the right rollouts of the group.

    A[b, t] = GRPO[b] + K(token[b, t]); of the rollouts, a right and b wrong ones hold the token, c and d do not:
    z = (alpha F + beta IG) x / (alpha + beta), K = 2 top (sigmoid(z) - 1/2); F = exp(-2 p) with the two-sided Fisher
    p, 0 where p is 1; IG = H2(right) - H2(right | held), in bits; x = asin sqrt(a / (a + c)) - asin sqrt(b / (b + d))
    + gamma (tf_r / (tf_w + 1e-5) - tf_w / (tf_r + 1e-5)); f = share of the token among the class's tokens, n of them,
    tf = 3 f / (f + 2 (1/2 + 1/2 n / mean n)).

    Right: reward > 0. neutral: a token with K = 0, the end of sequence in the public code. K is 0 in a group without a
    right or without a wrong rollout: there it is GRPO. A token of one class alone has a tf ratio near 1e5 / 3, so K is
    at +-top. Exchanging right and wrong flips the sign of K exactly. KTAE, 2505.16826 (code: verl fork, F 0 only where
    p is 1 to the last bit, here to 1e-9; its scripts pass a beta that it does not use).
    On denoising steps: none, continuous latents do not repeat; ids of discrete decisions (branch, step size) do.
    """
    for name, number in (("alpha", alpha), ("beta", beta), ("gamma", gamma), ("top", top)):
        check_number(name, number, 0.0)
    if alpha + beta == 0:
        raise ValueError("alpha, beta: expected one of them above 0, got 0 and 0")
    outcome = grpo(rewards, group, valid, ddof=ddof, eps=eps)
    check_mask(mask, len(group))
    check_ids("token", token, tuple(mask.shape))
    kept = mask & outcome.loss_mask[:, None]
    value = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    if bool(kept.any()):
        row = kept.nonzero()[:, 0]
        groups = Groups.of(group, outcome.loss_mask)
        value[kept] = _key_token_values(token[kept], row, groups, rewards.detach() > 0, (alpha, beta, gamma))
    if neutral is not None:
        value = torch.where(token == neutral, 0.0, value)
    return combine(outcome, value, top, mask, group)


def _shared_run(position: Tensor, token: Tensor, kept: Tensor, index: Tensor, sign: Tensor) -> Tensor:
    """bool [B, T]: kept steps whose token stands at that position in a positive and in a negative row of the group."""
    row = kept.nonzero()[:, 0]
    slot, number = _places(token[kept], index[row] * kept.shape[1] + position[kept], len(kept) * kept.shape[1])
    both = (_count(slot, number, sign[row] > 0) > 0) & (_count(slot, number, sign[row] < 0) > 0)
    shared = torch.zeros_like(kept)
    shared[kept] = both[slot]
    return shared


def gtpo(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    token: Tensor,
    entropy: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    factor: float = 2.0,
    entropy_coef: float = 0.1,
    entropy_limit: float = math.log(2.0),
    per_conflict: bool = False,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Advantage:
    """Spare the opening and closing tokens that right and wrong rows share: no negative pull, twice the positive one.

    A step is in conflict where its token stands at the same position in a row with positive and in one with negative
    GRPO advantage, in an unbroken run from the start (forward) or, counted from the end, to the end (backward).
    weight = l_forward l_backward, l = factor on a conflict of a positive row, 0 of a negative row, 1 elsewhere (4 on a
    positive row that is shared whole). A = GRPO - entropy_coef H, H the row's mean entropy; a row with
    H > entropy_limit is dropped (loss_mask False, weight and A 0).

    Positions count the unmasked steps of the row. Rows with A = 0 take no part in conflicts and keep weight 1. Without
    ``entropy`` ([B, T]) there is neither penalty nor filter; the filter (infinity is off) is meant for policies that
    start below the limit. live: signal in the group, or a penalty. per_conflict: divide the weight by the row's number
    of conflicts, as the code does and its README does not. channels["conflict"]: float32 [B, T], 1 on conflicts.
    GTPO, 2508.03772 (code: limit 0.7, where the paper has ln 2; not Group Turn PO, 2511.14846).
    On denoising steps: with branch rollouts, token the id of the branch node; entropy None (the schedule sets it).
    """
    check_number("factor", factor, 0.0)
    check_number("entropy_coef", entropy_coef)
    if not entropy_limit >= 0:
        raise ValueError(f"entropy_limit: expected a number >= 0, infinity for none, got {entropy_limit}")
    outcome = grpo(rewards, group, valid, ddof=ddof, eps=eps)
    check_mask(mask, len(group))
    check_ids("token", token, tuple(mask.shape))
    weight, conflict = _conflict_weight(token, mask, outcome, group, factor)
    if per_conflict:
        weight = weight / conflict.sum(dim=1, keepdim=True).clamp(min=1)
    rows, penalty = outcome.loss_mask, torch.zeros_like(outcome.advantage)
    if entropy is not None:
        mean = read_steps("entropy", entropy, mask, torch.float64).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        rows, penalty = rows & (mean <= entropy_limit), (entropy_coef * mean).float()
    shaped = replace(outcome, advantage=outcome.advantage - penalty, loss_mask=rows)
    felt = torch.where(rows, penalty, 0.0) != 0
    live = outcome.live | (Groups.of(group).max(felt) > 0)
    result = replace(shaped, live=live).over_steps(mask)
    weight = weight * result.loss_mask
    return replace(result, weight=weight, channels={"conflict": (conflict & result.loss_mask).float()})


def _conflict_weight(
    token: Tensor, mask: Tensor, outcome: Advantage, group: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """float32 [B, T], the product of both weights; bool [B, T], the conflicts of either run."""
    sign = torch.where(outcome.advantage.abs() > ROUNDING, outcome.advantage, 0.0)
    kept = mask & (sign != 0)[:, None]
    if not bool(kept.any()):
        return mask.float(), torch.zeros_like(mask)
    index = Groups.of(group).index
    step = mask.long().cumsum(dim=1)
    ahead, back = (_shared_run(position, token, kept, index, sign) for position in (step - 1, step[:, -1:] - step))
    ahead = ahead & ((mask & ~ahead).cumsum(dim=1) == 0)
    back = back & ((mask & ~back).flip(1).cumsum(dim=1).flip(1) == 0)
    on_conflict = torch.where(sign > 0, factor, 0.0)[:, None]
    weight = torch.where(ahead, on_conflict, 1.0) * torch.where(back, on_conflict, 1.0)
    return weight, ahead | back


_TESTS = "tests/advantage/test_token_terms.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="ktae",
        kind="estimator",
        paper_id="2505.16826",
        title="KTAE: a value for each token, by how far its presence goes with right rollouts",
        tier=2,
        evidence={
            "exact": _TESTS + "test_ktae_worked_numbers",
            "formula": _TESTS + "test_ktae_against_a_plain_loop",
            "identity": _TESTS + "test_ktae_of_an_all_right_or_all_wrong_group_is_grpo",
        },
        call=ktae,
        tokens_only=(
            "it counts how often a token occurs, and continuous latents never repeat; "
            "use tree or anchor credit (spo_tree, gigpo) on shared branch prefixes"
        ),
        exempt={"shift": "a rollout is right where its reward is above 0"},
    ),
    Method(
        key="gtpo",
        kind="estimator",
        paper_id="2508.03772",
        title="GTPO: weights that spare the tokens shared by right and wrong rows, and an entropy filter",
        tier=2,
        evidence={
            "exact": _TESTS + "test_gtpo_worked_numbers",
            "formula": _TESTS + "test_gtpo_against_a_plain_loop",
            "identity": _TESTS + "test_gtpo_without_conflicts_or_entropy_is_grpo",
        },
        call=gtpo,
        exempt={"constant": "the entropy penalty remains where all rewards are equal"},
    ),
)
