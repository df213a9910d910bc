"""Catalogue entries of the objectives that take the gradient of a reward."""

from __future__ import annotations

from collections.abc import Mapping

from flowrl.advantage.method import Method

_GRADIENTS = "tests/training/test_direct_gradients.py::"
_EXACT = "tests/training/test_direct_exact.py::"
_OUTCOME = "tests/objectives/differentiable/test_outcome.py::"
_ADJOINT = "tests/objectives/differentiable/test_adjoint_matching.py::"
_RUN = "tests/training/test_direct.py::"


def _objective(key: str, paper: str, title: str, evidence: Mapping[str, str]) -> Method:
    return Method(key, "objective", paper, title, 2, evidence, config=f"objective.name={key}")


METHODS: tuple[Method, ...] = (
    _objective(
        "refl",
        "2304.05977",
        "ReFL: the reward's gradient at the one-step estimate of a late step, with a hinge",
        {
            "exact": _GRADIENTS + "test_refl_is_the_one_step_estimate_of_a_late_step",
            "formula": _OUTCOME + "test_refl_worked_numbers",
        },
    ),
    _objective(
        "draft",
        "2309.17400",
        "DRaFT-K: the reward's gradient through the last K steps",
        {
            "exact": _GRADIENTS + "test_draft_is_the_gradient_of_the_whole_chain_or_of_its_end",
            "formula": _RUN + "test_the_gradient_is_that_of_the_reward",
        },
    ),
    _objective(
        "draft_lv",
        "2309.17400",
        "DRaFT-LV: the last step's gradient, averaged over pictures that are noised anew",
        {"identity": _GRADIENTS + "test_draft_lv_is_the_last_step_whatever_the_number_of_pictures"},
    ),
    _objective(
        "alignprop",
        "2310.03739",
        "AlignProp: the reward's gradient through the chain, checkpointed by step, truncated at random",
        {
            "exact": _GRADIENTS + "test_alignprop_draws_how_far_back_it_goes",
            "identity": _RUN + "test_without_checkpointing_the_gradient_is_the_same",
        },
    ),
    _objective(
        "ctrl",
        "2406.12120",
        "CTRL: a new condition by an offline classifier's likelihood and the path's divergence",
        {
            "exact": _EXACT + "test_quadratic_reward_reaches_the_optimum",
            "formula": _OUTCOME + "test_step_kl_is_girsanovs_for_euler_maruyama",
            "identity": "tests/rollout/test_conditions.py::"
            "test_at_the_start_every_class_gives_the_pre_trained_model_bit_by_bit",
        },
    ),
    _objective(
        "adjoint_matching",
        "2409.08861",
        "Adjoint Matching: regression on lean adjoints along memoryless paths",
        {
            "exact": _EXACT + "test_adjoint_matching_reaches_the_linear_tilt",
            "formula": _ADJOINT + "test_loss_against_a_plain_loop_and_its_gradient",
            "identity": "tests/training/test_direct_tilt.py::test_general_reward_on_a_mixture_reaches_the_tilted_law",
            "learned": "docs/results/forward/direct.json",
        },
    ),
)
