"""Time every estimator of the advantage engine, and some of its parts against plain loops.

    python scripts/bench_advantage.py --rows 4096 --steps 1024 --groups 512 --output docs/results/bench_advantage.json

One thread. A figure is the least CPU time of the process over ``--repeats`` calls after one that warms up: other work on
the machine does not count. A call is all that a user calls: every check of the inputs, and the whole result record.
``passes`` is its time over that of one elementwise product of two float32 [B, T] tensors into a third that is already
there: how often the method could have read its input. ``--only gae,otb`` times those alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowrl.advantage.catalogue import ESTIMATORS
from flowrl.advantage.pipeline import inputs_of
from flowrl.training.run import machine


def seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return min(found)


def make_inputs(rows: int, steps: int, groups: int) -> dict[str, Any]:
    """Ragged rows without holes, groups of equal size in shuffled order, eight segments."""
    g = torch.Generator().manual_seed(0)
    length = torch.randint(steps // 2, steps + 1, (rows,), generator=g)
    mask = torch.arange(steps) < length[:, None]
    segment = torch.where(mask, torch.arange(steps) * 8 // steps, -1)
    group = (torch.arange(rows) % groups)[torch.randperm(rows, generator=g)]
    order = group.argsort(stable=True)
    leaf = torch.empty(rows, dtype=torch.int64)
    leaf[order] = torch.arange(rows)
    child = leaf // max(1, rows // groups // 2)
    rewards = torch.rand(rows, generator=g)
    step_reward = torch.zeros(rows, steps)
    step_reward[torch.arange(rows), length - 1] = rewards
    noise = torch.randn(rows, steps, generator=g)
    return {
        "rewards": rewards, "group": group, "mask": mask, "step_reward": step_reward, "segment": segment,
        "trajectory": torch.arange(rows), "value": noise, "value_high": noise, "value_term": noise, "value_post": noise,
        "anchor": torch.arange(steps).expand(rows, steps).contiguous(), "node_path": torch.stack([group, child, leaf], 1),
        "segment_value": torch.rand(rows, 9, generator=g), "confidence": torch.rand(rows, 9, generator=g),
        "stage_reward": torch.rand(rows, 8, generator=g), "answer_reward": torch.rand(rows, 8, 4, generator=g),
        "votes": torch.rand(4, rows, steps, generator=g) < 0.2, "entropy": torch.rand(rows, steps, generator=g),
        "old_log_prob": -torch.rand(rows, steps, generator=g), "reference_log_prob": -torch.rand(rows, steps, generator=g),
        "process_log_prob": -torch.rand(rows, steps, generator=g), "tempered_log_prob": -torch.rand(rows, steps, generator=g),
        "token": torch.randint(0, 1000, (rows, steps), generator=g), "sum_pi_squared": torch.rand(rows, steps, generator=g),
        "switch": torch.arange(steps).expand(rows, steps) % 64 == 0, "truncated": torch.rand(rows, generator=g) < 0.3,
        "correct": rewards > 0.5, "pivot": torch.zeros(rows, dtype=torch.int64), "length": length.float(),
        "cost": length.float(), "energy": 1 + torch.rand(rows, generator=g), "outcome": (rewards * 4).long(),
        "probe": torch.rand(rows, generator=g), "prompt_value": torch.rand(rows, generator=g),
        "greedy_reward": torch.rand(rows, generator=g), "choice": torch.rand(rows, 16, generator=g) < 0.5,
        "step_energy": torch.rand(rows, steps, generator=g),
    }  # fmt: skip


def grpo_loop(rewards: torch.Tensor, group: torch.Tensor) -> list[float]:
    """The same formula, one sample at a time."""
    members: dict[int, list[float]] = {}
    for r, g in zip(rewards.tolist(), group.tolist(), strict=True):
        members.setdefault(g, []).append(r)
    spread = {g: (statistics.fmean(v), statistics.pstdev(v)) for g, v in members.items()}
    return [(r - spread[g][0]) / (spread[g][1] + 1e-4) for r, g in zip(rewards.tolist(), group.tolist(), strict=True)]


def gae_in_float64(inputs: dict[str, Any], gamma: float, lam: float) -> torch.Tensor:
    """GAE by the definition, one step at a time over the batch, skipping masked steps."""
    reward, value, mask = inputs["step_reward"].double(), inputs["value"].double(), inputs["mask"]
    out = torch.zeros_like(reward)
    next_value = next_advantage = torch.zeros(len(reward), dtype=torch.float64)
    for t in range(reward.shape[1] - 1, -1, -1):
        now = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * next_advantage
        out[:, t] = torch.where(mask[:, t], now, 0.0)
        next_value = torch.where(mask[:, t], value[:, t], next_value)
        next_advantage = torch.where(mask[:, t], now, next_advantage)
    return out


def masked_carry_gae(inputs: dict[str, Any], gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE as verl computes it, in its way: float32, a column at a time, what is carried blended by the mask, whitened."""
    reward, value, mask = inputs["step_reward"], inputs["value"], inputs["mask"].float()
    next_value: Any = 0.0
    carried: Any = 0.0
    columns = []
    for t in range(reward.shape[1] - 1, -1, -1):
        here, now = mask[:, t], value[:, t]
        moved = reward[:, t] + gamma * next_value - now + gamma * lam * carried
        next_value = now * here + (1 - here) * next_value
        carried = moved * here + (1 - here) * carried
        columns.append(carried)
    advantage = torch.stack(columns[::-1], dim=1)
    count = mask.sum()
    mean = (advantage * mask).sum() / count
    centred = advantage - mean
    variance = (centred.square() * mask).sum() / (count - 1)
    return centred * (variance + 1e-8).rsqrt() * mask, advantage + value


def inputs_for(name: str, needed: list[str], inputs: dict[str, Any]) -> dict[str, Any]:
    """What the method takes, in the form that it asks for."""
    chosen = {key: inputs[key] for key in needed}
    if name in ("gdpo", "mt_grpo"):
        chosen["rewards"] = torch.rand(len(inputs["rewards"]), 2)
    if name == "mt_ppo":  # a turn that a row never reaches has no reward
        reached = torch.stack([(inputs["segment"] == k).any(1) for k in range(8)], 1)
        chosen["stage_reward"] = torch.where(reached, inputs["stage_reward"], torch.nan)
    if name in ("spo_tree", "grpo_ma"):  # a segment a level of the tree
        chosen["segment"] = torch.where(inputs["mask"], inputs["segment"] // 4, -1)
    if name == "grpo_ma":
        chosen["node_path"] = inputs["node_path"][:, 1:]
    if name == "otb":
        chosen["step_energy"] = inputs["step_energy"]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="keys, separated by commas")
    parser.add_argument("--output", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs = make_inputs(args.rows, args.steps, args.groups)
    a, b, c = (torch.rand(args.rows, args.steps) for _ in range(3))
    one = seconds(lambda: torch.mul(a, b, out=c), args.repeats)
    rows, skipped = [], []
    for name, call in ESTIMATORS.items():
        if args.only and name not in args.only.split(","):
            continue
        needed = [key for key, required in inputs_of(call).items() if required]
        missing = [key for key in needed if key not in inputs]
        if missing:
            skipped.append({"key": name, "needs": missing})
            continue
        chosen = inputs_for(name, needed, inputs)
        taken = seconds(lambda call=call, chosen=chosen: call(**chosen), args.repeats)  # type: ignore[misc]
        shape = "[B, T]" if call(**chosen).advantage.ndim == 2 else "[B]"
        rows.append({"key": name, "result": shape, "ms": round(1000 * taken, 2), "passes": round(taken / one, 1)})
        print(f"{name:24} {shape:7} {1000 * taken:9.2f} ms {taken / one:8.1f} passes", flush=True)
    loop = seconds(lambda: grpo_loop(inputs["rewards"], inputs["group"]), args.repeats)
    holes = {**inputs, "mask": inputs["mask"] & (torch.rand(args.rows, args.steps) > 0.1)}
    holes["step_reward"] = torch.where(holes["mask"], inputs["step_reward"], 0.0)
    scans = {
        "gae_ms": seconds(lambda: ESTIMATORS["gae"](**{k: inputs[k] for k in ("step_reward", "value", "mask")}), 3),
        "gae_with_holes_ms": seconds(lambda: ESTIMATORS["gae"](holes["step_reward"], holes["value"], holes["mask"]), 3),
        "gae_whitened_ms": seconds(
            lambda: ESTIMATORS["gae"](inputs["step_reward"], inputs["value"], inputs["mask"], whiten=True), 3
        ),
        "verl_recursion_ms": seconds(lambda: masked_carry_gae(inputs, 1.0, 0.95), 3),
    }
    scans = {name: round(1000 * taken, 1) for name, taken in scans.items()}
    worst = {}
    for lam in (0.9, 1.0):
        ours = ESTIMATORS["gae"](holes["step_reward"], holes["value"], holes["mask"], gamma=1.0, lam=lam).advantage
        exact = gae_in_float64(holes, 1.0, lam)
        worst[str(lam)] = float((ours.double() - exact).abs().max() / exact.abs().max())
    print(f"grpo, one sample at a time: {1000 * loop:.2f} ms; gae against float64, relative to the largest: {worst}")
    print(scans)
    if args.output:
        found = {
            "command": f"python scripts/bench_advantage.py --rows {args.rows} --steps {args.steps} --groups {args.groups}",
            "machine": machine(), "threads": 1, "timer": "CPU time of the process, least of the repeats",
            "repeats": args.repeats, "one_pass_ms": round(1000 * one, 3),
            "estimators": rows, "skipped": skipped, "grpo_loop_ms": round(1000 * loop, 2), "scans": scans,
            "gae_relative_error": worst,
        }  # fmt: skip
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
