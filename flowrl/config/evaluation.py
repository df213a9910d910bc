"""What an evaluation measures beside rewards: features of pictures, diversity in them, distances between sets; and its checks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowrl import registry
from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.config.schema import Config

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_LABEL = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, kw_only=True)
class FeatureEntry:
    """A network whose features diversity and distances are taken in: a registry key, ``module:attr`` or ``path.py:attr``.

    args: its keyword arguments, checked against its signature, such as {path: /models/clip-vit-large-patch14}. label: its
    name in results ("": made of name).
    """

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def key(self) -> str:
        """Its name in results."""
        return self.label or self.name.rpartition(":")[2] or self.name


@dataclass(frozen=True, kw_only=True)
class Measures:
    """features: cells (no network: colours of 8 x 8 cells) | tiny_clip | clip | dino | siglip, or one's own.

    distances: between the pictures of base and tuned, and of both and ``reference`` (a folder of pictures; "" for none).
    """

    features: tuple[FeatureEntry, ...] = (FeatureEntry(name="cells"),)
    distances: tuple[Literal["kid", "cmmd", "fid"], ...] = ("kid", "cmmd", "fid")
    reference: str = ""


def reference_files(folder: str) -> list[Path]:
    """The pictures of a folder, by name; files that do not end as a picture does are left out."""
    return sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in PICTURES and file.is_file())


def problems(config: Config) -> Iterator[str]:
    """List what is wrong, each as ``key.path: what; what to do``."""
    measures = config.evaluation
    for label, count in Counter(entry.key for entry in measures.features).items():
        if count > 1:
            yield f"evaluation.features: {label} is given {count} times; keep one, or give each a label of its own"
    for index, entry in enumerate(measures.features):
        key = f"evaluation.features.{index}"
        if not _LABEL.fullmatch(entry.key):
            yield f"{key}.label: {entry.key!r} cannot name a result; use letters, digits, _ . and -"
        try:
            found = registry.check_arguments("feature", entry.name, entry.args)
            yield from (f"{key}.args.{problem}" for problem in found)
        except UserError as error:
            yield f"{key}.name: {error}"
    for name, count in Counter(measures.distances).items():
        if count > 1:
            yield f"evaluation.distances: {name} is given {count} times; name it once"
    if not measures.reference:
        return
    if not measures.features or not measures.distances:
        yield "evaluation.reference: nothing is measured against it; give evaluation.features and evaluation.distances"
    if not Path(measures.reference).is_dir():
        yield f"evaluation.reference: no folder {measures.reference!r}; give a folder of pictures, or leave it out"
    elif len(reference_files(measures.reference)) < 2:
        found_there = len(reference_files(measures.reference))
        yield (
            f"evaluation.reference: {measures.reference} holds {found_there} pictures ({', '.join(PICTURES)}); give at least "
            "2, and some thousands for a distance that says something"
        )
