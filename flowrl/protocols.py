"""The few seams that plug-ins implement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from flowrl.records import (
    Conditioning,
    Detection,
    Prediction,
    ProcessScore,
    Prompted,
    Request,
    RewardBatch,
    RewardResult,
    Schedule,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

GuidanceRule = Literal["linear", "norm_preserving", "embedded"]


@runtime_checkable
class ModelFamily(Protocol):
    """What the class of an adapter may know of a model before its weights are read. model: a flowrl.config.model.Model."""

    def check(self, model: Any, texts: Sequence[str] = ()) -> None:
        """Raise UserError for another family's model, a size that does not divide, LoRA targets or prompts that do not fit."""

    def size(self, model: Any) -> Any:
        """What the model holds, a flowrl.performance.memory.ModelSize; None where its files are not on this machine."""

    def licence(self, model: Any) -> str:
        """The licence that the model's own card states, "" where there is none."""


@runtime_checkable
class Configurable(Protocol):
    """An adapter that can run its model in other ways than as it was loaded. model: a flowrl.config.model.Model."""

    def configure(self, model: Any) -> None:
        """Activation checkpointing, compiled blocks, attention backend, tiling and slicing of the autoencoder."""

    def free_text_encoders(self, requests: Sequence[Request], size: int) -> None:
        """Encode every request and its negative, ``size`` a call, and drop the encoders."""


@runtime_checkable
class PipelineAdapter(Protocol):
    """A model family: what it takes, predicts and shows. It knows nothing of reinforcement learning."""

    guidance_rule: GuidanceRule
    guidance_boundary: float | None
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

    def load_lora(self, folder: str) -> None:
        """Put an exported LoRA beside the frozen network, so that ``lora_off`` leaves it out."""

    def export(self, folder: str) -> None:
        """Write the trained part: a LoRA that the family's ``load_lora_weights`` takes, or the whole network."""


class Reward(Protocol):
    """Scores finished pictures or videos.

    A reward may say of itself, as class attributes: scope ("sample", or "group" to be handed one whole group at a time),
    minimum (a lower bound of its scores), media (frozenset of "image", "video"), backbone (the network it stands on, ""
    for none), deterministic (equal pictures get equal scores, so they may be remembered), licence, presets (names that
    its argument ``preset`` takes, for ``name/preset``), needs_latents (it reads ``RewardBatch.latents``, which other rewards
    are not handed). Methods offload() and onload() move what it holds off its device and back (entry key ``offload``).
    """

    name: str

    def score(self, batch: RewardBatch) -> RewardResult:
        """One score a sample; may raise, which the runtime turns into an invalid batch."""


@runtime_checkable
class ProcessReward(Protocol):
    """Scores latents on the way from noise to data.

    differentiable: autograd reaches x through ``score`` (where x asks for a gradient), so that the reward may guide.
    """

    differentiable: bool

    def score(self, x: torch.Tensor, t: torch.Tensor, prompted: Prompted) -> ProcessScore:
        """One value a latent. x: float32 [B, ...]; t: float32 [B] in [0, 1], 1 is noise; prompted: one row a latent.

        May raise: those that hold it take it for values that are not valid.
        """


@runtime_checkable
class DifferentiableReward(Protocol):
    """A reward that autograd reaches through; the class says so, so that a config can be checked before anything loads.

    differentiable: what ``value`` reads, "pictures" (float32 [B, 3, H, W] in [0, 1], as an adapter decodes them) or
    "latents" (x0 [B, ...]).
    """

    differentiable: Literal["pictures", "latents"]

    def value(self, x: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """One number a sample, float [B], larger is better, each a function of its own sample alone."""


@runtime_checkable
class TextReward(Protocol):
    """A DifferentiableReward of latents that also reads the prompt as the model encodes it; needs_text: True."""

    differentiable: Literal["pictures", "latents"]
    needs_text: bool

    def value(self, x: torch.Tensor, requests: Sequence[Request], text: torch.Tensor) -> torch.Tensor:
        """See DifferentiableReward. text: pooled text, float32 [B, D] (``flowrl.credit.networks.pooled_text``)."""


class PairReward(Protocol):
    """Judges pairs of pictures; the runtime makes win rates within groups of it. It may say of itself what a Reward may."""

    def compare(self, first: RewardBatch, second: RewardBatch) -> RewardResult:
        """For each row, how much better ``first`` is, in [0, 1], 1/2 for a tie. Each pair comes in both orders."""


class Detector(Protocol):
    """Finds objects: uint8 [B, H, W, 3] to one list of detections a picture."""

    def __call__(self, images: npt.NDArray[np.uint8]) -> list[list[Detection]]: ...


class Tracker(Protocol):
    """Receives numbers once an iteration. key: its name in the config; run_id: what its service calls the run, "" for none."""

    key: str
    run_id: str

    def scalars(self, values: Mapping[str, Any], iteration: int) -> None: ...

    def close(self, failed: bool = False) -> None: ...
