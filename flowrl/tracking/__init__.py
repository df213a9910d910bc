"""Where numbers go while a run lasts: JSON lines, a progress bar, tensorboard, wandb, swanlab, trackio.

metrics.jsonl is always written, by the trainer; the others are off by default and imported here alone, when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from flowrl.protocols import Tracker

OFF = "off"


class Service(Protocol):
    """What is chosen of a tracking service: see flowrl.config.tracking."""

    @property
    def mode(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def name(self) -> str: ...


class Space(Service, Protocol):
    """The same of trackio."""

    @property
    def space(self) -> str: ...


class Choice(Protocol):
    """Which trackers a run has."""

    @property
    def tensorboard(self) -> bool: ...
    @property
    def wandb(self) -> Service: ...
    @property
    def swanlab(self) -> Service: ...
    @property
    def trackio(self) -> Space: ...


class Trackers:
    """The optional trackers of a run. Use it as a context manager: it marks their runs as failed where an error passes."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)

    @property
    def run_ids(self) -> dict[str, str]:
        """What each service calls the run, by tracker: what a resumed run hands to ``open_trackers``."""
        return {tracker.key: tracker.run_id for tracker in self._trackers if tracker.run_id}

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None:
        """Send the numbers of one iteration to each."""
        for tracker in self._trackers:
            tracker.scalars(values, iteration)

    def close(self, failed: bool = False) -> None:
        """End each, the last one first; may be called twice."""
        while self._trackers:
            self._trackers.pop().close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def chosen(choice: Choice) -> list[str]:
    """List the trackers that are on."""
    services = {"wandb": choice.wandb, "swanlab": choice.swanlab, "trackio": choice.trackio}
    return [*(["tensorboard"] if choice.tensorboard else []), *(k for k, s in services.items() if s.mode != OFF)]


def require(choice: Choice) -> None:
    """Import the package of each tracker that is on, before anything slow is done. Raises UserError where one is missing."""
    from flowrl.tracking.packages import load

    for key in chosen(choice):
        load(key)


def open_trackers(
    run_dir: Path,
    choice: Choice,
    *,
    start: int = 0,
    config: Mapping[str, Any] | None = None,
    run_ids: Mapping[str, str] | None = None,
) -> Trackers:
    """Open the optional trackers of a run.

    run_dir: the run directory, where tensorboard, wandb and swanlab keep their files; start: the first iteration that will
    be tracked, so that tensorboard hides what a resumed run had tracked after its checkpoint; config: plain data that the
    services show beside the run; run_ids: of an earlier process of this run, to continue (see ``Trackers.run_ids``).

    Raises UserError where a tracker's package is missing, or a service refuses.
    """
    require(choice)
    trackers = Trackers()
    try:
        for key in chosen(choice):
            trackers._trackers.append(_open(key, run_dir, choice, start, config or {}, (run_ids or {}).get(key, "")))
    except BaseException:
        trackers.close(failed=True)
        raise
    return trackers


def _open(key: str, run_dir: Path, choice: Choice, start: int, config: Mapping[str, Any], run_id: str) -> Tracker:
    if key == "tensorboard":
        from flowrl.tracking.tensorboard import TensorboardTracker

        return TensorboardTracker(run_dir / "tensorboard", start=start)
    if key == "trackio":
        from flowrl.tracking.trackio import TrackioTracker

        service = choice.trackio
        name = service.name or run_dir.resolve().name
        return TrackioTracker(project=service.project, name=name, config=config, space=service.space, run_id=run_id)
    from flowrl.tracking.swanlab import SwanLabTracker
    from flowrl.tracking.wandb import WandbTracker

    kind, chose = (WandbTracker, choice.wandb) if key == "wandb" else (SwanLabTracker, choice.swanlab)
    return kind(
        run_dir, project=chose.project, name=chose.name or run_dir.resolve().name, mode=chose.mode, config=config,
        run_id=run_id,
    )  # fmt: skip
