"""What a judge's words say, as numbers. Where they say nothing that can be read, ValueError: never a made-up score."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

NUMBER = r"(-?\d+(?:\.\d+)?)"


def yes_probability(first_token: Mapping[str, float]) -> float:
    """P(yes) / (P(yes) + P(no)) from the log-probabilities of the answer's first token, in [0, 1].

    Tokens count without white space and case, so " Yes" and "yes" add up. Raises ValueError where neither is listed.
    """
    mass = {"yes": 0.0, "no": 0.0}
    for token, log_probability in first_token.items():
        word = token.strip().strip('."').lower()
        if word in mass:
            mass[word] += math.exp(min(log_probability, 0.0))
    total = mass["yes"] + mass["no"]
    if total <= 0:
        raise ValueError(f"neither yes nor no among the first tokens {sorted(first_token)[:5]}")
    return mass["yes"] / total


def labelled_number(text: str, label: str, low: float, high: float) -> float:
    """The last number after ``label``, a colon between (as in "Final Score: 3.5", "**Final Score:** 4/5").

    Raises ValueError where there is none, or it lies outside [low, high].
    """
    pattern = re.escape(label) + r"\s*(?:\([^)]*\))?[\s*_]*[:：][\s*_]*" + NUMBER
    found = re.findall(pattern, text, re.IGNORECASE)
    if not found:
        raise ValueError(f"no {label!r} with a number in {shortened(text)!r}")
    value = float(found[-1])
    if not low <= value <= high:
        raise ValueError(f"{label} is {value:g}, outside {low:g} to {high:g}")
    return value


def unit_range(value: float, low: float, high: float) -> float:
    """(value - low) / (high - low)."""
    return (value - low) / (high - low)


def axis_scores(text: str, axes: Sequence[str], low: float, high: float) -> dict[str, float]:
    """One labelled number an axis, as in "Alignment Score (1-5): 4". Raises ValueError where one is missing."""
    return {axis: labelled_number(text, axis, low, high) for axis in axes}


def preferred(text: str) -> float:
    """1 where the first picture is called better, 0 where the second is, 1/2 for a tie; the last verdict counts.

    Understands "Image 1 is better", "Better: Image 2", "Tie". Raises ValueError for anything else.
    """
    pattern = (
        r"image\s*([12])\s+is\s+(?:the\s+)?better|better(?:\s+image)?\s*[:：][\s*_]*image\s*([12])"
        r"|\b(tie|equally\s+good|no\s+difference)\b"
    )
    found = re.findall(pattern, text, re.IGNORECASE)
    if not found:
        raise ValueError(f"no verdict between image 1 and image 2 in {shortened(text)!r}")
    one, other, _ = found[-1]
    return {"1": 1.0, "2": 0.0}.get(one or other, 0.5)


def shortened(text: str) -> str:
    """At most 80 characters of a text, from its end, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else "..." + line[-77:]
