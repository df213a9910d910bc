"""Feature networks of an evaluation, most of them networks of the rewards: pictures to vectors, for diversity and distances.

Each holds a ``metric`` (how two vectors are compared, see ``flowrl.evaluation.diversity``) and maps uint8 [N, H, W, 3] to
float32 [N, D], preprocessed as its checkpoint says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from flowrl.rewards.clip import DualEncoder
from flowrl.rewards.loading import Dtype
from flowrl.rewards.similarity import Dino

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from flowrl.rewards.tiny_clip import TinyClipScore


class Cells:
    """Mean colours of 8 x 8 cells, float32 [N, 192] in [0, 1]: what a glance from afar tells apart; no weights, no meaning."""

    metric: ClassVar[Literal["cosine", "rms"]] = "rms"

    def __call__(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [N, H, W, 3] to float32 [N, 192], fewer for pictures of fewer than 8 pixels a side."""
        import numpy as np

        from flowrl.scoring.alarm import cells

        found: npt.NDArray[np.float32] = cells(pictures).astype(np.float32)
        return found


class _Embedding:
    """What the networks share: unit vectors, and a place in main memory while they are not needed."""

    metric: ClassVar[Literal["cosine", "rms"]] = "cosine"

    def __init__(self, encoder: DualEncoder | Dino | TinyClipScore) -> None:
        self.encoder = encoder

    def __call__(self, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 [N, H, W, 3] to unit float32 [N, D]."""
        found: npt.NDArray[np.float32] = self._images(pictures).cpu().numpy()
        return found

    def _images(self, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
        return self.encoder.images(pictures)

    def offload(self) -> None:
        """Move the network to main memory."""
        self.encoder.offload()

    def onload(self) -> None:
        """Move the network back to its device."""
        self.encoder.onload()


class Clip(_Embedding):
    """The picture side of CLIP; CMMD asks for openai/clip-vit-large-patch14-336. path: folder or hub id."""

    def __init__(
        self, path: str = "openai/clip-vit-large-patch14", device: str = "auto", dtype: Dtype = "float32"
    ) -> None:
        super().__init__(DualEncoder(path, "evaluation.features: clip", device, dtype))


class Siglip(_Embedding):
    """The picture side of SigLIP 2. path: folder or hub id."""

    def __init__(
        self, path: str = "google/siglip2-base-patch16-224", device: str = "auto", dtype: Dtype = "float32"
    ) -> None:
        super().__init__(DualEncoder(path, "evaluation.features: siglip", device, dtype))


class DinoV2(_Embedding):
    """The class token of DINO or DINOv2, which follows the subject more than its description. path: folder or hub id."""

    def __init__(self, path: str = "facebook/dinov2-base", device: str = "auto", dtype: Dtype = "float32") -> None:
        super().__init__(Dino(path, "evaluation.features: dino", device, dtype))


class TinyClip(_Embedding):
    """The picture side of a TinyClip, for the embedded world. path: a folder written by ``TinyClip.save``."""

    def __init__(self, path: str, device: str = "auto") -> None:
        from flowrl.rewards.tiny_clip import TinyClipScore

        super().__init__(TinyClipScore(path, device=device))
