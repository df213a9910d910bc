"""Rewards that fail, compare or are gold, in real iterations on the tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowrl
from flowrl.config.render import to_mapping
from flowrl.records import RewardBatch
from flowrl.training.collection import _Waiting
from flowrl.training.trainer import Trainer

from .helpers import make, small_config

HERE = __name__
FAULT: dict[str, Any] = {"group": None, "calls": 0}
SEEN: list[list[int]] = []


def red(images: Any) -> Any:
    return images[..., 0].mean((1, 2)) / 255.0


def red_that_fails(batch: RewardBatch) -> list[float | None]:
    """As ``red``, but one group of the second iteration gets no value."""
    return [
        None if group == FAULT["group"] else float(value)
        for value, group in zip(red(batch.images), batch.group_ids, strict=True)
    ]


def raises_for_a_chunk(batch: RewardBatch) -> Any:
    if FAULT["group"] in batch.group_ids:
        raise RuntimeError("the service went away")
    return red(batch.images)


def blue(images: Any) -> Any:
    return images[..., 2].mean((1, 2)) / 255.0


def redder(first: RewardBatch, second: RewardBatch) -> Any:
    a, b = red(first.images), red(second.images)
    return np.where(a == b, 0.5, a > b).astype(float)


def whole_group(images: Any, group_ids: Any) -> list[float]:
    SEEN.append(list(group_ids))
    return [float(v) for v in red(images)]


whole_group.scope = "group"  # type: ignore[attr-defined]


def advantages(trainer: Trainer) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """Advantage of each group of the next iteration, and its row of metrics."""
    kept: list[Any] = []
    credit = trainer._credit

    def keep(collected: Any) -> Any:
        batch, found = credit(collected)
        kept.append((collected.trajectory.group_id, batch.advantage * batch.element))
        return batch, found

    trainer._credit = keep  # type: ignore[method-assign]
    row = trainer.iterate()
    trainer._credit = credit  # type: ignore[method-assign]
    group, advantage = kept[0]
    return {g: advantage[group == g] for g in group.unique().tolist()}, row


def second_iteration(tiny: Path, name: str, group: int | None) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    config = small_config(tiny, **{
        "rewards": [{"name": f"{HERE}:{name}"}], "batch.groups": 3, "failures.max_invalid_fraction": 0.5,
    })  # fmt: skip
    FAULT["group"] = None
    trainer = make(config)
    trainer.iterate()
    FAULT["group"] = group
    try:
        return advantages(trainer)
    finally:
        trainer.rewards.close()


def test_a_group_that_fails_in_mid_run_leaves_the_others_as_they_were(tiny_sd3: Path) -> None:
    clean, row = second_iteration(tiny_sd3, "red_that_fails", None)
    assert sorted(clean) == [3, 4, 5] and row["score/invalid"] == 0
    for name in ("red_that_fails", "raises_for_a_chunk"):
        faulty, row = second_iteration(tiny_sd3, name, 4)
        assert row["score/invalid"] == 4 and row[f"reward/{name}/invalid"] == 4
        for group in (3, 5):
            assert torch.equal(faulty[group], clean[group]) and float(clean[group].abs().max()) > 0
        assert float(faulty[4].abs().max()) == 0


def test_shares_shaping_and_gates_are_logged(tiny_sd3: Path) -> None:
    rewards = [
        {"name": f"{HERE}:red", "weight": 2.0, "shaping": [{"affine": [10.0, 0.0]}]},
        {"name": f"{HERE}:blue", "shaping": [{"gate": {"by": "watch", "at_least": 2.0, "otherwise": 0.0}}]},
        {"name": f"{HERE}:red", "label": "watch", "role": "monitor"},
    ]
    row = make(small_config(tiny_sd3, rewards=rewards)).iterate()
    assert abs(row["reward/red/shaped"] - 10 * row["reward/red/mean"]) < 1e-4
    assert row["reward/blue/shaped"] == 0 and row["reward/blue/mean"] > 0 and "reward/watch/shaped" not in row
    assert (row["reward/red/variance_share"], row["reward/blue/variance_share"]) == (1.0, 0.0)
    assert row["score/gated"] == 0 and abs(row["score/mean"] - 2 * row["reward/red/shaped"]) < 1e-4
    assert not any("variance_share" in key for key in make(small_config(tiny_sd3)).iterate())


def test_comparing_rewards_see_whole_groups_whatever_the_micro_batch(tiny_sd3: Path) -> None:
    found = {}
    for size in (3, 8):
        config = small_config(tiny_sd3, **{
            "rewards": [{"name": f"{HERE}:redder"}, {"name": f"{HERE}:whole_group", "weight": 0.5}],
            "batch.micro_batch": size,
        })  # fmt: skip
        SEEN.clear()
        found[size], row = advantages(make(config))
        assert sorted(SEEN) == [[0] * 4, [1] * 4]
        assert abs(row["reward/redder/mean"] - 0.5) < 1e-6 and row["score/invalid"] == 0
    for group in (0, 1):
        torch.testing.assert_close(found[3][group], found[8][group], rtol=1e-4, atol=1e-4)


def test_latents_wait_for_their_group() -> None:
    ids, x = torch.tensor([0, 0, 0, 1, 1, 2]), torch.arange(6.0)
    waiting = _Waiting(torch.tensor([3, 2, 1]))
    assert waiting.add(x[:2], ids[:2]) is None
    start, x0, group = waiting.add(x[2:4], ids[2:4]) or (-1, x, ids)
    assert (start, x0.tolist(), group.tolist()) == (0, [0, 1, 2], [0, 0, 0])
    start, x0, group = waiting.add(x[4:], ids[4:]) or (-1, x, ids)
    assert (start, x0.tolist(), group.tolist()) == (3, [3, 4, 5], [1, 1, 2])
    at_once = _Waiting(None)
    assert [(at_once.add(x[i : i + 2], ids[i : i + 2]) or (-1,))[0] for i in (0, 2, 4)] == [0, 2, 4]


def test_gold_alarm_and_best_checkpoints(tiny_sd3: Path, tmp_path: Path) -> None:
    config = small_config(tiny_sd3, **{
        "rewards": [{"name": f"{HERE}:red"}, {"name": f"{HERE}:blue", "role": "gold", "weight": 2.0}],
        "evaluation.every": 1, "evaluation.count": 6, "evaluation.quick": 6, "evaluation.per_prompt": 2,
        "iterations": 3, "checkpoint.every": 0, "run_dir": str(tmp_path / "run"),
    })  # fmt: skip
    run = flowrl.train(to_mapping(config))
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["gold/blue_low"] <= row["gold/blue"] <= row["gold/blue_high"]
        assert abs(row["gold/score"] - 2 * row["gold/blue"]) < 1e-6 and "eval/blue" not in row
        assert 0 < row["eval/diversity"] < 1 and 0 <= row["picture/brightness"] <= 1 and row["alarm/fired"] in (0, 1)
        assert "reward/blue/mean" not in row, "gold is scored at evaluations alone"
    best = json.loads((run.folder / "best.json").read_text())
    for key, name in (("best_proxy", "eval/score"), ("best_gold", "gold/score")):
        top = max(rows, key=lambda row: row[name])
        assert best[key]["iteration"] == top["iteration"] and abs(best[key]["mean"] - top[name]) < 1e-9
        if top["iteration"]:
            assert (run.folder / "checkpoints" / f"iteration-{top['iteration']:08d}").is_dir()
    for file in (run.folder / "checkpoints").glob("iteration-*/manifest.json"):
        said = json.loads(file.read_text())["info"]
        assert bool(said["alarm"]) == bool(rows[int(file.parent.name.partition("-")[2])]["alarm/fired"])
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert set(samples[0]["scores"]) == {"red", "blue"}
