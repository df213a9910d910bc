"""What a saved pipeline says of itself before its weights are read: class, settings, shapes, licence. No torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import UserError

INDEX = "model_index.json"


@dataclass(frozen=True)
class Folder:
    """A pipeline on disk. index: its model_index.json."""

    path: Path
    index: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        return str(self.index.get("_class_name", ""))

    @property
    def parts(self) -> list[str]:
        """Names of the parts that it holds: those whose entry names a library and a class."""
        return [
            name for name, entry in self.index.items()
            if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
        ]  # fmt: skip

    @property
    def licence(self) -> str:
        """``license`` in the front matter of README.md; "" where there is none."""
        import yaml

        file = self.path / "README.md"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if not text.startswith("---\n"):
            return ""
        try:
            front = yaml.safe_load(text[4:].partition("\n---")[0])
        except yaml.YAMLError:
            return ""
        found = front.get("license_name") or front.get("license") if isinstance(front, dict) else None
        return str(found) if found else ""

    def settings(self, part: str) -> dict[str, Any]:
        """config.json of a part; empty where there is none."""
        file = self.path / part / "config.json"
        return read_json(file) if file.is_file() else {}

    def text_lengths(self) -> dict[str, int]:
        """The most tokens that each tokenizer takes, where its settings say."""
        found = {}
        for name in self.parts:
            file = self.path / name / "tokenizer_config.json"
            length = read_json(file).get("model_max_length") if file.is_file() else None
            if isinstance(length, int):
                found[name] = length
        return found

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a part by name, from the headers of its safetensors; empty where it has none."""
        found: dict[str, tuple[int, ...]] = {}
        for file in self._files(part):
            found.update(header(file))
        return found

    def _files(self, part: str) -> Iterator[Path]:
        folder = self.path / part
        for stem in ("diffusion_pytorch_model", "model"):
            index = folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                for name in sorted(set(read_json(index)["weight_map"].values())):
                    yield folder / name
                return
            if (folder / f"{stem}.safetensors").is_file():
                yield folder / f"{stem}.safetensors"
                return

    def numbers(self, part: str) -> int:
        """How many numbers a part holds, parameters and saved buffers."""
        return sum(math.prod(shape) for shape in self.shapes(part).values())


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {file} cannot be read: {error}; download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"model.path: {file} holds no JSON object; download it again")
    return found


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of the tensors of a safetensors file: eight bytes of length, then JSON. Reads no weights."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100 << 20:
                raise ValueError("its header is longer than 100 MiB")
            entries = json.loads(stream.read(length))
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"model.path: {file} is no safetensors file ({error}); download it again") from error


def find(path: str, revision: str = "") -> Folder | None:
    """The folder of a path or of a hub id that is already in the local cache; None where it is neither.

    Raises UserError for a folder that holds no pipeline.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        cached = _cached(path, revision)
        if cached is None:
            return None
        folder = cached
    if not (folder / INDEX).is_file():
        raise UserError(
            f"model.path: {path} holds no {INDEX}, so it is no saved pipeline; give the folder that has one"
        )
    return Folder(folder, read_json(folder / INDEX))


def _cached(repo: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, INDEX, revision=revision or None)
    except HFValidationError:  # no hub id: loading says so
        return None
    return Path(found).parent if isinstance(found, str) else None
