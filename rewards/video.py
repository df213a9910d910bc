"""Cheap video scores: how much moves, how steady the picture is, whether the subject stays itself.

Steadiness and identity are perfect for a frozen video, so both are multiplied by min(1, motion / floor): a video that
moves less than ``floor`` earns in proportion. With y_t the luma of frame t in [0, 1], its mean taken off (a flash is no
motion):

    motion    mean over t of the mean of the largest 5% of |y_(t+1) - y_t| (after the dynamic degree of VBench,
              2311.17982, which takes the largest 5% of an optical flow)
    flicker   1 - mean over t and pixels of |y_(t-1) - 2 y_t + y_(t+1)| / 2, the luma's mean kept: constant change costs
              nothing
    identity  mean over t >= 1 of (max(0, u_t . u_(t-1)) + max(0, u_t . u_0)) / 2, u_t unit embeddings (subject
              consistency of VBench)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flowrl.rewards.clip import DualEncoder
from flowrl.rewards.loading import Dtype
from flowrl.rewards.media import VIDEO, frames, scored, videos
from flowrl.rewards.similarity import Dino

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.picture_statistics import luma

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

FASTEST = 0.05


def motion(films: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Dynamic degree in [0, 1], see the module's text. films: uint8 [B, F, H, W, 3], F >= 2; returns float32 [B]."""
    import numpy as np

    found = np.empty(len(films), np.float32)
    for index, film in enumerate(films):
        y = luma(film)
        y -= y.mean((1, 2), keepdims=True)
        change = np.abs(np.diff(y, axis=0)).reshape(len(y) - 1, -1)
        fastest = max(1, round(FASTEST * change.shape[1]))
        found[index] = np.partition(change, -fastest, axis=1)[:, -fastest:].mean()
    return found


def steadiness(films: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """1 - flicker, in [-1, 1], see the module's text. films: uint8 [B, F, H, W, 3]; 1 with fewer than 3 frames."""
    import numpy as np

    found = np.ones(len(films), np.float32)
    for index, film in enumerate(films):
        if len(film) > 2:
            found[index] = 1 - np.abs(np.diff(luma(film), n=2, axis=0)).mean() / 2
    return found


def identity(embeddings: torch.Tensor) -> torch.Tensor:
    """Subject consistency in [0, 1], see the module's text. embeddings: unit [B, F, D], F >= 2; returns [B]."""
    before = (embeddings[:, 1:] * embeddings[:, :-1]).sum(-1).clamp(0, 1)
    first = (embeddings[:, 1:] * embeddings[:, :1]).sum(-1).clamp(0, 1)
    return ((before + first) / 2).mean(1)


class _Moving:
    """What the video scores share: the floor under motion."""

    name = ""
    scope = "sample"
    media = VIDEO
    minimum = 0.0
    deterministic = True

    def __init__(self, floor: float) -> None:
        if not 0 < floor <= 1:
            raise UserError(f"{self.name}: floor is {floor}; use a motion above 0, at most 1")
        self.floor = floor

    def pay(self, films: npt.NDArray[np.uint8], values: npt.NDArray[np.float32] | None, label: str) -> RewardResult:
        """values min(1, motion / floor), with both as components."""
        import numpy as np

        moved = motion(films)
        share = np.minimum(1, moved / np.float32(self.floor)).astype(np.float32)
        if values is None:
            return scored(share, {"motion": moved})
        return scored(share * values, {"motion": moved, label: values})


class VideoMotion(_Moving):
    """min(1, motion / floor) in [0, 1]: something moves, and more than ``floor`` pays nothing more."""

    name = "video_motion"
    backbone = ""
    licence = "Apache-2.0 (flowrl)"

    def __init__(self, floor: float = 0.05) -> None:
        super().__init__(floor)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished videos; no prompt is read."""
        return self.pay(videos(batch, self.name), None, "")


class VideoFlicker(_Moving):
    """max(0, 1 - flicker) min(1, motion / floor) in [0, 1]: steady, and not because nothing moves."""

    name = "video_flicker"
    backbone = ""
    licence = "Apache-2.0 (flowrl)"

    def __init__(self, floor: float = 0.05) -> None:
        super().__init__(floor)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished videos; no prompt is read."""
        films = videos(batch, self.name)
        return self.pay(films, steadiness(films).clip(min=0), "steadiness")


class VideoIdentity(_Moving):
    """identity min(1, motion / floor) in [0, 1]: the subject stays itself while it moves.

    encoder: "dino" (the subject) or "clip" (the scene: VBench's background consistency); path: its checkpoint.
    """

    name = "video_identity"
    backbone = "dinov2"
    licence = "Apache-2.0 (facebook/dinov2), MIT (openai/clip-vit-large-patch14)"

    def __init__(
        self, path: str = "facebook/dinov2-base", encoder: Literal["dino", "clip"] = "dino", floor: float = 0.05,
        device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        super().__init__(floor)
        if encoder not in ("dino", "clip"):
            raise UserError(f"{self.name}: encoder is {encoder!r}; use dino or clip")
        made: Dino | DualEncoder = (
            Dino(path, self.name, device, dtype) if encoder == "dino" else DualEncoder(path, self.name, device, dtype)
        )
        self.encoder = made
        self.backbone = "dinov2" if encoder == "dino" else "clip-vit-l-14"

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished videos; no prompt is read."""
        films = videos(batch, self.name)
        pictures, _ = frames(films)
        embeddings = self.encoder.images(pictures).cpu().reshape(len(films), films.shape[1], -1)
        return self.pay(films, identity(embeddings).numpy(), "identity")

    def offload(self) -> None:
        """Move the network to main memory."""
        self.encoder.offload()

    def onload(self) -> None:
        """Move the network back to its device."""
        self.encoder.onload()
