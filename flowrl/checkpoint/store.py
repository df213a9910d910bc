"""Save and load checkpoints: atomic directories that verify themselves, without pickle.

``save`` writes ``.tmp-<iteration>-<nonce>``, flushes it, puts the manifest last, re-reads it, renames it to
``iteration-00000012``, moves the pointer ``LATEST`` and only then prunes. A process killed anywhere in between leaves
the older checkpoints as they were. ``load`` verifies and reads everything to the host before it returns anything.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.checkpoint import retention
from flowrl.checkpoint.manifest import (
    MANIFEST,
    POINTER,
    REPLACED,
    STATE,
    DamagedCheckpoint,
    Entry,
    FileRecord,
    Manifest,
    check_hashes,
    check_info,
    check_sizes,
    directory_name,
    read_manifest,
    read_verified,
    scan,
    sync_directory,
    write_file,
)
from flowrl.checkpoint.tensors import Encoded, TensorFiles, decode, encode, read_safetensors, safetensors_chunks
from flowrl.errors import UserError

logger = logging.getLogger(__name__)

_HEADROOM = 64 * 1024


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; those before it are untouched and the run may go on."""


@dataclass(frozen=True)
class Loaded:
    """What ``load`` found. state: as given to ``save``, tensors on the CPU; info: the manifest's; path: the directory;
    warnings: one message for each newer checkpoint that was refused, naming the file and the reason."""

    iteration: int
    state: dict[str, Any]
    info: dict[str, Any]
    path: Path
    warnings: tuple[str, ...]


def save(
    root: Path,
    iteration: int,
    state: Mapping[str, Any],
    *,
    info: Mapping[str, Any],
    keep: int = 2,
    protected: Collection[int] = (),
) -> Path:
    """Write the checkpoint of ``iteration`` and return its directory.

    root: made where missing; iteration: completed iterations, from 0; state: what ``tensors.encode`` takes; info: plain
    JSON that goes into the manifest; keep: how many newest to keep, at least 2; protected: iterations never pruned.

    Raises CheckpointWriteError where it cannot be written (no space, no permission, a read-back that differs),
    TypeError for a state or info that cannot be stored, ValueError for a bad iteration or keep. No checkpoint is
    deleted in those cases. A pointer that cannot be moved or a delete that fails is logged as a warning.
    """
    if iteration < 0:
        raise ValueError(f"iteration is {iteration}; it counts from 0")
    if keep < retention.MINIMUM:
        raise ValueError(f"keep is {keep}; at least {retention.MINIMUM} checkpoints are kept")
    check_info(info)
    encoded = encode(state)
    try:
        root.mkdir(parents=True, exist_ok=True)
        retention.remove_stale(root)
        _check_space(root, iteration, encoded.nbytes)
        final = _write_and_rename(root, iteration, encoded, info)
    except (OSError, DamagedCheckpoint) as error:
        raise CheckpointWriteError(_failure(root, iteration, encoded.nbytes, str(error))) from error
    try:
        _point(root, final.name)
    except OSError as error:
        logger.warning("%s: cannot move the pointer %s (%s); nothing was pruned", root, POINTER, error)
        return final
    retention.prune(root, keep, protected)
    return final


def load(root: Path, iteration: int | None = None) -> Loaded:
    """Read a checkpoint wholly to the host after verifying it; nothing of the caller's changes.

    iteration: that one or an error; None: the last one written, else the newest before it that verifies, with a warning
    for each that was refused. Never unpickles.

    Raises UserError where there is none, or none verifies, with what is wrong with each.
    """
    entries = scan(root)
    if iteration is not None:
        there = ", ".join(str(number) for number in sorted({entry.iteration for entry in entries})) or "none"
        entries = [entry for entry in entries if entry.iteration == iteration]
        if not entries:
            raise UserError(f"no checkpoint of iteration {iteration} in {root}; there are: {there}")
    if not entries:
        raise UserError(f"no checkpoint in {root}: nothing was saved there, or the path is wrong")
    problems = [(entry, str(entry.problem)) for entry in entries if entry.manifest is None]
    for entry in entries:
        if entry.manifest is None:
            continue
        try:
            state = _read(entry.path, entry.manifest)
        except DamagedCheckpoint as error:
            problems.append((entry, str(error)))
            continue
        warnings = tuple(
            f"checkpoint {other.path.name} was refused, {entry.path.name} is used: {problem}"
            for other, problem in problems
            if other.manifest is not None or other.iteration >= entry.iteration
        )
        return Loaded(entry.iteration, state, dict(entry.manifest.info), entry.path, warnings)
    listing = "\n".join(f"  {entry.path.name}: {problem}" for entry, problem in problems)
    raise UserError(
        f"no usable checkpoint in {root}; refused:\n{listing}\nRestore one from a copy, or start a new run."
    )


def list_checkpoints(root: Path) -> list[Entry]:
    """List the checkpoints under ``root`` in the order in which ``load`` tries them, manifests and sizes checked."""
    return scan(root)


def _read(folder: Path, manifest: Manifest) -> dict[str, Any]:
    document = read_verified(folder, STATE, manifest.files[STATE])
    files: TensorFiles = {}
    for name, record in manifest.files.items():
        if name != STATE:
            files[name] = read_safetensors(name, read_verified(folder, name, record))
    return decode(document, files)


def _write_and_rename(root: Path, iteration: int, encoded: Encoded, info: Mapping[str, Any]) -> Path:
    folder = root / f"{retention.TEMPORARY_PREFIX}{iteration:08d}-{secrets.token_hex(6)}"
    folder.mkdir()
    try:
        with retention.holding(folder):
            sequence = 1 + max((entry.manifest.sequence for entry in scan(root) if entry.manifest), default=0)
            _write(folder, encoded, Manifest(iteration, sequence, info, {}))
            manifest = read_manifest(folder, iteration)
            check_sizes(folder, manifest)
            check_hashes(folder, manifest)
            return _rename(folder, root / directory_name(iteration))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(folder: Path, encoded: Encoded, blank: Manifest) -> None:
    files: dict[str, FileRecord] = {}
    for name, tensors in encoded.files.items():
        files[name] = write_file(folder / name, safetensors_chunks(tensors))
    files[STATE] = write_file(folder / STATE, [encoded.document])
    sync_directory(folder)
    manifest = Manifest(blank.iteration, blank.sequence, blank.info, files)
    write_file(folder / MANIFEST, [manifest.to_bytes()])
    sync_directory(folder)


def _rename(folder: Path, final: Path) -> Path:
    # A directory cannot be renamed over a full one. The old one keeps a name that load knows: no moment is without it.
    aside = final.with_name(final.name + REPLACED)
    if os.path.lexists(final):
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(final, aside)
    os.rename(folder, final)
    sync_directory(final.parent)
    if aside.exists():
        retention.delete(aside)
    return final


def _point(root: Path, name: str) -> None:
    fresh = root / f"{retention.TEMPORARY_PREFIX}pointer-{secrets.token_hex(6)}"
    try:
        write_file(fresh, [f"{name}\n".encode("ascii")])
        os.replace(fresh, root / POINTER)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    sync_directory(root)


def _check_space(root: Path, iteration: int, needed: int) -> None:
    # Told before a byte is written where it is plain; quotas and other writers still show as an error later.
    if shutil.disk_usage(root).free < needed + _HEADROOM:
        raise CheckpointWriteError(_failure(root, iteration, needed, "No space left on the device"))


def _failure(root: Path, iteration: int, needed: int, reason: str) -> str:
    try:
        free = f"{shutil.disk_usage(root).free / 1e6:.1f} MB are free"
    except OSError as error:
        free = f"free space is unknown ({error})"
    return (
        f"cannot write the checkpoint of iteration {iteration} in {root}: {reason}. It needs about "
        f"{needed / 1e6:.1f} MB, {free}. Checkpoints written before are intact. Free some space or mend the path; the "
        "next save tries again."
    )
