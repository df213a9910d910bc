"""Drawing from a world's sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

Sentence = TypeVar("Sentence")


def draw_by_tag(
    pools: Mapping[str, Sequence[Sentence]], weights: Mapping[str, float], rng: np.random.Generator
) -> Sentence:
    """Draw a tag by ``weights``, in their order, then one of its sentences uniformly."""
    tags = list(weights)
    pool = pools[tags[rng.choice(len(tags), p=list(weights.values()))]]
    return pool[int(rng.integers(len(pool)))]
