"""Flow-GRPO on the embedded model beside its controls, at equal compute, over several seeds.

    python scripts/learning_study.py --methods flow_grpo,shuffled --seeds 0,1,2 --out docs/results/learning [key=value ...]

Every run starts from the shipped recipe ``demo`` and is evaluated like any other run (same held-out prompts, noise, steps and
guidance for base and tuned weights). Methods:

flow_grpo   the recipe as it is
shuffled    rewards permuted inside each group: the same pictures, updates and reward values, no information
lr_zero     learning rate 0
best        best-of-group regression: flow matching on the best member of each group, as many forwards and backwards as flow_grpo
supervised  continued supervised training: flow matching on renders of training prompts, the iteration's network work spent on it
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from flowrl import rng
from flowrl.config import load
from flowrl.distributed.backend import Backend
from flowrl.records import Request
from flowrl.training import metrics
from flowrl.training.batch import TrainingBatch
from flowrl.training.build import build
from flowrl.training.run import Run, machine
from flowrl.training.trainer import Collected, Trainer
from flowrl.worlds.v1 import render, scenes


class ShuffledRewards(Trainer):
    """Permutes the scores inside each group before credit is assigned."""

    def _credit(self, collected: Collected) -> tuple[TrainingBatch, Any]:
        scored = collected.scored
        scores, valid = scored.scores.copy(), scored.valid.copy()
        for group in torch.unique(collected.trajectory.group_id).tolist():
            rows = (collected.trajectory.group_id == group).nonzero().flatten().numpy()
            order = rows[rng.permutation(rng.key(self.seed, self.iteration, member=group, stream="perturb"), len(rows))]
            scores[rows], valid[rows] = scored.scores[order], scored.valid[order]
        return super()._credit(replace(collected, scored=replace(scored, scores=scores, valid=valid)))


class Regression(Trainer):
    """Shared by the flow-matching controls: one optimizer step on pairs (x0, conditioning row)."""

    def _regress(self, x0: torch.Tensor, rows: torch.Tensor, prompted: Any, draw: int) -> float:
        generator = torch.Generator().manual_seed(rng.key(self.seed, self.iteration, step=draw, stream="timestep"))
        x1 = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(x0), generator=generator))
        losses = []
        for part in torch.arange(len(x0)).split(self.config.batch.micro_batch):
            x = torch.lerp(x0[part], x1[part], t[part, None, None, None])
            v = self.adapter.predict(x, t[part], prompted[rows[part]].positive).value
            loss = F.mse_loss(v, (x1 - x0)[part], reduction="sum") / x0.numel()
            loss.backward()
            losses.append(loss.detach())
        self._step()
        return float(torch.stack(losses).sum())


class BestOfGroup(Regression):
    """Flow matching on each group's best member, repeated to the number of samples that Flow-GRPO would train."""

    def _train(self, batch: TrainingBatch) -> dict[str, Any]:
        groups = batch.trajectory.group_id
        best = []
        for group in torch.unique(groups).tolist():
            rows = ((groups == group) & batch.mask).nonzero().flatten()
            if len(rows) and bool(batch.signal[rows].any()):
                best.append(rows[batch.advantage[rows, 0].argmax()])
        if not best:
            return {"update/steps": 0}
        chosen = torch.stack(best)
        live = int(batch.signal.sum()) * int(batch.trajectory.trained_mask[0].sum())
        chosen = chosen.repeat(max(1, live // len(chosen)))
        with self.clock.phase("update"):
            loss = self._regress(batch.trajectory.x0[chosen], batch.row[chosen], batch.prompted, 0)
        return {"update/steps": 1, "policy/loss": loss, "optimizer/lr": self.optimizer.param_groups[0]["lr"]}


class Supervised(Regression):
    """Flow matching on renders; per iteration the network work of Flow-GRPO: forwards / 3 + backwards, in batches of 128."""

    BATCH = 128

    @classmethod
    def batches(cls, c: Any) -> int:
        """Optimizer steps an iteration."""
        steps, size = c.rollout.steps, c.rollout.window.size
        work = (
            c.batch.samples * (steps - (c.rollout.window.first + c.rollout.window.last) / 2) / 3
            + c.batch.samples * size
        )
        return max(1, round(work / cls.BATCH))

    def iterate(self) -> dict[str, Any]:
        self.clock.reset()
        self.counter.reset()
        losses = [self._batch(draw) for draw in range(self.batches(self.config))]
        self.iteration += 1
        row = {"iteration": self.iteration, "policy/loss": float(np.mean(losses)), "score/mean": None}
        return row | self.counter.as_metrics() | self.clock.as_metrics() | metrics.of_memory()

    def _batch(self, draw: int) -> float:
        generator = np.random.default_rng(rng.key(self.seed, self.iteration, step=draw, stream="sampler"))
        prompts = [scenes.draw_prompt(generator) for _ in range(self.BATCH)]
        pixels = np.stack([render.render(scenes.place(p, generator)) for p in prompts])
        media = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        requests = [Request(p.text, 0, scenes.SIZE, scenes.SIZE) for p in prompts]
        with self.clock.phase("encode"):
            x0, prompted = self.adapter.encode_media(media, requests[0]), self.policy.encode(requests)
        with self.clock.phase("update"):
            return self._regress(x0, torch.arange(len(x0)), prompted, draw)


def changes_of_controls(method: str, config: Any) -> list[str]:
    """Three tenths of the recipe's rate, a guess for regression; its fall to 0 is spread over the control's own steps."""
    steps = Supervised.batches(config) if method == "supervised" else 1
    return [f"optimizer.lr={config.optimizer.lr * 0.3:.3g}", f"objective.updates={steps}"]


METHODS: dict[str, tuple[type[Trainer], str]] = {
    "flow_grpo": (Trainer, ""),
    "shuffled": (ShuffledRewards, ""),
    "lr_zero": (Trainer, "zero"),
    "best": (BestOfGroup, "third"),
    "supervised": (Supervised, "third"),
}


def one(method: str, seed: int, folder: Path, recipe: str, overrides: list[str]) -> dict[str, Any]:
    config = load(recipe, [f"seed={seed}", f"run_dir={folder}", *overrides])
    trainer_class, rate = METHODS[method]
    if rate == "third":
        config = load(recipe, [f"seed={seed}", f"run_dir={folder}", *overrides, *changes_of_controls(method, config)])
    backend = Backend()
    parts = build(config, backend, trainer_class)
    if rate == "zero":
        parts.trainer.config = replace(config, optimizer=replace(config.optimizer, lr=0.0))
    run = Run(config, parts, folder, f"scripts/learning_study.py --methods {method} --seeds {seed}", print)
    run.prepare()
    started = time.time()
    if run.go():
        raise SystemExit(130)
    result = json.loads((folder / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in rows if "time/iteration_s" in r]
    return {
        "method": method, "seed": seed, "iterations": config.iterations, "lr": config.optimizer.lr,
        "train_seconds": round(sum(r["time/iteration_s"] for r in trained), 1), "total_seconds": round(time.time() - started, 1),
        "forward_samples": sum(r["calls/forward_samples"] for r in trained),
        "backward_samples": sum(r["calls/backward_samples"] for r in trained),
        "base": result["base"], "tuned": result["tuned"], "difference": result["difference"],
        "curve": [{k: r[k] for k in ("iteration", "eval/strict", "eval/strict_low", "eval/strict_high")}
                  for r in rows if "eval/strict" in r],
        "score": [r["score/mean"] for r in trained],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="flow_grpo")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--out", required=True, help="folder for one JSON a run; run directories go to runs/study")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for method in args.methods.split(","):
        for seed in map(int, args.seeds.split(",")):
            folder = Path("runs/study") / f"{out.name}-{method}-{seed}"
            found = one(method, seed, folder, args.recipe, args.overrides)
            found |= {"machine": machine(), "overrides": args.overrides, "recipe": args.recipe}
            (out / f"{method}-{seed}.json").write_text(json.dumps(found, indent=1))
            d = found["difference"]["strict"]
            print(f"{method} seed {seed}: {found['base']['strict']['mean']:.3f} -> {found['tuned']['strict']['mean']:.3f} "
                  f"({d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]) in {found['train_seconds']} s")  # fmt: skip


if __name__ == "__main__":
    main()
