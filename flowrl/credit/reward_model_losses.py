"""Losses that teach a process reward which of two latents ends better, and how times and pairs are drawn for them.

Pairs are members of one group at one noise level, so nothing but what a model sees of the latent tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl import rng


def stratified_times(seed: int, count: int) -> Tensor:
    """Draw ``count`` times in (0, 1), one from each of as many equal parts, in random order: float32 [count]."""
    if count < 1:
        raise ValueError(f"count: expected a number >= 1, got {count}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.tensor(rng.permutation(seed, count))
    return ((order + torch.rand(count, generator=generator)) / count).clamp(1e-4, 1 - 1e-4)


def group_pairs(reward: Tensor, group: Tensor, level: Tensor, tie: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """List the pairs of one group and one noise level: (i, j, outcome), int64 [M], int64 [M], float32 [M].

    reward: float [B], NaN takes part in no pair; group, level: int64 [B]. outcome: 1 where i has the larger reward, and
    1/2 where the rewards differ by at most ``tie``; i always has the reward that is not smaller. Each pair comes once.
    """
    if tie < 0 or math.isnan(tie):
        raise ValueError(f"tie: expected a margin >= 0, got {tie}")
    first, second = torch.triu_indices(len(reward), len(reward), 1)
    known = reward.isfinite()
    alike = (group[first] == group[second]) & (level[first] == level[second]) & known[first] & known[second]
    first, second = first[alike], second[alike]
    swap = reward[second] > reward[first]
    i, j = torch.where(swap, second, first), torch.where(swap, first, second)
    outcome = torch.where((reward[i] - reward[j]) <= tie, 0.5, 1.0)
    return i, j, outcome


def bradley_terry(gap: Tensor, outcome: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Negative log-likelihood of pairs without a model of ties: ``-y log s(d) - (1 - y) log s(-d)``, d = gap / temperature.

    gap: float [M], score of i minus score of j; outcome y: float [M], 1, or 1/2 for a tie, which counts as half a win of
    each; temperature > 0: scalar or [M]. Returns float [M]. Source: Bradley and Terry (1952).
    """
    d = gap / _positive("temperature", temperature)
    return -outcome * F.logsigmoid(d) - (1 - outcome) * F.logsigmoid(-d)


def bradley_terry_ties(
    gap: Tensor,
    outcome: Tensor,
    temperature: Tensor | float = 1.0,
    *,
    margin: float = 0.5,
    form: Literal["rao_kupper", "davidson"] = "rao_kupper",
) -> Tensor:
    """Negative log-likelihood of pairs that may be tied, d = gap / temperature.

    rao_kupper: P(i wins) = s(d - margin), P(tie) = 1 - s(d - margin) - s(-d - margin)
    davidson:   with n = e^margin - 1: P(i wins) = e^(d/2) / Z, P(tie) = n / Z, Z = e^(d/2) + e^(-d/2) + n

    gap, outcome, temperature as in `bradley_terry`; margin > 0. Either with margin -> 0 is `bradley_terry` on pairs that
    are not tied. Returns float [M]. Sources: Rao and Kupper (1967); Davidson (1970), whose n is written by a margin here.
    """
    if not margin > 0:
        raise ValueError(
            f"margin: expected more than 0, got {margin}; use bradley_terry where ties have no probability"
        )
    d = gap / _positive("temperature", temperature)
    tied = outcome == 0.5
    if form == "rao_kupper":
        win = F.logsigmoid(d - margin)
        # 1 - s(d - m) - s(-d - m) = (e^2m - 1) s(d - m) s(-d - m)
        tie = math.log(math.expm1(2 * margin)) + win + F.logsigmoid(-d - margin)
    elif form == "davidson":
        log_n = torch.full_like(d, math.log(math.expm1(margin)))
        total = torch.logsumexp(torch.stack([d / 2, -d / 2, log_n]), 0)
        win, tie = d / 2 - total, log_n - total
    else:
        raise ValueError(f"form: expected rao_kupper or davidson, got {form!r}")
    return -torch.where(tied, tie, win)


def thurstone(
    gap: Tensor,
    outcome: Tensor,
    variance: Tensor | float = 1.0,
    *,
    fidelity: bool = False,
) -> Tensor:
    """Loss of pairs under Thurstone's model, P(i wins) = Phi(gap / sqrt(2 variance)).

    variance > 0: of each score's own noise, scalar or [M]; DiNa-LRM has ``a sigma^2 + 0.05`` (see `level_variance`), so
    that noisier latents may be told apart less surely. fidelity False: negative log-likelihood; True: ``1 - sqrt(y P) -
    sqrt((1 - y)(1 - P))``, bounded by 1 (for y = 1, ``1 - sqrt(P)``). gap, outcome as in `bradley_terry`. Returns float
    [M]. Sources: Thurstone (1927); DiNa-LRM's public code for variance and fidelity.
    """
    z = gap / (2 * torch.as_tensor(_positive("variance", variance))).sqrt()
    if fidelity:
        won, lost = torch.special.log_ndtr(z), torch.special.log_ndtr(-z)
        bounded: Tensor = 1 - outcome.sqrt() * (won / 2).exp() - (1 - outcome).sqrt() * (lost / 2).exp()
        return bounded
    loss: Tensor = -outcome * torch.special.log_ndtr(z) - (1 - outcome) * torch.special.log_ndtr(-z)
    return loss


def level_variance(t: Tensor, slope: float = 1.0, floor: float = 0.05) -> Tensor:
    """Variance of a score at noise level t: ``slope t^2 + floor``, as in DiNa-LRM's public code. float [B]."""
    return slope * t.square() + floor


def regression(score: Tensor, reward: Tensor, *, delta: float = 0.0) -> Tensor:
    """Half the squared error of a score against the final reward, or Huber's: float [B].

    delta 0: ``(s - r)^2 / 2``; more: linear beyond ``delta``, ``delta (|s - r| - delta / 2)``.
    """
    if delta < 0:
        raise ValueError(f"delta: expected a number >= 0, got {delta}")
    if delta == 0:
        return (score - reward).square() / 2
    return F.huber_loss(score, reward, reduction="none", delta=delta)


PAIR_LOSSES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"bradley_terry": bradley_terry, "bradley_terry_ties": bradley_terry_ties, "thurstone": thurstone}
)


def by_level(loss: Tensor, level: Tensor, levels: int) -> Tensor:
    """Average a loss within each noise level, then over the levels that have any: a scalar.

    A level with few pairs (many rewards tied, say) counts as much as one with many. loss: float [M]; level: int64 [M].
    An empty loss gives 0.
    """
    total = torch.zeros(levels, dtype=loss.dtype, device=loss.device).index_add(0, level, loss)
    count = torch.zeros(levels, dtype=loss.dtype, device=loss.device).index_add(0, level, torch.ones_like(loss))
    return (total / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def _positive(name: str, value: Tensor | float) -> Tensor | float:
    if not bool((torch.as_tensor(value) > 0).all()):
        raise ValueError(f"{name}: expected more than 0")
    return value
