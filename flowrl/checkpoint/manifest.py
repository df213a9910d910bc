"""What a checkpoint directory says of itself, and how that is checked. Needs no torch.

``manifest.json`` is written last, so its presence means that the rest is complete. It lists every other file with its
size and sha256, and carries a digest of itself; its bytes must equal the one canonical spelling of its content, so that
any altered byte of it is noticed as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
KIND = "flowrl-checkpoint"
MANIFEST = "manifest.json"
STATE = "state.json"
POINTER = "LATEST"
REPLACED = ".replaced"

FILE_NAME = re.compile(r"[a-z][a-z0-9_]*\.safetensors|state\.json")
DIRECTORY_NAME = re.compile(r"iteration-(\d{8,})(\.replaced)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MANIFEST_LIMIT = 16 * 2**20
_CHUNK = 8 * 2**20


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be used: which file, and what is wrong with it."""


@dataclass(frozen=True)
class FileRecord:
    """size: bytes; sha256: lower-case hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    iteration: completed iterations; sequence: counts the saves of a run, so the highest is the last one written
    even where a run went back to an older iteration; info: the caller's (versions, config hash);
    files: all but the manifest.
    """

    iteration: int
    sequence: int
    info: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    def to_bytes(self) -> bytes:
        """Spell the manifest canonically, digest included."""
        body = {
            "kind": KIND,
            "schema": SCHEMA,
            "iteration": self.iteration,
            "sequence": self.sequence,
            "info": dict(self.info),
            "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in self.files.items()},
        }
        return _spell({**body, "digest": hashlib.sha256(_spell(body)).hexdigest()})


@dataclass(frozen=True)
class Entry:
    """One directory under a checkpoint root. ``manifest`` is None where ``problem`` says why it cannot be used."""

    iteration: int
    path: Path
    manifest: Manifest | None
    problem: str | None


def directory_name(iteration: int) -> str:
    """Name the directory of an iteration, e.g. ``iteration-00000012``."""
    return f"iteration-{iteration:08d}"


def check_info(info: Mapping[str, Any]) -> None:
    """Refuse info that JSON would not give back as it is. Raises TypeError."""
    try:
        same = json.loads(json.dumps(dict(info), allow_nan=False)) == dict(info)
    except (TypeError, ValueError) as error:
        raise TypeError(f"checkpoint info must be plain JSON: {error}") from error
    if not same:
        raise TypeError("checkpoint info must be plain JSON: text keys, lists (no tuples), finite numbers")


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, flushed to the disk, hashing on the way. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as handle:
        for chunk in chunks:
            handle.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        handle.flush()
        os.fsync(handle.fileno())
    return FileRecord(size, digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk: a rename outlives a power cut only after that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path, iteration: int) -> Manifest:
    """Read and check a directory's manifest, which must be that of ``iteration``. Raises DamagedCheckpoint."""
    raw = _read_regular(folder, MANIFEST, _MANIFEST_LIMIT)
    try:
        body = json.loads(raw)
        manifest = _from_body(body)
        spelled = manifest.to_bytes()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{MANIFEST}: not a checkpoint manifest ({type(error).__name__}: {error})") from error
    if spelled != raw:
        raise DamagedCheckpoint(f"{MANIFEST}: was altered after it was written (its digest does not match)")
    if manifest.iteration != iteration:
        raise DamagedCheckpoint(f"{MANIFEST}: is of iteration {manifest.iteration}, not {iteration}")
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that the directory holds the listed files at their sizes and nothing else. Raises DamagedCheckpoint."""
    try:
        found = {item.name for item in os.scandir(folder)}
    except OSError as error:
        raise DamagedCheckpoint(f"{folder.name}: cannot be read ({error})") from error
    expected = {MANIFEST, *manifest.files}
    for name in sorted(expected - found):
        raise DamagedCheckpoint(f"{name}: is missing")
    for name in sorted(found - expected):
        raise DamagedCheckpoint(f"{name!r}: is not listed in the manifest")
    for name, record in manifest.files.items():
        size = _regular_size(folder, name)
        if size != record.size:
            raise DamagedCheckpoint(f"{name}: has {size} bytes, the manifest says {record.size}")


def check_hashes(folder: Path, manifest: Manifest) -> None:
    """Re-read every listed file against its sha256, in constant memory. Raises DamagedCheckpoint."""
    for name, record in manifest.files.items():
        digest = hashlib.sha256()
        try:
            with (folder / name).open("rb") as handle:
                while chunk := handle.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise DamagedCheckpoint(f"{name}: cannot be read ({error})") from error
        _compare(name, digest.hexdigest(), record)


def read_verified(folder: Path, name: str, record: FileRecord) -> bytes:
    """Return a listed file's bytes, the very ones that were hashed. Raises DamagedCheckpoint."""
    raw = _read_regular(folder, name, record.size)
    if len(raw) != record.size:
        raise DamagedCheckpoint(f"{name}: has {len(raw)} bytes, the manifest says {record.size}")
    _compare(name, hashlib.sha256(raw).hexdigest(), record)
    return raw


def scan(root: Path) -> list[Entry]:
    """List the checkpoints under ``root``, the one to use first at the front; only manifests and sizes are checked.

    The last one written leads; then come its predecessors, newest first; then what a run that went back to an older
    iteration left behind; then what cannot be used. A missing root holds none.
    """
    if not root.is_dir():
        return []
    entries = []
    for item in root.iterdir():
        match = DIRECTORY_NAME.fullmatch(item.name)
        if match:
            entries.append(_entry(item, int(match.group(1))))
    good = sorted(((e.manifest.sequence, e) for e in entries if e.manifest), key=lambda pair: pair[0], reverse=True)
    ordered = [entry for _, entry in good]
    head = ordered[0].iteration if ordered else 0
    rest = sorted(ordered[1:], key=lambda entry: (entry.iteration <= head, entry.iteration), reverse=True)
    bad = sorted((e for e in entries if e.manifest is None), key=lambda entry: entry.iteration, reverse=True)
    return ordered[:1] + rest + bad


def _entry(folder: Path, iteration: int) -> Entry:
    try:
        if folder.is_symlink() or not folder.is_dir():
            raise DamagedCheckpoint(f"{folder.name}: is not a directory")
        manifest = read_manifest(folder, iteration)
        check_sizes(folder, manifest)
    except DamagedCheckpoint as error:
        return Entry(iteration, folder, None, str(error))
    return Entry(iteration, folder, manifest, None)


def _from_body(body: Mapping[str, Any]) -> Manifest:
    if body["kind"] != KIND:
        raise ValueError(f"kind is {body['kind']!r}, not {KIND!r}")
    if body["schema"] != SCHEMA:
        raise ValueError(f"schema {body['schema']!r} was written by another version; this one reads schema {SCHEMA}")
    for key in ("iteration", "sequence"):
        if type(body[key]) is not int or body[key] < 0:
            raise ValueError(f"{key} is {body[key]!r}, not a whole number from 0")
    files = {}
    for name, entry in body["files"].items():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"refused file name {name!r}")
        record = FileRecord(entry["size"], entry["sha256"])
        if type(record.size) is not int or record.size < 0 or not _SHA256.fullmatch(record.sha256):
            raise ValueError(f"no proper size and sha256 for {name!r}")
        files[name] = record
    if STATE not in files:
        raise ValueError(f"{STATE} is not listed")
    return Manifest(body["iteration"], body["sequence"], dict(body["info"]), files)


def _regular_size(folder: Path, name: str) -> int:
    try:
        found = os.lstat(folder / name)
    except OSError as error:
        raise DamagedCheckpoint(f"{name}: cannot be read ({error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(f"{name}: is not a plain file")
    return found.st_size


def _read_regular(folder: Path, name: str, limit: int) -> bytes:
    size = _regular_size(folder, name)
    if size > limit:
        raise DamagedCheckpoint(f"{name}: has {size} bytes, more than the {limit} that it may have")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{name}: cannot be read ({error})") from error


def _compare(name: str, digest: str, record: FileRecord) -> None:
    if digest != record.sha256:
        raise DamagedCheckpoint(f"{name}: was altered or damaged after it was written (sha256 does not match)")


def _spell(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
