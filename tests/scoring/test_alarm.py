"""The alarm: fires when the score rises and gold or diversity falls, not when only one of them does, and not by chance."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from flowrl.config.schema import Alarm
from flowrl.evaluation.statistics import bootstrap_mean
from flowrl.scoring.alarm import GOLD, PROXY, Judged, Watch, metrics, spread, warning

IDS = np.repeat(np.arange(40), 2)
BASE = np.random.default_rng(0).normal(0.5, 0.1, 80)
Level = Callable[[int], float]


def follow(
    proxy: Level, gold: Level, diversity: Level, count: int = 6, noise: float = 0.02, **settings: float
) -> Watch:
    """A watch that saw ``count`` evaluations of 40 prompts; each series is a level plus noise of its own."""
    watch = Watch(Alarm(**settings), bootstrap_mean)  # type: ignore[arg-type]
    generator = np.random.default_rng(1)
    for k in range(count):
        p, g, d = (BASE + f(k) + noise * generator.normal(size=80) for f in (proxy, gold, diversity))
        watch.note(Judged(4 * k, IDS, p, {"gold/x": g, "diversity": d}, float(g.mean())))
    return watch


def up(k: int) -> float:
    return 0.1 * k


def down(k: int) -> float:
    return -0.1 * k


def flat(k: int) -> float:
    return 0.0


def test_it_fires_for_gold_after_patience_evaluations_in_a_row() -> None:
    assert [follow(up, down, flat, count=n, patience=3).fired for n in (1, 2, 3, 4, 5)] == [
        [],
        [],
        [],
        ["gold/x"],
        ["gold/x"],
    ]
    assert follow(up, down, flat, patience=0).fired == []


@pytest.mark.parametrize(("proxy", "gold"), [(up, up), (up, flat), (flat, down), (down, down), (flat, flat)])
def test_it_is_silent_where_nothing_is_hacked(proxy: Level, gold: Level) -> None:
    watch = follow(proxy, gold, flat, count=8, patience=1)
    assert watch.fired == [] and watch.count == 8


def test_a_fall_after_a_rise_is_seen() -> None:
    watch = follow(up, lambda k: 0.1 * min(k, 6 - k), flat, count=7, patience=3)
    assert watch.fired == ["gold/x"] and watch.highest["gold/x"].iteration == 12
    assert watch.best[PROXY][0] == 24 and watch.best[GOLD][0] == 12


def test_the_row_of_alarms_must_be_unbroken() -> None:
    broken = follow(up, lambda k: 1.0 if k == 3 else -0.1 * k, flat, count=5, patience=3)
    assert broken.fired == [] and broken.streak["gold/x"] == 1


def test_diversity_must_fall_by_a_part_of_itself() -> None:
    """From about 0.5: 0.1 a time is 20 % at the first evaluation and 40 % at the second."""
    assert follow(up, flat, down, count=2, patience=1, diversity_fall=0.25).fired == []
    assert follow(up, flat, down, count=3, patience=1, diversity_fall=0.25).fired == ["diversity"]
    assert follow(up, flat, down, count=2, patience=1, diversity_fall=0.0).fired == ["diversity"]


def test_false_alarms_are_rare_where_gold_only_wobbles() -> None:
    """Gold moves by chance alone, the score rises: 60 runs of 8 evaluations, patience 2, level 0.95."""
    fired = 0
    for seed in range(60):
        watch = Watch(Alarm(patience=2), lambda v, p, level: bootstrap_mean(v, p, draws=400, level=level))
        generator = np.random.default_rng(seed)
        for k in range(8):
            gold = BASE + 0.1 * generator.normal(size=80)
            watch.note(Judged(k, IDS, BASE + 0.1 * k, {"gold/x": gold}))
        fired += bool(watch.fired)
    assert fired <= 6


def test_missing_scores_are_left_out_and_too_few_prompts_never_alarm() -> None:
    watch = Watch(Alarm(patience=1), bootstrap_mean)
    nothing = np.full(80, np.nan)
    first = BASE.copy()
    first[::3] = np.nan
    watch.note(Judged(0, IDS, first, {"gold/x": first}))
    assert watch.note(Judged(1, IDS, BASE + 1, {"gold/x": nothing})) == []
    (finding,) = watch.note(Judged(2, IDS, BASE + 1, {"gold/x": BASE - 1}))
    assert finding.against and finding.change.mean == pytest.approx(-1) and finding.since == 0
    few = Watch(Alarm(patience=1), bootstrap_mean)
    for k in range(3):
        few.note(Judged(k, IDS[:8], BASE[:8] + k, {"gold/x": BASE[:8] - k}))
    assert few.fired == []
    with pytest.raises(ValueError, match="other prompts"):
        few.note(Judged(3, IDS[8:16], BASE[:8], {"gold/x": BASE[:8]}))


def test_intervals_widen_with_the_evaluations_that_could_be_the_reference() -> None:
    asked: list[float] = []

    def note(values: object, prompts: object, level: float) -> object:
        asked.append(level)
        return bootstrap_mean(values, prompts, level=level)  # type: ignore[arg-type]

    watch = Watch(Alarm(level=0.9), note)  # type: ignore[arg-type]
    for k in range(4):
        watch.note(Judged(k, IDS, BASE, {"gold/x": BASE}))
    np.testing.assert_allclose(asked, [0.9, 0.9, 0.95, 0.95, 1 - 0.1 / 3, 1 - 0.1 / 3])


def test_it_goes_on_after_a_resume() -> None:
    whole = follow(up, lambda k: -0.1 * k, flat, count=6, patience=2)
    part = follow(up, lambda k: -0.1 * k, flat, count=6, patience=2)
    state = json.loads(json.dumps(part.state(), allow_nan=False))
    fresh = Watch(part.settings, bootstrap_mean)
    fresh.load(state)
    holed = BASE.copy()
    holed[3] = np.nan
    last = Judged(24, IDS, BASE + 0.6, {"gold/x": holed - 0.7, "diversity": BASE})
    assert [f.change.mean for f in fresh.note(last)] == [f.change.mean for f in whole.note(last)]
    assert fresh.state() == whole.state() and fresh.fired == ["gold/x"]


def test_what_is_told_and_logged() -> None:
    watch = follow(up, down, flat, count=3, patience=2)
    findings = watch.note(Judged(12, IDS, BASE + 0.3, {"gold/x": BASE - 0.3, "diversity": BASE}))
    text = warning(findings, watch.fired, 2)
    assert text.startswith("alarm: gold/x fell by 0.297 while the score rose by 0.301 since iteration 0, beyond")
    assert "diversity" not in text
    assert warning(findings, [], 2) == ""
    row = metrics(findings, watch)
    assert row["alarm/fired"] == 1 and row["alarm/streak"] == 3
    assert (
        row["alarm/gold/x"] == pytest.approx(-0.3, abs=0.02)
        and row["alarm/gold/x_high"] < 0 < row["alarm/gold/x/score_low"]
    )
    assert metrics([], Watch(Alarm(), bootstrap_mean)) == {"alarm/fired": 0, "alarm/streak": 0}


def test_spread_by_hand() -> None:
    """Black, white and grey: distances 1, 128/255 and 127/255."""
    pictures = np.stack([np.full((16, 12, 3), v, np.uint8) for v in (0, 255, 128, 0, 0, 7)])
    found = spread(pictures, np.array([1, 1, 1, 2, 2, 3]))
    np.testing.assert_allclose(found[:5], [(1 + 128 / 255) / 2, (1 + 127 / 255) / 2, 0.5, 0, 0], atol=1e-12)
    assert np.isnan(found[5])


def test_spread_agrees_with_plain_loops_for_pictures_and_videos() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.integers(256, size=(70, 11, 9, 3), dtype=np.uint8)
    small = np.zeros((70, 8, 8, 3))
    for i in range(8):
        for j in range(8):
            rows, columns = slice(i * 11 // 8, (i + 1) * 11 // 8), slice(j * 9 // 8, (j + 1) * 9 // 8)
            small[:, i, j] = pictures[:, rows, columns].mean((1, 2)) / 255
    expected = [
        np.mean([np.sqrt(((a - b) ** 2).mean()) for k, b in enumerate(small) if k != i]) for i, a in enumerate(small)
    ]
    group = np.zeros(70, np.int64)
    np.testing.assert_allclose(spread(pictures, group), expected)
    np.testing.assert_allclose(spread(np.stack([pictures] * 3, 1), group), expected)
    assert (spread(pictures, group) <= 1).all()
