"""Numbers to tensorboard event files; needs the extra ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.tracking.packages import load, numbers


class TensorboardTracker:
    """Write scalars of each iteration to ``folder``.

    start: the first iteration that will be written; where it is above 0, tensorboard hides what an earlier process
    wrote from there on. Raises UserError where tensorboard is not installed.
    """

    key = "tensorboard"
    run_id = ""

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        writer = load(self.key).SummaryWriter
        self._writer = writer(log_dir=str(folder), purge_step=start if start > 0 else None)

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None:
        """Write the numbers among ``values``; text, None (not finite) and nested values have no place here."""
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        """Flush and close the event file, which has no mark of a failure."""
        self._writer.close()
