"""Five ways of assigning credit on one text task, at equal numbers of generated tokens: one JSON and one picture.

    python scripts/text_study.py --seeds 0,1,2,3,4 --tune 100 --rates 2e-4,4e-4 --out docs/results/text [key=value ...]

Every method starts from the same supervised weights and stops once the same number of tokens was generated; value rollouts and
branches count. All share one learning rate: the better one of --rates for `outcome` on the seed --tune, by the mean of its curve
of held-out accuracy. Runs that the JSON already holds are kept, so the study may be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from flowrl import __version__
from flowrl.config.render import to_plain
from flowrl.text import load, train

METHODS = {
    "outcome": "text_outcome",
    "turn": "text_turn",
    "spo_chain": "text_spo_chain",
    "spo_tree": "text_spo_tree",
    "ppo": "text_ppo",
}
MACHINE = "A: two x86-64 cores at 2.8 GHz, no bf16, 24 GB"


def one(method: str, seed: int, rate: float, overrides: list[str]) -> dict[str, Any]:
    """Run one method; return its curve."""
    with tempfile.TemporaryDirectory() as folder:
        config = load(METHODS[method], [f"seed={seed}", f"optimizer.lr={rate}", f"run_dir={folder}/run", *overrides])
        started, cpu = time.time(), time.process_time()
        rows = train(config, lambda line: None, "scripts/text_study.py")
    points = [r for r in rows if "eval/accuracy" in r]
    return {
        "method": method, "seed": seed, "lr": rate, "iterations": rows[-1]["iteration"],
        "tokens": [r["tokens"] for r in points], "samples": [r["samples"] for r in points],
        "accuracy": [r["eval/accuracy"] for r in points],
        "reward_last": float(np.mean([r["reward/outcome/mean"] for r in rows[-5:]])),
        "seconds": round(time.time() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
    }  # fmt: skip


def interval(values: list[float]) -> dict[str, float]:
    """Mean over seeds and its 95% interval (Student's t)."""
    mean, n = float(np.mean(values)), len(values)
    half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def crossing(run: dict[str, Any], axis: str, level: float) -> float | None:
    """Where the curve first reaches ``level``, by straight lines between evaluations; None where it does not."""
    x, y = run[axis], run["accuracy"]
    for k in range(1, len(y)):
        if y[k] >= level:
            return float(x[k - 1] + (x[k] - x[k - 1]) * max(0.0, (level - y[k - 1]) / (y[k] - y[k - 1])))
    return None


def summary(runs: list[dict[str, Any]], level: float) -> dict[str, Any]:
    """What the seeds of one method say together."""
    reached = {axis: [crossing(r, axis, level) for r in runs] for axis in ("tokens", "samples")}
    return {
        "start": runs[0]["accuracy"][0],
        "end": interval([r["accuracy"][-1] for r in runs]),
        "curve_mean": interval([float(np.mean(r["accuracy"][1:])) for r in runs]),
        "end_samples": round(float(np.mean([r["samples"][-1] for r in runs]))),
        **{
            f"{axis}_to_{level}": interval([v for v in found if v is not None]) if None not in found else None
            for axis, found in reached.items()
        },
    }


def against_outcome(runs: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Differences to `outcome` of the same seeds (equal problems, equal first rollout), mean and 95% interval."""
    base = {r["seed"]: r["accuracy"] for r in runs if r["method"] == "outcome"}
    pairs = [(r["accuracy"], base[r["seed"]]) for r in runs if r["method"] == method]
    return {
        "end": interval([own[-1] - other[-1] for own, other in pairs]),
        "curve_mean": interval([float(np.mean(own[1:]) - np.mean(other[1:])) for own, other in pairs]),
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw held-out accuracy against tokens and samples, mean and 95% interval over seeds (pip install matplotlib)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, name in zip(axes, ("tokens", "samples"), strict=True):
        for method in METHODS:
            runs = [r for r in record["runs"] if r["method"] == method]
            if not runs:
                continue
            x = np.mean([r[name] for r in runs], axis=0) / 1000
            bands = [interval([r["accuracy"][k] for r in runs]) for k in range(len(x))]
            (line,) = axis.plot(x, [b["mean"] for b in bands], marker=".", label=method)
            axis.fill_between(
                x, [b["low"] for b in bands], [b["high"] for b in bands], color=line.get_color(), alpha=0.15
            )
        axis.set_xlabel(f"generated {name}, thousands (branches and value rollouts counted)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, greedy")
    axes[0].set_ylim(0.3, 0.95)
    axes[1].legend(loc="lower right", fontsize=8)
    figure.suptitle(
        f"{len(record['seeds'])} seeds a method, mean and 95% interval; runs end at equal tokens; lr {record['lr']:g}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--tune", type=int, default=100, help="seed on which the learning rate is chosen")
    parser.add_argument("--rates", default="2e-4,4e-4")
    parser.add_argument("--level", type=float, default=0.8, help="accuracy whose cost is reported")
    parser.add_argument("--out", required=True, help="folder for text_study.json and text_study.png")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "text_study.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"tuning": [], "runs": []}
    seeds, rates = [int(s) for s in args.seeds.split(",")], [float(r) for r in args.rates.split(",")]

    def run(kind: str, method: str, seed: int, rate: float) -> dict[str, Any]:
        for known in record[kind]:
            if (known["method"], known["seed"], known["lr"]) == (method, seed, rate):
                return dict(known)
        made = one(method, seed, rate, args.overrides)
        record[kind].append(made)
        path.write_text(json.dumps(record, indent=1))
        print(f"{kind} {method} seed {seed} lr {rate:g}: {made['accuracy']} in {made['cpu_seconds']} s", flush=True)
        return made

    tried = [run("tuning", "outcome", args.tune, rate) for rate in rates]
    best = max(tried, key=lambda r: float(np.mean(r["accuracy"])))["lr"]
    for seed in seeds:
        for method in METHODS:
            run("runs", method, seed, best)
    record |= {
        "command": f"python scripts/text_study.py --seeds {args.seeds} --tune {args.tune} --rates {args.rates} "
        + " ".join([f"--level {args.level}", f"--out {args.out}", *args.overrides]),
        "version": __version__, "torch": torch.__version__, "machine": MACHINE, "seeds": seeds,
        "tune_seed": args.tune, "lr": best,
        "cpu_seconds": round(sum(r["cpu_seconds"] for kind in ("tuning", "runs") for r in record[kind])),
        "config": to_plain(load("text_outcome", args.overrides)),
        "summary": {
            m: summary(own, args.level) | {"minus_outcome": against_outcome(record["runs"], m)}
            for m in METHODS if (own := [r for r in record["runs"] if r["method"] == m])
        },
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1))
    plot(record, out / "text_study.png")


if __name__ == "__main__":
    main()
