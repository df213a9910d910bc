"""GenEval-style compositional checking: clauses about objects, counts, colours and positions against a detector.

The detector is a protocol (pictures in, detections out): connected components for the embedded world, a transformers detector
for photographs. Rules after GenEval (2310.11513) with two defects of the copied soft score mended: a failed position clause
earns nothing, and a count term never leaves [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowrl.records import Detection

RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Verdict:
    """strict: every clause holds. dense: mean over atoms, in [0, 1]. reason: the first failed atom, or ""."""

    strict: bool
    dense: float
    reason: str


def judge(
    metadata: Mapping[str, Any], found: Sequence[Detection], *, exact: bool = True, min_score: float = 0.0
) -> Verdict:
    """Check one picture's detections against GenEval metadata.

    Atoms, each in [0, 1]: presence of each include clause's class, its count ``max(0, 1 - |n - found| / n)``, its colour
    (share of the needed objects in that colour), its position; each exclude clause; with ``exact``, that no object is
    unexplained. strict needs every atom at 1. A count clause asks for exactly n with ``exact``, else for at least n.
    """
    found = [d for d in found if d.score >= min_score]
    atoms: list[tuple[float, str]] = []
    matched: list[list[Detection]] = []
    for clause in metadata.get("include", ()):
        best = _match(clause, found)
        matched.append(best)
        atoms += _clause_atoms(clause, best, found, matched)
    for clause in metadata.get("exclude", ()):
        have = sum(d.label == clause["class"] for d in found)
        atoms.append((float(have < clause["count"]), f"{have} x {clause['class']}, fewer than {clause['count']} allowed"))
    if exact:
        expected = sum(clause["count"] for clause in metadata.get("include", ()))
        extra = max(0, len(found) - expected)
        atoms.append((1.0 / (1 + extra), f"{extra} objects more than the {expected} asked for"))
    dense = sum(value for value, _ in atoms) / len(atoms)
    failed = [reason for value, reason in atoms if value < 1.0]
    return Verdict(not failed, dense, failed[0] if failed else "")


def _match(clause: Mapping[str, Any], found: Sequence[Detection]) -> list[Detection]:
    """The detections that this clause speaks of: its class, its colour first when it names one, surest first."""
    same = [d for d in found if d.label == clause["class"]]
    color = clause.get("color")
    if color:
        right = [d for d in same if d.color == color]
        same = right + [d for d in same if d.color != color]
        return same[: max(len(right), clause["count"])]
    return same


def _clause_atoms(
    clause: Mapping[str, Any], mine: Sequence[Detection], found: Sequence[Detection], matched: Sequence[Sequence[Detection]]
) -> list[tuple[float, str]]:
    wanted, name, color = clause["count"], clause["class"], clause.get("color")
    have = len(mine)
    atoms = [
        (float(have > 0), f"no {name}"),
        (max(0.0, 1.0 - abs(have - wanted) / wanted) if have < wanted or wanted > 1 else 1.0, f"{have} x {name}, {wanted} asked for"),
    ]
    if color:
        right = sum(d.color == color for d in mine)
        atoms.append((min(1.0, right / wanted), f"{right} {color} {name}, {wanted} asked for"))
    if "position" in clause:
        relation, target = clause["position"]
        holds = any(_stands(a, relation, b) for a in mine[:wanted] for b in matched[target] if a is not b)
        atoms.append((float(holds), f"{name} not {relation} clause {target}"))
    return atoms


def _stands(a: Detection, relation: str, b: Detection, margin: float = 0.1) -> bool:
    """GenEval's relation test: the centre offset, less ``margin`` of both sizes, points ``relation`` with cosine > 0.5."""
    ax, ay, bx, by = *_centre(a), *_centre(b)
    wide = (a.box[2] - a.box[0]) + (b.box[2] - b.box[0])
    high = (a.box[3] - a.box[1]) + (b.box[3] - b.box[1])
    dx = math.copysign(max(0.0, abs(ax - bx) - margin * wide), ax - bx)
    dy = math.copysign(max(0.0, abs(ay - by) - margin * high), ay - by)
    length = math.hypot(dx, dy)
    if length == 0.0:
        return False
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation] / length > 0.5


def _centre(d: Detection) -> tuple[float, float]:
    return (d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2
