"""The methods table's entries of objectives on re-noised samples."""

from __future__ import annotations

from collections.abc import Mapping

from flowrl.advantage.catalogue import Method

_MATCHING = "tests/objectives/forward/test_matching.py::"
_PAIRS = "tests/objectives/forward/test_preferences.py::"
_EXACT = "tests/training/test_forward_exact.py::"
_RUNS = "tests/training/test_forward.py::"
_LINEAR = _EXACT + "test_linear_reward_moves_each_velocity_by_its_share_of_the_covariance"
_ONE_SEED = "docs/results/forward/one_seed.json"


def _entry(
    key: str, paper: str, tier: int, title: str, evidence: Mapping[str, str], config: str | None = None
) -> Method:
    return Method(
        key, "objective", paper, title, tier, evidence, config=f"objective.name={key}" if config is None else config
    )


METHODS: tuple[Method, ...] = (
    _entry(
        "nft",
        "2509.16117",
        2,
        "DiffusionNFT: implicit positive and negative policies on re-noised samples, without guidance",
        {
            "exact": _LINEAR,
            "formula": _MATCHING + "test_nft_in_the_space_of_public_code",
            "identity": _MATCHING + "test_nft_has_no_gradient_without_a_preference",
            "learned": "docs/results/forward/main.json",
        },
    ),
    _entry(
        "awm",
        "2509.25050",
        2,
        "Advantage weighted matching: the denoising error weighed by the advantage, or its ratio clipped or bounded",
        {
            "exact": _LINEAR,
            "formula": _MATCHING + "test_awm_on_policy_gradient_is_the_covariance",
            "identity": _RUNS + "test_awm_with_a_ratio_bounded_by_the_engine",
            "learned": "docs/results/forward/main.json",
        },
    ),
    _entry(
        "orw",
        "2502.06061",
        2,
        "ORW-CFM-W2: exponential weights with a Wasserstein term towards the pre-trained model",
        {
            "exact": _EXACT + "test_exponential_weights_reach_the_quadratic_tilt",
            "formula": _MATCHING + "test_orw_is_the_tilt_for_any_reward",
        },
    ),
    _entry(
        "ram",
        "2605.10759",
        3,
        "RAM: regression on the reference plus the advantage times what a sample adds",
        {
            "exact": _LINEAR,
            "reconstructed": _MATCHING + "test_ram_fixed_point_is_the_tilted_velocity",
            "learned": _ONE_SEED,
        },
    ),
    _entry(
        "dpo",
        "2311.12908",
        2,
        "Diffusion DPO on given pairs of pictures",
        {
            "exact": _PAIRS + "test_dpo_at_the_reference_is_log_two_and_pulls_the_right_way",
            "formula": _PAIRS + "test_dpo_worked_number",
        },
        config="",  # it needs a file of pairs
    ),
    _entry(
        "dpo_online",
        "2311.12908",
        2,
        "Diffusion DPO on the best and the worst sample of each group",
        {
            "exact": _PAIRS + "test_dpo_at_the_reference_is_log_two_and_pulls_the_right_way",
            "formula": _PAIRS + "test_dpo_worked_number",
            "learned": _ONE_SEED,
        },
    ),
    _entry(
        "dgpo",
        "2510.08425",
        2,
        "DGPO: the error weighed by the advantage, less where a group is ordered already",
        {"formula": _PAIRS + "test_dgpo_by_a_plain_loop", "learned": _ONE_SEED},
    ),
    _entry(
        "crd",
        "",
        2,
        "Centred reward distillation: the change of the error matched to the reward, both centred in the group",
        {
            "formula": _PAIRS + "test_crd_by_a_plain_loop",
            "identity": _PAIRS + "test_crd_does_not_move_what_is_equal_and_ends_where_rewards_agree",
            "learned": _ONE_SEED,
        },
    ),
)
