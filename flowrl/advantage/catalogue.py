"""What the engine holds: the entries of every module, gathered; each entry stands beside its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import (
    anchors,
    bandits,
    baselines,
    branches,
    clipping,
    conflict,
    contrastive_losses,
    controllers,
    curriculum,
    estimators,
    kl,
    local_terms,
    macro_returns,
    normalisation,
    optimal_baselines,
    optimisers,
    preference,
    process_terms,
    progress,
    redistribution,
    regularised_losses,
    returns,
    selection,
    sequence_losses,
    stages,
    step_values,
    streams,
    tempered,
    token_terms,
    trees,
    unified,
    weighted_losses,
    weighting,
)
from .aggregation import AGGREGATIONS
from .loss_record import PolicyLoss
from .method import EVIDENCE_LABELS, KINDS, Method
from .record import Advantage

_LOSSES = "tests/advantage/test_losses.py::"

METHODS: tuple[Method, ...] = (
    *estimators.METHODS,
    *anchors.METHODS,
    *bandits.METHODS,
    *baselines.METHODS,
    *branches.METHODS,
    *clipping.METHODS,
    *conflict.METHODS,
    *contrastive_losses.METHODS,
    *controllers.METHODS,
    *curriculum.METHODS,
    *kl.METHODS,
    *local_terms.METHODS,
    *macro_returns.METHODS,
    *normalisation.METHODS,
    *optimal_baselines.METHODS,
    *optimisers.METHODS,
    *preference.METHODS,
    *process_terms.METHODS,
    *progress.METHODS,
    *redistribution.METHODS,
    *regularised_losses.METHODS,
    *returns.METHODS,
    *selection.METHODS,
    *sequence_losses.METHODS,
    *stages.METHODS,
    *step_values.METHODS,
    *streams.METHODS,
    *tempered.METHODS,
    *token_terms.METHODS,
    *trees.METHODS,
    *unified.METHODS,
    *weighted_losses.METHODS,
    *weighting.METHODS,
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


def _calls(kind: str) -> dict[str, Callable[..., Any]]:
    return {m.key: m.call for m in METHODS if m.kind == kind and m.call is not None}


ESTIMATORS: Mapping[str, Callable[..., Advantage]] = _calls("estimator")
POLICY_LOSSES: Mapping[str, Callable[..., PolicyLoss]] = _calls("policy_loss")
JOINT_LOSSES = frozenset(m.key for m in METHODS if m.joint)

__all__ = [
    "AGGREGATIONS",
    "ESTIMATORS",
    "EVIDENCE_LABELS",
    "JOINT_LOSSES",
    "KINDS",
    "METHODS",
    "POLICY_LOSSES",
    "Method",
]
