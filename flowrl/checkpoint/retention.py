"""Which checkpoints may go, and when. A failed delete is a warning: it must not end a run."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from flowrl.checkpoint.manifest import (
    DIRECTORY_NAME,
    POINTER,
    REPLACED,
    DamagedCheckpoint,
    Entry,
    check_hashes,
    scan,
)

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".tmp-"
MINIMUM = 2


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Mark a directory as being written; the mark goes with the block, or with the process however it dies."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems know no locks; a second writer of one run is then the user's to avoid.
            logger.warning("cannot lock %s (%s)", folder, error)
        yield
    finally:
        os.close(descriptor)


def remove_stale(root: Path) -> None:
    """Delete what writers that died left behind: ``.tmp-*`` entries that no living process holds."""
    for path in sorted(root.glob(f"{TEMPORARY_PREFIX}*")):
        if path.is_symlink() or not path.is_dir():
            _delete_file(path)
        elif not _held(path):
            delete(path)


def delete(folder: Path) -> bool:
    """Delete a directory and say whether it went; a failure is logged as a warning."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("cannot delete %s (%s): delete it by hand to get its space back", folder, error)
        return False
    return True


def prune(root: Path, keep: int, protected: Collection[int]) -> list[Path]:
    """Delete checkpoints beyond the ``keep`` best placed ones and return what went.

    Order is that of ``scan``. Damaged ones do not count towards ``keep``. Nothing goes unless at least two of those
    that stay have just been re-read against their hashes; nor does what ``LATEST`` names, a protected iteration, or a
    directory without a readable manifest (it may not be ours).

    Raises ValueError for keep < 2.
    """
    if keep < MINIMUM:
        raise ValueError(f"keep is {keep}; at least {MINIMUM} checkpoints are kept")
    good = [entry for entry in scan(root) if entry.manifest is not None]
    named = pointed(root)
    doomed = [entry for entry in good[keep:] if entry.iteration not in protected and entry.path != named]
    if not doomed:
        return []
    staying = [entry for entry in good if entry not in doomed]
    verified = 0
    for entry in staying:
        verified += _verified(entry)
        if verified == MINIMUM:
            return [entry.path for entry in doomed if delete(_set_aside(root, entry.path))]
    logger.warning("%s: only %d of the newest checkpoints verifies, so older ones are kept", root, verified)
    return []


def pointed(root: Path) -> Path | None:
    """Return the directory that ``LATEST`` names, or None where there is no such file or directory."""
    try:
        name = (root / POINTER).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not DIRECTORY_NAME.fullmatch(name):
        return None
    for folder in (root / name, root / f"{name}{REPLACED}"):
        if folder.is_dir():
            return folder
    return None


def _set_aside(root: Path, folder: Path) -> Path:
    # A delete that a kill cuts short must not leave a checkpoint that looks damaged.
    target = root / f"{TEMPORARY_PREFIX}pruned-{folder.name}"
    try:
        return folder.rename(target)
    except OSError:
        return folder


def _verified(entry: Entry) -> bool:
    if entry.manifest is None:
        return False
    try:
        check_hashes(entry.path, entry.manifest)
    except DamagedCheckpoint as error:
        logger.warning("checkpoint %s is damaged: %s", entry.path, error)
        return False
    return True


def _held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # without locks, one run has one writer, and that is the caller
    finally:
        os.close(descriptor)
    return False


def _delete_file(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        logger.warning("cannot delete %s (%s)", path, error)
