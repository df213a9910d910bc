"""World video1: sentences and split are pinned, clips show what their sentence says, and the checker sees what does not."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from flowrl.errors import UserError
from flowrl.worlds.prompts import evaluation_rows, tag_weights, world_rows
from flowrl.worlds.video1 import scenes, track
from flowrl.worlds.video1.render import render

RIGHT = scenes.Prompt("red", "circle", "right", "fast")


def clips(prompts: list[scenes.Prompt], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([render(scenes.place(prompt, rng)) for prompt in prompts])


def every_prompt() -> list[scenes.Prompt]:
    return [p for split in ("train", "held_out") for pool in scenes.prompts(split).values() for p in pool]


def reason(clip: np.ndarray, prompt: scenes.Prompt) -> str:
    return track.strict_reason(track.follow(clip[None])[0], prompt.metadata)


def test_the_split_is_pinned_and_its_sides_are_apart() -> None:
    train, held = ([p for pool in scenes.prompts(side).values() for p in pool] for side in ("train", "held_out"))
    assert (len(train), len(held)) == (6 * 4 * 4 * 2 - 64, 64) and not {p.text for p in train} & {p.text for p in held}
    assert {word for p in held for word in p.text.split()} <= {word for p in train for word in p.text.split()}
    digest = hashlib.sha256("\n".join(p.text for p in held).encode()).hexdigest()
    assert digest[:16] == "8e6e8334badd6087"


def test_a_render_is_pinned() -> None:
    clip = render(scenes.Moving("square", "blue", 6.0, 12.0, 3.0, 0.0, 4.0))
    assert clip.shape == (5, 24, 24, 3) and clip.dtype == np.uint8
    assert clip[0, 12, 6].tolist() == [64, 104, 244] and clip[0, 12, 18].tolist() == [34, 36, 42]
    assert clip[4, 12, 18].tolist() == [64, 104, 244] and clip[4, 12, 6].tolist() == [34, 36, 42]


def test_every_sentence_is_drawn_as_it_says() -> None:
    """A render of each of the 192 sentences; the few misses are shapes of eight pixels that fit two templates."""
    prompts = every_prompt()
    tracks = track.follow(clips(prompts))
    assert np.mean([not track.strict_reason(t, p.metadata) for t, p in zip(tracks, prompts, strict=True)]) > 0.98
    assert all(track.direction_fits(t, p.direction) for t, p in zip(tracks, prompts, strict=True))
    assert all(track.speed_fit(t, p.speed) == 1 for t, p in zip(tracks, prompts, strict=True))


def test_velocity_is_the_renders() -> None:
    item = scenes.Moving("circle", "red", 6.0, 14.0, 2.5, -1.0, 4.4)
    found = track.follow(render(item)[None])[0]
    assert found.velocity == pytest.approx((2.5, -1.0), abs=0.1)
    assert found.wobble < 0.4 and found.speed == pytest.approx(np.hypot(2.5, 1.0), abs=0.1)


def test_another_sentence_is_refused_in_each_word() -> None:
    clip = clips([RIGHT])[0]
    assert reason(clip, RIGHT) == ""
    for field, word, told in (
        ("color", "blue", "5 frames without one blue circle"),
        ("shape", "square", "5 frames without one red square"),
        ("direction", "left", "not left"),
        ("speed", "slowly", "not slowly"),
    ):
        assert told in reason(clip, dataclasses.replace(RIGHT, **{field: word}))


def test_what_is_no_clip_of_its_sentence() -> None:
    clip = clips([RIGHT])[0]
    assert reason(np.repeat(clip[:1], 5, axis=0), RIGHT) == "nothing moves"
    blank = clip.copy()
    blank[2] = clip[0, 0, 0]
    assert reason(blank, RIGHT).startswith("1 frames without")
    other = clips([dataclasses.replace(RIGHT, color="green")])[0]
    blinking = np.where((np.arange(5) % 2 == 0)[:, None, None, None], clip, other)
    assert reason(blinking, RIGHT).startswith("2 frames without")
    assert "not right" in reason(clip[::-1], RIGHT)
    jumpy = clip[[0, 2, 1, 4, 3]]
    assert reason(jumpy, RIGHT).startswith("strays")
    empty = track.follow(np.full((1, 5, 24, 24, 3), 34, np.uint8))[0]
    assert empty.speed == 0 and empty.wobble == np.inf and empty.kept() == 0


def test_a_second_object_counts_against_the_frame() -> None:
    clip = clips([RIGHT])[0]
    low = render(scenes.Moving("square", "blue", 5.0, 18.5, 0.0, 0.0, 4.0))
    free = clips([dataclasses.replace(RIGHT, direction="right")], seed=3)[0]
    both = np.where((low != low[0, 0, 0]).any(-1, keepdims=True), low, free)
    assert reason(both, RIGHT).startswith("5 frames without") and not reason(clip, RIGHT)


def test_speeds_between_the_words_fit_by_degrees() -> None:
    def moving(speed: float) -> track.Track:
        return track.Track((None,) * 5, (0,) * 5, (speed, 0.0), 0.0)

    assert [track.speed_fit(moving(v), "fast") for v in (0.0, 0.2, 0.9, 1.8, 3.0, 9.6)] == [0, 0, 0.5, 1, 1, 0.5]
    assert [track.speed_fit(moving(v), "slowly") for v in (0.2, 0.4, 1.7, 3.6)] == [0, 1, 1, 0.5]
    assert moving(1.0).cosine("up") == 0 and moving(1.0).cosine("left") == -1 and moving(0.1).cosine("right") == 0


@pytest.mark.parametrize("shape", [(5, 24, 24, 3), (1, 2, 24, 24, 3), (1, 5, 24, 24, 4)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="follow: expected uint8"):
        track.follow(np.zeros(shape, np.uint8))


def test_rows_weights_and_evaluation() -> None:
    rows = world_rows("world/video1", "train")
    assert len(rows) == 128 and rows[5].prompt_id == 5 and not any(track.fault(row.metadata) for row in rows)
    weights = tag_weights(rows, "world/video1")
    slow = sum(w for w, row in zip(weights, rows, strict=True) if row.metadata["tag"] == "slowly")
    assert slow == pytest.approx(0.5)
    picked = evaluation_rows(40, 7, "world/video1")
    held = {row.prompt for row in world_rows("world/video1", "held_out")}
    assert len({row.prompt for row in picked}) == 40 and {row.prompt for row in picked} <= held
    assert sum(row.metadata["tag"] == "fast" for row in picked) == 20
    with pytest.raises(UserError, match="holds out 64"):
        evaluation_rows(65, 0, "world/video1")


def test_metadata_faults_are_named() -> None:
    good = RIGHT.metadata
    assert track.fault(good) == ""
    assert "speed is 'warp'" in track.fault(good | {"speed": "warp"})
    assert "color is None" in track.fault({})
