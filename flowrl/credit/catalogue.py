"""What backs each process reward and the critic: entries of the methods table."""

from __future__ import annotations

from flowrl.advantage.method import Method

_PROCESS = "tests/credit/test_process.py::"
_VALUES = "tests/training/test_process_values.py::"
_CRITIC = "tests/credit/test_critic.py::"
_RUN = "tests/training/test_critics.py::"

METHODS = (
    Method(
        key="process_x0",
        kind="reward",
        paper_id="2512.12387",
        title="any outcome reward of the finished picture as estimated from a latent, by n deterministic steps",
        tier=2,
        evidence={
            "exact": _PROCESS + "test_extrapolation_of_a_linear_reward_on_gaussian_data",
            "identity": _VALUES + "test_one_step_extrapolation_is_credit_values_x0",
        },
        config="""'process=[{"name":"x0"}]' credit.values=process advantage.name=stepwise""",
    ),
    Method(
        key="process_latent",
        kind="reward",
        paper_id="",
        title="a small network on latent, time and text, trained on pairs or scores of a model's own samples",
        tier=2,
        evidence={
            "formula": "tests/credit/test_reward_model_losses.py::test_every_pair_loss_recovers_the_scores_that_made_the_pairs",
            "exact": "tests/training/test_reward_model.py::test_a_latent_network_learns_the_order_and_reports_it",
        },
    ),
    Method(
        key="process_features",
        kind="reward",
        paper_id="",
        title="a head on hidden states of the generator, modulated by time: one network call, no decoding",
        tier=3,
        evidence={
            "exact": _PROCESS + "test_a_head_on_features_costs_one_call_and_differentiates_to_the_latent",
            "reconstructed": _PROCESS + "test_a_head_reads_the_reference_whatever_training_has_done",
        },
    ),
    Method(
        key="latent_critic",
        kind="reward",
        paper_id="2403.03950",
        title="a value network on latents (squared, Huber, HL-Gauss), averaged weights, behind a gate on explained variance",
        tier=2,
        evidence={
            "exact": _CRITIC + "test_a_critic_learns_the_posterior_mean_down_to_its_floor",
            "formula": _CRITIC + "test_hl_gauss_against_a_plain_loop",
            "identity": _RUN + "test_a_closed_gate_leaves_the_policy_bit_identical",
        },
        config="credit.values=critic advantage.name=gae",
    ),
)
