"""Training objectives that know of kernels and velocities; the arithmetic of policies is ``flowrl.advantage``'s.

FORMS maps a config's ``objective.name`` to the parts it is made of; METHODS describes them as the engine's catalogue
does.
"""

from __future__ import annotations

from collections.abc import Mapping

from flowrl.advantage.catalogue import Method

from .flow_grpo import LossTerms, flow_grpo_loss, merge_terms
from .forms import FORMS, Form

_FLOW = "tests/objectives/test_flow_grpo.py::"
_RATIOS = "tests/objectives/test_ratios.py::"
_WEIGHTS = "tests/objectives/test_step_weights.py::"
_LOSSES = "tests/objectives/test_surrogates.py::"
_EUPHONIUM = "tests/training/test_euphonium.py::"
_FORMS = "tests/objectives/test_forms.py::"
_POLICY_FLOW = "tests/objectives/test_policy_flow.py::"
_NEIGHBOURS = "tests/objectives/test_neighbours.py::"


def _objective(key: str, paper: str, tier: int, title: str, evidence: Mapping[str, str]) -> Method:
    return Method(key, "objective", paper, title, tier, evidence, config=f"objective.name={key}")


# The loss of these is Flow-GRPO's; they differ in the rollout.
_SHARED = {
    "formula": _FLOW + "test_loss_and_statistics_against_a_plain_loop",
    "identity": _FORMS + "test_methods_that_differ_in_the_rollout_alone_share_flow_grpo",
}
_MAIN = {"learned": "docs/results/credit/main.json"}
_REST = {"learned": "docs/results/credit/rest.json"}  # one seed
METHODS: tuple[Method, ...] = (
    _objective(
        "flow_grpo",
        "2505.05470",
        1,
        "Flow-GRPO: group-relative clipped updates on stochastic denoising steps, with a reference penalty",
        {
            "exact": "tests/training/test_exact.py::test_trainer_reaches_the_optimum_under_path_kl",
            "formula": _FLOW + "test_loss_and_statistics_against_a_plain_loop",
            "identity": _FLOW + "test_micro_batches_add_up_to_the_whole",
            "learned": "docs/results/learning/flow_grpo-0.json",
        },
    ),
    _objective("flow_grpo_fast", "2505.05470", 2, "Flow-GRPO-Fast: trained on a short random window", _SHARED | _MAIN),
    _objective(
        "dance_grpo",
        "2505.07818",
        2,
        "DanceGRPO: constant noise, shared start, a random part of the steps",
        _SHARED | _REST,
    ),
    _objective(
        "mix_grpo", "2507.21802", 2, "MixGRPO: trained on a window that slides along the schedule", _SHARED | _REST
    ),
    _objective(
        "grpo_guard",
        "2510.22319",
        2,
        "GRPO-Guard: a ratio without bias or noise scale, steps of equal weight, on any kernel",
        {
            "exact": "tests/objectives/test_guard_facts.py::test_log_ratio_has_mean_zero_where_the_plain_one_has_minus_kl",
            "formula": _RATIOS + "test_each_form_is_its_sum_over_the_drawn_noise",
            "identity": _RATIOS + "test_on_policy_ratio_is_one_and_the_gradient_is_scaled_by_std",
        }
        | _MAIN,
    ),
    _objective(
        "tempflow",
        "2508.04324",
        3,
        "TempFlow-GRPO's noise-aware weight: steps count by their std",
        {
            "exact": _WEIGHTS + "test_gradient_scale_of_each_step",
            "identity": _WEIGHTS + "test_weights_have_mean_one_over_what_is_trained",
            "reconstructed": _WEIGHTS + "test_worked_numbers",
        }
        | _MAIN,
    ),
    _objective(
        "flash_grpo",
        "2605.15980",
        2,
        "Flash-GRPO's temporal gradient rectification: std over the slope of the mean",
        {
            "exact": _WEIGHTS + "test_flash_and_general_guard_are_flat_on_every_kernel_and_grid",
            "formula": _WEIGHTS + "test_worked_numbers",
        },
    ),
    _objective(
        "flow_dppo",
        "2606.11025",
        2,
        "Flow-DPPO: steps beyond an exact KL that go further are dropped, without a clip",
        {
            "exact": _LOSSES + "test_flow_dppo_mask_table",
            "formula": _LOSSES + "test_against_a_plain_loop",
            "identity": _LOSSES + "test_flow_dppo_gradient_is_the_engines_below_its_cap",
        }
        | _REST,
    ),
    _objective(
        "pcpo",
        "2509.25774",
        3,
        "PCPO: a hinge on the log ratio, credit in proportion to a step's length",
        {
            "exact": _LOSSES + "test_pcpo_hinge_gradient",
            "golden": _WEIGHTS + "test_pcpo_keeps_the_total_credit_and_shares_it_by_length",
            "formula": _LOSSES + "test_against_a_plain_loop",
            "identity": _LOSSES + "test_pcpo_is_ppo_to_first_order",
            "reconstructed": _LOSSES + "test_pcpo_hinge_gradient",
        }
        | _REST,
    ),
    _objective(
        "policy_flow",
        "2602.01156",
        3,
        "PolicyFlow: a surrogate ratio from the change of velocity, Brownian regulariser",
        {
            "exact": _POLICY_FLOW + "test_worked_number",
            "formula": _POLICY_FLOW + "test_regulariser_is_the_papers_in_its_own_time",
            "identity": _POLICY_FLOW + "test_kernel_transport_is_the_plain_ratio",
            "reconstructed": _POLICY_FLOW + "test_on_policy_log_ratio_is_zero",
        }
        | _REST,
    ),
    _objective(
        "neighbor_grpo",
        "2511.16955",
        3,
        "Neighbor GRPO: a softmax over distances between deterministic samples, quasi-norm advantages",
        {
            "exact": _NEIGHBOURS + "test_gradient_leads_from_the_mean_member_to_the_chosen_one",
            "formula": _NEIGHBOURS + "test_softmax_over_distances_by_a_plain_loop",
            "identity": _NEIGHBOURS + "test_order_of_members_and_anchors_does_not_matter",
            "reconstructed": _NEIGHBOURS + "test_quasi_norm_by_a_plain_loop",
        }
        | _REST,
    ),
    _objective(
        "ddpo",
        "2305.13301",
        1,
        "DDPO: clipped importance sampling of every denoising step",
        _SHARED | {"learned": "docs/results/diffusion/ddpo.json"},
    ),
    _objective(
        "euphonium",
        "2602.04928",
        3,
        "Euphonium: guided samples, clipped surrogates of outcome and process rewards, guidance distilled into the network",
        {
            "exact": _EUPHONIUM + "test_distillate_of_the_exact_tilt_reaches_its_mean_without_a_reward",
            "formula": _EUPHONIUM + "test_two_surrogates_are_summed",
            "identity": _EUPHONIUM + "test_zero_guidance_is_flow_grpo_and_dance_grpo_bit_for_bit",
            "reconstructed": _EUPHONIUM + "test_distillation_moves_towards_the_guided_step",
            "learned": "docs/results/forward/euphonium.json",
        },
    ),
    _objective(
        "dpok",
        "2305.16381",
        2,
        "DPOK: log-prob weighted by the advantage, with a penalty towards the pre-trained model",
        {
            "exact": _LOSSES + "test_dpok_without_a_bound_is_the_weighted_log_prob",
            "formula": _LOSSES + "test_against_a_plain_loop",
            "identity": _LOSSES + "test_on_policy_gradient_is_the_advantage",
        },
    ),
)

__all__ = ["FORMS", "METHODS", "Form", "LossTerms", "flow_grpo_loss", "merge_terms"]
