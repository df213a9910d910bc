"""Where numbers go while a run lasts: JSON lines, a progress bar, tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowrl.protocols import Tracker


def open_trackers(run_dir: Path, tensorboard: bool, *, start: int = 0) -> list[Tracker]:
    """Open the optional trackers of a run (``metrics.jsonl`` is always written, by the trainer, and is not among them).

    run_dir: the run directory; tensorboard: write event files to ``run_dir/tensorboard``; start: the first iteration
    that will be tracked, so that a resumed run hides what it had tracked after its checkpoint.

    Raises UserError where a tracker's package is missing.
    """
    if not tensorboard:
        return []
    from flowrl.tracking.tensorboard import TensorboardTracker

    return [TensorboardTracker(run_dir / "tensorboard", start=start)]
