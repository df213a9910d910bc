"""Stand-ins for what needs weights, and small settings, for the tests of ``flowrl eval``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flowrl.rewards.ocr import Ocr
from flowrl.rewards.ocr_engines import Line

from flowrl.config.render import to_yaml
from flowrl.records import Detection
from tests.training.helpers import small_config

READS = "Spring Collection 2024"


class FakeEngine:
    """Reads the same two lines in every picture."""

    def read(self, picture: np.ndarray) -> list[Line]:
        assert picture.dtype == np.uint8 and picture.ndim == 3
        return [Line("spring  COLLECTION"), Line("2024", 0.9)]


class FakeOcr(Ocr):
    """The OCR reward, with an engine that needs no weights."""

    name = "fake_ocr"

    def __init__(self) -> None:
        self._setup("edit", True, 1, 4, 0.0, "")
        self.engine = FakeEngine()


def two_glasses(images: np.ndarray) -> list[list[Detection]]:
    """A detector that sees two wine glasses in every picture."""
    page = [Detection("wine glass", 0.9, (x, 4.0, x + 8.0, 12.0)) for x in (2.0, 20.0)]
    return [page for _ in images]


class Halves:
    """A feature network of one's own: mean colour of the upper and the lower half, [N, 6]."""

    metric = "rms"

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        parts = np.array_split(pictures.astype(np.float32) / 255, 2, axis=1)
        return np.concatenate([part.mean((1, 2)) for part in parts], 1)


def recipe(model: Path, folder: Path, name: str = "recipe.yaml", **changes: Any) -> Path:
    """A recipe on the tiny pipeline; two sampling steps, no grid."""
    file = folder / name
    file.write_text(to_yaml(small_config(model, **{"evaluation.grid": 2, "run_dir": str(folder / "out")} | changes)))
    return file


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def picture_of(metadata: Mapping[str, Any]) -> list[Detection]:
    """Detections that satisfy a GenEval row: each clause's objects apart from the others, or as its position says."""
    places: list[tuple[float, float]] = []
    found: list[Detection] = []
    moves = {"left of": (-100.0, 0.0), "right of": (100.0, 0.0), "above": (0.0, -100.0), "below": (0.0, 100.0)}
    for index, clause in enumerate(metadata["include"]):
        x, y = 1000.0 * index, 0.0
        if "position" in clause:
            relation, target = clause["position"]
            x, y = (here + move for here, move in zip(places[target], moves[relation], strict=True))
        places.append((x, y))
        for number in range(clause["count"]):
            left = x + 12.0 * number
            box = (left, y, left + 10.0, y + 10.0)
            found.append(Detection(clause["class"], 0.95, box, clause.get("color", "")))
    return found


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein, from the whole table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            swap = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(swap, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return int(table[-1, -1])
