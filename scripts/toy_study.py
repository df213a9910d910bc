"""Ablations on problems with known answers, through the real trainer: a JSON and a picture a study.

    python scripts/toy_study.py --studies a1,a3,a5,a6,a11,a13 --seeds 0,1,2,3,4 --out docs/results/toys

Each study varies one thing. What is claimed of it, and when a claim counts as seen, is fixed in scripts/_toys_studies.py before
the run: the 95% interval of the difference over seeds lies above 0, or, for claims of equality, within a margin. Pictures need
matplotlib (pip install matplotlib); without it only the JSON is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _toys_studies import COMMON, STUDIES, Claim, Row, Study

from flowrl import __version__

MACHINE = "A: two x86-64 cores at 2.8 GHz, no bf16, 24 GB; one thread, beside other work"


def interval(values: list[float]) -> dict[str, float]:
    """Mean over seeds and its 95% interval (Student's t)."""
    mean, n = float(np.mean(values)), len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {
        name: float(f"{value:.5g}") for name, value in (("mean", mean), ("low", mean - half), ("high", mean + half))
    }


def values_of(rows: list[Row], variant: str, metric: str) -> list[float]:
    return [row[metric] for row in rows if row["variant"] == variant]


def judge(rows: list[Row], claim: Claim) -> dict[str, Any]:
    """Pair the seeds of two variants: agrees, disagrees or cannot tell."""
    more = values_of(rows, claim.more, claim.metric)
    less = values_of(rows, claim.less, claim.metric) if claim.less else [0.0] * len(more)
    found = interval([a - b for a, b in zip(more, less, strict=True)])
    low, high = found["low"], found["high"]
    if claim.margin is None:
        verdict = "agrees" if low > 0 else "disagrees" if high < 0 else "cannot tell"
    else:
        inside, outside = max(-low, high) <= claim.margin, low > claim.margin or high < -claim.margin
        verdict = "agrees" if inside else "disagrees" if outside else "cannot tell"
    return vars(claim) | {"difference": found, "verdict": verdict}


def figures(rows: list[Row]) -> list[str]:
    return [name for name, value in rows[0].items() if isinstance(value, int | float) and name != "seed"]


def record_of(key: str, study: Study, seeds: list[int]) -> dict[str, Any]:
    rows = [row | {"seed": seed} for seed in seeds for row in study.run(seed)]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    return {
        "study": key, "title": study.title, "setting": f"{study.setting}. {COMMON}" if key != "a11" else study.setting,
        "command": f"python scripts/toy_study.py --studies {key} --seeds {','.join(map(str, seeds))} --out docs/results/toys",
        "version": f"flowrl {__version__}, torch {torch.__version__}", "machine": MACHINE, "seeds": seeds,
        "claims": [judge(rows, claim) for claim in study.claims],
        "summary": {v: {name: interval(values_of(rows, v, name)) for name in figures(rows)} for v in variants},
        "rows": rows,
    }  # fmt: skip


def plot(record: dict[str, Any], study: Study, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(study.panels), figsize=(5 * len(study.panels), 4))
    for axis, (x, y, title) in zip(axes, study.panels, strict=True):
        for place, (variant, summary) in enumerate(record["summary"].items()):
            rows = [row for row in record["rows"] if row["variant"] == variant]
            if not x:
                found = summary[y]
                error = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
                axis.barh(place, found["mean"], xerr=error, label=variant)
                continue
            across = np.mean([row[x if x == "iteration" else f"{x}_curve"] for row in rows], axis=0)
            bands = [interval([row[f"{y}_curve"][k] for row in rows]) for k in range(len(across))]
            (line,) = axis.plot(across, [b["mean"] for b in bands], marker=".", label=variant)
            lows, highs = ([b[end] for b in bands] for end in ("low", "high"))
            axis.fill_between(across, lows, highs, color=line.get_color(), alpha=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x, fontsize=9)
        axis.grid(alpha=0.3)
        if not x:
            names = list(record["summary"])
            axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=8)
            axis.invert_yaxis()
    if study.panels[0][0]:
        axes[-1].legend(fontsize=8)
    figure.suptitle(
        f"{record['study'].upper()}: {record['title']}; {len(record['seeds'])} seeds, mean and 95% interval",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", default=",".join(STUDIES))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", required=True, help="folder for STUDY.json and STUDY.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keys, seeds = args.studies.split(","), [int(s) for s in args.seeds.split(",")]
    unknown = [key for key in keys if key not in STUDIES]
    if unknown:
        parser.error(f"--studies: no {unknown[0]!r}; the studies are {', '.join(STUDIES)}")
    for key in keys:
        record = record_of(key, STUDIES[key], seeds)
        (out / f"{key}.json").write_text(json.dumps(record, indent=1) + "\n")
        for claim in record["claims"]:
            print(f"{key}: {claim['text']}: {claim['verdict']} ({claim['difference']})", flush=True)
        if importlib.util.find_spec("matplotlib"):
            plot(record, STUDIES[key], out / f"{key}.png")


if __name__ == "__main__":
    main()
