"""The compositional judge on hand-made detections: GenEval's rules, its mended soft score, and what must not pay."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from flowrl.rewards.compositional import judge

from flowrl.data.geneval import RELATIONS
from flowrl.records import Detection


def thing(
    label: str, color: str = "red", x: float = 18, y: float = 18, size: float = 8, score: float = 1.0
) -> Detection:
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color)


def include(*clauses: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"tag": "t", "include": list(clauses), "exclude": list(exclude)}


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


CIRCLE = include(clause("circle"))
RED = include(clause("circle", color="red"))
BOTH = include(clause("circle", color="red"), clause("circle", color="blue"))
TWO = include(clause("circle", 2), exclude=(clause("circle", 3),))
TWO_RED = include(clause("circle", 2, color="red"))
LEFT = include(clause("square"), clause("circle", position=["left of", 0]))
C, S, B, BLUE = thing("circle"), thing("square"), thing("blob"), thing("circle", "blue")
A_LEFT, A_RIGHT, MIDDLE = thing("circle", x=6), thing("circle", x=30), thing("square", x=18)

CASES = [
    # metadata, detections, strict, dense (worked by hand), reason
    (CIRCLE, [C], True, 1.0, ""),
    (CIRCLE, [], False, (0 + 0 + 1) / 3, "no circle"),
    (CIRCLE, [S], False, (0 + 0 + 1) / 3, "no circle"),
    (CIRCLE, [C, S], False, (1 + 1 + 1 / 2) / 3, "1 objects more than the 1 asked for"),
    (CIRCLE, [C, B], False, (1 + 1 + 1 / 2) / 3, "1 objects more than the 1 asked for"),
    (CIRCLE, [C, BLUE], False, (1 + 0 + 1 / 2) / 3, "2 x circle, 1 asked for"),
    (CIRCLE, [C] * 17, False, (1 + 0 + 1 / 17) / 3, "17 x circle, 1 asked for"),
    (RED, [C], True, 1.0, ""),
    (RED, [BLUE], False, (1 + 1 + 0 + 1) / 4, "0 red circle, 1 asked for"),
    (RED, [BLUE, C], False, (1 + 1 + 1 + 1 / 2) / 4, "1 objects more than the 1 asked for"),
    (BOTH, [C, BLUE], True, 1.0, ""),
    (BOTH, [C], False, (3 + 0 + 0 + 0 + 1) / 7, "no circle"),
    # The second red circle stands in for the blue one, in the wrong colour.
    (BOTH, [C, C], False, (3 + 1 + 1 + 0 + 1) / 7, "0 blue circle, 1 asked for"),
    (BOTH, [C, C, BLUE], False, (1 + 0 + 1 + 3 + 1 / 2) / 7, "2 x circle, 1 asked for"),
    (TWO, [C, BLUE], True, 1.0, ""),
    (TWO, [C], False, (1 + 1 / 2 + 1 + 1) / 4, "1 x circle, 2 asked for"),
    (TWO, [C, C, BLUE], False, (1 + 1 / 2 + 0 + 1 / 2) / 4, "3 x circle, 2 asked for"),
    (TWO, [C, C, S], False, (1 + 1 + 1 + 1 / 2) / 4, "1 objects more than the 2 asked for"),
    (TWO, [C] * 9, False, (1 + 0 + 0 + 1 / 8) / 4, "9 x circle, 2 asked for"),
    (TWO_RED, [C, BLUE], False, (1 + 1 + 1 / 2 + 1) / 4, "1 red circle, 2 asked for"),
    (LEFT, [A_LEFT, MIDDLE], True, 1.0, ""),
    (LEFT, [A_RIGHT, MIDDLE], False, (4 + 0 + 1) / 6, "circle not left of square"),
    (LEFT, [A_LEFT], False, (0 + 0 + 1 + 1 + 0 + 1) / 6, "no square"),
]


@pytest.mark.parametrize(("metadata", "found", "strict", "dense", "reason"), CASES)
def test_worked_cases(
    metadata: dict[str, Any], found: list[Detection], strict: bool, dense: float, reason: str
) -> None:
    copies = [Detection(d.label, d.score, d.box, d.color) for d in found]
    verdict = judge(metadata, copies)
    assert verdict.strict is strict and verdict.dense == pytest.approx(dense)
    assert verdict.reason == reason


def test_one_object_cannot_pay_for_two_clauses() -> None:
    any_and_red = include(clause("circle"), clause("circle", color="red"))
    assert not judge(any_and_red, [C]).strict
    assert judge(any_and_red, [C]).dense < judge(any_and_red, [C, BLUE]).dense == 1.0
    assert judge(any_and_red, [BLUE, C]).strict and judge(any_and_red, [C, thing("circle", "red", x=3)]).strict


def test_hedging_a_position_with_a_second_object_does_not_pay() -> None:
    honest = judge(LEFT, [A_RIGHT, MIDDLE]).dense
    for order in itertools.permutations([A_LEFT, A_RIGHT, MIDDLE]):
        verdict = judge(LEFT, list(order))
        assert not verdict.strict and verdict.dense < 1
    right_sure = [thing("circle", x=6, score=0.8), thing("circle", x=30, score=0.9), MIDDLE]
    assert judge(LEFT, right_sure).dense < honest


def test_a_position_must_hold_between_all_objects_of_both_clauses() -> None:
    pair = include(clause("square"), clause("circle", 2, position=["left of", 0]))
    assert judge(pair, [A_LEFT, thing("circle", x=5, y=30), MIDDLE]).strict
    assert judge(pair, [A_LEFT, A_RIGHT, MIDDLE]).reason == "circle not left of square"


def test_a_position_may_point_forwards() -> None:
    ahead = include(clause("circle", position=["left of", 1]), clause("square"))
    assert judge(ahead, [A_LEFT, MIDDLE]).strict and not judge(ahead, [A_RIGHT, MIDDLE]).strict


def test_sure_detections_and_right_colours_go_first() -> None:
    weak, sure = thing("circle", x=30, score=0.4), thing("circle", x=6, score=0.9)
    assert judge(LEFT, [weak, sure, MIDDLE], exact=False).strict
    assert not judge(LEFT, [thing("circle", x=30, score=0.95), sure, MIDDLE], exact=False).strict
    red_left = include(clause("square"), clause("circle", color="red", position=["left of", 0]))
    assert judge(red_left, [thing("circle", "blue", x=30), A_LEFT, MIDDLE], exact=False).strict


def test_min_score_drops_detections() -> None:
    assert judge(CIRCLE, [C, thing("square", score=0.2)], min_score=0.3).strict
    assert judge(CIRCLE, [thing("circle", score=0.2)], min_score=0.3).reason == "no circle"


def test_without_exact_a_count_is_a_least_count_and_exclude_is_the_ceiling() -> None:
    many = [C, thing("circle", x=6), thing("circle", x=30)]
    assert judge(include(clause("circle", 2)), many, exact=False).strict
    assert judge(TWO, many, exact=False).reason == "3 x circle, fewer than 3 allowed"
    assert judge(TWO, [*many[:2], S, B], exact=False).strict
    assert not judge(TWO, many[:1], exact=False).strict


def geneval_official(metadata: dict[str, Any], found: list[Detection]) -> bool:
    """GenEval's verdict (2310.11513), written from its rules: the surest objects of each class, AND over clauses."""
    groups: list[list[Detection] | None] = []
    for want in metadata["include"]:
        same = sorted((d for d in found if d.label == want["class"]), key=lambda d: -d.score)[: want["count"]]
        good = len(same) == want["count"]
        good = good and all(d.color == want.get("color", d.color) for d in same)
        if good and "position" in want:
            relation, index = want["position"]
            others = groups[index]
            good = others is not None and all(relation in relations(a, b) for a in same for b in others)
        groups.append(same if good else None)
    over = any(sum(d.label == ban["class"] for d in found) >= ban["count"] for ban in metadata["exclude"])
    return all(group is not None for group in groups) and not over


def relations(a: Detection, b: Detection) -> set[str]:
    one, two = np.array(a.box).reshape(2, 2), np.array(b.box).reshape(2, 2)
    offset = one.mean(0) - two.mean(0)
    sizes = (one[1] - one[0]) + (two[1] - two[0])
    reduced = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes, 0)
    unit = reduced / np.linalg.norm(offset) if offset.any() else reduced
    tests = {"left of": -unit[0], "right of": unit[0], "above": -unit[1], "below": unit[1]}
    return {name for name, value in tests.items() if value > 0.5}


def random_case(generator: np.random.Generator) -> tuple[dict[str, Any], list[Detection]]:
    names, colors = ("circle", "square"), ("red", "blue")
    found = [
        thing(
            str(generator.choice(names)), str(generator.choice(colors)), *generator.uniform(5, 31, 2),
            size=generator.uniform(4, 10), score=generator.uniform(0.5, 1),
        )
        for _ in range(generator.integers(0, 5))
    ]  # fmt: skip
    kind = generator.integers(3)
    first = clause(names[0], int(generator.integers(1, 3)) if kind == 0 else 1)
    if kind == 0:
        return include(first, exclude=(clause(names[0], first["count"] + 1),)), found
    second = clause(names[1])
    if kind == 1:
        first["color"] = "red"
    else:
        second["position"] = [str(generator.choice(RELATIONS)), 0]
    return include(first, second), found


def test_without_exact_the_verdict_is_genevals() -> None:
    """Colour apart: GenEval looks at the surest object alone, we take the right colour first and are no stricter."""
    generator = np.random.default_rng(0)
    agreed = positives = 0
    for _ in range(2000):
        metadata, found = random_case(generator)
        ours, theirs = judge(metadata, found, exact=False).strict, geneval_official(metadata, found)
        if any("color" in c for c in metadata["include"]):
            assert ours >= theirs
        else:
            assert ours == theirs, (metadata, found)
        agreed += ours == theirs
        positives += theirs
    assert agreed > 1900 and positives > 150


def test_exact_only_adds_demands_and_scores_stay_in_range() -> None:
    generator = np.random.default_rng(1)
    for _ in range(1000):
        metadata, found = random_case(generator)
        verdict = judge(metadata, found)
        assert 0 <= verdict.dense <= 1 and verdict.strict == (verdict.dense == 1) == (verdict.reason == "")
        assert not verdict.strict or judge(metadata, found, exact=False).strict
        if verdict.strict:
            assert not judge(metadata, [*found, B]).strict


def test_relations_on_a_clock_face() -> None:
    """Around the dial in steps of 15 degrees: each relation holds for the directions that GenEval's cosine allows."""
    for degrees in range(0, 360, 15):
        x, y = 18 + 12 * np.cos(np.radians(degrees)), 18 - 12 * np.sin(np.radians(degrees))
        a, b = thing("circle", x=x, y=y), thing("square")
        held = {
            r for r in RELATIONS if judge(include(clause("square"), clause("circle", position=[r, 0])), [a, b]).strict
        }
        assert held == relations(a, b)
        main = {0: "right of", 90: "above", 180: "left of", 270: "below"}
        assert degrees not in main or held == {main[degrees]}


def test_objects_on_one_spot_stand_in_no_relation() -> None:
    for relation in RELATIONS:
        metadata = include(clause("square"), clause("circle", position=[relation, 0]))
        assert not judge(metadata, [C, S]).strict
        assert not judge(metadata, [thing("circle", x=18.5, y=18.5), S]).strict


def test_wrong_metadata_raise() -> None:
    with pytest.raises(ValueError, match='key "include" is missing'):
        judge({"tag": "t"}, [C])
    with pytest.raises(ValueError, match="use one of left of"):
        judge(include(clause("square"), clause("circle", position=["beside", 0])), [C])
