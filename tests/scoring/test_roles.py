"""What the runtime makes of roles, shaping and gates: what is trained on, what is watched, what may take a sample away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flowrl.config.schema import Executor, Failures, RewardEntry
from flowrl.errors import UserError
from flowrl.records import RewardBatch
from flowrl.scoring.runtime import RewardRuntime, Scored, join, settings_of

CALLS: list[str] = []


def first(images: Any, prompts: Any) -> list[float | None]:
    CALLS.append("first")
    return [None if image[0, 0, 0] == 99 else float(image[0, 0, 0]) for image in images]


def second(images: Any, prompts: Any) -> list[float | None]:
    CALLS.append("second")
    return [None if image[0, 0, 1] == 99 else float(image[0, 0, 1]) for image in images]


def broken(images: Any, prompts: Any) -> list[float]:
    raise RuntimeError("no weights")


def wins(first: RewardBatch, second: RewardBatch) -> Any:
    a, b = (part.images[:, 0, 0, 0].astype(int) for part in (first, second))
    return np.where(a == b, 0.5, a > b).astype(float)


def entry(name: str, **settings: Any) -> RewardEntry:
    return RewardEntry(name=f"{__name__}:{name}", **settings)


def batch(rows: list[tuple[int, int]], groups: list[int] | None = None) -> RewardBatch:
    images = np.stack([np.full((2, 2, 3), (a, b, 0), np.uint8) for a, b in rows])
    return RewardBatch(images, ["p"] * len(rows), [{}] * len(rows), groups or [0] * len(rows))


ROWS = [(1, 10), (2, 20), (3, 30), (99, 40), (5, 99)]


def run(*entries: RewardEntry, rows: list[tuple[int, int]] = ROWS, evaluate: bool = False) -> Scored:
    with RewardRuntime(entries, Failures()) as runtime:
        return (runtime.for_evaluation() if evaluate else runtime).score(batch(rows))


def close_to(found: Any, *numbers: float) -> None:
    np.testing.assert_allclose(found, numbers, rtol=1e-6)


def test_shaping_changes_the_score_and_not_the_reward() -> None:
    scored = run(entry("first", weight=2.0, shaping=({"affine": [0.5, 1.0]}, {"clip": [0.0, 2.2]})), entry("second"))
    close_to(scored.scores, 2 * 1.5 + 10, 2 * 2.0 + 20, 2 * 2.2 + 30, np.nan, np.nan)
    close_to(scored.per_reward["first"].scores, 1, 2, 3, np.nan, 5)
    close_to(scored.shaped["first"], 1.5, 2.0, 2.2, np.nan, 2.2)
    assert list(scored.shaped) == ["first"] and scored.weights == {"first": 2.0, "second": 1.0}
    close_to(scored.channel("first"), 1.5, 2.0, 2.2, np.nan, 2.2)
    close_to(scored.channel("second"), 10, 20, 30, 40, np.nan)


def test_rank_is_within_groups_and_needs_them_whole() -> None:
    entries = [entry("first", shaping=({"rank": {}},))]
    with RewardRuntime(entries, Failures()) as runtime:
        assert runtime.needs_groups
        scored = runtime.score(batch([(5, 0), (1, 0), (3, 0), (9, 0)], [0, 0, 0, 1]))
        close_to(scored.scores, 1, 0, 0.5, 0.5)
        judged = runtime.for_evaluation()
        close_to(judged.score(batch([(5, 0), (1, 0)])).scores, 5, 1)
        assert judged.needs_groups is True
    with RewardRuntime([entry("first")], Failures()) as runtime:
        assert not runtime.needs_groups


def test_a_gate_multiplies_or_masks_and_a_mask_is_no_failure() -> None:
    gate = {"by": "second", "at_least": 20}
    watching = entry("second", role="monitor")
    scored = run(entry("first", shaping=({"gate": gate},)), watching)
    close_to(scored.scores, 0, 2, 3, np.nan, np.nan)
    masked = run(entry("first", shaping=({"gate": gate | {"otherwise": "mask"}},)), watching)
    close_to(masked.scores, np.nan, 2, 3, np.nan, np.nan)
    assert masked.valid.tolist() == [False, True, True, False, False]
    assert masked.gated is not None and masked.gated.tolist() == [True, False, False, False, False]
    assert masked.sound.tolist() == [True, True, True, False, False]
    assert masked.errors[0] == "first: left out by its gate, where second is 10"
    assert masked.errors[4] == "first: its gate second has no score: second: returned no value (None or NaN)"
    with RewardRuntime([entry("first")], Failures(max_invalid_fraction=0.4)) as runtime:
        runtime.check_failures(masked.sound)
    parts = join([masked, scored])
    assert parts.sound.tolist() == [*masked.sound, *scored.sound] and parts.shaped["first"].shape == (10,)


def test_a_mask_and_a_failure_of_another_reward_is_a_failure() -> None:
    gate = {"gate": {"by": "watch", "at_least": 20, "otherwise": "mask"}}
    scored = run(
        entry("first", shaping=(gate,)), entry("second", label="watch", role="monitor"), entry("second"),
        rows=[(1, 10), (99, 10), (1, 99)],
    )  # fmt: skip
    assert scored.sound.tolist() == [True, False, False] and not scored.valid.any()


def test_roles() -> None:
    rewards = [
        entry("first"),
        entry("second", role="gold", weight=0.5),
        entry("broken", role="monitor"),
        entry("second", weight=0.0, label="w"),
    ]
    CALLS.clear()
    scored = run(*rewards)
    assert CALLS.count("second") == 1, "the monitor alone: gold is not scored while training"
    assert list(scored.per_reward) == ["first", "broken", "w"]
    close_to(scored.scores, 1, 2, 3, np.nan, 5)
    judged = run(*rewards, evaluate=True)
    assert list(judged.per_reward) == ["first", "second", "broken", "w"]
    close_to(judged.per_reward["second"].scores, 10, 20, 30, 40, np.nan)
    close_to(judged.scores, 1, 2, 3, np.nan, 5)
    with RewardRuntime(rewards, Failures()) as runtime:
        assert runtime.weights == {"first": 1.0, "broken": 0.0, "w": 0.0} and runtime.gold == {"second": 0.5}
    with pytest.raises(UserError, match="none has a weight other than 0"):
        RewardRuntime([entry("first", role="gold")], Failures())
    with pytest.raises(UserError, match="has no 'misspelt'"):
        RewardRuntime([entry("first"), entry("misspelt", role="gold")], Failures())


def test_win_rates_leave_an_evaluation_score_where_something_absolute_is_trained() -> None:
    rows = [(1, 10), (2, 20), (3, 30)]
    close_to(run(entry("wins"), entry("second"), rows=rows).scores, 10, 20.5, 31)
    close_to(run(entry("wins"), entry("second"), rows=rows, evaluate=True).scores, 10, 20, 30)
    close_to(run(entry("wins"), rows=rows, evaluate=True).scores, 0, 0.5, 1)
    with RewardRuntime([entry("wins")], Failures()) as runtime:
        assert runtime.needs_groups


def test_deadlines_of_failures_hold_where_a_reward_has_none_of_its_own() -> None:
    failures = Failures(timeout_s=7.0, total_s=None, breaker=3)
    made = settings_of(RewardEntry(name="x", executor=Executor(total_s=9.0, workers=2)), failures)
    assert (made.timeout_s, made.total_s, made.breaker, made.breaker_s, made.workers) == (7.0, 9.0, 3, 30.0, 2)


def sleeps(images: Any, prompts: Any) -> list[float]:
    import time

    time.sleep(3.0)
    return [1.0] * len(images)


def test_a_late_reward_is_a_mask() -> None:
    with RewardRuntime([entry("sleeps")], Failures(timeout_s=0.2, breaker=0)) as runtime:
        scored = runtime.score(batch(ROWS))
    assert not scored.valid.any() and "no result within 0.2 s" in str(scored.errors[0])


def test_shaping_that_cannot_be_read() -> None:
    with pytest.raises(UserError, match=r"shaping: 0: unknown step 'afine'; use .*; gate: no reward is called 'x'"):
        RewardRuntime([entry("first", shaping=({"afine": [1, 2]}, {"gate": {"by": "x", "at_least": 1}}))], Failures())


def test_one_reward_after_another_is_closed_when_one_cannot_be_made() -> None:
    with pytest.raises(UserError, match="unknown reward"):
        RewardRuntime([entry("first"), RewardEntry(name="nope")], Failures())
