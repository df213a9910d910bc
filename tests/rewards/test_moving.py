"""Rewards of the video world on clips whose score is known: frozen, flickering, jumping and wrong-way clips earn little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flowrl.rewards.moving import MovingConsistency, MovingDirection, MovingIdentity, MovingObject

from flowrl.errors import UserError
from flowrl.records import RewardBatch
from flowrl.scoring.probe import probe
from flowrl.worlds.video1 import scenes, track
from flowrl.worlds.video1.render import render

PROMPT = scenes.Prompt("red", "square", "right", "fast")
CLIP = render(scenes.Moving("square", "red", 6.0, 12.0, 2.8, 0.0, 4.2))
FROZEN = np.repeat(CLIP[:1], 5, axis=0)
SLOW = render(scenes.Moving("square", "red", 6.0, 12.0, 0.9, 0.0, 4.2))
SLANTED = render(scenes.Moving("square", "red", 6.0, 6.0, 2.0, 2.0, 4.2))
GREEN = render(scenes.Moving("square", "green", 6.0, 12.0, 2.8, 0.0, 4.2))
ODD = (np.arange(5) % 2 == 1)[:, None, None, None]
COLOURS = np.where(ODD, GREEN, CLIP)
BLINK = np.where(ODD, CLIP[0, 0, 0], CLIP)
JUMPS = CLIP[[0, 2, 1, 4, 3]]
JITTER = CLIP[[0, 1, 0, 1, 0]]

EXPECTED = {
    # direction, identity, consistency, strict
    "right": (CLIP, 1.0, 1.0, 1.0, 1.0),
    "frozen": (FROZEN, 0.0, 0.0, 0.0, 0.0),
    "wrong way": (CLIP[::-1], 0.0, 1.0, 1.0, 0.0),
    "slow": (SLOW, 0.5, 1.0, 1.0, 0.0),
    "slanted": (SLANTED, np.sqrt(0.5), 1.0, 1.0, 0.0),
    "changes colour": (COLOURS, 1.0, 3 / 5, 3 / 5, 0.0),
    "blinks": (BLINK, 1.0, 3 / 5, 3 / 5, 0.0),
    "another object": (GREEN, 1.0, 0.0, 1.0, 0.0),
    "jitter": (JITTER, 0.0, 0.0, 0.0, 0.0),
}


def batch(clips: list[np.ndarray], metadata: list[dict[str, Any]] | None = None) -> RewardBatch:
    rows = metadata or [PROMPT.metadata] * len(clips)
    return RewardBatch(np.stack(clips), [PROMPT.text] * len(clips), rows, list(range(len(clips))))


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_known_clips(kind: str) -> None:
    clip, direction, identity, consistency, strict = EXPECTED[kind]
    given = batch([clip])
    assert MovingDirection().score(given).scores[0] == pytest.approx(direction, abs=0.05)
    assert MovingIdentity().score(given).scores[0] == pytest.approx(identity, abs=0.01)
    assert MovingConsistency().score(given).scores[0] == pytest.approx(consistency, abs=0.01)
    judged = MovingObject().score(given)
    dense = (direction + identity + consistency) / 3
    assert judged.components["strict"][0] == strict and judged.components["dense"][0] == pytest.approx(dense, abs=0.03)
    assert judged.scores[0] == pytest.approx((strict + dense) / 2, abs=0.02)
    assert (judged.details[0] is None) == bool(strict)


def test_jumps_cost_consistency_and_the_strict_judge() -> None:
    found = track.follow(JUMPS[None])[0]
    assert found.wobble > track.MAX_WOBBLE
    assert MovingConsistency().score(batch([JUMPS])).scores[0] == pytest.approx(
        track.MAX_WOBBLE / found.wobble, abs=0.01
    )
    assert MovingObject("strict").score(batch([JUMPS])).scores[0] == 0


def test_less_motion_than_the_floor_earns_in_proportion() -> None:
    crawl = render(scenes.Moving("square", "red", 8.0, 12.0, 0.6, 0.0, 4.2))
    speed = track.follow(crawl[None])[0].speed
    assert 0.4 < speed < 0.8
    for reward in (MovingIdentity(), MovingConsistency()):
        assert reward.score(batch([crawl])).scores[0] == pytest.approx(speed / 0.8, abs=0.01)


def test_noise_earns_next_to_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 24, 24, 3), dtype=np.uint8)
    for reward in (MovingDirection(), MovingIdentity(), MovingConsistency(), MovingObject()):
        assert reward.score(batch(list(noise))).scores.max() < 0.5
    assert MovingObject("strict").score(batch(list(noise))).scores.max() == 0


def test_a_batch_is_scored_row_by_row_and_bad_metadata_is_a_mask() -> None:
    rows = [PROMPT.metadata, {"tag": "fast"}, PROMPT.metadata | {"direction": "left"}]
    result = MovingDirection().score(batch([CLIP, CLIP, CLIP], rows))
    assert result.valid.tolist() == [True, False, True]
    assert result.scores[0] == pytest.approx(1, abs=0.01) and np.isnan(result.scores[1]) and result.scores[2] == 0
    assert "it needs the prompts of world/video1" in result.errors[1]


def test_pictures_short_clips_and_unknown_modes_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 frames"):
        MovingIdentity().score(batch([CLIP[0]]))
    with pytest.raises(UserError, match="3 frames or more"):
        MovingIdentity().score(batch([CLIP[:2]]))
    with pytest.raises(UserError, match="use mean, strict or dense"):
        MovingObject("soft")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["moving_direction", "moving_object"])
def test_the_probe_finds_them_usable(name: str) -> None:
    assert probe(name, {}).endswith("usable")
