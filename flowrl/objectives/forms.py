"""Which ratio, step weight and loss each objective on trajectories is made of.

The parts combine freely; a form is a named choice. What differs only in the rollout (windows, schedules, kernels, shared
noise) is the same form here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from flowrl.advantage import POLICY_LOSSES
from flowrl.advantage.checks import check_choice
from flowrl.objectives.ratios import RatioForm
from flowrl.objectives.step_weights import MEAN_ONE, StepWeight
from flowrl.objectives.surrogates import SURROGATES

Ratio = Literal["plain", "debiased", "normalised", "policy_flow", "neighbours"]

NEEDS: Mapping[str, str] = MappingProxyType(
    {
        "old_value": "the network's output when the step was drawn, from which the old mean is remade",
        "divergence": "the step's exact KL from the old policy, which needs the old mean",
        "neighbours": "a group drawn from neighbouring noises without noise in between, and its members' next latents",
        "reference": "a penalty towards the pre-trained model",
    }
)
_RATIO_NEEDS: Mapping[str, frozenset[str]] = {
    "plain": frozenset(),
    "debiased": frozenset({"old_value"}),
    "normalised": frozenset({"old_value"}),
    "policy_flow": frozenset({"old_value"}),
    "neighbours": frozenset({"neighbours"}),
}
_LOSS_NEEDS: Mapping[str, frozenset[str]] = {"flow_dppo": frozenset({"old_value", "divergence"})}


@dataclass(frozen=True)
class Form:
    """An objective on trajectories as a choice of parts; ``dataclasses.replace`` overrides one.

    ratio: plain, debiased or normalised of ``ratios``; policy_flow of ``policy_flow``; neighbours of ``neighbours``.
    step_weight: of ``step_weights``. loss: of the engine or of ``surrogates``; loss_options: its options, without its
    clip range. reference: the method is defined with a penalty towards the pre-trained model. Raises ValueError for an
    unknown part, or a weight by the kernel's noise where there is none.
    """

    ratio: Ratio = "plain"
    step_weight: StepWeight = "none"
    loss: str = "ppo"
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_options", MappingProxyType(dict(self.loss_options)))
        for name, value, known in (
            ("ratio", self.ratio, get_args(Ratio)),
            ("step_weight", self.step_weight, get_args(StepWeight)),
            ("loss", self.loss, sorted({*POLICY_LOSSES, *SURROGATES})),
        ):
            check_choice(name, value, tuple(known))
        if self.ratio == "neighbours" and self.step_weight not in ("none", "dt"):
            raise ValueError(f"step_weight: {self.step_weight!r} weighs by noise, and neighbours are drawn without any")

    @property
    def needs(self) -> frozenset[str]:
        """What the update must have beside the log-probs; keys of NEEDS."""
        own = frozenset({"reference"}) if self.reference else frozenset()
        return _RATIO_NEEDS[self.ratio] | _LOSS_NEEDS.get(self.loss, frozenset()) | own

    @property
    def mean_one(self) -> bool:
        """Whether the step weight is to be divided by its mean over the trained steps."""
        return self.step_weight in MEAN_ONE

    @property
    def transforms(self) -> RatioForm | None:
        """The ratio form for ``log_ratio_pair``; None where the log-probs are made another way."""
        known: tuple[RatioForm, ...] = get_args(RatioForm)
        return next((form for form in known if form == self.ratio), None)


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "flow_grpo": Form(),
        "flow_grpo_fast": Form(),
        "dance_grpo": Form(),
        "mix_grpo": Form(),
        "grpo_guard": Form(ratio="normalised", step_weight="inverse_slope"),
        "tempflow": Form(step_weight="std"),
        "flash_grpo": Form(step_weight="std_over_slope"),
        "flow_dppo": Form(loss="flow_dppo", loss_options={"threshold": 1e-5}),
        "pcpo": Form(step_weight="dt_std_over_slope", loss="pcpo"),
        "policy_flow": Form(ratio="policy_flow"),
        "neighbor_grpo": Form(ratio="neighbours"),
        "ddpo": Form(),
        "euphonium": Form(),
        "dpok": Form(loss="dpok", reference=True),
    }
)
"""Objectives by the name that a config gives. Clip ranges of papers and public code, and what they are under ``sqrt``:

| form | stated, with mean | latent elements D | under sqrt (times sqrt D) |
|---|---|---|---|
| flow_grpo | 1e-4 | 65,536 (SD3 at 512) | 0.0256 |
| flow_grpo_fast | 1e-5 (with CPS) | 65,536 | 0.00256 |
| dance_grpo, mix_grpo | 1e-4 | 129,600 (FLUX at 720) | 0.036 |
| grpo_guard | 2e-6, PickScore 4e-6 | 65,536 | 0.00051, 0.00102 |
| tempflow | not known | | |
| flash_grpo | 1e-3 | 2,096,640 (Wan, 480 x 832 x 81) | 1.45 |
| flow_dppo | none; threshold 1e-5 nats an element | any | the same |
| pcpo | that of its baseline, as margin | | |
| ddpo, dpok | 1e-4 | 16,384 (SD 1.5 at 512) | 0.0128 |
| policy_flow | 0.2 with sum | a few | |
| neighbor_grpo | not known; a ratio of probabilities | | does not depend on D |

``sqrt`` compares policies that have moved by the same share of std in every element; grpo_guard's range is in units of
the mean's shift, about std times a plain one. ``ratios.convert_range`` does the arithmetic for another D.
"""
