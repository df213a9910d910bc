"""The catalogue's entry: what a method is, where it comes from, and what backs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

EVIDENCE_LABELS = ("exact", "golden", "formula", "identity", "learned", "reconstructed")
KINDS = (
    "estimator",
    "policy_loss",
    "kl",
    "aggregation",
    "objective",
    "weight",
    "reward",
    "selection",
    "curriculum",
    "controller",
    "monitor",
    "conflict",
    "optimizer",
)


@dataclass(frozen=True)
class Method:
    """One method: what it is, where it comes from, why its numbers can be trusted, how a config names it.

    key: unique within its kind. kind: one of KINDS. paper_id: arXiv number, "" where there is none. tier: 1 trained
    end to end, 2 formula or worked numbers, 3 reconstructed. evidence: label (exact: a closed-form answer; golden:
    numbers of a public implementation; formula: an independent transcription; identity: reduces to a known method;
    learned: a recorded curve; reconstructed: the source could not be read) -> test id. config: the override that runs
    it, "" where a config cannot name it yet. call: the function itself. Its positional parameters are inputs, named as
    in ``inputs.INPUTS``; its keyword-only parameters are options. tokens_only: why it has no meaning on denoising
    steps and what to use there, "" where it has one. joint: a policy loss in which the loss of one step depends on
    other steps or rows. exempt: registry property (tests/advantage/test_properties.py) ->
    why this method need not have it. Raises ValueError for an unknown kind, label or tier.
    """

    key: str
    kind: str
    paper_id: str
    title: str
    tier: int
    evidence: Mapping[str, str]
    config: str = ""
    call: Callable[..., Any] | None = None
    tokens_only: str = ""
    joint: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.evidence) - set(EVIDENCE_LABELS)
        if unknown or not self.evidence:
            raise ValueError(
                f"method {self.key}: evidence needs labels of {EVIDENCE_LABELS}, got {sorted(self.evidence)}"
            )
        if self.kind not in KINDS or self.tier not in (1, 2, 3):
            raise ValueError(f"method {self.key}: kind {self.kind!r} or tier {self.tier} is unknown")
        object.__setattr__(self, "evidence", MappingProxyType(dict(self.evidence)))
        object.__setattr__(self, "exempt", MappingProxyType(dict(self.exempt)))
