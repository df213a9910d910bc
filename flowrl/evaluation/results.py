"""The files of an evaluation: samples.jsonl, features.safetensors, grids, evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowrl import __version__
from flowrl.config import Config, to_mapping
from flowrl.evaluation.features import FeatureNetwork
from flowrl.evaluation.grids import contact_sheet, save_grids
from flowrl.evaluation.measures import measure, save, summary_of
from flowrl.evaluation.paired import Evaluated
from flowrl.evaluation.video_sheets import stills


def write_results(
    folder: Path, config: Config, networks: Mapping[str, FeatureNetwork], facts: Mapping[str, Any], base: Evaluated,
    tuned: Evaluated | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write what is known of one or two evaluations of the same prompts and noise; returns what evaluation.json holds.

    facts: what else it says (command, iteration, machine ...).
    """
    measured = measure([base] if tuned is None else [base, tuned], networks, config.evaluation.reference)
    save(folder, measured)
    grids, limit = folder / "grids", config.evaluation.grid
    if tuned is None:
        _sheet(grids, base, limit)
    else:
        save_grids(
            grids, base.images, tuned.images, [row["prompt"] for row in base.rows],
            [row["score"] for row in base.rows], [row["score"] for row in tuned.rows], limit=limit,
        )  # fmt: skip
    settings = to_mapping(config)["evaluation"]
    evaluation = {
        "version": __version__, "seed": config.seed, "settings": settings, **facts,
        **summary_of(measured, config.evaluation.distances),
    }  # fmt: skip
    text = json.dumps(evaluation, indent=1, allow_nan=False)
    (folder / "evaluation.json").write_text(text, encoding="utf-8")
    return evaluation


def _sheet(folder: Path, base: Evaluated, limit: int) -> None:
    """base.png: pictures spread evenly over the prompts, chosen by no score."""
    pick = np.linspace(0, len(base.rows) - 1, min(limit, len(base.rows))).astype(int)
    if not len(pick):
        return
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(stills(base.images)[pick], [base.rows[i]["prompt"] for i in pick]).save(folder / "base.png")
