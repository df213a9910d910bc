"""Several rewards at once: settle conflicts between their gradients on a Gram matrix.

The policy gradient is linear in the advantage, so surgery on the gradients g_1 .. g_R of R rewards needs only their
Gram matrix K_kl = <g_k, g_l> (of a last layer, of adapter weights, of a probe subset) and comes back as coefficients
C [R]: train on the advantage sum_k C_k A_k. Each gradient is tracked as a row of coefficients over the originals, and a
projection is a row operation: PCGrad is exact so. GCond differs from its code in two things: its momentum runs over
coefficients instead of gradients, and a gradient's stability is that of the raw gradient (equation 8 of the paper; the
code compares with the resolved one of the last step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import check_flags, check_ids
from .method import Method
from .moments import Reduce, total
from .state import State

_VANISHED = 1e-12  # a squared norm below this share of the greatest original one counts as 0
_ROUNDING = 1e-9  # a projected pair has cosine 0 up to rounding; that is no conflict


def _read_gram(gram: Tensor) -> Tensor:
    """float64 [R, R], symmetric; ValueError, naming gram, otherwise."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.numel() == 0 or gram.is_complex():
        raise ValueError(f"gram: expected real [R, R] with R >= 1, got {gram.dtype} {list(gram.shape)}")
    k = gram.detach().double()
    scale = float(k.abs().max())
    if not math.isfinite(scale) or float((k - k.T).abs().max()) > 1e-4 * scale or bool((k.diagonal() < 0).any()):
        raise ValueError("gram: expected finite numbers, symmetric, with a diagonal >= 0")
    return (k + k.T) / 2


def advantage_gram(channel_advantage: Tensor, valid: Tensor | None = None, *, reduce: Reduce | None = None) -> Tensor:
    """Stand in for the Gram matrix without any gradient: K_kl = mean_i A_ik A_il, float64 [R, R].

    channel_advantage: float [B, R], the advantage of each reward; valid: bool [B]. NaN adds 0. A proxy only: it is the
    Gram matrix where the score vectors of different samples are orthogonal and of one length. ``reduce`` makes the
    mean that of all ranks. On denoising steps: as it is.
    """
    a = channel_advantage.detach().double()
    if a.ndim != 2 or a.numel() == 0 or bool(a.isinf().any()):
        raise ValueError(f"channel_advantage: expected finite [B, R] with B, R >= 1, got {list(a.shape)}")
    rows = torch.ones(len(a), dtype=torch.bool, device=a.device) if valid is None else valid
    check_flags("valid", rows, (len(a),))
    kept = torch.where(rows[:, None] & ~a.isnan(), a, 0.0)
    parts = total(torch.cat([(kept.T @ kept).flatten(), rows.sum().double()[None]]), reduce)
    return (parts[:-1] / parts[-1].clamp(min=1)).view(a.shape[1], a.shape[1])


def combine_channels(channel_advantage: Tensor, coefficients: Tensor) -> Tensor:
    """Add reward channels up: A_i = sum_k C_k A_ik, float32 [B] (or [B, T] from [B, T, R]); NaN adds 0."""
    if coefficients.ndim != 1 or channel_advantage.shape[-1:] != coefficients.shape:
        raise ValueError(
            f"coefficients: expected [R] for channel_advantage {list(channel_advantage.shape)}, "
            f"got {list(coefficients.shape)}"
        )
    a = channel_advantage.detach().double().nan_to_num(nan=0.0)
    return (a * coefficients.detach().double()).sum(-1).float()


def random_order(channels: int, generator: torch.Generator) -> Tensor:
    """Draw for each of R gradients the order in which it meets the others: int64 [R, R], rows are permutations."""
    return torch.rand(channels, channels, generator=generator, device=generator.device).argsort(1)


def pcgrad(gram: Tensor, order: Tensor | None = None) -> Tensor:
    """Project each gradient off those that it conflicts with, and add them up: coefficients, float32 [R].

    For each i, over j != i in the given order: where <g_i, g_j> < 0, g_i -= <g_i, g_j> / |g_j|^2 g_j, with the present
    g_i and the original g_j. C = the sum of the rows. gram: float [R, R], <g_k, g_l>; order: int64 [R, R], row i a
    permutation (``random_order``; None: 0 .. R - 1). No conflict gives ones; a zero gradient meets nobody.

    PCGrad, 2001.06782; on a Gram matrix it is exact. On denoising steps: as it is.
    """
    k = _read_gram(gram)
    channels = len(k)
    each = torch.arange(channels, device=k.device)
    order = each.expand(channels, channels) if order is None else order
    check_ids("order", order, (channels, channels))
    if not order.sort(1).values.equal(each.expand(channels, channels)):
        raise ValueError(f"order: expected a permutation of 0 .. {channels - 1} in each row")
    rows = torch.eye(channels, dtype=torch.float64, device=k.device)
    for j in order.T:
        dot, square = (rows * k[j]).sum(1), k.diagonal()[j]
        conflict = (dot < 0) & (square > 0) & (j != each)
        step = torch.where(conflict, dot / torch.where(square > 0, square, 1.0), 0.0)
        rows = rows.index_put((each, j), -step, accumulate=True)
    return rows.sum(0).float()


@dataclass(frozen=True)
class GCondState(State):
    """What GCond remembers of R rewards.

    norm_ema: float64 [R], moving averages of the gradient norms; winners: int64 [W], the last W winners, the newest
    last, -1 for none yet; momentum: float64 [R], moving average of the coefficients; updates: int64 [];
    coefficients: float32 [R], the result of the last update, ones before the first.
    """

    norm_ema: Tensor
    winners: Tensor
    momentum: Tensor
    updates: Tensor
    coefficients: Tensor

    @classmethod
    def start(cls, channels: int, window: int = 3) -> GCondState:
        """Begin with ``channels`` rewards; a winner of ``window`` conflicts on end must lose the next, 0 is never."""
        if channels < 1 or window < 0:
            raise ValueError(f"channels, window: expected at least 1 and 0, got {channels} and {window}")
        return cls(
            norm_ema=torch.ones(channels, dtype=torch.float64),
            winners=torch.full((window,), -1),
            momentum=torch.zeros(channels, dtype=torch.float64),
            updates=torch.zeros((), dtype=torch.int64),
            coefficients=torch.ones(channels),
        )


def conflict_strengths(
    cosine: float, *, critical: float = -0.8, main: float = -0.5, weak: float = 0.0, power: float = 2.0
) -> tuple[float, float]:
    """Say how much of the projection the winner and the loser of a conflict undergo: (s_w, s_l).

    s_w = sin a, s_l = sin min(a, pi/2), with the angle a(c): 0 for c >= weak; pi/2 (weak - c) / (weak - main) down to
    main; pi/2 + pi/2 ((main - c) / (main - critical))^power down to critical; pi below. GCond, 2509.07252, equations 4
    to 6: (1, 1) at main is PCGrad of the pair, (0, 1) at critical spares the winner.
    """
    if not -1 <= critical < main < weak <= 1 or not power > 0:
        raise ValueError(
            f"critical, main, weak: expected -1 <= critical < main < weak <= 1 (and power > 0), got {critical}, {main}, "
            f"{weak} (and {power})"
        )
    if cosine >= weak:
        return 0.0, 0.0
    if cosine >= main:
        s = math.sin(math.pi / 2 * (weak - cosine) / (weak - main))
        return s, s
    depth = min((main - cosine) / (main - critical), 1.0) ** power
    return math.sin(math.pi / 2 * (1 + depth)), 1.0


def _worst_pair(rows: Tensor, k: Tensor) -> tuple[int, int, float]:
    """Find the pair (i < j) of least cosine among the gradients ``rows`` [R, R]; 1.0 where there is no pair."""
    inner = rows @ k @ rows.T
    square = inner.diagonal()
    alive = square > _VANISHED * k.diagonal().max()
    norm = torch.where(alive, square, 1.0).sqrt()
    pairs = (alive[:, None] & alive[None, :]).triu(1)
    cosine = torch.where(pairs, inner / (norm[:, None] * norm[None, :]), 1.0)
    at = int(cosine.argmin())
    return at // len(k), at % len(k), float(cosine.flatten()[at])


@dataclass(frozen=True)
class _Arbiter:
    """The rules by which a pair in conflict is settled; see ``gcond_update``."""

    zones: tuple[float, float, float, float]
    smooth: bool
    share: float
    scaled_norm: Tensor
    stability: Tensor

    def loses(self, i: int, j: int, norm: Tensor, winners: list[int]) -> bool:
        """Tell whether i loses to j: by dominance first, then by the greater score; a tie goes to i."""
        if winners and len(set(winners)) == 1 and winners[0] in (i, j):
            return winners[0] == i
        scaled = norm * self.scaled_norm
        strength = scaled / (scaled[i] + scaled[j])
        score = self.share * self.stability.clamp(min=0) + (1 - self.share) * strength
        return bool(score[j] > score[i])

    def settle(self, rows: Tensor, k: Tensor, winners: list[int]) -> tuple[Tensor, list[int]] | None:
        """Settle the worst pair of ``rows``; None where no pair is in conflict."""
        critical, main, weak, power = self.zones
        i, j, cosine = _worst_pair(rows, k)
        if cosine >= weak - _ROUNDING:
            return None
        norm = ((rows @ k) * rows).sum(1).clamp(min=0).sqrt()
        arbitrated = self.smooth or cosine < main
        if arbitrated:
            i, j = (j, i) if self.loses(i, j, norm, winners) else (i, j)
            winners = [*winners, i][1:] if winners else winners
        if self.smooth:
            s_w, s_l = conflict_strengths(cosine, critical=critical, main=main, weak=weak, power=power)
        else:
            s_w, s_l = (0.0 if arbitrated else 1.0), 1.0
        new = rows.clone()
        new[i] -= s_w * cosine * norm[i] / norm[j] * rows[j]
        new[j] -= s_l * cosine * norm[j] / norm[i] * rows[i]
        if not self.smooth and cosine < critical:
            new[j] = 0.0
        return new, winners


def gcond_update(
    gram: Tensor,
    state: GCondState,
    stability: Tensor | None = None,
    *,
    critical: float = -0.8,
    main: float = -0.5,
    weak: float = 0.0,
    power: float = 2.0,
    smooth: bool = True,
    stability_share: float = 0.8,
    norm_decay: float = 0.95,
    momentum: float = 0.85,
) -> GCondState:
    """Settle conflicts worst pair first, by arbitration; the result is ``coefficients`` of the new state.

    At most 2 R times: take the pair of least cosine, if below weak; name winner w and loser l; g_w -= s_w <g_w, g_l> /
    |g_l|^2 g_l, g_l -= s_l <g_w, g_l> / |g_w|^2 g_w, both of the values before, by ``conflict_strengths``. Then C = sum
    of the rows, m = momentum m + (1 - momentum) C, result m / (1 - momentum^t). The winner has the greater share
    max(0, stability) + (1 - share) N, a tie going to the first; N is the norm over its moving average (``norm_decay``,
    from 1) as a part of the pair's sum. Who won the last W conflicts loses.

    gram: float [R, R]; state: ``GCondState.start(R, W)``; stability: float [R], cosine of each gradient with that of its
    reward at the last update (0 by default: norms decide). smooth off: zones in steps (the loser is dropped below
    critical, projected alone below main, both are below weak). momentum: 0.85 in the code, 0.9 in the paper.

    GCond, 2509.07252, repository AlevLab-dev/GCond; differences: see the module. On denoising steps: as it is.
    """
    k = _read_gram(gram)
    conflict_strengths(0.0, critical=critical, main=main, weak=weak, power=power)  # checks the zones
    if not (0 <= stability_share <= 1 and 0 <= norm_decay < 1 and 0 <= momentum < 1):
        given = f"{stability_share}, {norm_decay}, {momentum}"
        raise ValueError(f"stability_share, norm_decay, momentum: expected [0, 1], [0, 1), [0, 1), got {given}")
    if state.norm_ema.shape != k.shape[:1]:
        raise ValueError(f"state: expected {len(k)} rewards like gram, got {list(state.norm_ema.shape)}")
    steady = torch.zeros_like(k[0]) if stability is None else stability.detach().double()
    if steady.shape != k.shape[:1] or not bool((steady.abs() <= 1 + 1e-6).all()):
        raise ValueError(f"stability: expected [{len(k)}] cosines, got {list(steady.shape)}")
    ema = (norm_decay * state.norm_ema + (1 - norm_decay) * k.diagonal().sqrt()).clamp(min=1e-8)
    arbiter = _Arbiter((critical, main, weak, power), smooth, stability_share, 1 / ema, steady)
    rows, winners = _resolve(arbiter, k, state.winners.tolist())
    mean, updates = momentum * state.momentum + (1 - momentum) * rows.sum(0), state.updates + 1
    coefficients = (mean / (1 - momentum ** int(updates))).float()
    return GCondState(ema, torch.tensor(winners, dtype=torch.int64), mean, updates, coefficients)


def _resolve(arbiter: _Arbiter, k: Tensor, winners: list[int]) -> tuple[Tensor, list[int]]:
    rows = torch.eye(len(k), dtype=torch.float64, device=k.device)
    for _ in range(2 * len(k)):
        settled = arbiter.settle(rows, k, winners)
        if settled is None:
            break
        rows, winners = settled
    return rows, winners


_CONFLICT = "tests/advantage/test_conflict.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="pcgrad",
        kind="conflict",
        paper_id="2001.06782",
        title="PCGrad on a Gram matrix: each reward's gradient projected off those that oppose it",
        tier=2,
        evidence={
            "exact": _CONFLICT + "test_pcgrad_worked_number",
            "formula": _CONFLICT + "test_pcgrad_is_pcgrad_on_vectors",
            "identity": _CONFLICT + "test_no_conflict_gives_ones",
        },
        call=pcgrad,
    ),
    Method(
        key="gcond",
        kind="conflict",
        paper_id="2509.07252",
        title="GCond on a Gram matrix: worst conflicts first, a winner by stability and strength",
        tier=2,
        evidence={
            "exact": _CONFLICT + "test_conflict_strengths_worked_numbers",
            "formula": _CONFLICT + "test_gcond_is_gcond_on_vectors",
            "identity": _CONFLICT + "test_gcond_at_main_is_pcgrad_of_the_pair",
        },
        call=gcond_update,
    ),
)
