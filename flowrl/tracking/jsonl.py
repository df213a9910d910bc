"""Rows of JSON, one object a line, that survive a kill in the middle of a line."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.errors import UserError


def finite(value: float) -> float | None:
    """Return the number, or None (JSON's null) where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


class JsonLines:
    """Append JSON objects to a file, one a line, each in one write.

    path: made where missing, with its folder; fsync: flush every row to the disk. A line that a kill tore is cut off
    when the file is opened. Raises UserError where the file cannot be opened.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path = path
        self._fsync = fsync
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend_tail(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot append to {path}: {error}. Mend the path or its permissions.") from error

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Raises ValueError that names the keys for NaN or infinity (write ``finite(value)``), TypeError for what JSON
        cannot hold, UserError where the disk refuses; the file then ends where it ended before.
        """
        try:
            line = json.dumps(dict(row), allow_nan=False, ensure_ascii=False) + "\n"
        except ValueError as error:
            raise ValueError(
                f"{self.path.name}: not finite: {', '.join(_not_finite(row))}; use finite(value)"
            ) from error
        data = line.encode("utf-8", errors="backslashreplace")
        before = os.fstat(self._file.fileno()).st_size
        try:
            _write_all(self._file.fileno(), data)
            if self._fsync:
                os.fsync(self._file.fileno())
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise UserError(f"cannot append to {self.path}: {error}. Free some space or mend the path.") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_after(path: Path, iteration: int) -> int:
    """Drop the rows whose ``"iteration"`` is greater, and a torn last line; return how many lines went.

    Rows that stay keep their bytes. The file is replaced atomically, and not touched where nothing goes; a missing file
    has nothing to cut. Raises UserError with file and line for a row that is no JSON object with an ``"iteration"``.
    """
    if not path.exists():
        return 0
    with path.open("rb") as handle:
        lines = handle.readlines()
    kept = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is None and number == len(lines):
            continue  # torn by a kill
        found = row.get("iteration") if row is not None else None
        if type(found) is not int:
            raise UserError(
                f'{path}:{number}: not a JSON object with a whole-number "iteration"; mend or delete this line'
            )
        if found <= iteration:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    if kept != lines:
        _replace(path, b"".join(kept))
    return len(lines) - len(kept)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _mend_tail(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as handle:
        data = handle.read()
        start = data.rstrip(b"\n").rfind(b"\n") + 1
        tail = data[start:]
        if not tail or _parse(tail) is None:
            handle.truncate(start)
        elif not tail.endswith(b"\n"):
            handle.write(b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.tmp-{secrets.token_hex(6)}")
    try:
        with fresh.open("xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        shutil.copymode(path, fresh)
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UserError(f"cannot rewrite {path}: {error}. It is as it was; free some space and try again.") from error
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _not_finite(value: Any, path: str = "") -> list[str]:
    if isinstance(value, float):
        return [] if math.isfinite(value) else [path]
    if isinstance(value, Mapping):
        pairs = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        pairs = [(str(index), item) for index, item in enumerate(value)]
    else:
        return []
    return [found for key, item in pairs for found in _not_finite(item, f"{path}.{key}" if path else key)]
