"""Records that travel between the parts: frozen dataclasses, no behaviour beyond checks of their own shape.

Shapes: B samples, T steps of a schedule, K trained steps a sample, ... latent dimensions (C, H, W or C, F, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

LogProbReduction = Literal["sum", "mean", "sqrt"]
PredictionKind = Literal["velocity", "epsilon", "v", "x0"]


@dataclass(frozen=True)
class Request:
    """What one sample is asked to show, frames 1 being a picture. ``prompt_id`` is the row of the prompt in its dataset."""

    prompt: str
    prompt_id: int
    height: int
    width: int
    frames: int = 1
    negative: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditioning:
    """What an adapter made of requests: named tensors, all with the batch first."""

    tensors: Mapping[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: torch.Tensor | slice) -> Conditioning:
        """Rows ``index`` (int64 [N] or a slice) of every tensor."""
        return Conditioning({name: value[index] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning({name: value.to(device) for name, value in self.tensors.items()})


@dataclass(frozen=True)
class Prompted:
    """Conditioning of both branches, one row a sample; negative is None without guidance.

    requests: what each row asks for, () where they are not known.
    """

    positive: Conditioning
    negative: Conditioning | None
    requests: Sequence[Request] = ()

    def __getitem__(self, rows: torch.Tensor) -> Prompted:
        """Rows int64 [N] of all of it."""
        chosen = tuple(self.requests[row] for row in rows.tolist()) if self.requests else ()
        return Prompted(self.positive[rows], None if self.negative is None else self.negative[rows], chosen)


@dataclass(frozen=True)
class ProcessScore:
    """What a process reward says of latents on the way. values: float32 [B], larger is better; valid: bool [B].

    Where not valid, the value has no meaning and is read by nobody.
    """

    values: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class Prediction:
    """A network's output, its meaning, and hidden states asked for by name."""

    value: torch.Tensor
    kind: PredictionKind
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """Times of a sampler, from noise to data, with the interpolant ``x_t = alpha x0 + sigma x1`` at each.

    t, alpha, sigma: float32 [T + 1], t decreasing within [0, 1]. Flow models: alpha = 1 - t, sigma = t.
    """

    t: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.t) - 1


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind: ids, the schedule, and the latents of the transitions that are trained.

    x, x_next: storage dtype [B, K, ...]; step: int64 [B, K]; old_log_prob, std: float32 [B, K]; x0: [B, ...];
    stochastic_mask, trained_mask: bool [B, T]; parent: int64 [B], the sample whose prefix this one shares (itself if none);
    prompt_id, occurrence, member, group_id: int64 [B]. Forward-process methods leave x .. std as None and keep x0 alone.

    state, node: int64 [B, K]; samples with equal ``state`` at a transition start it from one latent, so one network call
    serves them all; those with equal ``node`` share the whole transition. What a method asks for beyond that: value, the
    network's (guided) output of each transition, float32 [B, K, ...], and its ``kind``; x0_hat, the one-step clean
    estimate before the first transition and after each but the last, float32 [B, K, ...].

    Of a guided rollout: behaviour_log_prob, the log-prob under the guided Gaussian that drew a transition (old_log_prob is
    the policy's own), and pull, how far guidance moved its mean, root mean square in units of std, both float32 [B, K];
    reward_gradient, of the guided latents, 0 elsewhere, float32 [B, K, ...], on request; log_weight: float32 [B]; sound:
    bool [B], whether the process reward failed nowhere on the way.
    """

    prompt_id: torch.Tensor
    occurrence: torch.Tensor
    group_id: torch.Tensor
    member: torch.Tensor
    policy_version: int
    schedule: Schedule
    kernel: str
    log_prob_reduction: LogProbReduction
    storage_dtype: torch.dtype
    x0: torch.Tensor
    stochastic_mask: torch.Tensor
    trained_mask: torch.Tensor
    parent: torch.Tensor
    x: torch.Tensor | None = None
    x_next: torch.Tensor | None = None
    step: torch.Tensor | None = None
    old_log_prob: torch.Tensor | None = None
    std: torch.Tensor | None = None
    state: torch.Tensor | None = None
    node: torch.Tensor | None = None
    value: torch.Tensor | None = None
    kind: PredictionKind = "velocity"
    x0_hat: torch.Tensor | None = None
    behaviour_log_prob: torch.Tensor | None = None
    pull: torch.Tensor | None = None
    reward_gradient: torch.Tensor | None = None
    log_weight: torch.Tensor | None = None
    sound: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_id)


@dataclass(frozen=True)
class RewardBatch:
    """Finished pictures, or videos, to be scored.

    images: uint8 [B, H, W, 3], videos [B, F, H, W, 3]; group_ids: one a sample; latents: x0 [B, ...] on request; text: with
    them, and not for rewards in another process, the model's pooled text of the prompts, float32 [B, D];
    reference: what was edited or shall be resembled, one a sample, of either shape.
    """

    images: npt.NDArray[np.uint8]
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    group_ids: Sequence[int] = ()
    latents: torch.Tensor | None = None
    reference: npt.NDArray[np.uint8] | None = None
    text: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RewardResult:
    """Scores of one reward. A failure is ``valid = False`` with its error, never a number.

    scores: float32 [B], NaN where not valid; valid: bool [B]; errors: one text or None a sample; components: further named
    float32 [B] that are logged and never trained on; details: what a report shows beside a picture.
    """

    scores: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    errors: Sequence[str | None]
    components: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    details: Sequence[str | None] = ()


@dataclass(frozen=True)
class Detection:
    """One object found in a picture. box: (left, top, right, bottom) in pixels, right and bottom exclusive."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str = ""


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a dataset: its text, its row (the prompt id) and what came with it (tag, include, target, ...)."""

    prompt: str
    prompt_id: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
