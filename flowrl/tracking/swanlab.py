"""Numbers to SwanLab; needs the extra ``swanlab``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.tracking.packages import load, numbers, start


class SwanLabTracker:
    """A run of SwanLab, with its files in ``folder/swanlab``.

    mode: "offline" (upload with ``swanlab sync``) or "online"; config: plain data shown beside the run; run_id: continue
    that run, "" for a new one. Raises UserError where swanlab is missing or refuses.
    """

    key = "swanlab"

    def __init__(
        self, folder: Path, *, project: str, name: str, mode: str, config: Mapping[str, Any], run_id: str = ""
    ) -> None:
        swanlab = load(self.key)
        files = folder / "swanlab"
        files.mkdir(parents=True, exist_ok=True)
        self._run = start(
            self.key,
            lambda: swanlab.init(
                project=project, name=name, mode=mode, log_dir=str(files), config=dict(config), id=run_id or None,
                resume="allow" if run_id else None,
            ),
        )  # fmt: skip
        self.run_id = str(self._run.id)

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None:
        """Send the numbers among ``values``."""
        self._run.log(numbers(values), step=iteration)

    def close(self, failed: bool = False) -> None:
        """Send what waits and end the run there; failed: mark it so."""
        if failed:
            self._run.finish(state="crashed", error="the run ended with an error; see its own log")
        else:
            self._run.finish(state="success")
