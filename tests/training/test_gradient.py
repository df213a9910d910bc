"""Execution details leave the gradient alone: micro-batch, silent rows, minibatch split, storage, start-up check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowrl.errors import UserError
from tests.training.helpers import make, small_config


def gradient(config) -> tuple[list[torch.Tensor], dict]:
    """The gradient of the first update."""
    trainer = make(config)
    found: list[torch.Tensor] = []

    def keep() -> float:
        if not found:
            found.extend(p.grad.clone() for p in trainer.weights.parameters)
        trainer.optimizer.zero_grad()
        return 0.0

    trainer._step = keep
    row = trainer.iterate()
    return found, row


def assert_close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    scale = max(float(x.abs().max()) for x in a)
    assert scale > 0
    assert max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) <= tolerance * max(scale, 1e-3)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batch_changes_neither_groups_nor_gradient(tiny_sd3: Path, size: int) -> None:
    whole, row = gradient(small_config(tiny_sd3))
    parts, other = gradient(small_config(tiny_sd3, **{"batch.micro_batch": size}))
    assert row["score/mean"] == pytest.approx(other["score/mean"], abs=1e-4)
    assert_close(whole, parts, 2e-2)  # pictures are rounded to 8 bits: a pixel may tip over with the batch shape


def test_micro_batch_of_the_update_alone(tiny_sd3: Path) -> None:
    """Given the same rollout, splitting the update differently gives the same gradient to 1e-5."""
    from flowrl.training.update import accumulate, chunks

    trainer = make(small_config(tiny_sd3))
    batches = []
    trainer._train = lambda batch: batches.append(batch) or {}
    trainer.iterate()
    found = []
    for size in (8, 3, 1):
        parts = chunks(batches[0], 0, size, True)
        weight = torch.full((8, 2), 1 / 16)
        list(accumulate(trainer.policy, trainer.learner.objective, batches[0], parts, weight, {}, True))
        found.append([p.grad.clone() for p in trainer.weights.parameters])
        trainer.optimizer.zero_grad()
    assert_close(found[0], found[1], 1e-5)
    assert_close(found[0], found[2], 1e-5)


@pytest.mark.parametrize("passes", [1, 2])
def test_one_call_for_members_that_share_a_latent_keeps_the_gradient(tiny_sd3: Path, passes: int) -> None:
    """The first trained step of a group starts from one latent; a call of its own for every member changes nothing."""
    changes = {"objective.kl.form": "paper", "objective.kl.weight": 0.5, "objective.passes": passes}
    found = {}
    for shared in (True, False):
        trainer = make(small_config(tiny_sd3, **changes))
        train = trainer.learner._train  # after the self-check, which compares with the rollout's own calls

        def alone(batch, train=train, shared=shared):
            trajectory = batch.trajectory if shared else replace(batch.trajectory, state=None)
            return train(replace(batch, trajectory=trajectory))

        trainer.learner._train = alone
        gradients: list[list[torch.Tensor]] = []

        def keep(trainer=trainer, gradients=gradients, step=trainer._step) -> float:
            gradients.append([p.grad.clone() for p in trainer.weights.parameters])
            return step()

        trainer._step = keep
        row = trainer.iterate()
        found[shared] = (gradients[-1], row["calls/backward_samples"], row["policy/kl"])
    assert (found[True][1], found[False][1]) == (10 * passes, 16 * passes)
    assert_close(found[True][0], found[False][0], 1e-4)
    assert found[True][2] == pytest.approx(found[False][2], rel=1e-4, abs=1e-9)


def test_leaving_out_silent_rows_keeps_the_gradient(tiny_sd3: Path) -> None:
    """One of two groups has no signal: with and without it the gradient is the same, and its calls are saved."""
    changes = {"rewards": [{"name": "tests.training.test_gradient:first_group_only"}]}
    kept, row = gradient(small_config(tiny_sd3, **changes, **{"objective.skip_silent": False}))
    left, saved = gradient(small_config(tiny_sd3, **changes))
    assert row["group/live_fraction"] == 0.5
    assert (row["calls/backward_samples"], saved["calls/backward_samples"]) == (10, 5)
    assert_close(kept, left, 1e-5)


def first_group_only(images, prompts):
    """Scores differ inside a chunk only where its prompt sorts first: chunks of 4 are whole groups here."""
    red = images[..., 0].mean((1, 2)) / 255.0
    return red * 0 + 0.25 if hash_of(prompts[0]) else red


def hash_of(prompt: str) -> bool:
    if not hasattr(hash_of, "first"):
        hash_of.first = prompt
    return prompt != hash_of.first


def test_lora_gradients_reach_every_matrix_after_a_no_grad_rollout(tiny_sd3: Path) -> None:
    """B starts at 0, so A gets its first gradient at the second update; a stale cast cache would keep one at 0."""
    trainer = make(small_config(tiny_sd3))
    trainer.iterate()
    still = [
        n
        for n, p in zip(trainer.weights.names, trainer.weights.parameters, strict=True)
        if "lora_B" in n and not p.any()
    ]
    # The last block's context stream feeds nothing: SD3 drops it there.
    assert all("context" in n or "add_" in n or "to_add_out" in n for n in still)
    assert any("lora_B" in n for n in trainer.weights.names if n not in still)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kernel", "noise"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("precise", 0.9), ("ddim", 1.0)]
)
def test_self_check_is_exact_for_every_kernel(tiny_sd3: Path, kernel: str, noise: float, storage: str) -> None:
    config = small_config(tiny_sd3, **{
        "rollout.kernel.name": kernel, "rollout.kernel.noise": noise, "rollout.storage_dtype": storage,
        "objective.skip_silent": False,
    })  # fmt: skip
    row = make(config).iterate()  # raises where the check fails
    assert row["policy/ratio_mean"] == 1.0
    assert row["policy/ratio_max_deviation"] == 0.0


def test_self_check_finds_a_network_that_changes_between_calls(tiny_sd3: Path) -> None:
    trainer = make(small_config(tiny_sd3))
    network, real = trainer.adapter.network, trainer.adapter.network.forward
    calls = iter(range(10_000))
    network.forward = lambda *a, **k: (real(*a, **k)[0] * (1 + 1e-3 * next(calls)),)
    with pytest.raises(
        UserError, match=r"start-up self-check: the log-prob of step \d recomputed for the update differs"
    ):
        trainer.iterate()


def test_reference_is_honest(tiny_sd3: Path) -> None:
    """KL is exactly 0 before the first update and above 0 after it, with a gradient that is not 0."""
    for train, lr in (("lora", 1e-2), ("full", 1e-3)):
        config = small_config(tiny_sd3, **{
            "model.train": train, "optimizer.lr": lr, "objective.kl.form": "paper", "objective.kl.weight": 1.0,
        })  # fmt: skip
        trainer = make(config)
        first, second = trainer.iterate(), trainer.iterate()
        assert first["policy/kl"] == 0.0
        assert second["policy/kl"] > 0.0


def test_kl_term_has_a_gradient(tiny_sd3: Path) -> None:
    """With the reward's part taken out, the KL alone moves the policy back towards the reference."""
    config = small_config(tiny_sd3, **{"objective.kl.form": "velocity", "objective.kl.weight": 1.0})
    trainer = make(config)
    trainer.iterate()
    grads = []
    trainer._step = lambda: grads.append([p.grad.clone() for p in trainer.weights.parameters]) or 0.0
    trainer._credit_real = trainer._credit

    def without_reward(collected):
        batch, credit = trainer._credit_real(collected)
        from dataclasses import replace

        return replace(batch, advantage=batch.advantage * 0), credit

    trainer._credit = without_reward
    trainer.iterate()
    assert sum(float(g.abs().sum()) for g in grads[0]) > 0


def darkness(images, prompts):
    return 1 - images.mean((1, 2, 3)) / 255.0


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "lite_ppo", "gdpo"])
def test_every_estimator_trains(tiny_sd3: Path, name: str) -> None:
    """Two rewards that pull apart; gdpo takes them as channels, the others their weighted sum."""
    changes = {"rewards": [
        {"name": "tests.training.helpers:brightness"}, {"name": "tests.training.test_gradient:darkness", "weight": 0.5},
    ]}  # fmt: skip
    row = make(small_config(tiny_sd3, **changes, **{"advantage.name": name})).iterate()
    assert row["update/count"] == 1 and row["optimizer/grad_norm"] > 0
