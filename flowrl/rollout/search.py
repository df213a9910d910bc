"""Search at test time: several candidates for each picture, and a reward that chooses among them.

    best_of      ``width`` start noises, the deterministic path from each, the best end
    beam         ``width`` latents a picture; at chosen steps each draws ``children`` noises, and of the states that they
                 reach the best ``width`` go on
    particles    ``width`` samples of the stochastic chain with weights ``exp(R / lambda)``, resampled on the way where few
                 of them carry the weight; one of them is drawn by its weight (or the best is taken)

The reward is asked through a `Judge`: of an unfinished latent, or of the one-step estimate of its picture. Candidates are
keyed: the first one of ``best_of`` is the picture that plain sampling makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flowrl.records import Prompted
from flowrl.rollout.guided import effective_size
from flowrl.rollout.policy import Policy, Step

Kind = Literal["best_of", "beam", "particles"]
Noise = Callable[[int, str], Tensor]
"""(number of the draw, stream) -> noise [B * S, ...], S = ``Search.slots``; slot s of picture b is row b * S + s, and its
noise depends on the picture, the slot and the draw alone."""
Ask = Callable[[Tensor, int, Prompted], Tensor]
"""(x [N, ...], state k of the schedule, what each row asks for) -> values [N], NaN where there is none."""


@dataclass(frozen=True)
class Judge:
    """ask: the reward. of_estimate: it is shown the one-step estimate of an unfinished latent (an outcome reward), else
    the latent itself (a process reward)."""

    ask: Ask
    of_estimate: bool


@dataclass(frozen=True)
class Search:
    """How candidates are made and chosen. branch: the steps that draw noise, each followed by a choice (beam, particles).

    scale: 1 / lambda of particles; threshold: they are resampled where the effective sample size is below that part of
    width; pick: what particles return.
    """

    kind: Kind
    width: int
    children: int = 2
    branch: frozenset[int] = frozenset()
    scale: float = 1.0
    threshold: float = 0.5
    pick: Literal["draw", "best"] = "draw"

    @property
    def slots(self) -> int:
        """Rows of noise a picture: candidates at the widest."""
        return self.width * (self.children if self.kind == "beam" else 1)


@dataclass
class Spent:
    """What a search cost. network: latents through the network (times 2 with guidance); scored: latents judged; failed:
    of them without a value; resampled: of all resampling decisions, how many said yes."""

    network: int = 0
    scored: int = 0
    failed: int = 0
    resampled: int = 0
    pictures: int = 0

    def as_facts(self) -> Mapping[str, int]:
        return dict(vars(self))


@dataclass
class Searcher:
    """Runs one kind of search with one judge, and counts what it spends."""

    policy: Policy
    search: Search
    judge: Judge
    spent: Spent = field(default_factory=Spent)

    @torch.no_grad()
    def run(self, prompted: Prompted, noise: Noise, uniform: Callable[[int, int], float]) -> Tensor:
        """Find one x0 for each of the B rows of ``prompted``: float32 [B, ...].

        noise: see `Noise`; stream "initial" is start noise (draw 0), "step" that of a step. uniform: (picture, state) ->
        a keyed number in [0, 1), for resampling and the final draw.
        """
        self.spent.pictures += len(prompted.positive)
        match self.search.kind:
            case "best_of":
                return self._best_of(prompted, noise)
            case "beam":
                return self._beam(prompted, noise)
        return self._particles(prompted, noise, uniform)

    def _best_of(self, prompted: Prompted, noise: Noise) -> Tensor:
        width, total = self.search.width, self.policy.schedule.steps
        start = _slots(noise(0, "initial"), width)
        best: Tensor | None = None
        top = torch.full((len(start),), -math.inf)
        for slot in range(width):  # one slot at a time: the same batches as plain sampling
            x = start[:, slot].to(self.policy.adapter.device)
            for k in range(total):
                x = self._step(x, k, prompted, "ode").mean
            if width == 1:
                return x
            value = self._values(x, None, total, prompted)
            better = value > top
            best = x if best is None else torch.where(_like(better, x), x, best)
            top = torch.maximum(value, top)
        if best is None:
            raise ValueError(f"search.width: expected at least 1, got {width}")
        return best

    def _beam(self, prompted: Prompted, noise: Noise) -> Tensor:
        search, total = self.search, self.policy.schedule.steps
        pictures, x = len(prompted.positive), noise(0, "initial").to(self.policy.adapter.device)
        x = _slots(x, search.width * search.children)[:, : search.width].flatten(0, 1)
        count = search.width
        for k in range(total):
            kernel = self.policy.kernel if k in search.branch else "ode"
            asked = _repeat(prompted, pictures, count)
            made = None
            if count > search.width:
                if self.judge.of_estimate:
                    made = self._step(x, k, asked, kernel)
                kept = self._best(self._values(x, made, k, asked), count)
                x, made = x[kept], None if made is None else made[kept]
                count, asked = search.width, _repeat(prompted, pictures, search.width)
            made = self._step(x, k, asked, kernel) if made is None else made
            if k in search.branch:
                count = search.width * search.children
                made = made[torch.arange(len(x)).repeat_interleave(search.children)]
                x = made.mean + made.std * noise(k, "step").to(x.device)
            else:
                x = made.mean
        if count == 1:
            return x
        values = self._values(x, None, total, _repeat(prompted, pictures, count))
        return x[_slots(values, count).argmax(1) + torch.arange(pictures) * count]

    def _best(self, values: Tensor, count: int) -> Tensor:
        """Rows of the best ``width`` of every picture's ``count`` candidates, best first; equal ones in their order."""
        table = _slots(values, count)
        order = table.sort(dim=1, descending=True, stable=True).indices[:, : self.search.width]
        return (order + torch.arange(len(table))[:, None] * count).flatten()

    def _particles(self, prompted: Prompted, noise: Noise, uniform: Callable[[int, int], float]) -> Tensor:
        search, total = self.search, self.policy.schedule.steps
        pictures, width = len(prompted.positive), search.width
        asked = _repeat(prompted, pictures, width)
        x = noise(0, "initial").to(self.policy.adapter.device)
        log_weight = torch.zeros(pictures, width, dtype=torch.float64)
        known = torch.zeros_like(log_weight)
        for k in range(total):
            kernel = self.policy.kernel if k in search.branch else "ode"
            made = None
            if k - 1 in search.branch:  # the state was drawn with noise: weigh it
                made = self._step(x, k, asked, kernel) if self.judge.of_estimate else None
                log_weight, known = self._weigh(log_weight, known, self._values(x, made, k, asked))
                rows = self._resample(log_weight, uniform, k)
                if rows is not None:
                    x, made, known = x[rows], None if made is None else made[rows], known.flatten()[rows].view_as(known)
            made = self._step(x, k, asked, kernel) if made is None else made
            x = made.mean + made.std * noise(k, "step").to(x.device) if k in search.branch else made.mean
        values = self._values(x, None, total, asked)
        log_weight, _ = self._weigh(log_weight, known, values)
        if search.pick == "best":
            place = _slots(values, width).argmax(1)
        else:
            weights = _weights(log_weight)
            place = torch.stack([systematic(w, uniform(b, total), 1)[0] for b, w in enumerate(weights)])
        return x[place + torch.arange(pictures) * width]

    def _weigh(self, log_weight: Tensor, known: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weights exp(R / lambda) of states, by what R has gained since it was last known; -inf without a value."""
        now = _slots(values, self.search.width).double()
        return log_weight + self.search.scale * (now - known), torch.where(now.isfinite(), now, known)

    def _resample(self, log_weight: Tensor, uniform: Callable[[int, int], float], k: int) -> Tensor | None:
        """Rows that go on, int64 [B * W], and even weights (in place) where they were uneven; None where nowhere."""
        width = self.search.width
        weights = _weights(log_weight)
        poor = effective_size(weights) < self.search.threshold * width
        if not bool(poor.any()):
            return None
        rows = torch.arange(len(weights) * width).view(len(weights), width).clone()
        for b in poor.nonzero().flatten().tolist():
            rows[b] = b * width + systematic(weights[b], uniform(b, k), width)
            self.spent.resampled += 1
            log_weight[b] = 0.0
        return rows.flatten()

    def _step(self, x: Tensor, k: int, prompted: Prompted, kernel: str) -> Step:
        self.spent.network += len(x)
        return self.policy.step(x, torch.full((len(x),), k), prompted, kernel=kernel)

    def _values(self, x: Tensor, made: Step | None, k: int, prompted: Prompted) -> Tensor:
        """float64 [N] on CPU, -inf without a value."""
        shown = made.x0_hat if made is not None and self.judge.of_estimate else x
        found = self.judge.ask(shown, k, prompted).double().cpu()
        self.spent.scored += len(found)
        self.spent.failed += int((~found.isfinite()).sum())
        return torch.where(found.isfinite(), found, -math.inf)


def systematic(weights: Tensor, uniform: float, count: int) -> Tensor:
    """Draw ``count`` indices in proportion to weights [W], with one number in [0, 1): int64 [count], rising.

    Index i is taken as often as ``(u + j) / count``, j = 0 .. count - 1, falls into its part of the sum of weights, so it
    comes ``floor(count w_i)`` or ``ceil(count w_i)`` times, count w_i on average (Kitagawa 1996). Raises ValueError for
    weights that are negative, not finite or all 0.
    """
    w = weights.double()
    if not bool((w.isfinite() & (w >= 0)).all()) or not float(w.sum()) > 0:
        raise ValueError("weights: expected finite numbers >= 0, not all 0")
    places = (uniform + torch.arange(count, dtype=torch.float64)) / count
    return torch.searchsorted(w.cumsum(0) / w.sum(), places, right=True).clamp(max=len(w) - 1)


def network_rows(search: Search, steps: int, of_estimate: bool) -> int:
    """Latents of one picture that go through the network: what ``Searcher`` spends, worked out beforehand.

    best_of and particles: width steps. beam: width a step, width children where candidates are judged by their estimate.
    """
    if search.kind != "beam" or not of_estimate:
        return search.width * steps
    wide = sum(1 for k in range(1, steps) if k - 1 in search.branch)
    return search.width * (steps + (search.children - 1) * wide)


def judged_rows(search: Search, steps: int) -> int:
    """Latents of one picture that the reward is shown."""
    match search.kind:
        case "best_of":
            return search.width if search.width > 1 else 0
        case "particles":
            return search.width * (1 + sum(1 for k in range(1, steps) if k - 1 in search.branch))
    inner = sum(1 for k in range(1, steps) if k - 1 in search.branch)
    last = search.width * (search.children if steps - 1 in search.branch else 1)
    return search.width * search.children * inner + (last if last > 1 else 0)


def _weights(log_weight: Tensor) -> Tensor:
    """Weights of each picture's particles, [B, W], of sum 1; even where all of them have failed."""
    lost = (log_weight == -math.inf).all(1, keepdim=True)
    return torch.where(lost, torch.zeros_like(log_weight), log_weight).softmax(1)


def _slots(rows: Tensor, count: int) -> Tensor:
    return rows.reshape(-1, count, *rows.shape[1:])


def _repeat(prompted: Prompted, pictures: int, count: int) -> Prompted:
    return prompted[torch.arange(pictures).repeat_interleave(count)]


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1)).to(x.device)
