"""Settings of the trackers, and their checks. metrics.jsonl is always written; everything here is off by default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from flowrl.config.pictures import Pictures

if TYPE_CHECKING:
    from flowrl.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Service:
    """A tracking service. mode: off | offline (files on this machine, to be uploaded by hand) | online.

    project: where the service files the run; name: the run's name there ("": the run folder's).
    """

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "flowrl"
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Trackio(Service):
    """trackio: offline keeps the numbers in its own database on this machine; online needs ``space``, a hub Space."""

    space: str = ""


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """metrics.jsonl is always written; others by choice. tensorboard: event files; progress: a bar, or a line an iteration."""

    tensorboard: bool = False
    progress: bool = True
    wandb: Service = field(default_factory=Service)
    swanlab: Service = field(default_factory=Service)
    trackio: Trackio = field(default_factory=Trackio)
    pictures: Pictures = field(default_factory=Pictures)


def problems(config: Config) -> Iterator[str]:
    """List what is wrong, each as ``key.path: what; what to do``."""
    tracking = config.tracking
    for key, service in (("wandb", tracking.wandb), ("swanlab", tracking.swanlab), ("trackio", tracking.trackio)):
        if service.mode != "off" and not service.project.strip():
            yield f"tracking.{key}.project: is empty; name the project that the run belongs to, such as flowrl"
    online = tracking.trackio.mode == "online"
    if online and not tracking.trackio.space:
        yield "tracking.trackio.space: online needs a hub Space, owner/name; give one, or use tracking.trackio.mode=offline"
    elif tracking.trackio.space and not online:
        yield (
            f"tracking.trackio.space: is for mode online, and tracking.trackio.mode is {tracking.trackio.mode}; remove it, "
            "or use tracking.trackio.mode=online"
        )
