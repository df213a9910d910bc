"""Training objectives that know of kernels and velocities; the arithmetic of policies is ``flowrl.advantage``'s.

OBJECTIVES maps a config's ``objective.name`` to its function; METHODS describes them as the engine's catalogue does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flowrl.advantage.catalogue import Method

from .flow_grpo import LossTerms, flow_grpo_loss, merge_terms

OBJECTIVES: Mapping[str, Callable[..., LossTerms]] = {"flow_grpo": flow_grpo_loss}

_TESTS = "tests/objectives/test_flow_grpo.py::"
METHODS: tuple[Method, ...] = (
    Method(
        key="flow_grpo",
        kind="objective",
        paper_id="2505.05470",
        title="Flow-GRPO: group-relative clipped updates on stochastic denoising steps, with a reference penalty",
        tier=1,
        evidence={
            "exact": "tests/training/test_exact.py::test_trainer_reaches_the_optimum_under_path_kl",
            "formula": _TESTS + "test_loss_and_statistics_against_a_plain_loop",
            "identity": _TESTS + "test_micro_batches_add_up_to_the_whole",
            "learned": "docs/results/learning/flow_grpo-0.json",
        },
        config="objective.name=flow_grpo",
    ),
)

__all__ = ["METHODS", "OBJECTIVES", "LossTerms", "flow_grpo_loss", "merge_terms"]
