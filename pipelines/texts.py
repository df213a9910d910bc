"""Prompts encoded once: what the text encoders made of each, kept in main memory, so that the encoders can go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from flowrl.errors import UserError

Encoded = tuple[torch.Tensor, ...]
"""What a family makes of texts: tensors, all with the texts first."""


class TextCache:
    """Encoded texts by themselves. split: one text's row of a batch; join: rows to a batch again."""

    def __init__(self, split: Callable[[Encoded, int], Encoded], join: Callable[[Sequence[Encoded]], Encoded]) -> None:
        self.split, self.join = split, join
        self.rows: dict[str, Encoded] = {}

    def fill(self, texts: Sequence[str], encode: Callable[[list[str]], Encoded], size: int) -> None:
        """Encode the texts that are not there yet, ``size`` a call. Raises UserError where main memory cannot hold them."""
        missing = [text for text in dict.fromkeys(texts) if text not in self.rows]
        for part in _chunks(missing, size):
            encoded = encode(part)
            for number, text in enumerate(part):
                self.rows[text] = tuple(tensor.cpu().clone() for tensor in self.split(encoded, number))
            if part[0] == missing[0]:
                check_room(sum(t.numel() * t.element_size() for t in self.rows[part[0]]) * len(missing), len(missing))

    def __call__(self, texts: Sequence[str], device: torch.device) -> Encoded:
        """As encoding ``texts`` in one call. Raises UserError for a text that was not there to be encoded."""
        for text in texts:
            if text not in self.rows:
                raise UserError(
                    f"model.free_text_encoders: the encoders are gone, and this prompt was not encoded before: {text[:80]!r}; "
                    "set it to false"
                )
        return tuple(tensor.to(device) for tensor in self.join([self.rows[text] for text in texts]))


def _chunks(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])


def check_room(wanted: int, count: int, free: int | None = None) -> None:
    """Raise UserError where ``wanted`` bytes for ``count`` prompts exceed the free main memory (``free``: asked where None)."""
    free = _free_memory() if free is None else free
    if free is not None and wanted > free:
        raise UserError(
            f"model.free_text_encoders: {count:,} encoded prompts take {wanted / 2**30:,.1f} GiB of main memory, and "
            f"{free / 2**30:,.1f} GiB are free; use fewer prompts, or set it to false"
        )


def _free_memory() -> int | None:
    """Bytes of main memory that programs can have; what files only cache counts as free. None where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
