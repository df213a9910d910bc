"""Terms and weights from the identity of the actions: which token stands where, in right and in wrong rows.

What the methods share (a NaN reward, masked steps, float32) is in ``local_terms``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import by_rows
from .checks import check_number
from .estimators import grpo
from .inputs import check_ids, check_mask, read_steps
from .local_terms import combine
from .method import Method
from .moments import row_moments
from .record import Advantage
from .segments import Groups, number_ids

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
    most = int((n1 + n2).max()) + 1
    margins, which = torch.unique((n1 * most + n2) * most + r, return_inverse=True)
    n1, n2, r = (m[:, None] for m in (margins // most**2, margins // most % most, margins % most))
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


def _count(index: Tensor, number: int, flags: Tensor) -> Tensor:
    """int64 [number]: how many ``flags`` (bool [N]) hold at each ``index`` (int64 [N])."""
    return torch.zeros(number, dtype=torch.int64, device=index.device).index_add_(0, index, flags.long())


def _key_token_values(
    token: Tensor, row: Tensor, groups: Groups, correct: Tensor, weights: tuple[float, ...]
) -> Tensor:
    """K of every kept step, float64 [N], before the factor; token, row: int64 [N]; groups.valid, correct: [B]."""
    alpha, beta, gamma = weights
    code, codes = number_ids(token)
    rows = len(correct)
    # One sort puts equal (group, token, row) together, and so each group's holders of a token.
    held, place, times = torch.unique(
        (groups.index[row] * codes + code) * rows + row, return_inverse=True, return_counts=True
    )
    pairs, inside = torch.unique_consecutive(held // rows, return_inverse=True)
    number, owner, holder = len(pairs), pairs // codes, correct[held % rows]
    a, b = _count(inside, number, holder), _count(inside, number, ~holder)
    right, wrong = (_count(groups.index, groups.number, groups.valid & x)[owner] for x in (correct, ~correct))
    c, d = right - a, wrong - b
    p = fisher_exact(a, b, c, d)
    certainty = torch.where(p < 1.0 - CERTAIN, (-2.0 * p).exp(), 0.0)
    a, b, c, d = (x.double() for x in (a, b, c, d))
    effect = (a / (a + c)).sqrt().asin() - (b / (b + d)).sqrt().asin()
    if gamma != 0:
        often = [torch.where(holders, times, 0) for holders in (holder, ~holder)]
        count = [torch.zeros_like(pairs).index_add_(0, inside, n) for n in often]
        length = [
            torch.zeros(groups.number, dtype=torch.int64, device=row.device).index_add_(0, owner, n)[owner].double()
            for n in count
        ]
        average = (length[0] + length[1]) / 2
        tf_right, tf_wrong = (
            _frequency(n.double(), of_class, average) for n, of_class in zip(count, length, strict=True)
        )
        effect = effect + gamma * (tf_right / (tf_wrong + TF_FLOOR) - tf_wrong / (tf_right + TF_FLOOR))
    z = (alpha * certainty + beta * _information_gain(a, b, c, d)) * effect / (alpha + beta)
    return torch.where((right > 0) & (wrong > 0), (z / 2.0).tanh(), 0.0)[inside[place]]


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
    value = torch.zeros(mask.shape, device=mask.device)
    if bool(kept.any()):
        row = torch.arange(len(mask), device=mask.device).repeat_interleave(kept.sum(1))
        groups = Groups.of(group, outcome.loss_mask)
        found = _key_token_values(token[kept], row, groups, rewards.detach() > 0, (alpha, beta, gamma))
        value.masked_scatter_(kept, found.float())
    if neutral is not None:
        value = torch.where(token == neutral, 0.0, value)
    return combine(outcome, value, top, mask, group)


def _shared_run(packed: Tensor, size: Tensor, index: Tensor, sign: Tensor, back: bool) -> Tensor:
    """int64 [B]: length of the row's unbroken run of tokens that stand at the same position in a row of the other sign.

    packed: int64 [B, T], the row's tokens from its first step on; size: int64 [B], how many; back: count from the end.
    It ends with the longest run: one step costs a sort of a number for each row.
    """
    run, alive = torch.zeros_like(size), sign != 0
    for position in range(int(size.max())):
        there = (size > position) & (sign != 0)
        at = (size - 1 - position).clamp(min=0) if back else torch.full_like(size, position)
        token, tokens = number_ids(packed.gather(1, at[:, None])[:, 0])
        slot, number = number_ids(index * tokens + token)
        positive, negative = (_count(slot, number, there & side)[slot] > 0 for side in (sign > 0, sign < 0))
        alive = alive & there & positive & negative
        if not bool(alive.any()):
            break
        run += alive
    return run


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
        mean = row_moments(read_steps("entropy", entropy, mask), mask)[1]
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

    def pack(token: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        rank = kept.cumsum(dim=1, dtype=torch.int32).sub_(1)
        place = torch.where(kept, rank, kept.shape[1]).long()  # one column more, thrown away, takes what is masked
        packed = token.new_zeros(len(token), kept.shape[1] + 1).scatter_(1, place, token)
        return packed[:, :-1], rank

    def weigh(kept: Tensor, rank: Tensor, first: Tensor, last: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        ahead, back = kept & (rank < first[:, None]), kept & (rank >= last[:, None])
        factor = factor[:, None]
        return torch.where(ahead, factor, 1.0) * torch.where(back, factor, 1.0), ahead | back

    packed, rank = by_rows(pack, token, kept)
    size, index = rank[:, -1].long() + 1, Groups.of(group).index
    ahead, back = (_shared_run(packed, size, index, sign, back) for back in (False, True))
    on_conflict = torch.where(sign > 0, factor, 0.0)
    weight, conflict = by_rows(weigh, kept, rank, ahead.int(), (size - back).int(), on_conflict)
    return weight, conflict


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
