"""The few seams that plug-ins implement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from flowrl.records import Conditioning, Detection, Prediction, Request, RewardBatch, RewardResult, Schedule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

GuidanceRule = Literal["linear", "norm_preserving", "embedded"]


@runtime_checkable
class PipelineAdapter(Protocol):
    """A model family: what it takes, predicts and shows. It knows nothing of reinforcement learning."""

    guidance_rule: GuidanceRule
    device: torch.device

    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        """Text (or the negative text) of requests to conditioning, without gradient; batch first."""

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""

    def schedule(self, steps: int, request: Request) -> Schedule:
        """The stock pipeline's grid of ``steps`` steps, on CPU."""

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
    ) -> Prediction:
        """One network call. x [B, ...]; t float32 [B] in [0, 1], 1 is noise; no guidance inside."""

    def decode(self, x0: torch.Tensor, request: Request) -> torch.Tensor:
        """Latents to pictures: float32 [B, 3, H, W] in [0, 1], without gradient unless x0 needs one."""

    def encode_media(self, media: torch.Tensor, request: Request) -> torch.Tensor:
        """Pictures float32 [B, 3, H, W] in [0, 1] to latents."""

    def trainable(self) -> torch.nn.Module:
        """The network that ``predict`` calls and that training changes."""

    def add_lora(self, rank: int, alpha: float, groups: Sequence[str], seed: int) -> None:
        """Freeze the network and add LoRA to the named groups of its linear layers ("attention", "feed_forward")."""

    def lora_off(self) -> AbstractContextManager[None]:
        """Within the block the network runs without LoRA: the reference policy."""

    def export(self, folder: str) -> None:
        """Write the trained part: a LoRA that the family's ``load_lora_weights`` takes, or the whole network."""


class Reward(Protocol):
    """Scores finished pictures or videos.

    A reward may say of itself, as class attributes: scope ("sample", or "group" to be handed one whole group at a time),
    minimum (a lower bound of its scores), media (frozenset of "image", "video"), backbone (the network it stands on, ""
    for none), deterministic (equal pictures get equal scores, so they may be remembered), licence, presets (names that
    its argument ``preset`` takes, for ``name/preset``).
    """

    name: str

    def score(self, batch: RewardBatch) -> RewardResult:
        """One score a sample; may raise, which the runtime turns into an invalid batch."""


class PairReward(Protocol):
    """Judges pairs of pictures; the runtime makes win rates within groups of it. It may say of itself what a Reward may."""

    def compare(self, first: RewardBatch, second: RewardBatch) -> RewardResult:
        """For each row, how much better ``first`` is, in [0, 1], 1/2 for a tie. Each pair comes in both orders."""


class Detector(Protocol):
    """Finds objects: uint8 [B, H, W, 3] to one list of detections a picture."""

    def __call__(self, images: npt.NDArray[np.uint8]) -> list[list[Detection]]: ...


class Tracker(Protocol):
    """Receives numbers once an iteration."""

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None: ...

    def close(self) -> None: ...
