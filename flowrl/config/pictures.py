"""What a run draws of its own training, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """PNGs under RUN/pictures: one group of a rollout by advantage, one sample's clean estimates step by step.

    Drawn at the first and the last iteration and at each with an evaluation, and every ``every`` iterations besides
    (0: no further ones). They change nothing that is trained, cost one group's decoding and a few network calls, and are
    timed as ``time/pictures_s``. rows: prompts of the page that sets the in-training evaluations side by side.
    """

    enabled: bool = True
    every: int = 0
    rows: int = 12
