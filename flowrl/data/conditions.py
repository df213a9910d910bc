"""Prompts with a new condition: which classes a request asks for, and every prompt with every choice of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flowrl.errors import UserError
from flowrl.records import PromptRow, Request

NULL = -1


def choices(attributes: Mapping[str, int]) -> list[dict[str, int]]:
    """Every choice of classes that asks for something: one class of each attribute, or none of it."""
    spaces = [[NULL, *range(classes)] for classes in attributes.values()]
    found = [dict(zip(attributes, values, strict=True)) for values in itertools.product(*spaces)]
    return [{name: value for name, value in each.items() if value != NULL} for each in found[1:]]


def multiply_out(
    rows: Sequence[PromptRow], weights: Sequence[float] | None, attributes: Mapping[str, int]
) -> tuple[list[PromptRow], list[float] | None]:
    """Every prompt with every choice, renumbered; a prompt's weight is that of each of its copies."""
    every = choices(attributes)
    made = [(row, choice) for row in rows for choice in every]
    out = [
        replace(row, prompt_id=number, metadata={**row.metadata, "condition": choice})
        for number, (row, choice) in enumerate(made)
    ]
    return out, None if weights is None else [weight for weight in weights for _ in every]


def in_turn(rows: Sequence[PromptRow], attributes: Mapping[str, int]) -> list[PromptRow]:
    """Every prompt with one choice, in turn; a prompt that has its own keeps it."""
    every = choices(attributes)
    return [
        row
        if "condition" in row.metadata
        else replace(row, metadata={**row.metadata, "condition": every[i % len(every)]})
        for i, row in enumerate(rows)
    ]


def classes_of(request: Request, attributes: Mapping[str, int]) -> list[int]:
    """The class of every attribute that a request asks for, NULL for none. Raises UserError for an unknown one."""
    asked = request.metadata.get("condition", {})
    for name, value in asked.items():
        known = attributes.get(name)
        if known is None:
            raise UserError(f"condition: {request.prompt!r} asks for {name!r}; known are {', '.join(attributes)}")
        if not isinstance(value, int) or not 0 <= value < known:
            raise UserError(f"condition.{name}: {value!r} is no class; use 0 to {known - 1}")
    return [asked.get(name, NULL) for name in attributes]
