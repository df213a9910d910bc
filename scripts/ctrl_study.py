"""A new condition by reinforcement learning (CTRL) against two kinds of guidance, on a mixture whose answer is known.

    python scripts/ctrl_study.py --seeds 0,1,2,3,4 --out docs/results/toys

The pre-trained model is the exact velocity of six Gaussians; a label of three is drawn from each point with known odds. From
2,000 labelled points an offline classifier is learned, and the target is p(x) p(y | x)^gamma. CTRL trains a conditional network
with the real trainer (objective ctrl, memoryless noise); classifier guidance takes the classifier's gradient at the one-step
estimate; classifier-free guidance takes a conditional model that flow matching made of the same points, at scale gamma. Distances
are total variation between cell counts; the target is the pre-trained chain's own samples, reweighted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _ctrl_toy as toy
from _toys import LatentRewards, configure
from _toys_studies import Claim
from toy_study import MACHINE, interval, judge, values_of

from flowrl import __version__
from flowrl.data.conditions import multiply_out
from flowrl.records import PromptRow
from flowrl.rollout.conditions import Conditioned
from flowrl.training.trainer import Trainer

GAMMAS = (1.0, 2.0, 4.0)
COUNT, ITERATIONS = 6000, 200
METRICS = ("accuracy", "log_likelihood", "distance", "target_accuracy", "target_log_likelihood")
Velocity = Callable[[Tensor, Tensor], Tensor]
CLAIMS = tuple(
    Claim(f"CTRL is nearer to the target than {other} at gamma {gamma:g}", "distance", f"{other} {gamma:g}", f"ctrl {gamma:g}")
    for other in ("classifier guidance", "classifier-free guidance")
    for gamma in GAMMAS
)  # fmt: skip


def trained(seed: int, gamma: float, iterations: int) -> tuple[Conditioned, int]:
    """CTRL by the real trainer; returns the adapter and its network samples."""
    config = configure({
        "seed": seed, "iterations": iterations, "model.train": "lora", "objective.name": "ctrl", "direct.strength": gamma,
        "direct.last": 0, "direct.checkpoint": False, "condition.attributes": {"label": toy.CLASSES},
        "rollout.kernel.name": "memoryless", "batch.groups": 12, "batch.group_size": 12, "batch.micro_batch": 144,
        "optimizer.lr": 3e-2, "optimizer.schedule": "linear",
        "rewards": [{"name": f"{Path(toy.__file__).resolve()}:OfflineLikelihood", "args": {"seed": seed}}],
    })  # fmt: skip
    rows, _ = multiply_out([PromptRow("", 0)], None, config.condition.attributes)
    adapter = Conditioned(toy.PlaneAdapter(seed), config.condition.attributes, config.condition.tensor)
    trainer = Trainer(config, adapter, LatentRewards(lambda x: x[:, 0]), rows, reference=adapter.lora_off)
    calls = sum(trainer.iterate()["calls/forward_samples"] for _ in range(iterations))
    return adapter, calls


def conditioned(adapter: Conditioned, label: int) -> Velocity:
    """The trained model's velocity for one label."""
    request = toy.Request("", 0, 0, 0, metadata={"condition": {"label": label}})
    one = adapter.encode([request])
    return lambda x, t: adapter.predict(x, t, one[torch.zeros(len(x), dtype=torch.int64)]).value


def cells(x: Tensor, weight: Tensor) -> Tensor:
    """Share of each of 20 x 20 cells of [-3, 3]^2; what lies outside counts to the border."""
    place = ((x + 3) / 6 * 20).long().clamp(0, 19)
    return torch.zeros(400).index_add_(0, place[:, 0] * 20 + place[:, 1], weight / weight.sum())


def row(
    variant: str, gamma: float, made: Callable[[int], Velocity], base: Tensor, seed: int, **more: float
) -> dict[str, Any]:
    """Means over the labels: accuracy, mean log-likelihood, distance from the target, and the target's own."""
    found: dict[str, list[float]] = {key: [] for key in METRICS}
    for label in range(toy.CLASSES):
        x = toy.draw(made(label), COUNT, 10 * seed + label)
        exact, base_exact = toy.likelihood(x), toy.likelihood(base)
        weight = base_exact[:, label] ** gamma
        part = weight / weight.sum()
        found["accuracy"].append(float((exact.argmax(1) == label).float().mean()))
        found["log_likelihood"].append(float(exact[:, label].log().mean()))
        found["distance"].append(float((cells(x, torch.ones(len(x))) - cells(base, weight)).abs().sum() / 2))
        found["target_accuracy"].append(float((part * (base_exact.argmax(1) == label)).sum()))
        found["target_log_likelihood"].append(float((part * base_exact[:, label].log()).sum()))
    means = {key: sum(values) / len(values) for key, values in found.items()}
    return {"variant": f"{variant} {gamma:g}".strip(), "gamma": gamma, "seed": seed, **means, **more}


def study(seed: int, iterations: int) -> list[dict[str, Any]]:
    base = toy.draw(toy.base_velocity, 60_000, 77)
    rows = []
    for gamma in GAMMAS:
        start = time.process_time()
        adapter, calls = trained(seed, gamma, iterations)
        seconds = time.process_time() - start
        rows.append(
            row("ctrl", gamma, lambda y, a=adapter: conditioned(a, y), base, seed, training_s=seconds, samples=calls)
        )
        rows.append(row("classifier guidance", gamma, lambda y, g=gamma: toy.classifier_guided(seed, y, g), base, seed))
        rows.append(
            row("classifier-free guidance", gamma, lambda y, g=gamma: toy.classifier_free(seed, y, g), base, seed)
        )
        null = adapter.encode([toy.Request("", 0, 0, 0)])
        x, t = torch.randn(64, 2), torch.full((64,), 0.4)
        kept = adapter.predict(x, t, null[torch.zeros(64, dtype=torch.int64)]).value
        rows[-3]["null_is_kept"] = bool(torch.equal(kept, toy.base_velocity(x, t)))
        told = " ".join(f"{made['distance']:.3f}" for made in rows[-3:])
        print(f"seed {seed}, gamma {gamma:g}: {told}", flush=True)
    return rows


def noise_floor() -> float:
    """Distance of the pre-trained chain's own samples, of the size drawn here, from its reference sample."""
    base, again = toy.draw(toy.base_velocity, 60_000, 77), toy.draw(toy.base_velocity, COUNT, 78)
    return float((cells(base, torch.ones(len(base))) - cells(again, torch.ones(COUNT))).abs().sum() / 2)


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    names = ("ctrl", "classifier guidance", "classifier-free guidance")
    for axis, metric, title in zip(
        axes, ("log_likelihood", "accuracy", "distance"),
        ("calibration: mean log p(y | x)", "accuracy of the exact label",
         "total variation from p(x) p(y | x)^gamma"), strict=True,
    ):  # fmt: skip
        for name in names:
            bands = [interval(values_of(record["rows"], f"{name} {g:g}", metric)) for g in GAMMAS]
            (line,) = axis.plot(GAMMAS, [b["mean"] for b in bands], marker=".", label=name)
            axis.fill_between(
                GAMMAS, [b["low"] for b in bands], [b["high"] for b in bands], color=line.get_color(), alpha=0.15
            )
        if metric == "distance":
            axis.axhline(record["noise_floor"], color="grey", linestyle=":", label="sampling noise")
        else:
            exact = [interval(values_of(record["rows"], f"ctrl {g:g}", f"target_{metric}"))["mean"] for g in GAMMAS]
            axis.plot(GAMMAS, exact, color="black", linestyle="--", label="exact target")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("gamma", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[2].legend(fontsize=8)
    figure.suptitle(
        f"A9: a new condition, CTRL against guidance; {len(record['seeds'])} seeds, mean and 95% interval", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--out", required=True, help="folder for ctrl.json and ctrl.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rows = [row for seed in seeds for row in study(seed, args.iterations)]
    record = {
        "study": "a9", "title": "A new condition: CTRL against classifier and classifier-free guidance",
        "setting": f"six Gaussians in the plane, three soft labels, {toy.LABELLED} labelled points, {toy.STEPS} memoryless "
        f"steps, {args.iterations} iterations of 144 samples; constants: scripts/_ctrl_toy.py",
        "command": f"python scripts/ctrl_study.py --seeds {args.seeds} --iterations {args.iterations} --out docs/results/toys",
        "version": f"flowrl {__version__}, torch {torch.__version__}", "machine": MACHINE, "seeds": seeds,
        "noise_floor": noise_floor(), "claims": [judge(rows, claim) for claim in CLAIMS],
        "summary": {
            variant: {name: interval(values_of(rows, variant, name)) for name in METRICS}
            for variant in dict.fromkeys(row["variant"] for row in rows)
        },
        "rows": rows,
    }  # fmt: skip
    (out / "ctrl.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for claim in record["claims"]:
        print(f"{claim['text']}: {claim['verdict']} ({claim['difference']})", flush=True)
    plot(record, out / "ctrl.png")


if __name__ == "__main__":
    main()
