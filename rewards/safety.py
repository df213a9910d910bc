"""A classifier of unsafe pictures as a gate: 1 where a picture may pass, 0 where it may not."""

from __future__ import annotations

from typing import Any, Literal

from flowrl.rewards.clip import BATCH
from flowrl.rewards.loading import Dtype, OnDevice, load_image_processor, load_network
from flowrl.rewards.media import BOTH, check_positive, chunks, frames, scored

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult


class NsfwGate(OnDevice):
    """gate: 1 if p < threshold, else 0; soft: 1 - p, with p the classifier's softmax probability of ``label``.

    A video counts by its worst frame of 0, stride, 2 stride ... path: an image classifier, folder or hub id; label: the
    unsafe class as the checkpoint names it. Component "unsafe" is p. Multiply other rewards by it with a gate in their
    shaping: as a summand it can be outbid.
    """

    name = "nsfw"
    scope = "sample"
    media = BOTH
    minimum = 0.0
    backbone = "vit-b-16-nsfw"
    deterministic = True
    licence = "Apache-2.0 (Falconsai/nsfw_image_detection)"

    def __init__(
        self, path: str = "Falconsai/nsfw_image_detection", label: str = "nsfw", threshold: float = 0.5,
        mode: Literal["gate", "soft"] = "gate", stride: int = 4, device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        from transformers import AutoModelForImageClassification

        if not 0 < threshold <= 1:
            raise UserError(f"{self.name}: threshold is {threshold}; use a probability above 0, at most 1")
        if mode not in ("gate", "soft"):
            raise UserError(f"{self.name}: mode is {mode!r}; use gate or soft")
        check_positive(self.name, "stride", stride)
        super().__init__(device)
        network: Any = self.hold(load_network(AutoModelForImageClassification, path, self.name, dtype))
        names = {str(value): int(key) for key, value in network.config.id2label.items()}
        if label not in names:
            raise UserError(f"{self.name}: {path!r} has no label {label!r}; use one of {', '.join(names)}")
        self.network, self.column = network, names[label]
        self.processor = load_image_processor(path, self.name)
        self.threshold, self.mode, self.stride = threshold, mode, stride

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures or videos; no prompt is read."""
        import numpy as np
        import torch

        pictures, owner = frames(batch.images, self.stride)
        dtype = next(self.network.parameters()).dtype
        found = []
        for rows in chunks(len(pictures), BATCH):
            inputs = self.processor(list(pictures[rows]), return_tensors="pt", input_data_format="channels_last")
            with torch.inference_mode():
                logits = self.network(pixel_values=inputs["pixel_values"].to(self.device, dtype)).logits
            found.append(logits.float().softmax(-1)[:, self.column].cpu().numpy())
        unsafe = np.zeros(len(batch), np.float32)
        np.maximum.at(unsafe, owner, np.concatenate(found))
        scores = 1 - unsafe if self.mode == "soft" else (unsafe < self.threshold).astype(np.float32)
        return scored(scores, {"unsafe": unsafe})
