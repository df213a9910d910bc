"""A trained process reward as a reward of finished latents: differentiable, and nothing is decoded for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.rewards.media import BOTH

from flowrl.errors import UserError
from flowrl.records import Request, RewardBatch, RewardResult

if TYPE_CHECKING:
    import torch


class LatentModel:
    """What a latent network that was trained on noised latents says of finished ones: its value at t = 0.

    path: a folder of scripts/train_reward_model.py (kind latent). The value is in units of the score that it was trained
    on, at its cleanest level's calibration. It reads latents and the model's own pooled text, so it judges what this run
    draws (training and evaluation) and no picture from elsewhere. It stands for a score and is trained against as one: an
    independent reward with role gold says whether the score itself rises.
    """

    name = "latent_model"
    scope = "sample"
    media = BOTH
    minimum = float("-inf")
    backbone = ""
    deterministic = False  # equal pictures may come from other latents
    licence = "Apache-2.0 (flowrl)"
    differentiable = "latents"
    needs_latents = True
    needs_text = True

    def __init__(self, path: str) -> None:
        from flowrl.credit.networks import LatentNetwork
        from flowrl.credit.process.storage import load_model

        module, self.card = load_model(Path(path))
        if not isinstance(module, LatentNetwork):
            raise UserError(
                f"{self.name}: {path} holds a head on features of the generator, which reads no finished latent; train one "
                "with --kind latent"
            )
        self.path, self.network = path, module

    @staticmethod
    def held_bytes(path: str) -> int:
        """What one of these will take, before it is loaded (`flowrl plan`). Raises UserError where the folder holds none."""
        from flowrl.credit.process.storage import held_bytes

        return held_bytes(path)

    @property
    def nbytes(self) -> int:
        """Bytes of its float32 weights; beside them it holds the card, a few numbers a noise level, and nothing a call."""
        from flowrl.credit.networks import module_bytes

        return module_bytes(self.network)

    def value(self, x: torch.Tensor, requests: Sequence[Request], text: torch.Tensor) -> torch.Tensor:
        """x: x0 [B, C, ...], with gradient; text: pooled text [B, D]. Returns float32 [B].

        Raises UserError where latents or text are not those of the model that the folder was trained for.
        """
        import torch

        from flowrl.credit.process.learned import calibrated

        network = self.network
        if x.ndim not in (4, 5) or x.shape[1] != network.channels or text.shape[1] != network.text:
            raise UserError(
                f"{self.name}: {self.path} was trained on latents of {network.channels} channels and text of "
                f"{network.text} numbers, and this model has latents {list(x.shape[1:])} and text of {text.shape[1]}; "
                "train one for this model"
            )
        t = torch.zeros(len(x), device=x.device)
        made: torch.Tensor = network.to(x.device)(x, t, text.to(x.device))
        return calibrated(made[:, 0], t, self.card)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score the latents that come with pictures. Raises UserError where none do, or no text does."""
        import numpy as np
        import torch

        if batch.latents is None or batch.text is None:
            raise UserError(
                f"{self.name}: reads latents and the model's text, and none came with these pictures; it scores what a run "
                "draws, in the run's own process (executor thread or inline)"
            )
        with torch.no_grad():
            scores = self.value(batch.latents.float(), (), batch.text).cpu().numpy()
        valid = np.isfinite(scores)
        told = [None if ok else f"{self.name}: the value is not finite" for ok in valid]
        return RewardResult(np.where(valid, scores, np.nan).astype(np.float32), valid, told)
