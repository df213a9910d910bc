"""Some rows of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flowrl.records import RewardBatch


def take(batch: RewardBatch, rows: Sequence[int]) -> RewardBatch:
    """The samples ``rows`` of a batch, in that order; the batch itself where they are all of it."""
    if list(rows) == list(range(len(batch))):
        return batch
    index = list(rows)
    return dataclasses.replace(
        batch,
        images=batch.images[index],
        prompts=[batch.prompts[row] for row in index],
        metadata=[batch.metadata[row] for row in index],
        group_ids=[batch.group_ids[row] for row in index] if batch.group_ids else (),
        latents=None if batch.latents is None else batch.latents[index],
        reference=None if batch.reference is None else batch.reference[index],
        text=None if batch.text is None else batch.text[index],
    )
