"""Latents go to the rewards that say they read them, and the others are remembered, in training too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.config.rewards import reads_latents
from flowrl.config.schema import Failures, RewardEntry
from flowrl.protocols import Reward
from flowrl.records import RewardBatch
from flowrl.scoring.runtime import RewardRuntime
from tests.scoring.executor_tools import batch
from tests.training.helpers import make, small_config

HERE = __name__
SEEN: list[tuple[str, int, bool]] = []  # reward, samples, whether there were latents


def noted(name: str, own: RewardBatch) -> list[float]:
    SEEN.append((name, len(own), own.latents is not None))
    return [float(value) for value in own.images.reshape(len(own), -1).mean(1)]


def plain(batch: RewardBatch) -> list[float]:
    return noted("plain", batch)


def remembered(batch: RewardBatch) -> list[float]:
    return noted("remembered", batch)


remembered.deterministic = True  # type: ignore[attr-defined]


def declares(batch: RewardBatch) -> list[float]:
    if batch.latents is None:
        raise RuntimeError("no latents")
    return noted("declares", batch)


declares.needs_latents = True  # type: ignore[attr-defined]
declares.deterministic = True  # type: ignore[attr-defined]


def by_parameter(latents: Any) -> list[float]:
    return [float(row.sum()) for row in latents]


class ByMethod:
    name = "by_method"

    def score(self, images: Any, latents: Any) -> list[float]:
        return [float(row.sum()) for row in latents]


def runtime(*names: str) -> RewardRuntime:
    return RewardRuntime([RewardEntry(name=f"{HERE}:{name}", label=name) for name in names], Failures())


@pytest.fixture(autouse=True)
def fresh() -> None:
    SEEN.clear()


def test_what_a_reward_says_decides() -> None:
    said = {name: reads_latents(RewardEntry(name=f"{HERE}:{name}")) for name in ("plain", "declares", "by_parameter")}
    assert said == {"plain": False, "declares": True, "by_parameter": True}
    assert reads_latents(RewardEntry(name=f"{HERE}:ByMethod")) is True
    assert reads_latents(RewardEntry(name="jpeg")) is False
    assert reads_latents(RewardEntry(name="tests.training.graded:Flat")) is True  # its value is of latents
    assert reads_latents(RewardEntry(name="tests.training.graded:Red")) is False


def test_latents_go_where_they_are_read() -> None:
    own = replace(batch(1, 2), latents=torch.ones(2, 4, 3, 3))
    with runtime("plain", "remembered", "declares", "by_parameter", "ByMethod") as rewards:
        scored = rewards.score(own)
    assert scored.valid.all()
    assert sorted(SEEN) == [("declares", 2, True), ("plain", 2, False), ("remembered", 2, False)]
    assert scored.per_reward["by_parameter"].scores.tolist() == [36.0, 36.0]
    assert scored.per_reward["ByMethod"].scores.tolist() == [36.0, 36.0]


def test_a_picture_that_comes_again_with_other_latents_is_known_to_who_reads_none() -> None:
    own = replace(batch(1, 2), latents=torch.ones(2, 4, 3, 3))
    with runtime("remembered", "declares") as rewards:
        first = rewards.score(own)
        second = rewards.score(replace(own, latents=torch.zeros(2, 4, 3, 3)))
    assert first.scores.tolist() == second.scores.tolist()
    assert SEEN.count(("remembered", 2, False)) == 1 and SEEN.count(("declares", 2, True)) == 2


def test_training_remembers_a_deterministic_reward(tiny_sd3: Path) -> None:
    """Weights and noise that do not change give the same pictures again: the second iteration asks for none."""
    rewards = [{"name": f"{HERE}:remembered"}, {"name": f"{HERE}:plain", "weight": 0.0}]
    config = small_config(tiny_sd3, rewards=rewards, **{"optimizer.lr": 0.0})
    trainer = make(config)
    rows = []
    for _ in range(2):
        trainer.iteration = 0  # the same prompts and noise
        rows.append(trainer.iterate())
    trainer.rewards.close()
    asked = {name: [count for seen, count, _ in SEEN if seen == name] for name in ("remembered", "plain")}
    assert sum(asked["plain"]) == 16 and not any(latents for *_, latents in SEEN)
    assert sum(asked["remembered"]) <= 8
    assert rows[0]["reward/remembered/mean"] == rows[1]["reward/remembered/mean"]


def test_the_attribute_is_part_of_the_protocol() -> None:
    assert "needs_latents" in str(Reward.__doc__)
