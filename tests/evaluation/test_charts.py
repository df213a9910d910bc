"""Charts put values where they belong, leave gaps where there are none, and escape text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from flowrl.evaluation.charts import Series, Trace, line_chart, nice_ticks, scatter_chart, small_multiples, stacked_bar


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """Points of each stroked line, in pixels."""
    paths = re.findall(r'd="M([^"]*)" fill="none" stroke="', svg)
    return [[tuple(map(float, pair)) for pair in re.findall(r"(\S+) (\S+)", path)] for path in paths]  # type: ignore[misc]


def test_a_straight_line_is_straight_and_up_is_up() -> None:
    (path,) = lines(line_chart([Series("a", [0, 1, 2], [0.0, 0.5, 1.0])], title="t"))
    (x0, y0), (x1, y1), (x2, y2) = path
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2 and y0 > y2


def test_axis_labels_lie_at_their_values() -> None:
    svg = line_chart([Series("a", [0, 10], [0.0, 1.0])], title="t")
    heights = {
        text.text: float(text.get("y", "0")) - 4
        for text in ET.fromstring(svg).iter("text")
        if text.get("class") == "tick"
    }
    (path,) = lines(svg)
    assert heights["0.0"] == pytest.approx(path[0][1], abs=0.1)
    assert heights["1.0"] == pytest.approx(path[1][1], abs=0.1)


def test_missing_values_break_the_line() -> None:
    paths = lines(line_chart([Series("a", range(6), [1, 2, None, 3, 4, math.nan])], title="t"))
    assert [len(path) for path in paths] == [2, 2]


def test_a_band_encloses_its_line() -> None:
    svg = line_chart([Series("a", [0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])], title="t")
    (band,) = re.findall(r'd="M([^"]*)Z"', svg)
    heights = [float(pair[1]) for pair in re.findall(r"(\S+) (\S+)", band)]
    (path,) = lines(svg)
    assert heights[0] < path[0][1] < heights[3] and heights[1] < path[1][1] < heights[2]


def test_a_lone_point_is_drawn() -> None:
    assert "<circle" in line_chart([Series("a", [3], [1.0])], title="t")


@pytest.mark.parametrize("values", [[], [None, None], [math.nan, math.inf]])
def test_no_values_are_said(values: list[float | None]) -> None:
    assert "no values yet" in line_chart([Series("a", range(len(values)), values)], title="t")
    assert "no values yet" in stacked_bar([("a", 0.0)], title="t")


def test_several_series_have_one_legend_entry_each_and_one_has_none() -> None:
    two = line_chart([Series("run A", [0, 1], [0, 1]), Series("run B", [0, 1], [1, 0])], title="t")
    assert two.count("run A") == two.count("run B") == 1
    assert "run A" not in line_chart([Series("run A", [0, 1], [0, 1])], title="t")


def test_small_multiples_share_their_axis() -> None:
    svg = small_multiples([("s0", [Series("", [0, 1], [0.0, 0.0])]), ("s1", [Series("", [0, 1], [0.0, 10.0])])])
    first, second = lines(svg)
    assert first[0][1] == second[0][1] == first[1][1]
    assert svg.count("<svg") == 2


def test_bar_widths_are_shares() -> None:
    svg = stacked_bar([("rollout", 3.0), ("update", 1.0)], title="t", width=416)
    widths = [float(rect.get("width", "0")) for rect in ET.fromstring(svg).iter("rect") if rect.get("height") == "22"]
    assert widths == [300.0, 100.0]
    assert "rollout 3 s (75.0%)" in svg


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 47, [0, 10, 20, 30, 40, 50]),
        (-0.012, 0.011, [-0.015, -0.01, -0.005, 0, 0.005, 0.01, 0.015]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e5, 1e12])
def test_any_size_of_value_gives_distinct_labels(scale: float) -> None:
    svg = line_chart([Series("a", [0, 1], [1.0 * scale, 1.7 * scale])], title="t")
    labels = [text.text for text in ET.fromstring(svg).iter("text") if text.get("text-anchor") == "end"]
    assert len(labels) >= 3 and len(set(labels)) == len(labels)


def test_constant_values_still_get_an_axis() -> None:
    for value in (0.0, 5.0, -3.0):
        assert len(lines(line_chart([Series("a", [0, 1], [value, value])], title="t"))) == 1


def test_text_is_escaped_and_the_result_is_valid_xml() -> None:
    svg = line_chart([Series('<b>"&', [0, 1], [0, 1]), Series("x", [0], [1])], title='</svg><script>"', x_label="<i>")
    names = [element.tag for element in ET.fromstring(svg).iter()]
    assert "script" not in names and "b" not in names


def test_a_scatter_places_its_points_and_joins_them_in_order() -> None:
    """x is not sorted: the path goes back where the values do. Equal steps of a value are equal steps on the page."""
    drawn = scatter_chart([Trace("run", [(0.0, 1.0, "0"), (2.0, 3.0, "16"), (1.0, 2.0, "32")])], title="t", x_label="x")
    dots = [(float(a), float(b)) for a, b in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert len(dots) == 3 and dots[2][0] == pytest.approx((dots[0][0] + dots[1][0]) / 2, abs=0.1)
    assert dots[2][1] == pytest.approx((dots[0][1] + dots[1][1]) / 2, abs=0.1) and dots[1][1] < dots[0][1]
    path = re.search(r'<path d="M([^"]*)" fill="none" stroke=', drawn)
    assert path is not None
    assert [float(v) for v in path[1].split()] == [v for dot in dots for v in dot]
    assert all(f">{name}</text>" in drawn for name in ("0", "16", "32")) and 'r="4"' in drawn


def test_a_scatter_has_bars_where_there_are_intervals_and_skips_gaps() -> None:
    nan = float("nan")
    trace = Trace("a", [(0.0, 1.0, "0"), (nan, 1.0, "1"), (1.0, 2.0, "2")], [0.5, 0.5, None], [1.5, 1.5, None])
    drawn = scatter_chart([trace, Trace("b", [])], title="t", x_label="x")
    assert drawn.count("<circle") == 2 and len(re.findall(r"V[\d.]+\" stroke=", drawn)) == 1
    assert ">a</text>" in drawn and ">b</text>" in drawn
    assert "no values yet" in scatter_chart([], title="t", x_label="x")


def test_a_scatter_names_only_some_of_many_points() -> None:
    points = [(float(i), float(i), f"it{i}") for i in range(50)]
    named = re.findall(r">(it\d+)<", scatter_chart([Trace("", points)], title="t", x_label="x", names=4))
    assert named == ["it0", "it16", "it33", "it49"]
