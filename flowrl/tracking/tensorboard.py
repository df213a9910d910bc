"""Numbers to tensorboard event files; needs the extra ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.errors import UserError


class TensorboardTracker:
    """Write scalars of each iteration to ``folder``.

    start: the first iteration that will be written; where it is above 0, tensorboard hides what an earlier process
    wrote from there on. Raises UserError where tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "tracking.tensorboard is true, but tensorboard is not installed: "
                "pip install 'flowrl[tensorboard]', or set tracking.tensorboard=false"
            ) from error
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=start if start > 0 else None)

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None:
        """Write the numbers among ``values``; text, None (not finite) and nested values have no place here."""
        for name, value in values.items():
            if isinstance(value, (bool, int, float)):
                self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
