"""Intervals over prompts against exact cases and a coverage simulation; summaries against hand-made rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from flowrl.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    bootstrap_tag_mean,
    paired_difference,
    summarise,
    summary_text,
)

NAN = float("nan")


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap_mean([0.5] * 10, range(10)) == Interval(0.5, 0.5, 0.5)


def test_the_mean_is_over_pictures_not_over_prompts() -> None:
    found = bootstrap_mean([1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 2, 3, 4, 5])
    assert found.mean == pytest.approx(3 / 7)


@pytest.mark.parametrize(("prompts", "has"), [(4, False), (5, True)])
def test_fewer_than_five_prompts_give_no_interval(prompts: int, has: bool) -> None:
    found = bootstrap_mean(np.arange(prompts * 100) % 2, np.arange(prompts * 100) % prompts)
    assert found.mean == 0.5
    assert (found.low is not None) is has and (found.high is not None) is has


def test_the_width_agrees_with_the_normal_interval_of_the_mean() -> None:
    """100 prompts with one picture each: half width 1.96 sd / sqrt(100) of the plug-in sd."""
    values = np.random.default_rng(3).normal(2.0, 1.0, 100)
    found = bootstrap_mean(values, np.arange(100), draws=20_000)
    half = 1.96 * values.std() / 10
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)
    narrow = bootstrap_mean(values, np.arange(100), draws=20_000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * values.std() / 10, abs=0.02)


def test_copies_of_a_picture_add_no_certainty() -> None:
    """Prompts are resampled: 16 equal pictures of each prompt leave the interval as one picture does."""
    values, ids = np.random.default_rng(0).random(40), np.arange(40)
    many, one = bootstrap_mean(np.repeat(values, 16), np.repeat(ids, 16)), bootstrap_mean(values, ids)
    assert (many.mean, many.low, many.high) == pytest.approx((one.mean, one.low, one.high), rel=1e-12)


def test_coverage_with_correlated_pictures() -> None:
    """30 prompts x 4 pictures with a shared prompt effect: 95% intervals hold the truth in 90 to 98% of 300 worlds."""
    rng = np.random.default_rng(1)
    ids, held = np.repeat(np.arange(30), 4), 0
    for world in range(300):
        values = rng.normal(0, 1, 30).repeat(4) + rng.normal(0, 0.5, 120)
        found = bootstrap_mean(values, ids, seed=world, draws=400)
        assert found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / 300 <= 0.98


def test_seeded() -> None:
    values, ids = np.random.default_rng(0).random(40), np.arange(40)
    assert bootstrap_mean(values, ids, seed=7) == bootstrap_mean(values, ids, seed=7)
    assert bootstrap_mean(values, ids, seed=7) != bootstrap_mean(values, ids, seed=8)


def test_chunks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ids = np.random.default_rng(0).random(40), np.arange(40)
    whole = bootstrap_mean(values, ids)
    monkeypatch.setattr("flowrl.evaluation.statistics._CHUNK", 40 * 7)
    assert bootstrap_mean(values, ids) == whole


def test_missing_scores_are_left_out_never_counted_as_zero() -> None:
    with_gaps = bootstrap_mean([1, NAN, 1, 1, 1, NAN, 0], [0, 0, 1, 2, 3, 9, 4])
    assert with_gaps == bootstrap_mean([1, 1, 1, 1, 0], [0, 1, 2, 3, 4])
    assert with_gaps.mean == 0.8


def test_pairing_removes_what_both_sides_share() -> None:
    base = np.random.default_rng(0).normal(0, 5, 60)
    found = paired_difference(base, base + 0.25, np.arange(60))
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_difference([1, NAN, 3], [2, 2, NAN], [0, 1, 2]).mean == 1.0


@pytest.mark.parametrize(
    ("values", "ids", "level", "message"),
    [
        ([1.0], [1, 2], 0.95, r"values \[1\] and prompt_ids \[2\] must be"),
        ([NAN], [1], 0.95, "no valid value"),
        ([], [], 0.95, "no valid value"),
        ([1.0], [1], 1.0, "level 1.0 must lie in"),
    ],
)
def test_bad_input_is_named(values: list[float], ids: list[int], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, ids, level=level)


def row(which: str, prompt: int, member: int, strict: bool | None, dense: float | None, **more: Any) -> dict[str, Any]:
    scores = {"jpeg": 2.0, "compositional": dense}
    made = {"iteration": 0, "which": which, "prompt_id": prompt, "prompt": f"p{prompt}", "tag": "ab"[prompt % 2]}
    return made | {"member": member, "seed": 1, "scores": scores, "strict": strict, "image": None} | more


def pairs() -> list[dict[str, Any]]:
    """10 prompts x 2: base strict on member 0 alone; tuned strict also on member 1 of even prompts (tag a)."""
    rows = []
    for prompt in range(10):
        for member in range(2):
            rows.append(row("base", prompt, member, member == 0, 0.5 + 0.5 * (member == 0)))
            good = member == 0 or prompt % 2 == 0
            rows.append(row("tuned", prompt, member, good, 0.25 + 0.75 * good, iteration=60))
    return rows


def test_summary_by_hand() -> None:
    found = summarise(pairs())
    assert found["dense_reward"] == "compositional"
    assert (found["base"]["pictures"], found["base"]["prompts"]) == (20, 10)
    assert found["base"]["strict"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["base"]["dense"]["mean"] == 0.75
    assert found["tuned"]["strict"]["mean"] == 0.75
    assert found["tuned"]["by_tag"]["a"]["strict"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["tuned"]["by_tag"]["b"]["strict"]["mean"] == 0.5
    change = found["difference"]
    assert change["strict"]["mean"] == 0.25
    assert change["dense"]["mean"] == pytest.approx(0.0625)  # (5 x 0.5 - 5 x 0.25) / 20
    assert change["by_tag"]["a"]["strict"]["mean"] == 0.5
    assert change["by_tag"]["b"]["dense"]["mean"] == -0.125
    assert change["scores"]["jpeg"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert change["outcomes"] == {"better": 5, "same": 10, "worse": 5}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_pairs_are_matched_by_prompt_member_and_seed_in_any_order() -> None:
    rows = pairs()
    assert summarise(rows[::-1])["difference"]["strict"]["mean"] == 0.25
    rows[1]["seed"] = 2  # its base has another seed: no longer a pair
    assert summarise(rows)["difference"]["pictures"] == 19


def test_only_the_last_tuned_iteration_and_no_other_checkpoint_counts() -> None:
    early = [row("tuned", p, m, False, 0.0, iteration=30) for p in range(10) for m in range(2)]
    between = [row("checkpoint", p, 0, False, 0.0, iteration=60) for p in range(10)]
    assert summarise(early + between + pairs()) == summarise(pairs())
    assert summarise(pairs() + between + early) == summarise(pairs())


def test_a_failed_score_is_left_out_of_its_side_and_of_the_pair() -> None:
    rows = pairs()
    rows[0] = row("base", 0, 0, None, None)
    found = summarise(rows)
    assert found["base"]["strict"]["mean"] == pytest.approx(9 / 19)
    assert found["difference"]["outcomes"] == {"better": 5, "same": 9, "worse": 5}


def test_sides_that_are_missing_are_none() -> None:
    base = [r for r in pairs() if r["which"] == "base"]
    found = summarise(base)
    assert found["tuned"] is None and found["difference"] is None
    assert summarise([])["base"] is None
    no_strict = summarise([r | {"strict": None, "scores": {"jpeg": None}} for r in base])
    assert no_strict["base"]["strict"] is None and no_strict["base"]["dense"] is None
    assert summarise([r | {"scores": {}} for r in pairs()])["difference"]["dense"] is None


def test_text_table() -> None:
    lines = summary_text(summarise(pairs())).splitlines()
    assert lines[0].split() == ["base", "tuned", "change"]
    assert lines[1].split() == [
        "strict", "50.0%", "[50.0,", "50.0]", "75.0%", "[60.0,", "90.0]", "+25.0", "[+10.0,", "+40.0]",
    ]  # fmt: skip
    assert lines[1].index("+25.0") == lines[0].index("change")
    assert any(line.startswith("  a ") and "+50.0" in line for line in lines)
    assert "20 pictures of 10 prompts" in lines[-6] and "percentage points" in lines[-6]
    assert lines[-5:] == [
        "dense score: 5 better, 10 the same, 5 worse",
        "",
        "wins of tuned over base, a tie counting half",
        "  jpeg           50.0% [50.0, 50.0]",
        "  compositional  50.0% [35.0, 65.0]",
    ]


def test_wins_count_a_tie_half() -> None:
    found = summarise(pairs())["difference"]["wins"]["compositional"]
    assert found == {"rate": found["rate"], "better": 5, "same": 10, "worse": 5} and found["rate"]["mean"] == 0.5
    rows = pairs()
    rows[3] = row("tuned", 0, 1, True, None, iteration=60)  # one that got better has no score any more
    assert summarise(rows)["difference"]["wins"]["compositional"]["rate"]["mean"] == pytest.approx((4 + 10 / 2) / 19)


def test_rows_of_one_text_are_one_prompt() -> None:
    """GenEval's file names each prompt four times: copies add no certainty, and count as one prompt."""
    rows = [
        r | {"prompt_id": 100 * m + p}
        for p in range(8)
        for m in range(4)
        for r in [row("base", p, 0, p % 3 == 0, p / 8)]
    ]
    found, once = summarise(rows)["base"], summarise([row("base", p, 0, p % 3 == 0, p / 8) for p in range(8)])["base"]
    assert (found["pictures"], found["prompts"]) == (32, 8)
    assert found["strict"] == pytest.approx(once["strict"]) and found["dense"] == pytest.approx(once["dense"])


def test_the_mean_over_tags_weighs_tags_alike() -> None:
    values, tags = [1.0] * 30 + [0.0] * 5 + [0.5] * 5, ["a"] * 30 + ["b"] * 5 + ["c"] * 5
    assert bootstrap_tag_mean(values, range(40), tags) == Interval(0.5, 0.5, 0.5)
    assert bootstrap_mean(values, range(40)).mean == 32.5 / 40
    assert bootstrap_tag_mean(values[:34], range(34), tags[:34]) == Interval(0.5, None, None)  # b has four prompts
    noisy = np.random.default_rng(0).normal(0, 1, 200)
    found = bootstrap_tag_mean(noisy, range(200), ["a"] * 40 + ["b"] * 160, draws=20_000)
    half = 1.96 * np.sqrt(noisy[:40].var() / 40 + noisy[40:].var() / 160) / 2
    assert found.mean == pytest.approx((noisy[:40].mean() + noisy[40:].mean()) / 2)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_components_gold_and_diversity_of_rows() -> None:
    rows = []
    for at, r in enumerate(pairs()):
        parts = {"ocr": {"exact": float(at % 4 == 0), "edit": 0.5, "confidence": 0.1}}
        near = {"cells": {"spread": 0.25, "vendi": None}}
        rows.append(r | {"components": parts, "gold": 2.0 * (r["which"] == "tuned"), "diversity": near})
    found = summarise(rows)
    assert set(found["base"]["accuracy"]) == {"ocr/exact", "ocr/edit"}
    exact = found["base"]["accuracy"]["ocr/exact"]
    assert exact["overall"]["mean"] == exact["tag_mean"]["mean"] == 0.5 and exact["by_tag"]["a"]["mean"] == 0.5
    assert found["tuned"]["accuracy"]["ocr/exact"]["overall"]["mean"] == 0.0
    assert found["difference"]["gold"]["mean"] == 2.0 and found["base"]["diversity"]["cells"]["vendi"] is None
    text = summary_text(found)
    for line in (
        "gold, weighted",
        "exact (ocr) ",
        "exact (ocr), mean of tags",
        "edit (ocr) ",
        "spread (cells)",
    ):
        assert line in text
    assert "vendi" not in text  # nothing to average
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_text_says_when_it_cannot_tell() -> None:
    few = [r for r in pairs() if r["prompt_id"] < 4]
    assert "+25.0 (too few prompts)" in summary_text(summarise(few))
    assert summary_text(summarise([])) == summary_text({}) == "no evaluated pictures"
