"""Comparisons of methods against numbers worked by hand: intervals over seeds and prompts, verdicts, diversity, tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flowrl.evaluation.comparison import (
    MethodRuns,
    clip_note,
    compare_methods,
    crossed_mean,
    last_mean,
    picture_spread,
    seed_mean,
    verdict,
)
from flowrl.evaluation.comparison_page import band, columns, markdown, picture_grid, show
from flowrl.evaluation.statistics import Interval, bootstrap_mean

NAN = float("nan")


# ----------------------------------------------------------------------------------------------------------- intervals


def test_one_seed_is_the_bootstrap_over_prompts() -> None:
    values, ids = np.random.default_rng(0).random(30), np.arange(30) // 3
    assert crossed_mean([values], ids, seed=4) == bootstrap_mean(values, ids, seed=4)


def test_equal_values_have_an_interval_of_no_width() -> None:
    found = crossed_mean(np.full((3, 12), 0.25), np.arange(12) // 2)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(("level", "low", "high"), [(0.4, 0.0, 1.0), (0.95, 0.0, 1.0)])
def test_two_seeds_that_differ_are_drawn_one_at_a_time(level: float, low: float, high: float) -> None:
    """Runs of 0 and of 1: a draw is one of them, so the 30% and 70% points are 0 and 1 (0.5 if both were drawn)."""
    found = crossed_mean(np.array([[0.0] * 8, [1.0] * 8]), np.arange(8), level=level)
    assert (found.mean, found.low, found.high) == (0.5, low, high)


def test_three_seeds_are_drawn_two_at_a_time() -> None:
    """Runs of 0, 0, 3: the mean of two is 0 (4/9), 1.5 (4/9) or 3 (1/9); the 5 to 95% and the 15 to 85% points."""
    runs = np.array([[0.0] * 6, [0.0] * 6, [3.0] * 6])
    wide, narrow = (crossed_mean(runs, np.arange(6), level=level) for level in (0.9, 0.7))
    assert (wide.mean, wide.low, wide.high) == (1.0, 0.0, 3.0)
    assert (narrow.low, narrow.high) == (0.0, 1.5)


def test_equal_runs_have_the_interval_of_one() -> None:
    values, ids = np.random.default_rng(1).normal(size=60), np.arange(60)
    one, three = crossed_mean([values], ids, draws=20_000), crossed_mean([values] * 3, ids, draws=20_000)
    assert three.mean == pytest.approx(one.mean)
    assert three.low == pytest.approx(one.low, abs=0.02) and three.high == pytest.approx(one.high, abs=0.02)


def test_the_mean_is_over_known_pictures() -> None:
    """Known values 1, 2, 3 and 4, 5 and twice 6: 27 / 7. A prompt without any value does not count as one."""
    values = [[1.0, 2.0, 3.0, NAN, NAN, NAN], [4.0, 5.0, NAN, 6.0, 6.0, NAN]]
    found = crossed_mean(values, [0, 1, 2, 3, 4, 5])
    assert found.mean == pytest.approx(27 / 7)
    assert found.low is not None
    assert crossed_mean(values, [0, 1, 2, 3, 3, 5]).low is None


def test_coverage_with_three_seeds() -> None:
    """Seeds, prompts and both together move the values; 95% intervals hold the truth in 90 to 99% of 200 worlds."""
    rng, held = np.random.default_rng(7), 0
    for world in range(200):
        values = rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (3, 40))
        found = crossed_mean(values, np.arange(40), seed=world, draws=300)
        assert found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / 200 <= 0.99


@pytest.mark.parametrize(
    ("values", "ids", "level", "message"),
    [
        ([0.0, 1.0], [0, 1], 0.95, r"values \[2\] must be \[S, N\] and prompt_ids \[2\]"),
        ([[0.0, 1.0]], [0], 0.95, r"values \[1, 2\] must be \[S, N\] and prompt_ids \[1\]"),
        ([[NAN], [NAN]], [0], 0.95, "no valid value"),
        ([[1.0], [1.0]], [0], 1.0, "level 1.0 must lie in"),
        ([[1.0], [1.0]], [0], 0.0, "level 0.0 must lie in"),
    ],
)
def test_bad_values_are_refused(values: Any, ids: list[int], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crossed_mean(values, ids, level=level)


def test_students_interval_over_seeds() -> None:
    """1, 2, 3: s = 1, t(0.975, 2) = 4.302653, so 2 +- 4.302653 / sqrt(3)."""
    found = seed_mean([1.0, 2.0, 3.0])
    assert found is not None and found.low is not None and found.high is not None
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert seed_mean([0.5, None]) == Interval(0.5, None, None)
    assert seed_mean([None, NAN]) is None


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        (Interval(1, 0.01, 2), "better"), (Interval(-1, -2, -0.01), "worse"), (Interval(1, 0.0, 2), "cannot tell"),
        (Interval(-1, -2, 0.0), "cannot tell"), (Interval(1, None, None), "cannot tell"), (None, "cannot tell"),
    ],
)  # fmt: skip
def test_verdicts(interval: Interval | None, word: str) -> None:
    assert verdict(interval) == word


# ----------------------------------------------------------------------------------------------------------- diversity


def test_spread_of_black_and_white_and_of_equal_pictures() -> None:
    """Two pictures at 0 and 1 have variance 1/2; with 0, 0, 1 it is 1/3. A lone picture has none."""
    black, white = np.zeros((24, 36, 3), np.uint8), np.full((24, 36, 3), 255, np.uint8)
    images = np.stack([black, white, white, white, black, black, white, black])
    found = picture_spread(images, [7, 7, 3, 3, 5, 5, 5, 9])
    assert found == {7: pytest.approx(math.sqrt(1 / 2)), 3: 0.0, 5: pytest.approx(math.sqrt(1 / 3))}


def test_spread_is_of_block_means() -> None:
    """Fine stripes of 0 and 254 look like a flat 127 in blocks of two; in blocks of one they do not."""
    stripes = np.zeros((1, 24, 24, 3), np.uint8)
    stripes[:, ::2] = 254
    pictures = np.concatenate([stripes, np.full((1, 24, 24, 3), 127, np.uint8)])
    assert picture_spread(pictures, [0, 0])[0] == pytest.approx(0.0, abs=1e-12)
    assert picture_spread(pictures, [0, 0], cells=24)[0] == pytest.approx(127 / 255 / math.sqrt(2))


def test_blocks_of_unequal_length_keep_their_means() -> None:
    """5 columns in 2 blocks are 2 and 3 wide: (0 + 30) / 2 = 15 and (60 + 90 + 150) / 3 = 100; against black."""
    row = np.array([0, 30, 60, 90, 150], np.uint8)
    picture = np.broadcast_to(row[None, :, None], (2, 5, 3))
    expected = math.sqrt((15**2 + 100**2) / 2 / 2) / 255
    assert picture_spread(np.stack([picture, 0 * picture]), [0, 0], cells=2)[0] == pytest.approx(expected)


def test_spread_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"images \[2, 4, 4, 3\] must be \[N, H, W, 3\] for 3 prompt_ids"):
        picture_spread(np.zeros((2, 4, 4, 3), np.uint8), [0, 0, 1])


# ------------------------------------------------------------------------------------------------------------- methods


def runs_of(label: str, gains: list[float], *, strict: bool = True, prompts: int = 6, kl: bool = False) -> MethodRuns:
    """One run a gain: base scores prompt / 10, tuned that plus the gain; strict in every second prompt, all when tuned."""
    samples, metrics = [], []
    for gain in gains:
        rows = []
        for which in ("base", "tuned"):
            for prompt in range(prompts):
                score = prompt / 10 + gain * (which == "tuned")
                rows.append({
                    "which": which, "prompt_id": prompt, "member": 0, "seed": 9, "score": score,
                    "strict": (prompt % 2 == 0 or which == "tuned") if strict else None,
                    "scores": {"trained": score, "gold": 1 - score},
                })  # fmt: skip
        samples.append(rows)
        metrics.append([
            {"iteration": i + 1, "score/mean": gain * i, "policy/kl": 0.5, "policy/clip_fraction": 0.02 * i,
             "calls/forward_samples": 100, "calls/backward_samples": 30, "time/iteration_s": 2.0}
            for i in range(20)
        ])  # fmt: skip
    spread = [{"base": dict.fromkeys(range(prompts), 0.3), "tuned": dict.fromkeys(range(prompts), 0.1)} for _ in gains]
    return MethodRuns(label, metrics, samples, spread, kl)


def test_two_methods_side_by_side() -> None:
    """Gains 0.1 and 0.3, against 0.2 and 0.4: changes 0.2 and 0.3, a difference of 0.1 for both seeds, so better."""
    first, second = runs_of("first", [0.1, 0.3], strict=False, kl=True), runs_of("second", [0.2, 0.4], strict=False)
    found = compare_methods([first, second], gold=["gold"])
    assert found["measure"] == "score"
    assert found["base"]["score"]["mean"] == pytest.approx(0.25)
    one, two = found["methods"]["first"], found["methods"]["second"]
    assert one["held_out"]["score"]["change"]["mean"] == pytest.approx(0.2)
    assert two["held_out"]["score"]["tuned"]["mean"] == pytest.approx(0.55)
    assert two["gold"]["gold"]["change"]["mean"] == pytest.approx(-0.3)
    assert list(one["held_out"]) == ["score"] and list(one["gold"]) == ["gold"]
    assert one["against"] is None
    difference = two["against"]["score"]
    assert (difference["mean"], difference["low"], difference["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert two["against"]["verdict"] == "better"
    assert two["against"]["gold"]["high"] == pytest.approx(-0.1)
    # The last tenth of 20 iterations: (18 + 19) / 2 = 18.5 times the mean gain.
    assert one["train_score"]["mean"] == pytest.approx(18.5 * 0.2)
    assert one["kl"]["mean"] == 0.5 and two["kl"] is None
    assert one["clip_fraction"] == pytest.approx(0.19)
    assert one["calls"] == {"forward_samples": 2000, "backward_samples": 600} and one["seconds"] == 40
    assert one["diversity"]["change"]["mean"] == pytest.approx(-0.2)
    assert found["base"]["diversity"]["mean"] == pytest.approx(0.3)


def test_the_order_of_methods_turns_the_verdict() -> None:
    first, second = runs_of("first", [0.3], strict=False), runs_of("second", [0.2], strict=False)
    assert compare_methods([first, second])["methods"]["second"]["against"]["verdict"] == "worse"


def test_strict_decides_where_it_was_recorded() -> None:
    """Both methods solve every prompt, so strict cannot tell them apart though the scores differ."""
    found = compare_methods([runs_of("first", [0.1, 0.1]), runs_of("second", [0.2, 0.2])])
    assert found["measure"] == "strict"
    assert found["methods"]["second"]["held_out"]["strict"]["change"]["mean"] == pytest.approx(0.5)
    assert found["methods"]["second"]["against"]["strict"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["methods"]["second"]["against"]["verdict"] == "cannot tell"


def test_seeds_are_paired_in_order() -> None:
    """Gains 0, 1 against 0.1, 1.1: paired, the difference is 0.1 sure; unpaired it would drown in the seeds."""
    found = compare_methods([runs_of("a", [0.0, 1.0], strict=False), runs_of("b", [0.1, 1.1], strict=False)])
    assert found["methods"]["b"]["against"]["verdict"] == "better"
    crossed = compare_methods([runs_of("a", [0.0, 1.0], strict=False), runs_of("b", [1.1, 0.1], strict=False)])
    assert crossed["methods"]["b"]["against"]["verdict"] == "cannot tell"


def test_other_pictures_or_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="b was judged on other pictures, or other seeds, than the first method"):
        compare_methods([runs_of("a", [0.1]), runs_of("b", [0.1], prompts=5)])
    with pytest.raises(ValueError, match="b was judged on other pictures, or other seeds, than the first method"):
        compare_methods([runs_of("a", [0.1]), runs_of("b", [0.1, 0.2])])
    mixed = runs_of("a", [0.1, 0.1])
    mixed.samples[1].pop()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="the runs of a were judged on different pictures"):
        compare_methods([mixed])


@pytest.mark.parametrize(("count", "mean"), [(1, 0.0), (4, 3.0), (20, 18.5), (30, 28.0)])
def test_the_last_tenth(count: int, mean: float) -> None:
    rows = [{"score/mean": float(i)} for i in range(count)]
    assert last_mean([*rows, {"score/mean": None}, {}], "score/mean") == mean
    assert last_mean([{}], "score/mean") is None


@pytest.mark.parametrize(
    ("fraction", "updates", "others", "warns"),
    [
        (0.05, 4, ["guard"], False), (0.049, 4, ["guard"], True), (0.3, 3, ["guard"], True), (None, 8, ["guard"], True),
        (0.0, 1, [], False),
    ],
)  # fmt: skip
def test_clip_warning(fraction: float | None, updates: int, others: list[str], warns: bool) -> None:
    fact, warning = clip_note("plain", fraction, updates, others)
    shown = "was not recorded" if fraction is None else f"{100 * fraction:.1f}%"
    assert fact.startswith(f"clip fraction of plain: {shown}, at {updates} update")
    assert bool(warning) is warns
    assert not warns or (fact in warning and warning.startswith("guard differs from plain in ratio or clipping"))


# ---------------------------------------------------------------------------------------------------------------- page


def result_of(*methods: MethodRuns) -> dict[str, Any]:
    found = compare_methods(methods, ["gold"])
    for label, method in found["methods"].items():
        method |= {"settings": f"x.y={label}", "iterations": 20}
        method["planned"] = {"forward_samples": 2500.0, "backward_samples": 600.0}
    return found | {
        "command": "flowrl compare it", "version": "0", "machine": {"device": "cpu"}, "seeds": [0, 1],
        "budget": "samples", "budget_text": "Equal.", "clip_text": "clip", "warnings": ["beware"],
    }  # fmt: skip


def test_the_table_in_words() -> None:
    head, rows = columns(result_of(runs_of("first", [0.1, 0.3], kl=True), runs_of("second", [0.2, 0.4])))
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(cells) == ["base", "first", "second"]
    assert cells["base"]["held-out score"].startswith("0.250 [")
    assert cells["base"]["held-out strict"].startswith("50.0% [")
    assert cells["first"]["held-out strict"].startswith("+50.0 [")
    assert cells["second"]["gold: gold"].startswith("-0.300 [-0.")
    assert (cells["first"]["KL"], cells["second"]["KL"]) == ("0.500 [0.500, 0.500]", "-")
    assert cells["first"]["counted / planned"] == "3,200 / 3,700"  # 2000 + 2 x 600 of 2500 + 2 x 600
    assert cells["first"]["against first"] == "-"
    assert cells["second"]["against first"] == "cannot tell: +0.0 [+0.0, +0.0]"
    assert "KL" not in columns(result_of(runs_of("first", [0.1]), runs_of("second", [0.2])))[0]


def test_markdown_holds_command_warnings_and_settings() -> None:
    text = markdown(result_of(runs_of("first", [0.1, 0.3]), runs_of("a|b", [0.2, 0.4])))
    assert "`flowrl compare it`" in text and "**Warning:** beware" in text and "- first: `x.y=first`" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1 and len(table) == 5


def test_numbers_as_shown() -> None:
    assert show({"mean": 0.0312, "low": 0.012, "high": 0.05}, percent=True, signed=True) == "+3.1 [+1.2, +5.0]"
    assert show({"mean": 0.5, "low": None, "high": None}) == "0.500"
    assert show(None) == "-"


def test_bands_over_seeds() -> None:
    """Values i x 0.1 and i x 0.3: mean 0.2 i; the two differ by 0.2 i, so two standard errors are 0.2 i."""
    line = band(runs_of("m", [0.1, 0.3]), "score/mean", smooth=True, color="#000000", scale=0.5)
    assert line is not None and line.low is not None and line.high is not None
    assert (line.x[4], line.y[4]) == pytest.approx((2.5, 0.8))  # the moving mean of a straight line is the line
    assert (line.low[4], line.high[4]) == pytest.approx((0.0, 1.6))
    one = band(runs_of("m", [0.1]), "score/mean", smooth=False, color="#000000")
    assert one is not None and one.low is None
    assert band(runs_of("m", [0.1]), "eval/strict", smooth=False, color="#000000") is None


def test_the_grid_holds_every_picture() -> None:
    """Rows of flat pictures, found again by their colours; a score above the base's is green, below red."""
    pictures = [np.full((2, 36, 36, 3), shade, np.uint8) for shade in (40, 90, 140)]
    scores: list[list[float | None]] = [[0.5, 0.5], [0.7, 0.5], [0.2, None]]
    rows = list(zip(["base", "one", "two"], pictures, scores, strict=True))
    page = np.asarray(picture_grid(rows, ["a red ring", "a long sentence about two blue squares and a circle"]))
    for shade in (40, 90, 140):
        assert (page == shade).all(-1).sum() == pytest.approx(2 * 144 * 144, rel=0.01)
    green, red = (page == (0x1A, 0x7F, 0x37)).all(-1), (page == (0xCF, 0x22, 0x2E)).all(-1)
    assert green.any() and red.any() and np.argwhere(green)[:, 0].max() < np.argwhere(red)[:, 0].min()
    with pytest.raises(ValueError, match="row two holds"):
        picture_grid([*rows[:2], ("two", pictures[2][:1], [0.2])], ["a", "b"])
