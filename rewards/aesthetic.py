"""The LAION aesthetic predictor: five linear layers without activations on a unit CLIP embedding; about 1 to 10.

score = W5(W4(W3(W2(W1 u + b1) + b2) + b3) + b4) + b5, u = CLIP(picture) / |CLIP(picture)| (improved-aesthetic-predictor,
github.com/christophschuhmann/improved-aesthetic-predictor).
"""

from __future__ import annotations

from flowrl.rewards.clip import DualEncoder
from flowrl.rewards.heads import linear_stack, read_linear_stack
from flowrl.rewards.loading import Dtype
from flowrl.rewards.media import BOTH, check_positive, frames, mean_by_owner, scored

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult


class Aesthetic:
    """LAION aesthetic score of a picture; of a video, the mean over frames 0, stride, 2 stride ...

    head: safetensors of the head (made from ``sac+logos+ava1-l14-linearMSE.pth`` by ``flowrl rewards convert plain``);
    path: its CLIP backbone; preset: "" or "native" (1 to 10), "10" (a tenth of it).
    """

    name = "aesthetic"
    scope = "sample"
    media = BOTH
    minimum = float("-inf")
    backbone = "clip-vit-l-14"
    deterministic = True
    licence = "Apache-2.0 head, MIT backbone (openai/clip-vit-large-patch14)"
    presets = ("native", "10")

    def __init__(
        self, head: str, path: str = "openai/clip-vit-large-patch14", preset: str = "", stride: int = 4,
        device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        if preset not in ("", *self.presets):
            raise UserError(f"{self.name}: preset is {preset!r}; use {', '.join(self.presets)}")
        check_positive(self.name, "stride", stride)
        self.factor = 0.1 if preset == "10" else 1.0
        self.stride = stride
        self.encoder = DualEncoder(path, self.name, device, dtype)
        self.layers = read_linear_stack(head, self.name, int(self.encoder.network.config.projection_dim))

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures or videos; no prompt is read."""
        pictures, owner = frames(batch.images, self.stride)
        values = linear_stack(self.encoder.images(pictures).cpu(), self.layers)[:, 0].numpy()
        return scored(self.factor * mean_by_owner(values, owner, len(batch)))

    def offload(self) -> None:
        """Move the network to main memory."""
        self.encoder.offload()

    def onload(self) -> None:
        """Move the network back to its device."""
        self.encoder.onload()
