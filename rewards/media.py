"""Pictures and videos on their way into a reward, scores on their way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

IMAGE: frozenset[str] = frozenset({"image"})
VIDEO: frozenset[str] = frozenset({"video"})
BOTH: frozenset[str] = IMAGE | VIDEO


def frames(images: npt.NDArray[np.uint8], stride: int = 1) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Lay videos out as pictures.

    images: uint8 [B, H, W, 3], or [B, F, H, W, 3], of which frames 0, stride, 2 stride ... are taken. Returns the
    pictures, uint8 [N, H, W, 3], and the sample that each belongs to, int64 [N].
    """
    import numpy as np

    if images.ndim == 4:
        return images, np.arange(len(images))
    taken = images[:, ::stride]
    owner = np.repeat(np.arange(len(images)), taken.shape[1])
    return taken.reshape(-1, *images.shape[2:]), owner


def mean_by_owner(values: npt.NDArray[np.float32], owner: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.float32]:
    """Mean over the frames of each sample: float [N] to float32 [count]. Every frame counts, the bad ones too."""
    import numpy as np

    total = np.bincount(owner, weights=values.astype(np.float64), minlength=count)
    return (total / np.bincount(owner, minlength=count)).astype(np.float32)


def videos(batch: RewardBatch, reward: str) -> npt.NDArray[np.uint8]:
    """The batch's videos, uint8 [B, F, H, W, 3]. Raises UserError for pictures and for a single frame."""
    if batch.images.ndim != 5 or batch.images.shape[1] < 2:
        raise UserError(
            f"{reward}: needs videos of at least 2 frames, got {list(batch.images.shape)}; use it with a video model"
        )
    return batch.images


def chunks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def scored(
    scores: npt.NDArray[np.float32],
    components: Mapping[str, npt.NDArray[np.float32]] | None = None,
    details: Sequence[str | None] = (),
    errors: Sequence[str | None] | None = None,
) -> RewardResult:
    """A result in which a sample is valid unless it has an error, which makes its score NaN."""
    import numpy as np

    told = list(errors) if errors is not None else [None] * len(scores)
    valid = np.array([error is None for error in told], dtype=np.bool_)
    values = np.where(valid, scores, np.nan).astype(np.float32)
    return RewardResult(values, valid, told, dict(components or {}), details)


def check_positive(reward: str, name: str, value: int) -> None:
    """Raise UserError for a number below 1."""
    if value < 1:
        raise UserError(f"{reward}: {name} is {value}; use 1 or more")
