"""The prompts of the embedded worlds as rows: training and held-out sentences, their weights, and evaluation picks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowrl import rng
from flowrl.data.sampler import weights_by_tag
from flowrl.errors import UserError
from flowrl.records import PromptRow, RewardBatch
from flowrl.worlds.v1 import scenes
from flowrl.worlds.video1 import scenes as moving

WORLDS = ("world/v1", "world/video1")

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class _World:
    """weights: how often each tag is drawn, tags in the world's order. pools: the sentences of a split, by tag."""

    weights: Mapping[str, float]
    pools: Mapping[Split, Mapping[str, Sequence[Any]]]


def _world(name: str) -> _World:
    """Raises UserError for an unknown world."""
    if name == "world/v1":
        return _World(scenes.TAG_WEIGHT, {"train": scenes.prompts("train"), "held_out": scenes.prompts("held_out")})
    if name == "world/video1":
        return _World(moving.TAG_WEIGHT, {"train": moving.prompts("train"), "held_out": moving.prompts("held_out")})
    raise UserError(f"unknown world {name!r}; use {', '.join(WORLDS)}, or give a prompt file")


def world_rows(name: str, split: Split) -> list[PromptRow]:
    """Every sentence of a split in a fixed order, tags in the world's order; ``prompt_id`` is the row within the split.

    metadata: tag, and what the world's checker reads: for v1 include and, for counting, exclude (flowrl.data.geneval);
    for video1 color, shape, direction and speed. Raises UserError for an unknown world or split.
    """
    world = _world(name)
    if split not in ("train", "held_out"):
        raise UserError(f"unknown split {split!r} of {name}; use train or held_out")
    sentences = [prompt for tag in world.weights for prompt in world.pools[split][tag]]
    rows = []
    for number, prompt in enumerate(sentences):
        metadata = {key: value for key, value in prompt.metadata.items() if key != "prompt"}
        rows.append(PromptRow(prompt.text, number, metadata))
    return rows


def tag_weights(rows: Sequence[PromptRow], name: str = "world/v1") -> list[float]:
    """Weight of each row so that a draw takes a tag by the world's TAG_WEIGHT and then a row of that tag uniformly."""
    return weights_by_tag(rows, _world(name).weights)


def evaluation_rows(count: int, seed: int, name: str = "world/v1") -> list[PromptRow]:
    """Pick ``count`` distinct held-out sentences, stratified by tag as near to TAG_WEIGHT as the tags' sizes allow.

    Deterministic by flowrl.rng. Tags are interleaved, so every prefix is spread over the tags as well. Raises UserError
    when fewer than ``count`` sentences exist.
    """
    rows, weights = world_rows(name, "held_out"), _world(name).weights
    if not 1 <= count <= len(rows):
        raise UserError(
            f"evaluation.count: {count} distinct prompts asked for; {name} holds out {len(rows)}; use 1 to {len(rows)}"
        )
    pools: dict[str, list[PromptRow]] = {tag: [] for tag in weights}
    for row in rows:
        pools[row.metadata["tag"]].append(row)
    quota = _quota(count, {tag: len(pool) for tag, pool in pools.items()}, weights)
    picked: list[tuple[float, PromptRow]] = []
    for number, (tag, pool) in enumerate(pools.items()):
        order = rng.permutation(rng.key(seed, number, stream="evaluation"), len(pool))[: quota[tag]]
        picked += [((place + 0.5) / quota[tag], pool[index]) for place, index in enumerate(order)]
    return [row for _, row in sorted(picked, key=lambda pair: (pair[0], pair[1].prompt_id))]


def probe_batch(count: int) -> RewardBatch:
    """Renders of held-out sentences for trying a reward out: ``count`` of them, always the same.

    metadata: as in ``world_rows``, a ``target`` text for rewards that read pictures, and the fields of world/video1, whose
    direction is the one in which the probe moves them.
    """
    import numpy as np

    from flowrl.worlds.v1.render import render

    generator = np.random.default_rng(0)
    chosen = [scenes.draw_prompt(generator, "held_out") for _ in range(count)]
    images = np.stack([render(scenes.place(prompt, generator)) for prompt in chosen])
    metadata = [prompt.metadata | {"target": "GO"} | _as_moving(prompt) for prompt in chosen]
    return RewardBatch(images, [prompt.text for prompt in chosen], metadata, list(range(count)))


def _as_moving(prompt: scenes.Prompt) -> dict[str, str]:
    first = prompt.kinds[0]
    return {"color": first.color or "red", "shape": first.shape, "direction": "right", "speed": "fast"}


def _quota(count: int, sizes: dict[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Split ``count`` by weight; a tag too small for its share is taken whole and the others share the rest."""
    fixed: dict[str, int] = {}
    while True:
        open_tags = [tag for tag in sizes if tag not in fixed]
        left = count - sum(fixed.values())
        total = sum(weights[tag] for tag in open_tags)
        shares = {tag: left * weights[tag] / total for tag in open_tags}
        full = {tag: sizes[tag] for tag in open_tags if shares[tag] >= sizes[tag]}
        if not full:
            break
        fixed |= full
        if len(fixed) == len(sizes):
            return fixed
    parts = {tag: math.floor(share) for tag, share in shares.items()}
    by_remainder = sorted(shares, key=lambda tag: parts[tag] - shares[tag])
    for tag in by_remainder[: left - sum(parts.values())]:
        parts[tag] += 1
    return fixed | parts
