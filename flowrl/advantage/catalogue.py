"""What the engine holds, one entry a method, each with the tests that back it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

EVIDENCE_LABELS = ("exact", "golden", "formula", "identity", "learned", "reconstructed")
KINDS = ("estimator", "policy_loss", "kl", "aggregation", "objective")


@dataclass(frozen=True)
class Method:
    """One method: what it is, where it comes from, why its numbers can be trusted, how a config names it.

    key: unique within its kind. kind: one of KINDS. paper_id: arXiv number, "" where there is none. tier: 1 trained
    end to end, 2 formula or worked numbers, 3 reconstructed. evidence: label (exact: a closed-form answer; golden:
    numbers of a public implementation; formula: an independent transcription; identity: reduces to a known method;
    learned: a recorded curve; reconstructed: the source could not be read) -> test id. config: the override that runs
    it, "" where a config cannot name it yet. Raises ValueError for an unknown kind, label or tier.
    """

    key: str
    kind: str
    paper_id: str
    title: str
    tier: int
    evidence: Mapping[str, str]
    config: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.evidence) - set(EVIDENCE_LABELS)
        if unknown or not self.evidence:
            raise ValueError(
                f"method {self.key}: evidence needs labels of {EVIDENCE_LABELS}, got {sorted(self.evidence)}"
            )
        if self.kind not in KINDS or self.tier not in (1, 2, 3):
            raise ValueError(f"method {self.key}: kind {self.kind!r} or tier {self.tier} is unknown")
        object.__setattr__(self, "evidence", MappingProxyType(dict(self.evidence)))


_ESTIMATORS = "tests/advantage/test_estimators.py::"
_CHANNELS = "tests/advantage/test_gdpo.py::"
_LOSSES = "tests/advantage/test_losses.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="grpo",
        kind="estimator",
        paper_id="2402.03300",
        title="GRPO: rewards standardised inside their group",
        tier=1,
        evidence={
            "exact": _ESTIMATORS + "test_grpo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
            "identity": _ESTIMATORS + "test_grpo_is_dr_grpo_over_its_deviation",
        },
        config="advantage.name=grpo",
    ),
    Method(
        key="dr_grpo",
        kind="estimator",
        paper_id="2503.20783",
        title="Dr.GRPO: group mean taken off, no division by the deviation",
        tier=2,
        evidence={
            "exact": _ESTIMATORS + "test_dr_grpo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
        },
        config="advantage.name=dr_grpo",
    ),
    Method(
        key="rloo",
        kind="estimator",
        paper_id="2402.14740",
        title="RLOO: each reward against the mean of the others in its group",
        tier=2,
        evidence={
            "exact": _ESTIMATORS + "test_rloo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
            "identity": _ESTIMATORS + "test_rloo_is_dr_grpo_times_n_over_n_minus_one",
        },
        config="advantage.name=rloo",
    ),
    Method(
        key="lite_ppo",
        kind="estimator",
        paper_id="2508.08221",
        title="Lite PPO: group mean, deviation of the whole batch",
        tier=2,
        evidence={
            "exact": _ESTIMATORS + "test_lite_ppo_worked_numbers",
            "formula": _ESTIMATORS + "test_against_plain_loops",
            "identity": _ESTIMATORS + "test_lite_ppo_of_one_group_is_grpo",
        },
        config="advantage.name=lite_ppo",
    ),
    Method(
        key="gdpo",
        kind="estimator",
        paper_id="2601.05242",
        title="GDPO: each reward channel standardised on its own before they are added",
        tier=2,
        evidence={
            "exact": _CHANNELS + "test_worked_numbers",
            "formula": _CHANNELS + "test_against_a_plain_loop",
            "identity": _CHANNELS + "test_one_channel_without_batch_norm_is_grpo",
        },
        config="advantage.name=gdpo",
    ),
    Method(
        key="ppo",
        kind="policy_loss",
        paper_id="1707.06347",
        title="PPO's clipped surrogate, with separate lower and upper bounds",
        tier=2,
        evidence={
            "exact": _LOSSES + "test_clipped_value_and_gradient_table",
            "formula": _LOSSES + "test_clipped_against_a_plain_loop",
            "identity": _LOSSES + "test_clipped_on_policy_is_the_policy_gradient",
        },
        config="objective.clip_range=0.2",
    ),
    *(
        Method(
            key=key,
            kind="kl",
            paper_id="",
            title=title,
            tier=2,
            evidence={"exact": _LOSSES + test, "identity": _LOSSES + "test_kl_estimators_vanish_on_policy"},
        )
        for key, title, test in (
            ("k1", "KL estimator x: unbiased, of either sign", "test_k1_and_k3_average_to_the_exact_kl"),
            ("k2", "KL estimator x^2 / 2: the gradient of KL", "test_k2_gradient_is_the_exact_kl_gradient"),
            ("k3", "KL estimator exp(-x) + x - 1: unbiased, never negative", "test_k1_and_k3_average_to_the_exact_kl"),
        )
    ),
    *(
        Method(
            key=key,
            kind="aggregation",
            paper_id=paper_id,
            title=title,
            tier=2,
            evidence={
                "exact": _LOSSES + "test_aggregate_worked_numbers",
                "identity": _LOSSES + "test_aggregations_agree_on_equal_lengths",
            },
        )
        for key, paper_id, title in (
            ("step_mean", "2503.14476", "mean over all valid steps of the global batch"),
            ("step_mean_local", "", "mean over the valid steps of this call"),
            ("step_sum", "", "sum over valid steps"),
            ("seq_sum_mean", "", "mean over rows of their sums"),
            ("seq_sum_norm", "2503.20783", "sum over valid steps by rows times a constant length"),
            ("seq_mean_mean", "2402.03300", "mean over non-empty rows of their means"),
            ("length_scaled", "", "mean over rows of their mean times their length"),
            ("own_mean_sum", "2509.02333", "sum over rows of their means"),
        )
    ),
)
