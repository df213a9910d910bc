"""What an evaluation leaves on disk to be summed up: samples.jsonl, features.safetensors, and the summary that follows from both.

samples.jsonl has one object a picture, with its diversity in it; features.safetensors has the features of the same pictures in
the same order, ``base/NETWORK``, ``tuned/NETWORK`` and ``reference/NETWORK``, from which the distances follow.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.errors import UserError
from flowrl.evaluation import distances as far
from flowrl.evaluation.diversity import by_group
from flowrl.evaluation.features import FeatureNetwork, Features, embed_all, embed_folder
from flowrl.evaluation.paired import Evaluated
from flowrl.evaluation.statistics import prompt_clusters, summarise
from flowrl.tracking.jsonl import JsonLines

SAMPLES, FEATURES = "samples.jsonl", "features.safetensors"
PAIRS = (("base", "tuned"), ("base", "reference"), ("tuned", "reference"))


@dataclass(frozen=True)
class Measured:
    """rows: of samples.jsonl, all sides; features: float32 [N, D] by side and network, each side's rows in order."""

    rows: list[dict[str, Any]]
    features: dict[str, Features]


def measure(sides: Sequence[Evaluated], networks: Mapping[str, FeatureNetwork], reference: str = "") -> Measured:
    """Take the features of the pictures, and add to each row what they say of the diversity within its prompt.

    A row's ``diversity`` is {network: {spread, vendi}}: its mean distance from the other pictures of its prompt, and the Vendi
    score of all of them; None where it is the only one. reference: a folder of pictures, or "".
    """
    rows: list[dict[str, Any]] = []
    features: dict[str, Features] = {}
    for side in sides:
        which = side.rows[0]["which"]
        mine = [dict(row) for row in side.rows]
        groups = prompt_clusters(mine)
        for name, values in embed_all(networks, side.images).items():
            features[f"{which}/{name}"] = values
            spread, vendi = by_group(values, groups, networks[name].metric)
            for row, near, number in zip(mine, spread, vendi, strict=True):
                row.setdefault("diversity", {})[name] = {"spread": _number(near), "vendi": _number(number)}
        rows += mine
    if reference:
        found = embed_folder(networks, reference)
        features |= {f"reference/{name}": values for name, values in found.items()}
    return Measured(rows, features)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def save(folder: Path, measured: Measured) -> None:
    """Write samples.jsonl and features.safetensors, in the place of older ones."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in (SAMPLES, FEATURES):
        (folder / name).unlink(missing_ok=True)
    with JsonLines(folder / SAMPLES) as log:
        for row in measured.rows:
            log.write(row)
    if measured.features:
        save_file({name: np.ascontiguousarray(values) for name, values in measured.features.items()}, folder / FEATURES)


def read(folder: Path) -> Measured:
    """Read what ``save`` wrote. Raises UserError where samples.jsonl is missing or a line of it is broken."""
    from safetensors.numpy import load_file

    file = folder / SAMPLES
    if not file.is_file():
        raise UserError(f"{folder}: no {SAMPLES}; evaluate first, with flowrl eval")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error}); evaluate again") from error
    features = load_file(folder / FEATURES) if (folder / FEATURES).is_file() else {}
    return Measured(rows, features)


def summary_of(measured: Measured, distances: Sequence[str] = far.DISTANCES) -> dict[str, Any]:
    """Sum an evaluation up, as JSON: `summarise` of its rows, ``distances`` and ``warnings``.

    distances: {network: {base_tuned, base_reference, tuned_reference: {kid {mean, std, subsets, size}, cmmd, fid}}}, pairs of
    sets that are there. ``measured`` may come from ``read``: nothing else is needed.
    """
    found, cautions = _distances(measured, distances)
    return {**summarise(measured.rows), "distances": found, "warnings": [*_failures(measured.rows), *cautions]}


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One warning for each reward that could not score some pictures."""
    first: dict[str, str] = {}
    count: dict[str, int] = {}
    for row in rows:
        for label, text in row.get("errors", {}).items():
            first.setdefault(label, text)
            count[label] = count.get(label, 0) + 1
    return [
        f"{label}: {count[label]:,} of {len(rows):,} pictures have no score; the first: {first[label]}"
        for label in first
    ]


def _distances(measured: Measured, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    networks = sorted({key.partition("/")[2] for key in measured.features})  # a file keeps no order
    found: dict[str, Any] = {}
    cautions: dict[str, None] = {}
    for network in networks:
        sets = {
            key.partition("/")[0]: values for key, values in measured.features.items() if key.endswith(f"/{network}")
        }
        for one, other in PAIRS:
            if one not in sets or other not in sets or not names:
                continue
            least = min(len(sets[one]), len(sets[other]))
            if least < 2:
                cautions[f"distances: {least} picture is no set; none is given"] = None
                continue
            paired = (one, other) == ("base", "tuned") and _aligned(measured.rows)
            values = _values(sets[one], sets[other], names, paired=paired)
            found.setdefault(network, {})[f"{one}_{other}"] = values
            for name in values:
                text = far.caution(name, least, sets[one].shape[1])
                cautions |= {f"{name} ({network}): {text}": None} if text else {}
            if "cmmd" in names and "cmmd" not in values:
                cautions[f"cmmd ({network}): some features have length 0 and so no direction; none is given"] = None
    return found, list(cautions)


def _values(one: Features, other: Features, names: Sequence[str], *, paired: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "kid" in names:
        values["kid"] = vars(far.kid(one, other, paired=paired))
    if "cmmd" in names and _directed(one) and _directed(other):
        values["cmmd"] = far.cmmd(one, other, paired=paired)
    if "fid" in names:
        values["fid"] = far.fid(one, other)
    return values


def _directed(features: npt.NDArray[np.float32]) -> bool:
    return bool(np.linalg.norm(features, axis=1).all())


def _aligned(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether base and tuned pictures stand in the same order of prompts, members and seeds."""
    sides = {
        which: [(row["prompt_id"], row["member"], row["seed"]) for row in rows if row["which"] == which]
        for which in ("base", "tuned")
    }
    return sides["base"] == sides["tuned"]
