"""The cache: hits by content alone, misses for anything that may change a score, a bound on memory, no failures kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.cache import RewardCache
from flowrl.scoring.executors import ExecutorSettings, FailedCall, failed_call, make_executor

from .executor_tools import batch, entry
from .test_executors import same


class Scorer:
    """Scores by first pixel, prompt and metadata; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, own: RewardBatch) -> RewardResult:
        pixels = own.images.reshape(len(own), -1)[:, 0]
        self.asked.append(pixels.tolist())
        scores = pixels.astype(np.float32) + np.float32(0.1)
        return RewardResult(
            scores=scores,
            valid=np.ones(len(own), np.bool_),
            errors=[None] * len(own),
            components={"twice": scores * 2},
            details=[f"{prompt} {row}" for prompt, row in zip(own.prompts, own.metadata, strict=True)],
        )


def alike(a: RewardResult, b: RewardResult) -> None:
    assert a.scores.tobytes() == b.scores.tobytes() and a.scores.dtype == b.scores.dtype
    assert a.valid.tolist() == b.valid.tolist() and list(a.errors) == list(b.errors)
    assert {k: v.tobytes() for k, v in a.components.items()} == {k: v.tobytes() for k, v in b.components.items()}
    assert list(a.details) == list(b.details)


PLAIN = [{}] * 9


def test_what_is_known_is_not_scored_again_and_comes_in_order() -> None:
    cache, score = RewardCache("x", {}), Scorer()
    first = cache.through(batch(3, 4, metadata=PLAIN[:2]), score)
    alike(first, Scorer()(batch(3, 4, metadata=PLAIN[:2])))
    mixed = batch(7, 4, 9, 3, metadata=PLAIN[:4])
    alike(cache.through(mixed, score), Scorer()(mixed))
    alike(cache.through(mixed, score), Scorer()(mixed))
    assert score.asked == [[3, 4], [7, 9]]
    assert (cache.hits, cache.misses, len(cache)) == (6, 4, 4)


def test_a_sample_that_stands_twice_is_scored_once() -> None:
    cache, score = RewardCache("x", {}), Scorer()
    twice = batch(5, 6, 5, 5, metadata=PLAIN[:4])
    alike(cache.through(twice, score), Scorer()(twice))
    assert score.asked == [[5, 6]] and (cache.hits, cache.misses) == (2, 2)


BASE = batch(1, metadata=[{"a": 1, "b": [2]}])
OTHERS: dict[str, RewardBatch] = {
    "picture": batch(2, metadata=BASE.metadata),  # type: ignore[arg-type]
    "shape": replace(BASE, images=BASE.images.reshape(1, 6, 4, 3)),
    "frames": replace(BASE, images=BASE.images.reshape(1, 2, 2, 6, 3)),
    "prompt": replace(BASE, prompts=["other"]),
    "metadata": replace(BASE, metadata=[{"a": 1, "b": [3]}]),
    "metadata key": replace(BASE, metadata=[{"a": 1, "c": [2]}]),
    "reference": replace(BASE, reference=np.zeros((1, 2, 2, 3), np.uint8)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_may_change_a_score_is_another_sample(other: str) -> None:
    cache, score = RewardCache("x", {}), Scorer()
    cache.through(BASE, score)
    cache.through(OTHERS[other], score)
    assert (cache.hits, cache.misses) == (0, 2)


def test_another_reference_is_another_sample() -> None:
    cache, score = RewardCache("x", {}), Scorer()
    for value in (0, 1, 0):
        cache.through(replace(BASE, reference=np.full((1, 2, 2, 3), value, np.uint8)), score)
    assert (cache.hits, cache.misses) == (1, 2)


def test_the_order_of_metadata_and_the_group_change_nothing() -> None:
    cache, score = RewardCache("x", {}), Scorer()
    cache.through(BASE, score)
    cache.through(replace(BASE, metadata=[{"b": [2], "a": 1}], group_ids=[7]), score)
    assert (cache.hits, cache.misses) == (1, 1)


def test_name_and_arguments_are_part_of_the_key() -> None:
    keys = [
        RewardCache(name, args)._keys(BASE) for name, args in (("x", {}), ("y", {}), ("x", {"a": 1}), ("x", {"a": 2}))
    ]
    assert len({tuple(key or ()) for key in keys}) == 4


def test_a_failure_is_not_kept() -> None:
    cache = RewardCache("x", {})

    def half(own: RewardBatch) -> RewardResult:
        good = Scorer()(own)
        return replace(
            good,
            scores=np.array([np.nan, *good.scores[1:]], np.float32),
            valid=np.array([False, *good.valid[1:]]),
            errors=["no", *good.errors[1:]],
        )

    result = cache.through(batch(1, 2, metadata=PLAIN[:2]), half)
    assert result.valid.tolist() == [False, True]
    score = Scorer()
    alike(cache.through(batch(1, 2, metadata=PLAIN[:2]), score), Scorer()(batch(1, 2, metadata=PLAIN[:2])))
    assert score.asked == [[1]]


def test_a_failed_call_stays_one_and_known_samples_keep_their_scores() -> None:
    cache = RewardCache("x", {})
    cache.through(batch(1, metadata=PLAIN[:1]), Scorer())
    result = cache.through(batch(2, 1, metadata=PLAIN[:2]), lambda own: failed_call(len(own), "down", fatal=True))
    assert isinstance(result, FailedCall) and result.fatal and result.reason == "down"
    assert result.valid.tolist() == [False, True] and list(result.errors) == ["down", None]
    assert np.isnan(result.scores[0]) and result.scores[1] == np.float32(1.1)


@pytest.mark.parametrize(
    "own",
    [replace(BASE, latents=torch.zeros(1, 2)), replace(BASE, metadata=[{"a": np.zeros(2)}])],
    ids=["latents", "metadata that is not JSON"],
)
def test_what_has_no_key_is_scored_each_time(own: RewardBatch) -> None:
    cache, score = RewardCache("x", {}), Scorer()
    for _ in range(2):
        cache.through(own, score)
    assert score.asked == [[1], [1]] and len(cache) == 0 and (cache.hits, cache.misses) == (0, 0)


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    probe = RewardCache("x", {})
    probe.through(batch(1, metadata=PLAIN[:1]), Scorer())
    size = probe.bytes
    assert 400 < size < 1000
    cache, score = RewardCache("x", {}, max_bytes=3 * size), Scorer()
    for pixel in (1, 2, 3):
        cache.through(batch(pixel, metadata=PLAIN[:1]), score)
    cache.through(batch(1, metadata=PLAIN[:1]), score)  # 2 is now the oldest
    cache.through(batch(4, metadata=PLAIN[:1]), score)
    assert len(cache) == 3 and cache.bytes == 3 * size
    score.asked.clear()
    cache.through(batch(1, 3, 4, metadata=PLAIN[:3]), score)
    assert score.asked == []
    cache.through(batch(2, metadata=PLAIN[:1]), score)
    assert score.asked == [[2]]


def test_an_executor_scores_through_its_cache() -> None:
    cache = RewardCache("first_pixel", {})
    made: dict[str, Any] = {"timeout_s": 5.0}
    with make_executor("pixel", entry("first_pixel"), ExecutorSettings(**made), cache) as executor:
        for _ in range(3):
            same(executor.score(batch(8, 9)), 8.0, 9.0)
    assert (cache.hits, cache.misses) == (4, 2)
