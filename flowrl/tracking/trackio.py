"""Numbers to trackio; needs the extra ``trackio``."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from flowrl.errors import UserError
from flowrl.tracking.packages import load, numbers, start

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioTracker:
    """A run of trackio: in its database on this machine, or in a Space of the hub.

    space: "owner/name", "" for this machine; config: plain data shown beside the run; run_id: continue that run, "" for
    a new one. trackio finds a run by its name, so a new one is ``name`` with a few random letters, and what a resumed
    run does again stands twice. Raises UserError where trackio is missing or refuses, and where the environment would
    send the numbers of a run without Space somewhere else.
    """

    key = "trackio"

    def __init__(
        self, *, project: str, name: str, config: Mapping[str, Any], space: str = "", run_id: str = ""
    ) -> None:
        trackio = load(self.key)
        strays = [variable for variable in ELSEWHERE if os.environ.get(variable)]
        if strays and not space:
            raise UserError(
                f"tracking.trackio.mode is offline, but {strays[0]} is set, which would send the numbers away; unset it, or "
                "use mode online with space"
            )
        self.run_id = run_id or f"{name}-{secrets.token_hex(3)}"
        self._run = start(
            self.key,
            lambda: trackio.init(
                project=project, name=self.run_id, space_id=space or None, config=dict(config), resume="allow",
                embed=False,
            ),
        )  # fmt: skip

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None:
        """Send the numbers among ``values``."""
        self._run.log(numbers(values), step=iteration)

    def close(self, failed: bool = False) -> None:
        """Send what waits and end the run there; trackio keeps no mark of a failure."""
        self._run.finish()
