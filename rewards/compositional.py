"""GenEval-style compositional checking: clauses about objects, counts, colours and positions against a detector.

The detector is a protocol (pictures in, detections out): connected components for the embedded world, a transformers
detector for photographs. Rules after GenEval (2310.11513) with two defects of the copied soft score mended: a failed
position clause earns nothing, and a count term never leaves [0, 1]. A detection serves one clause at most, so that one
object cannot pay for two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from flowrl.data.geneval import RELATIONS, fault
from flowrl.errors import UserError
from flowrl.records import Detection, RewardBatch, RewardResult

if TYPE_CHECKING:
    from flowrl.protocols import Detector

__all__ = ["DETECTORS", "RELATIONS", "Compositional", "Verdict", "judge", "stands"]

DETECTORS = {"world/v1": "flowrl.worlds.v1.detect:detect"}
MARGIN = 0.1  # of both objects' sizes, taken off their offset before its direction is judged (GenEval's figure)
MIN_COSINE = 0.5


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

    Atoms, each in [0, 1]: presence of each include clause's class, its count ``max(0, 1 - |n - found| / n)``, its
    colour (share of the needed objects in that colour), its position; each exclude clause; with ``exact``, that there
    are no more objects than asked for, ``1 / (1 + extra)``. strict needs every atom at 1. A count clause asks for
    exactly n with ``exact``, else for at least n (GenEval's own rule). Where several objects could serve a clause, the
    right colour goes before the wrong one and the surest detection first; a position must hold between all objects of
    the two clauses. metadata: checked by flowrl.data.geneval; raises ValueError where it is wrong.
    """
    problem = fault(metadata)
    if problem:
        raise ValueError(problem)
    found = sorted((d for d in found if d.score >= min_score), key=lambda d: -d.score)
    include = metadata["include"]
    claimed, spare = _claim(include, found)
    atoms: list[tuple[float, str]] = []
    for clause, mine in zip(include, claimed, strict=True):
        surplus = sum(_fits(d, clause) for d in spare) if exact else 0
        atoms += _clause_atoms(clause, mine, surplus)
        if "position" in clause:
            relation, target = clause["position"]
            pairs = [(a, b) for a in mine for b in claimed[target]]
            holds = bool(pairs) and all(stands(a, relation, b) for a, b in pairs)
            atoms.append((float(holds), f"{clause['class']} not {relation} {include[target]['class']}"))
    for clause in metadata.get("exclude", ()):
        have = sum(d.label == clause["class"] for d in found)
        reason = f"{have} x {clause['class']}, fewer than {clause['count']} allowed"
        atoms.append((float(have < clause["count"]), reason))
    if exact:
        expected = sum(clause["count"] for clause in include)
        extra = max(0, len(found) - expected)
        atoms.append((1.0 / (1 + extra), f"{extra} objects more than the {expected} asked for"))
    dense = sum(value for value, _ in atoms) / len(atoms)
    failed = [reason for value, reason in atoms if value < 1.0]
    return Verdict(not failed, dense, failed[0] if failed else "")


def _fits(d: Detection, clause: Mapping[str, Any]) -> bool:
    return bool(d.label == clause["class"] and d.color == clause.get("color", d.color))


def _claim(
    include: Sequence[Mapping[str, Any]], found: Sequence[Detection]
) -> tuple[list[list[Detection]], list[Detection]]:
    """Give each detection to one clause at most; return those of each clause (up to its count) and the ones left over.

    Coloured clauses choose first (their exact fits), then plain ones; what is left of the class fills a coloured
    clause that came short, as an object of the wrong colour.
    """
    claimed: list[list[Detection]] = [[] for _ in include]
    spare = list(found)
    plain = [index for index, clause in enumerate(include) if "color" not in clause]
    colored = [index for index, clause in enumerate(include) if "color" in clause]
    for indices, any_color in ((colored, False), (plain, False), (colored, True)):
        for index in indices:
            clause, mine = include[index], claimed[index]
            for d in list(spare):
                suits = d.label == clause["class"] if any_color else _fits(d, clause)
                if suits and len(mine) < clause["count"]:
                    mine.append(d)
                    spare = [other for other in spare if other is not d]
    return claimed, spare


def _clause_atoms(clause: Mapping[str, Any], mine: Sequence[Detection], surplus: int) -> list[tuple[float, str]]:
    wanted, name, color = clause["count"], clause["class"], clause.get("color")
    have = len(mine) + surplus
    atoms = [
        (float(bool(mine)), f"no {name}"),
        (max(0.0, 1.0 - abs(have - wanted) / wanted), f"{have} x {name}, {wanted} asked for"),
    ]
    if color:
        right = sum(d.color == color for d in mine)
        atoms.append((right / wanted, f"{right} {color} {name}, {wanted} asked for"))
    return atoms


def stands(a: Detection, relation: str, b: Detection) -> bool:
    """Whether a stands in ``relation`` to b: GenEval's test.

    offset = centre(a) - centre(b); each axis is shortened by MARGIN times both sizes; the shortened component over
    |offset| must exceed MIN_COSINE in the direction of the relation.
    """
    ax, ay, bx, by = *_centre(a), *_centre(b)
    length = math.hypot(ax - bx, ay - by)
    if length == 0.0:
        return False
    wide = (a.box[2] - a.box[0]) + (b.box[2] - b.box[0])
    high = (a.box[3] - a.box[1]) + (b.box[3] - b.box[1])
    dx = math.copysign(max(0.0, abs(ax - bx) - MARGIN * wide), ax - bx)
    dy = math.copysign(max(0.0, abs(ay - by) - MARGIN * high), ay - by)
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation] / length > MIN_COSINE


def _centre(d: Detection) -> tuple[float, float]:
    return (d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2


class Compositional:
    """Reward in [0, 1] for pictures that show what GenEval metadata asks for.

    detector: a name of DETECTORS, or ``module:attr`` of a function that maps uint8 [B, H, W, 3] to one list of
    Detection a picture. mode: "strict" (0 or 1), "dense" (mean over atoms), "mean" ((strict + dense) / 2): dense alone
    can be raised by hedging with spare objects, strict alone is sparse. exact: see ``judge``. A sample whose metadata
    is missing or wrong is invalid, with the reason.
    """

    name = "compositional"
    minimum = 0.0
    scope = "sample"
    media = frozenset({"image"})
    backbone = ""
    deterministic = True
    licence = "Apache-2.0 (flowrl)"

    def __init__(
        self, detector: str = "world/v1", mode: Literal["mean", "strict", "dense"] = "mean", exact: bool = True
    ) -> None:
        if mode not in ("mean", "strict", "dense"):
            raise UserError(f"compositional: mode is {mode!r}; use mean, strict or dense")
        self.mode = mode
        self.exact = exact
        self.detect: Detector = _detector(detector)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures; components "strict" and "dense", details the first failed atom (None where none)."""
        import numpy as np

        strict, dense = np.full(len(batch), np.nan, np.float32), np.full(len(batch), np.nan, np.float32)
        errors: list[str | None] = [_metadata_error(metadata) for metadata in batch.metadata]
        details: list[str | None] = [None] * len(batch)
        for index, found in enumerate(self.detect(batch.images)):
            if errors[index] is None:
                verdict = judge(batch.metadata[index], found, exact=self.exact)
                strict[index], dense[index] = verdict.strict, verdict.dense
                details[index] = verdict.reason or None
        mean = ((strict + dense) / 2).astype(np.float32)
        scores = {"strict": strict, "dense": dense, "mean": mean}[self.mode]
        valid = np.array([error is None for error in errors], dtype=np.bool_)
        return RewardResult(scores, valid, errors, {"strict": strict, "dense": dense}, details)


def _metadata_error(metadata: Mapping[str, Any]) -> str | None:
    problem = fault(metadata)
    return f"compositional: metadata: {problem}; it needs GenEval prompts or the embedded world's" if problem else None


def _detector(name: str) -> Detector:
    module, _, attribute = DETECTORS.get(name, name).partition(":")
    if not attribute:
        raise UserError(f"compositional: unknown detector {name!r}; use {', '.join(DETECTORS)} or module:attr")
    try:
        detect = vars(import_module(module))[attribute]
    except (ImportError, KeyError) as error:
        raise UserError(
            f"compositional: cannot load detector {name!r} ({type(error).__name__}: {error}); check its spelling"
        ) from error
    if not callable(detect):
        raise UserError(f"compositional: detector {name!r} is not callable")
    loaded: Detector = detect
    return loaded
