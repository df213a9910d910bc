"""What the tests of the text trainer share: a small recipe, a model with fixed probabilities, hand-made rollouts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flowrl.text import TextConfig, load, tasks
from flowrl.text.rollout import Sampled, written

SMALL: dict[str, Any] = {
    "task": {"name": "sums", "terms": 3},
    "model": {"hidden": 16, "layers": 1, "heads": 2},
    "pretraining": {"steps": 0, "batch": 8, "cache": ""},
    "rollout": {"problems": 8, "group_size": 16},
    "optimizer": {"lr": 3e-3, "warmup": 0, "schedule": "constant"},
    "evaluation": {"problems": 16, "points": 1},
}


def small(*overrides: str, recipe: str = "text_outcome") -> TextConfig:
    """A shipped recipe made small."""
    plain = [
        f"{section}.{key}={value}" for section, keys in SMALL.items() for key, value in keys.items() if value != ""
    ]
    return load(recipe, [*plain, 'pretraining.cache=""', *overrides])


class Fixed:
    """A model whose next token has the same probabilities everywhere. weights: character -> unnormalised probability."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.logits = torch.full((tasks.VOCABULARY,), -30.0)
        for character, weight in weights.items():
            self.logits[tasks.encode(character)[0]] = torch.tensor(weight).log()

    def __call__(self, ids: Tensor, past_key_values: None = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1), past_key_values=None)


def rows_of(texts: list[str], length: int) -> Tensor:
    return torch.tensor([tasks.encode(text.ljust(length, "_")) for text in texts])


def by_hand(task: tasks.Task, problems: list[tasks.Problem], texts: list[str], group: list[int]) -> Sampled:
    """A rollout of given completions with probability 1/2 a token."""
    tokens = rows_of(texts, tasks.longest(task))
    mask = written(tokens)
    grades = tasks.grade(task, problems, tokens, mask)
    half = torch.where(mask, torch.tensor(0.5).log(), torch.tensor(0.0))
    return Sampled(
        problems=problems, prompt=rows_of([p.prompt for p in problems], len(problems[0].prompt)), tokens=tokens,
        mask=mask, group=torch.tensor(group), old_log_prob=half, entropy=torch.zeros_like(half), grades=grades,
        segment=grades.turn, samples=len(texts), generated=int(mask.sum()),
    )  # fmt: skip
