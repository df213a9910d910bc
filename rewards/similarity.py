"""Likeness of a picture to a reference picture: cosine of CLIP or DINO embeddings (CLIP-I and DINO of 2208.12242).

A policy that returns the reference unchanged scores 1. ``ceiling`` is the likeness beyond which nothing more is paid;
pair it with a reward for the edit itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from flowrl.rewards.clip import BATCH, DualEncoder, unit
from flowrl.rewards.loading import Dtype, OnDevice, load_image_processor, load_network
from flowrl.rewards.media import BOTH, check_positive, chunks, frames, mean_by_owner, scored

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class Dino(OnDevice):
    """A DINO or DINOv2 vision transformer as a function to unit vectors: its class token after the last norm."""

    def __init__(self, path: str, reward: str, device: str = "auto", dtype: Dtype = "float32") -> None:
        from transformers import AutoModel

        super().__init__(device)
        # A pooler, where the class has one, is not used, and checkpoints come without it.
        self.network: Any = self.hold(load_network(AutoModel, path, reward, dtype, optional=("pooler.",)))
        if not hasattr(self.network.config, "patch_size") or hasattr(self.network, "get_text_features"):
            raise UserError(f"{reward}: {path!r} is a {type(self.network).__name__}; give a DINO or DINOv2 model")
        self.processor = load_image_processor(path, reward)

    def images(self, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 [N, H, W, 3] to unit float32 [N, D], preprocessed as the checkpoint says."""
        import torch

        found = []
        dtype = next(self.network.parameters()).dtype
        for rows in chunks(len(pictures), BATCH):
            inputs = self.processor(list(pictures[rows]), return_tensors="pt", input_data_format="channels_last")
            with torch.inference_mode():
                output = self.network(pixel_values=inputs["pixel_values"].to(self.device, dtype))
            found.append(unit(output.last_hidden_state[:, 0]))
        return torch.cat(found)


class _Similarity:
    """score = min(ceiling, cos(E(picture), E(reference))), over frames 0, stride, ... of a video."""

    name: ClassVar[str] = ""
    scope = "sample"
    media = BOTH
    minimum = -1.0
    deterministic = True

    def __init__(self, encoder: DualEncoder | Dino, ceiling: float, stride: int) -> None:
        if not -1 < ceiling <= 1:
            raise UserError(f"{self.name}: ceiling is {ceiling}; use a cosine above -1, at most 1 (no ceiling)")
        check_positive(self.name, "stride", stride)
        self.encoder, self.ceiling, self.stride = encoder, ceiling, stride

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures or videos against ``batch.reference``; component "cosine" knows no ceiling."""
        import numpy as np

        if batch.reference is None:
            raise UserError(f"{self.name}: the batch has no reference pictures; use it with an editing model")
        pictures, owner = frames(batch.images, self.stride)
        references, place = frames(batch.reference, self.stride)
        ours, theirs = self.encoder.images(pictures), self.encoder.images(references)
        if len(place) != len(owner):  # a video against one picture
            theirs = theirs[owner.tolist()]
        cosine = mean_by_owner((ours * theirs).sum(-1).clamp(-1, 1).cpu().numpy(), owner, len(batch))
        return scored(np.minimum(cosine, np.float32(self.ceiling)), {"cosine": cosine})

    def offload(self) -> None:
        """Move the network to main memory."""
        self.encoder.offload()

    def onload(self) -> None:
        """Move the network back to its device."""
        self.encoder.onload()


class ClipSimilarity(_Similarity):
    """CLIP-I: likeness in the embedding of CLIP's vision side. path: folder or hub id."""

    name = "clip_similarity"
    backbone = "clip-vit-l-14"
    licence = "MIT (openai/clip-vit-large-patch14)"

    def __init__(
        self, path: str = "openai/clip-vit-large-patch14", ceiling: float = 1.0, stride: int = 4,
        device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        super().__init__(DualEncoder(path, self.name, device, dtype), ceiling, stride)


class DinoSimilarity(_Similarity):
    """Likeness in the class token of DINOv2, which follows the subject more than its description. path: folder or hub id."""

    name = "dino_similarity"
    backbone = "dinov2"
    licence = "Apache-2.0 (facebook/dinov2)"

    def __init__(
        self, path: str = "facebook/dinov2-base", ceiling: float = 1.0, stride: int = 4, device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        super().__init__(Dino(path, self.name, device, dtype), ceiling, stride)
