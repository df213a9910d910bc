"""Remembers the scores of a deterministic reward by the content of what it scored."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.rows import take

_OVERHEAD = 400
"""Bytes that one entry takes beside its texts and numbers: key, objects, the table's slot."""


@dataclass(frozen=True)
class _Entry:
    score: float
    components: tuple[tuple[str, float], ...]
    detail: str | None

    @property
    def size(self) -> int:
        return _OVERHEAD + sum(len(name) + 80 for name, _ in self.components) + 4 * len(self.detail or "")


class RewardCache:
    """Scores of one reward by content, the least recently used dropped first. Safe to use from several threads.

    For rewards that are deterministic and score each sample by itself (scope ``sample``, no latents): the key of a sample
    is a hash of the reward's name and arguments, the shape and bytes of its picture (video) and reference, its prompt and
    its metadata, and not of what stands beside it. Only valid scores are kept: a failure is tried again.

    ``hits`` and ``misses`` count samples; one that stands twice in a batch is scored once. max_bytes: memory, estimated.
    """

    def __init__(self, name: str, args: Mapping[str, Any], max_bytes: int = 16 << 20) -> None:
        self.hits = 0
        self.misses = 0
        self.max_bytes = max_bytes
        self.bytes = 0
        self._reward = hashlib.blake2b(_canonical([name, dict(args)])).digest()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def through(self, batch: RewardBatch, score: Callable[[RewardBatch], RewardResult]) -> RewardResult:
        """The result of ``score`` for the batch, called with the samples that are not known, if any.

        A batch with latents, or with metadata that is not JSON, goes to ``score`` as it is.
        """
        keys = None if batch.latents is not None else self._keys(batch)
        if keys is None:
            return score(batch)
        known = self._known(keys)
        first: dict[bytes, int] = {}  # of each unknown key, the row that is scored
        for row, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, row)
        with self._lock:
            self.misses += len(first)
            self.hits += len(keys) - len(first)
        if not first:
            return _from_entries([known[key] for key in keys])
        rows = list(first.values())
        result = score(take(batch, rows))
        self._keep(list(first), result)
        return result if len(rows) == len(batch) else _merged(result, keys, known, list(first))

    def _keys(self, batch: RewardBatch) -> list[bytes] | None:
        reference = batch.reference
        try:
            texts = [_canonical([prompt, dict(row)]) for prompt, row in zip(batch.prompts, batch.metadata, strict=True)]
        except (TypeError, ValueError):
            return None
        found = []
        for row, text in enumerate(texts):
            digest = hashlib.blake2b(self._reward, digest_size=32)
            for media in (batch.images[row], None if reference is None else reference[row]):
                digest.update(f"{None if media is None else (media.dtype.str, media.shape)};".encode())
                if media is not None:
                    digest.update(np.ascontiguousarray(media).tobytes())
            digest.update(text)
            found.append(digest.digest())
        return found

    def _known(self, keys: Sequence[bytes]) -> dict[bytes, _Entry]:
        with self._lock:
            found = {key: self._entries[key] for key in keys if key in self._entries}
            for key in found:
                self._entries.move_to_end(key)
        return found

    def _keep(self, keys: Sequence[bytes], result: RewardResult) -> None:
        with self._lock:
            for place, key in enumerate(keys):
                if not result.valid[place]:
                    continue
                components = tuple((name, float(values[place])) for name, values in result.components.items())
                detail = result.details[place] if result.details else None
                old = self._entries.pop(key, None)
                self._entries[key] = entry = _Entry(float(result.scores[place]), components, detail)
                self.bytes += entry.size - (old.size if old else 0)
            while self.bytes > self.max_bytes and self._entries:
                self.bytes -= self._entries.popitem(last=False)[1].size


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _from_entries(entries: Sequence[_Entry]) -> RewardResult:
    count = len(entries)
    components: dict[str, Any] = {}
    for row, entry in enumerate(entries):
        for name, value in entry.components:
            components.setdefault(name, np.full(count, np.nan, np.float32))[row] = value
    details = [entry.detail for entry in entries]
    return RewardResult(
        scores=np.array([entry.score for entry in entries], np.float32),
        valid=np.ones(count, np.bool_),
        errors=[None] * count,
        components=components,
        details=details if any(text is not None for text in details) else (),
    )


def _merged(
    fresh: RewardResult, keys: Sequence[bytes], known: Mapping[bytes, _Entry], asked: Sequence[bytes]
) -> RewardResult:
    """Known and fresh results in the order of the batch; the kind of ``fresh`` (a failed call) is kept."""
    old = _from_entries([known[key] for key in keys if key in known])
    place_of = {key: len(old.scores) + place for place, key in enumerate(asked)}
    place = 0
    order = []
    for key in keys:
        if key in known:
            order.append(place)
            place += 1
        else:
            order.append(place_of[key])
    names = dict.fromkeys([*fresh.components, *old.components])
    parts = (old, fresh)
    errors = [text for part in parts for text in part.errors]
    details = [text for part in parts for text in (part.details or [None] * len(part.scores))]
    return replace(
        fresh,
        scores=np.concatenate([part.scores for part in parts])[order],
        valid=np.concatenate([part.valid for part in parts])[order],
        errors=[errors[index] for index in order],
        components={name: np.concatenate([_column(part, name) for part in parts])[order] for name in names},
        details=[details[index] for index in order] if old.details or fresh.details else (),
    )


def _column(part: RewardResult, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return part.components.get(name, np.full(len(part.scores), np.nan, np.float32))
