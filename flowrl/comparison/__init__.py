"""``flowrl compare``: several methods on one task, over the same seeds, prompts and noise, at an equal budget."""

from flowrl.comparison.compare import compare
from flowrl.comparison.planning import Request

__all__ = ["Request", "compare"]
