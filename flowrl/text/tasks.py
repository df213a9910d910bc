"""Verifiable tasks with several steps: problems, right and flawed solutions, and the grading of what a model writes.

A completion is results separated by ";", the last of them the answer, closed by ".". Sums: "3+8+5=" -> "11;16.".
Sorting by insertion: "538=" -> "35;358.". All prompts of a task have the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from flowrl import rng

PAD, END = 0, 1
_CHARACTERS = "_.;0123456789+="  # the index is the token; "_" pads
_TOKEN = {character: token for token, character in enumerate(_CHARACTERS)}
VOCABULARY = len(_CHARACTERS)
_HELD_OUT = 8  # one problem in this many is held out


def encode(text: str) -> list[int]:
    """Turn text into tokens, one a character. Raises ValueError for a character that no task uses."""
    unknown = sorted(set(text) - set(_TOKEN))
    if unknown:
        raise ValueError(f"text: characters {''.join(unknown)!r} are not in the alphabet {_CHARACTERS!r}")
    return [_TOKEN[character] for character in text]


def decode(tokens: Sequence[int]) -> str:
    """Turn tokens into text, up to the first padding."""
    return "".join(_CHARACTERS[token] for token in tokens).split("_", 1)[0]


@dataclass(frozen=True)
class Problem:
    """id: names the problem among those of its task; steps: the right results in order, the last one the answer."""

    id: int
    prompt: str
    steps: tuple[str, ...]

    @property
    def solution(self) -> str:
        return ";".join(self.steps) + "."


class Task(Protocol):
    """A family of problems, numbered 0 .. count - 1. turns: results of a worked solution."""

    @property
    def count(self) -> int: ...
    @property
    def turns(self) -> int: ...
    def problem(self, number: int) -> Problem: ...
    def flawed(self, number: int, slips: Sequence[bool]) -> str: ...


@dataclass(frozen=True)
class Sums:
    """Add ``terms`` digits from left to right, writing every partial sum. A slip forgets the carry of a 7, 8 or 9."""

    terms: int

    @property
    def count(self) -> int:
        return int(10**self.terms)

    @property
    def turns(self) -> int:
        return self.terms - 1

    def problem(self, number: int) -> Problem:
        digits = [int(d) for d in f"{number:0{self.terms}d}"]
        steps = tuple(str(sum(digits[: k + 2])) for k in range(self.turns))
        return Problem(number, "+".join(map(str, digits)) + "=", steps)

    def flawed(self, number: int, slips: Sequence[bool]) -> str:
        """Write the solution of a pupil who goes on from own mistakes. slips: one a result, whether it may go wrong."""
        digits = [int(d) for d in f"{number:0{self.terms}d}"]
        total, steps = digits[0], []
        for digit, slip in zip(digits[1:], slips, strict=True):
            forgotten = slip and digit >= 7 and total % 10 + digit >= 10
            total += digit - (10 if forgotten else 0)
            steps.append(str(total))
        return ";".join(steps) + "."


@dataclass(frozen=True)
class Sorting:
    """Sort ``terms`` digits by insertion, writing the sorted part every time. A slip leaves a 0, 1 or 2 at the end."""

    terms: int

    @property
    def count(self) -> int:
        return int(10**self.terms)

    @property
    def turns(self) -> int:
        return self.terms - 1

    def problem(self, number: int) -> Problem:
        digits = f"{number:0{self.terms}d}"
        return Problem(number, f"{digits}=", tuple("".join(sorted(digits[: k + 2])) for k in range(self.turns)))

    def flawed(self, number: int, slips: Sequence[bool]) -> str:
        """Write the solution of a pupil who goes on from own mistakes. slips: one a result, whether it may go wrong."""
        digits = f"{number:0{self.terms}d}"
        row, steps = digits[0], []
        for digit, slip in zip(digits[1:], slips, strict=True):
            before = next((i for i, other in enumerate(row) if other > digit), len(row))
            place = len(row) if slip and digit <= "2" else before
            row = row[:place] + digit + row[place:]
            steps.append(row)
        return ";".join(steps) + "."


def make(name: Literal["sums", "sorting"], terms: int) -> Task:
    """Make the task ``name`` with ``terms`` digits a problem."""
    return Sums(terms) if name == "sums" else Sorting(terms)


def longest(task: Task) -> int:
    """Count the characters of the longest worked solution."""
    return len(task.problem(task.count - 1).solution)


def held_out(number: int) -> bool:
    """Tell whether a problem is for evaluation only; the same ones for every seed."""
    return rng.key(0, 0, prompt_id=number, stream="evaluation") % _HELD_OUT == 0


def draw(task: Task, seed: int, count: int, evaluation: bool = False) -> list[Problem]:
    """Draw ``count`` distinct problems, of the held-out ones or of the others. seed: a key of ``flowrl.rng``.

    Raises ValueError where the task has too few.
    """
    if count * 2 * _HELD_OUT > task.count:
        raise ValueError(f"count: {count} distinct problems of {task.count} are too many to draw; use more terms")
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, None] = {}
    while len(found) < count:
        for number in torch.randint(task.count, (count,), generator=generator).tolist():
            if held_out(number) == evaluation:
                found[number] = None
    return [task.problem(number) for number in list(found)[:count]]


@dataclass(frozen=True)
class Grades:
    """What was written, judged by rule. B rows, T tokens, S turns.

    outcome: float32 [B], 1 where the last result is the answer and closed by "."; turn: int64 [B, T], the result that a
    token belongs to (its separator included), at most S - 1, -1 on masked tokens; turn_reward: float32 [B, S], 1 where
    result k is right, the outcome for the result that closes the row, NaN for turns that the row does not have; share:
    float32 [B], right results among the S - 1 before the answer.
    """

    outcome: Tensor
    turn: Tensor
    turn_reward: Tensor
    share: Tensor


def grade(task: Task, problems: Sequence[Problem], tokens: Tensor, mask: Tensor) -> Grades:
    """Judge completions ``tokens`` (int64 [B, T], trained where ``mask`` holds), row i an answer to problems[i]."""
    separator = (tokens == _TOKEN[";"]) & mask
    before = separator.long().cumsum(1) - separator.long()
    turn = torch.where(mask, before.clamp(max=task.turns - 1), -1)
    outcome, rewards, share = [], [], []
    for problem, row in zip(problems, tokens.tolist(), strict=True):
        text = decode(row)
        parts = text.removesuffix(".").split(";")
        right = float(text.endswith(".") and parts[-1] == problem.steps[-1])
        checked = [float(part == step) for part, step in zip(parts[:-1], problem.steps[:-1], strict=False)]
        own = [*checked, right]
        outcome.append(right)
        rewards.append(own + [float("nan")] * (task.turns - len(own)))
        share.append(sum(checked) / max(1, task.turns - 1))
    return Grades(torch.tensor(outcome), turn, torch.tensor(rewards), torch.tensor(share))
