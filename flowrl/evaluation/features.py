"""Features of pictures through one small protocol, whichever network they come from.

The built-in networks (``cells``, which needs no weights, ``clip``, ``dino``, ``siglip``, ``tiny_clip``) stand with the rewards,
whose loaders they use, and are reached through the registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from flowrl import registry
from flowrl.config.evaluation import FeatureEntry, reference_files
from flowrl.errors import UserError
from flowrl.evaluation.diversity import METRICS, Metric

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]

BATCH = 64


@runtime_checkable
class FeatureNetwork(Protocol):
    """Pictures to vectors. ``metric`` says how two vectors are compared: cosine, or rms (see diversity.py)."""

    metric: Metric

    def __call__(self, pictures: Images) -> npt.ArrayLike:
        """uint8 [N, H, W, 3] to float [N, D], each row of its picture alone."""


@runtime_checkable
class Movable(Protocol):
    """A network that can wait in main memory."""

    def offload(self) -> None: ...

    def onload(self) -> None: ...


def load_features(entries: Sequence[FeatureEntry]) -> dict[str, FeatureNetwork]:
    """Load the networks of a config, by their key, and leave them in main memory.

    Raises UserError for one that cannot be loaded or does not say how its vectors are compared.
    """
    found: dict[str, FeatureNetwork] = {}
    for entry in entries:
        network = registry.resolve("feature", entry.name)(**entry.args)
        if not isinstance(network, FeatureNetwork) or network.metric not in METRICS:
            raise UserError(
                f"evaluation.features: {entry.name} is no feature network; it needs __call__(pictures) and metric = "
                f"{' or '.join(map(repr, METRICS))}"
            )
        if isinstance(network, Movable):
            network.offload()
        found[entry.key] = network
    return found


@contextmanager
def _placed(network: FeatureNetwork) -> Iterator[FeatureNetwork]:
    """The network on its device for the time of the block."""
    if isinstance(network, Movable):
        network.onload()
    try:
        yield network
    finally:
        if isinstance(network, Movable):
            network.offload()


def embed(name: str, network: FeatureNetwork, media: Images) -> Features:
    """Return the features of pictures uint8 [N, H, W, 3], or of videos [N, F, H, W, 3] the mean over frames: float32 [N, D].

    Raises UserError where the network returns another shape or values that are not finite.
    """
    frames = media.shape[1] if media.ndim == 5 else 1
    pictures = media.reshape(-1, *media.shape[-3:])
    parts = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        values = np.asarray(network(part), np.float32)
        if values.ndim != 2 or len(values) != len(part) or not np.isfinite(values).all():
            raise UserError(
                f"evaluation.features: {name} made {list(values.shape)} of {len(part)} pictures, or values that are not "
                "finite; a feature network returns [N, D]"
            )
        parts.append(values)
    whole = np.concatenate(parts)
    mean: Features = whole.reshape(len(media), frames, -1).mean(1)
    return mean


def embed_all(networks: Mapping[str, FeatureNetwork], media: Images) -> dict[str, Features]:
    """Features of every network, by name, of pictures or videos; each network is on its device for that time alone."""
    found = {}
    for name, network in networks.items():
        with _placed(network):
            found[name] = embed(name, network, media)
    return found


def embed_folder(networks: Mapping[str, FeatureNetwork], folder: str) -> dict[str, Features]:
    """Features of the pictures of a folder, in the order of their names; pictures may be of any size.

    Raises UserError for a file that is no picture, and for too few of them.
    """
    files = reference_files(folder)
    if len(files) < 2:
        raise UserError(f"evaluation.reference: {folder} holds {len(files)} pictures; give at least 2")
    found = {}
    for name, network in networks.items():
        with _placed(network):
            parts = [embed(name, network, pictures) for pictures in _batches(files)]
        if len({part.shape[1] for part in parts}) > 1:
            raise UserError(
                f"evaluation.reference: {name} makes features of unequal length of the pictures in {folder}, whose sizes "
                "differ; bring them to one size"
            )
        found[name] = np.concatenate(parts)
    return found


def _batches(files: Sequence[Path]) -> Iterator[Images]:
    """Pictures in order, as many of one size at a time as stand together."""
    waiting: list[Images] = []
    for file in files:
        picture = _read(file)
        if waiting and (picture.shape != waiting[0].shape or len(waiting) == BATCH):
            yield np.stack(waiting)
            waiting = []
        waiting.append(picture)
    yield np.stack(waiting)


def _read(file: Path) -> Images:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(
            f"evaluation.reference: {file} cannot be read as a picture ({error}); mend or remove it"
        ) from error
