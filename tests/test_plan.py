"""The plan's arithmetic against numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys

from flowrl.config.schema import Batch, Config, Evaluation, Kl, Model, Objective, RewardEntry, Rollout, Window
from flowrl.plan import Count, plan, plan_text

SMALL = Batch(groups=4, group_size=8, micro_batch=16)  # 32 samples, 2 micro-batches


def test_window_with_shared_prefix() -> None:
    """24 x 16 = 384 samples, 8 steps, starts 0, 1, 2. Steps up to the window's first are one latent a group, 24; then 384:

    24 + 7 x 384 = 2712, 48 + 6 x 384 = 2352, 72 + 5 x 384 = 1992 forwards. The update's first step is 24, its second 384.
    """
    made = plan(Config(rewards=(RewardEntry(name="a"), RewardEntry(name="b"))))
    assert made.starts == (0, 1, 2)
    assert made.rollout.samples == Count(1992, 2352, 2712)
    # 6 calls a step for all samples, 1 for the 24 prefixes: 48, 1 + 42, 2 + 36.
    assert made.rollout.calls == Count(38, 43, 48)
    assert made.transitions == 768
    assert made.update_forward.samples == made.update_backward.samples == Count(408, 408, 408)
    assert made.update_forward.calls == Count(12, 12, 12)
    assert made.reference.samples == Count(0, 0, 0)
    assert made.forward.samples == Count(2400, 2760, 3120)
    assert (made.decode_calls, made.reward_samples) == (6, 768)


def test_window_without_shared_prefix() -> None:
    made = plan(Config(batch=SMALL, rollout=Rollout(share_prefix=False)))
    assert made.rollout.samples == Count(256, 256, 256)
    assert made.rollout.calls == Count(16, 16, 16)


def test_every_step_with_full_guidance_and_a_reference() -> None:
    """10 steps, 9 of them stochastic: 2 x 32 x 10 rollout; 2 x 32 x 9 update, backward and reference."""
    config = Config(
        batch=SMALL,
        rollout=Rollout(steps=10, window=Window(kind="full"), guidance=4.5, share_prefix=False),
        objective=Objective(kl=Kl(form="paper", weight=0.04)),
    )
    made = plan(config)
    assert (made.window, made.branches, made.transitions) == (9, 2, 288)
    assert made.rollout.samples == Count(640, 640, 640)
    assert made.rollout.calls == Count(40, 40, 40)
    assert made.update_forward.samples == made.update_backward.samples == made.reference.samples == Count(576, 576, 576)
    assert made.update_backward.calls == Count(36, 36, 36)
    assert made.forward.samples == Count(1792, 1792, 1792)


def test_conditional_gradient_saves_backwards_only() -> None:
    made = plan(Config(batch=SMALL, rollout=Rollout(guidance=3.0, cfg_gradient="conditional")))
    assert made.update_forward.samples == Count(72, 72, 72)  # 2 branches x (4 shared latents + 32)
    assert made.update_backward.samples == Count(36, 36, 36)
    assert made.update_backward.calls == Count(4, 4, 4)


def test_updates_split_the_groups_and_passes_repeat_them() -> None:
    """3 updates on 4 groups of 8: shares of 16, 8, 8 samples in 2 + 1 + 1 calls of 8; 2 steps, 2 passes.

    The reference is asked once, whatever the number of passes.
    """
    objective = Objective(updates=3, passes=2, kl=Kl(form="velocity", weight=1.0))
    made = plan(Config(batch=Batch(groups=4, group_size=8, micro_batch=8), objective=objective))
    assert made.updates == 6
    assert made.update_forward.samples == Count(72, 72, 72)  # 2 passes x (4 shared latents + 32)
    assert made.update_forward.calls == made.update_backward.calls == Count(16, 16, 16)
    assert made.reference.samples == Count(36, 36, 36)
    assert made.reference.calls == Count(8, 8, 8)


def test_ragged_micro_batches_round_up() -> None:
    made = plan(
        Config(
            batch=Batch(groups=5, group_size=3, micro_batch=4), rollout=Rollout(steps=3, window=Window(size=1, last=1))
        )
    )
    # Chunks start at rows 0, 4, 8, 12 and groups at 0, 3, 6, 9, 12: 7 latents at the shared step.
    assert made.rollout.samples == Count(5 + 7 + 15, 32, 7 + 15 + 15)
    assert made.rollout.calls == Count(10, 11, 12)
    assert made.decode_calls == 4


def test_stored_latents() -> None:
    """384 samples of 4 x 9 x 9: 2 x 2 trained latents and one x0, 4 bytes; bf16 halves the trained ones alone."""
    assert plan(Config()).stored_bytes == 324 * 384 * (4 * 4 + 4)
    assert plan(Config(rollout=Rollout(storage_dtype="bf16"))).stored_bytes == 324 * 384 * (4 * 2 + 4)
    sd3 = Config(model=Model(path="some/checkpoint", height=512, width=512), batch=SMALL)
    assert plan(sd3).stored_bytes == 16 * 64 * 64 * 32 * 20
    other = Config(model=Model(adapter="flux", path="x"), batch=SMALL)
    assert plan(other).stored_bytes is None
    assert plan(other, latent_shape=(2, 5)).stored_bytes == 10 * 32 * 20


def test_evaluation_cost() -> None:
    made = plan(Config(evaluation=Evaluation(count=10, per_prompt=4, steps=5, guidance=2.0)))
    assert (made.evaluation_pictures, made.evaluation_forwards) == (40, 400)


def test_text_names_the_numbers() -> None:
    text = plan_text(Config(rewards=(RewardEntry(name="a"),)))
    assert "24 groups x 16 members = 384 samples" in text
    assert "2,352.0 (1,992 to 2,712)" in text
    assert "its work is at most this" in text
    assert "known once the model is loaded" in plan_text(Config(model=Model(adapter="flux", path="x")))
    with_kl = Config(objective=Objective(kl=Kl(form="velocity", weight=1.0)))
    assert "at most this" not in plan_text(with_kl)


def test_the_plan_needs_no_torch() -> None:
    code = "import sys, flowrl.plan; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gold_rewards_do_not_score_training_pictures() -> None:
    gold = RewardEntry(name="b", role="gold")
    assert plan(Config(rewards=(RewardEntry(name="a"), gold))).reward_samples == 384


def test_the_cost_of_a_solver_is_what_the_solver_says() -> None:
    """cost.py keeps its own table, as it loads no torch."""
    from flowrl.cost import SOLVER_CALLS
    from flowrl.dynamics.solvers import SOLVERS, calls

    assert {name: calls(name) for name in SOLVERS} == SOLVER_CALLS
