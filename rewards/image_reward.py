"""ImageReward (2304.05977): five linear layers without activations on BLIP's text state under the picture.

score = (head(h) - 0.16717362830052426) / 1.0333394966054072, h the state of the first word after BLIP's text encoder has
attended to the picture (github.com/THUDM/ImageReward).

The package needs an old transformers: run this reward in a worker whose Python has it (``pip install image-reward``), next
to a trainer with a new one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowrl.rewards.heads import Layer, linear_stack
from flowrl.rewards.media import IMAGE, scored

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import torch

MEAN, STD = 0.16717362830052426, 1.0333394966054072


def image_reward(state: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """The standardised score, float32 [N]. state: h, float32 [N, D]; layers: see ``heads.read_linear_stack``."""
    return (linear_stack(state, layers)[:, 0] - MEAN) / STD


class ImageReward:
    """ImageReward-v1.0 of a picture for its prompt, through its own package. path: name or file of the checkpoint."""

    name = "image_reward"
    scope = "sample"
    media = IMAGE
    minimum = float("-inf")
    backbone = "blip-l"
    deterministic = True
    licence = "Apache-2.0 (THUDM/ImageReward)"

    def __init__(self, path: str = "ImageReward-v1.0", device: str = "auto") -> None:
        try:
            package: Any = importlib.import_module("ImageReward")
        except ImportError as error:
            raise UserError(
                f"{self.name}: its package cannot be imported here ({error}); set executor: worker with the Python of an "
                "environment that has image-reward and transformers 4.45"
            ) from error
        import torch

        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.network = package.load(path, device=chosen)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures."""
        import numpy as np
        import torch
        from PIL import Image

        if batch.images.ndim != 4:
            raise UserError(f"{self.name}: scores pictures, got {list(batch.images.shape)}")
        with torch.inference_mode():
            found = [
                float(self.network.score(prompt, Image.fromarray(image)))
                for image, prompt in zip(batch.images, batch.prompts, strict=True)
            ]
        return scored(np.array(found, np.float32))
