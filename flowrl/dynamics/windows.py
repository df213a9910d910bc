"""Which steps of a schedule are stochastic, hence trained. All groups of an iteration share them."""

from __future__ import annotations

from typing import Literal

from flowrl import rng

WindowKind = Literal["full", "random", "sliding"]


def stochastic_steps(
    kind: WindowKind, size: int, first: int, last: int, every: int, steps: int, iteration: int, seed: int
) -> list[int]:
    """List the stochastic steps of one iteration, in order.

    full: every step but the last. random: ``size`` steps whose start is uniform in [first, last], drawn from the key
    (seed, iteration, "window"). sliding: the start is ``first + (iteration // every) mod (last - first + 1)``.

    The last step of a schedule of ``steps`` steps is never stochastic: cps, precise and ddim make it without noise, and
    noise that an Euler-Maruyama kernel added there would stay in the picture. So ``last + size <= steps - 1``.
    Raises ValueError where a window leaves the schedule, has no steps or an empty range, never moves, or is of an
    unknown kind.
    """
    if steps < 2:
        raise ValueError(
            f"rollout.steps: {steps} leaves no stochastic step, as the last one is deterministic; use at least 2"
        )
    if kind == "full":
        return list(range(steps - 1))
    _check(kind, size, first, last, every, steps)
    starts = last - first + 1
    if kind == "random":
        start = first + int(rng.uniform(rng.key(seed, iteration, stream="window")) * starts)
    else:
        start = first + (iteration // every) % starts
    return list(range(start, start + size))


def _check(kind: str, size: int, first: int, last: int, every: int, steps: int) -> None:
    if kind not in ("random", "sliding"):
        raise ValueError(f"rollout.window.kind: unknown kind {kind!r}; use one of full, random, sliding")
    if size < 1:
        raise ValueError(f"rollout.window.size: {size} leaves nothing to train; use at least 1")
    if first < 0 or last < first:
        raise ValueError(
            f"rollout.window: starts from first = {first} to last = {last} are no range; use 0 <= first <= last"
        )
    if kind == "sliding" and every < 1:
        raise ValueError(f"rollout.window.every: a sliding window cannot move every {every} iterations; use at least 1")
    if last + size > steps - 1:
        most = steps - 1 - size
        mend = f"lower window.last to {most} or less, " if most >= first else "lower window.size, "
        raise ValueError(
            f"rollout.window: {size} steps from last = {last} reach step {last + size - 1}, but with rollout.steps = "
            f"{steps} only steps 0 to {steps - 2} can be stochastic; {mend}or raise rollout.steps"
        )
