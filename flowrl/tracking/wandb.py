"""Numbers to Weights & Biases; needs the extra ``wandb``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.tracking.packages import load, numbers, start


class WandbTracker:
    """A run of wandb, with its files in ``folder/wandb``.

    mode: "offline" (upload with ``wandb sync``) or "online"; config: plain data shown beside the run; run_id: continue
    that run, "" for a new one; a run that the caller has open already is left alone. wandb takes each iteration once:
    what a resumed run does again stays as it was.
    Raises UserError where wandb is missing or refuses.
    """

    key = "wandb"

    def __init__(
        self, folder: Path, *, project: str, name: str, mode: str, config: Mapping[str, Any], run_id: str = ""
    ) -> None:
        wandb = load(self.key)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = start(
            self.key,
            lambda: wandb.init(
                project=project, name=name, mode=mode, dir=str(folder), config=dict(config), id=run_id or None,
                resume="allow" if run_id else None, reinit="create_new",
            ),
        )  # fmt: skip
        self.run_id = str(self._run.id)

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None:
        """Send the numbers among ``values``."""
        self._run.log(numbers(values), step=iteration)

    def close(self, failed: bool = False) -> None:
        """Send what waits and end the run there; failed: mark it so."""
        self._run.finish(exit_code=1 if failed else 0)
