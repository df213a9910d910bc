"""The alarm: says when a score rises while what it stands for falls (reward hacking), from evaluations of the same prompts.

For each watched series (a gold reward, the diversity) the reference is the past evaluation at which it was highest. The
alarm counts an evaluation against a series where, over pairs of pictures from the same prompt and noise, the score has
risen since then (the interval of its change lies above 0) and the series has fallen (its interval lies below 0, or below
``- diversity_fall`` times its value then), and fires after ``patience`` such evaluations in a row.

The highest of n noisy values lies too high, so each interval has coverage ``1 - (1 - level) / n`` over the n evaluations that
could have been the reference (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flowrl.config.schema import Alarm

Values = npt.NDArray[np.float64]
DIVERSITY = "diversity"
CELLS = 8
PROXY, GOLD = "best_proxy", "best_gold"


class Bounds(Protocol):
    """A mean with the ends of its interval, None where there are too few prompts for one."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


class Bootstrap(Protocol):
    """Interval of a mean over prompts: values float [N] (NaN left out), their prompts, and the coverage."""

    def __call__(self, values: npt.ArrayLike, prompt_ids: npt.ArrayLike, *, level: float) -> Bounds: ...


@dataclass(frozen=True)
class Judged:
    """One evaluation, in the same order of prompts and members every time.

    prompt_ids: int64 [N]; proxy: float64 [N], the score that is trained for, NaN for none; watched: float64 [N] by name,
    ``diversity`` and one a gold reward; gold: mean of the gold score, None without gold rewards.
    """

    iteration: int
    prompt_ids: npt.NDArray[np.int64]
    proxy: Values
    watched: Mapping[str, Values]
    gold: float | None = None


@dataclass(frozen=True)
class Finding:
    """How one series stands. since: iteration of the reference; change, proxy: of the series and of the score since then."""

    name: str
    since: int
    change: Bounds
    proxy: Bounds
    against: bool


@dataclass
class Watch:
    """Follows the evaluations of a run. bootstrap: how an interval over prompts is made."""

    settings: Alarm
    bootstrap: Bootstrap
    count: int = 0
    streak: dict[str, int] = field(default_factory=dict)
    highest: dict[str, Judged] = field(default_factory=dict)
    best: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def fired(self) -> list[str]:
        """The series that the alarm has fired for."""
        patience = self.settings.patience
        return [name for name, length in self.streak.items() if patience and length >= patience]

    def note(self, judged: Judged) -> list[Finding]:
        """Compare an evaluation with those before it, and remember it."""
        findings = []
        for name, values in judged.watched.items():
            reference = self.highest.get(name)
            finding = self._compare(name, judged, reference) if reference else None
            if finding:
                findings.append(finding)
            self.streak[name] = self.streak.get(name, 0) + 1 if finding and finding.against else 0
            if _mean(values) is not None and (not reference or _above(values, reference.watched[name])):
                self.highest[name] = Judged(judged.iteration, judged.prompt_ids, judged.proxy, {name: values})
        self.count += 1
        for key, value in ((PROXY, _mean(judged.proxy)), (GOLD, judged.gold)):
            if value is not None and (key not in self.best or value > self.best[key][1]):
                self.best[key] = (judged.iteration, value)
        return findings

    def _compare(self, name: str, judged: Judged, reference: Judged) -> Finding | None:
        if not np.array_equal(judged.prompt_ids, reference.prompt_ids):
            raise ValueError("alarm: an evaluation has other prompts than those before it; they cannot be paired")
        level = 1 - (1 - self.settings.level) / self.count
        before = reference.watched[name]
        changes = (judged.watched[name] - before, judged.proxy - reference.proxy)
        if any(np.isnan(change).all() for change in changes):
            return None
        change, proxy = (self.bootstrap(values, judged.prompt_ids, level=level) for values in changes)
        allowed = self.settings.diversity_fall * float(np.nanmean(before)) if name == DIVERSITY else 0.0
        fell = change.high is not None and change.high < -allowed
        rose = proxy.low is not None and proxy.low > 0
        return Finding(name, reference.iteration, change, proxy, fell and rose)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain lists and numbers."""
        return {
            "count": self.count,
            "streak": dict(self.streak),
            "best": {key: list(pair) for key, pair in self.best.items()},
            "highest": {
                name: {
                    "iteration": judged.iteration,
                    "prompt_ids": judged.prompt_ids.tolist(),
                    "proxy": _plain(judged.proxy),
                    "values": _plain(judged.watched[name]),
                }
                for name, judged in self.highest.items()
            },
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up where ``state`` was made."""
        self.count, self.streak = state["count"], dict(state["streak"])
        self.best = {key: (pair[0], pair[1]) for key, pair in state["best"].items()}
        self.highest = {
            name: Judged(
                old["iteration"], np.array(old["prompt_ids"], np.int64), _array(old["proxy"]),
                {name: _array(old["values"])},
            )
            for name, old in state["highest"].items()
        }  # fmt: skip


def warning(findings: list[Finding], fired: list[str], patience: int) -> str:
    """What a user is told when the alarm fires; "" where it does not."""
    told = [
        f"{f.name} fell by {-f.change.mean:.3g} while the score rose by {f.proxy.mean:.3g} since iteration {f.since}"
        for f in findings
        if f.name in fired
    ]
    if not told:
        return ""
    return (
        f"alarm: {'; '.join(told)}, beyond the bootstrap interval at {patience} or more evaluations in a row. The policy may be "
        "hacking its reward: look at the pictures, and consider objective.kl, the grpo_guard objective, a gate, or the "
        "checkpoint that best.json names"
    )


def metrics(findings: list[Finding], watch: Watch) -> dict[str, Any]:
    """The alarm's row of metrics: fired (0 or 1), the longest streak, and each series' change and that of the score."""
    row: dict[str, Any] = {"alarm/fired": int(bool(watch.fired)), "alarm/streak": max(watch.streak.values(), default=0)}
    for f in findings:
        for name, bounds in ((f.name, f.change), (f"{f.name}/score", f.proxy)):
            row |= {f"alarm/{name}": bounds.mean, f"alarm/{name}_low": bounds.low, f"alarm/{name}_high": bounds.high}
    return row


def cells(pictures: npt.NDArray[np.uint8]) -> Values:
    """Return the mean colours of 8 x 8 cells, of every frame: uint8 [N, H, W, 3] or [N, F, H, W, 3] to [N, D] in [0, 1]."""
    frames = pictures.reshape(-1, *pictures.shape[-3:]).astype(np.float64) / 255
    for axis in (1, 2):
        size = frames.shape[axis]
        count = min(CELLS, size)
        edges = np.arange(count) * size // count
        widths = np.diff([*edges, size]).reshape([-1 if axis == a else 1 for a in range(4)])
        frames = np.add.reduceat(frames, edges, axis=axis) / widths
    return frames.reshape(len(pictures), -1)


def spread(pictures: npt.NDArray[np.uint8], group: npt.NDArray[np.int64]) -> Values:
    """Return each picture's mean distance from the other pictures of its group, float64 [N] in [0, 1].

    The distance of two pictures is the root mean square of the difference of their means over 8 x 8 cells, a channel and a
    frame at a time: what a glance from afar would tell apart. NaN for a picture alone in its group.

    pictures: uint8 [N, H, W, 3] or [N, F, H, W, 3]; group: int64 [N].
    """
    flat = cells(pictures)
    found = np.full(len(pictures), np.nan)
    for value in np.unique(group):
        rows = np.flatnonzero(group == value)
        if len(rows) < 2:
            continue
        mine = flat[rows]
        squares = ((mine[:, None] - mine[None]) ** 2).mean(2) if len(rows) <= 64 else _squares(mine)
        found[rows] = np.sqrt(squares).sum(1) / (len(rows) - 1)
    return found


def _squares(flat: Values) -> Values:
    """Mean squared differences of all pairs, without holding them all."""
    return np.stack([((flat - row) ** 2).mean(1) for row in flat])


def _mean(values: Values) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _above(values: Values, other: Values) -> bool:
    mine, theirs = _mean(values), _mean(other)
    return mine is not None and (theirs is None or mine > theirs)


def _plain(values: Values) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]


def _array(values: list[float | None]) -> Values:
    return np.array([np.nan if value is None else value for value in values], np.float64)
