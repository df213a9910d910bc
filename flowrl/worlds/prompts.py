"""The prompts of an embedded world as rows: training and held-out sentences, their weights, and evaluation picks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from flowrl import rng
from flowrl.data.sampler import weights_by_tag
from flowrl.errors import UserError
from flowrl.records import PromptRow, RewardBatch
from flowrl.worlds.v1 import scenes

WORLDS = ("world/v1",)


def world_rows(name: str, split: Literal["train", "held_out"]) -> list[PromptRow]:
    """Every sentence of a split in a fixed order, tags in the world's order; ``prompt_id`` is the row within the split.

    metadata: tag, include and, for counting, exclude (flowrl.data.geneval). Raises UserError for an unknown world or
    split.
    """
    if name not in WORLDS:
        raise UserError(f"unknown world {name!r}; use {', '.join(WORLDS)}, or give a prompt file")
    if split not in ("train", "held_out"):
        raise UserError(f"unknown split {split!r} of {name}; use train or held_out")
    sentences = [prompt for tag in scenes.TAGS for prompt in scenes.prompts(split)[tag]]
    rows = []
    for number, prompt in enumerate(sentences):
        metadata = {key: value for key, value in prompt.metadata.items() if key != "prompt"}
        rows.append(PromptRow(prompt.text, number, metadata))
    return rows


def tag_weights(rows: Sequence[PromptRow]) -> list[float]:
    """Weight of each row so that a draw takes a tag by TAG_WEIGHT and then a row of that tag uniformly."""
    return weights_by_tag(rows, scenes.TAG_WEIGHT)


def evaluation_rows(count: int, seed: int, name: str = "world/v1") -> list[PromptRow]:
    """Pick ``count`` distinct held-out sentences, stratified by tag as near to TAG_WEIGHT as the tags' sizes allow.

    Deterministic by flowrl.rng. Tags are interleaved, so every prefix is spread over the tags as well. Raises UserError
    when fewer than ``count`` sentences exist.
    """
    rows = world_rows(name, "held_out")
    if not 1 <= count <= len(rows):
        raise UserError(
            f"evaluation.count: {count} distinct prompts asked for; {name} holds out {len(rows)}; use 1 to {len(rows)}"
        )
    pools: dict[str, list[PromptRow]] = {tag: [] for tag in scenes.TAGS}
    for row in rows:
        pools[row.metadata["tag"]].append(row)
    quota = _quota(count, {tag: len(pool) for tag, pool in pools.items()})
    picked: list[tuple[float, PromptRow]] = []
    for number, (tag, pool) in enumerate(pools.items()):
        order = rng.permutation(rng.key(seed, number, stream="evaluation"), len(pool))[: quota[tag]]
        picked += [((place + 0.5) / quota[tag], pool[index]) for place, index in enumerate(order)]
    return [row for _, row in sorted(picked, key=lambda pair: (pair[0], pair[1].prompt_id))]


def probe_batch(count: int) -> RewardBatch:
    """Renders of held-out sentences for trying a reward out: ``count`` of them, always the same.

    metadata: as in ``world_rows``, and a ``target`` text for rewards that read pictures.
    """
    import numpy as np

    from flowrl.worlds.v1.render import render

    generator = np.random.default_rng(0)
    chosen = [scenes.draw_prompt(generator, "held_out") for _ in range(count)]
    images = np.stack([render(scenes.place(prompt, generator)) for prompt in chosen])
    metadata = [prompt.metadata | {"target": "GO"} for prompt in chosen]
    return RewardBatch(images, [prompt.text for prompt in chosen], metadata, list(range(count)))


def _quota(count: int, sizes: dict[str, int]) -> dict[str, int]:
    """Split ``count`` by TAG_WEIGHT; a tag too small for its share is taken whole and the others share the rest."""
    fixed: dict[str, int] = {}
    while True:
        open_tags = [tag for tag in sizes if tag not in fixed]
        left = count - sum(fixed.values())
        total = sum(scenes.TAG_WEIGHT[tag] for tag in open_tags)
        shares = {tag: left * scenes.TAG_WEIGHT[tag] / total for tag in open_tags}
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
