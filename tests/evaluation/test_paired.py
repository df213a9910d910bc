"""Pictures depend on seed, prompt and number alone, and several processes make the rows of one, whatever the counts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.config.schema import Config, Failures, RewardEntry
from flowrl.evaluation.paired import Evaluated, evaluate
from flowrl.records import PromptRow
from flowrl.scoring.runtime import RewardRuntime
from flowrl.training.build import bare_adapter
from tests.evaluation.eval_parts import recipe, samples
from tests.training.helpers import small_config

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
PROMPTS = [PromptRow(f"a photo of a {c} circle", 10 + i, {"tag": c}) for i, c in enumerate(["red", "green", "blue"])]


def red(images, prompts):
    return images[..., 0].mean((1, 2)) / 255.0


def against_the_best(images, prompts):
    """Relative to the group: only meaningful where the whole group is there."""
    bright = images[..., 0].mean((1, 2)) / 255.0
    return bright - bright.max()


against_the_best.scope = "group"


class Team:
    """Stand-in for a Backend: threads that wait for each other as processes do, and give up after a while."""

    def __init__(self, world: int) -> None:
        self.world, self.slots = world, [None] * world
        self.barrier = threading.Barrier(world, timeout=120)

    def member(self, rank: int) -> Member:
        return Member(self, rank)


class Member:
    def __init__(self, team: Team, rank: int) -> None:
        self.team, self.rank, self.world = team, rank, team.world

    def _all(self, value):
        self.team.slots[self.rank] = value
        self.team.barrier.wait()
        found = list(self.team.slots)
        self.team.barrier.wait()
        return found

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(rows))

    def counts(self, number: int) -> list[int]:
        return self._all(number)


def judged(config: Config, adapter, entry: RewardEntry, prompts=PROMPTS, world: int = 1) -> list[Evaluated]:
    team = Team(world)

    def one(rank: int) -> Evaluated:
        with RewardRuntime([entry], Failures()) as rewards:
            return evaluate(config, adapter, rewards.for_evaluation(), prompts, "base", 3, team.member(rank))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.fixture(scope="module")
def adapter(tiny_sd3: Path):
    return bare_adapter(small_config(tiny_sd3), CPU)


def settings(model: Path, per_prompt: int, micro: int) -> Config:
    return small_config(
        model, **{"evaluation.per_prompt": per_prompt, "batch.micro_batch": micro, "evaluation.steps": 1}
    )


@pytest.mark.parametrize(
    ("per_prompt", "micro", "world"),
    [(3, 2, 2), (1, 1, 2), (1, 4, 3), (2, 2, 5)],
    ids=["5 batches on 2, the last of one picture", "3 on 2", "one batch on 3", "3 on 5"],
)
def test_any_number_of_processes_makes_the_rows_of_one(
    tiny_sd3: Path, adapter, per_prompt: int, micro: int, world: int
) -> None:
    config, entry = settings(tiny_sd3, per_prompt, micro), RewardEntry(name="tests.evaluation.test_paired:red")
    (alone,) = judged(config, adapter, entry)
    assert [(r["prompt_id"], r["member"]) for r in alone.rows] == [
        (p.prompt_id, m) for p in PROMPTS for m in range(per_prompt)
    ]
    for found in judged(config, adapter, entry, world=world):
        assert found.rows == alone.rows
        np.testing.assert_array_equal(found.images, alone.images)


def test_a_picture_depends_on_its_seed_prompt_id_and_number_alone(tiny_sd3: Path, adapter) -> None:
    entry = RewardEntry(name="tests.evaluation.test_paired:red")
    (many,) = judged(settings(tiny_sd3, 3, 4), adapter, entry)
    (few,) = judged(settings(tiny_sd3, 2, 1), adapter, entry, PROMPTS[::-1])
    place = {(r["prompt_id"], r["member"]): i for i, r in enumerate(many.rows)}
    same = many.images[[place[r["prompt_id"], r["member"]] for r in few.rows]].astype(int)
    assert np.abs(same - few.images).max() <= 1  # kernels depend on the batch's shape, a picture by one level at most
    assert len({image.tobytes() for image in many.images}) == 9


def test_rewards_that_compare_a_group_see_it_whole(tiny_sd3: Path, adapter) -> None:
    """Three members and batches of two: one member of each prompt, the best, is at 0."""
    entry = RewardEntry(name="tests.evaluation.test_paired:against_the_best")
    for found in judged(settings(tiny_sd3, 3, 2), adapter, entry, world=2):
        scores = np.array([row["scores"]["against_the_best"] for row in found.rows]).reshape(3, 3)
        bright = found.images[..., 0].mean((1, 2)).reshape(3, 3) / 255
        np.testing.assert_allclose(scores, bright - bright.max(1, keepdims=True), atol=1e-6)


def test_what_a_row_holds(tiny_sd3: Path, adapter) -> None:
    config = settings(tiny_sd3, 1, 4)
    entries = [
        RewardEntry(name="statistics", weight=2.0), RewardEntry(name="tests.evaluation.test_paired:red", role="gold", weight=3.0),
        RewardEntry(name="compositional", role="monitor"),
    ]  # fmt: skip
    with RewardRuntime(entries, Failures()) as rewards:
        found = evaluate(config, adapter, rewards.for_evaluation(), PROMPTS, "tuned", 7)
    for row, prompt, image in zip(found.rows, PROMPTS, found.images, strict=True):
        assert (row["iteration"], row["which"], row["prompt"], row["tag"]) == (
            7,
            "tuned",
            prompt.prompt,
            prompt.metadata["tag"],
        )
        assert row["score"] == pytest.approx(2 * row["scores"]["statistics"], rel=1e-6)
        assert row["gold"] == pytest.approx(3 * image[..., 0].mean() / 255, rel=1e-5)
        assert row["components"]["statistics"]["brightness"] == row["scores"]["statistics"]
        assert row["scores"]["compositional"] is None and list(row["errors"]) == ["compositional"]
        assert row["components"]["compositional"] == {"strict": None, "dense": None} and row["strict"] is None


def test_two_real_processes_write_the_files_of_one(tiny_sd3: Path, tmp_path: Path) -> None:
    """Under torchrun with gloo: five prompts, three pictures each, batches of four; the last turn is half empty."""
    changes = {
        "evaluation.count": 5,
        "evaluation.per_prompt": 3,
        "batch.micro_batch": 4,
        "evaluation.grid": 0,
        "threads": 1,
    }
    file = recipe(tiny_sd3, tmp_path, **changes, **{"batch.groups": 3})  # 3 groups are no matter to an evaluation
    command = {"one": [sys.executable], "two": [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    ]}  # fmt: skip
    told = {}
    for name, words in command.items():
        done = subprocess.run(
            [*words, "scripts/evaluate.py", str(file), "--out", str(tmp_path / name)], cwd=REPOSITORY, capture_output=True,
            text=True, timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        told[name] = done.stdout.replace(str(tmp_path / name), "OUT")
    assert len(samples(tmp_path / "one")) == 15
    assert (tmp_path / "one" / "samples.jsonl").read_bytes() == (tmp_path / "two" / "samples.jsonl").read_bytes()
    assert (tmp_path / "one" / "features.safetensors").read_bytes() == (
        tmp_path / "two" / "features.safetensors"
    ).read_bytes()
    assert told["one"] == told["two"]  # told once
