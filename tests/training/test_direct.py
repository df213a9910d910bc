"""Differentiable rewards on a tiny random pipeline: they train, they count their calls, they resume, faults are masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl import api
from flowrl.checkpoint import store
from flowrl.errors import UserError
from tests.training.helpers import comparable, make, small_config, tensors
from tests.training.test_resume import cut_copy, rows_of

METHODS = {
    "refl": {"direct.last": 2, "direct.scale": 1.0},
    "draft": {"direct.last": 2},
    "draft_lv": {},
    "alignprop": {"direct.last": 0, "direct.least": 2, "direct.per_sample": True},
    "ctrl": {
        "direct.last": 0, "rollout.kernel.name": "memoryless", "condition.attributes": {"hue": 2},
        "rewards": [{"name": "tests.training.graded:ClassByRed"}], "direct.strength": 5.0,
    },
    "adjoint_matching": {"rollout.kernel.name": "memoryless", "direct.temperature": 0.01, "direct.trained": 2},
}  # fmt: skip


def direct_config(model: Path, name: str, **changes):
    base = {"objective.name": name, "rewards": [{"name": "tests.training.graded:Red"}], "optimizer.warmup": 0}
    return small_config(model, **(base | METHODS[name] | changes))


@pytest.mark.parametrize("name", METHODS)
def test_two_iterations_move_weights_and_say_how(tiny_sd3: Path, name: str) -> None:
    trainer = make(direct_config(tiny_sd3, name))
    before = [p.detach().clone() for p in trainer.weights.parameters]
    seen = [trainer.iterate() for _ in range(2)]
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))
    for row in seen:
        assert {"score/mean", "direct/loss", "optimizer/grad_norm", "update/steps", "score/invalid"} <= row.keys()
        assert row["optimizer/grad_norm"] > 0 and row["score/invalid"] == 0
        assert ("policy/kl" in row) == (name in ("ctrl", "adjoint_matching"))
    if name in ("ctrl", "adjoint_matching"):
        assert seen[0]["policy/kl"] == 0 and seen[1]["policy/kl"] > 0


CALLS = {
    # 8 samples in 2 chunks of 4, 4 steps: forward calls, forward samples, backward calls of both chunks.
    "draft": (2 * (4 + 2), 2 * 2),  # the chain, 2 steps again; 2 backwards
    "draft_lv": (2 * (4 + 1 + 2), 2 * (1 + 2)),  # the chain, its last step again, two more pictures
    "ctrl": (2 * 2 * (3 + 4), 2 * (3 + 4)),  # policy 3 steps, reference 4; once more with gradient
    "adjoint_matching": (2 * (4 + 4 + 2), 2 * (3 + 2)),  # path, sweep (3 with a backward), 2 trained steps
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_by_hand(tiny_sd3: Path, name: str) -> None:
    row = make(direct_config(tiny_sd3, name)).iterate()
    forward, backward = CALLS[name]
    assert (row["calls/forward"], row["calls/backward"]) == (forward, backward)
    assert row["calls/forward_samples"] == 4 * forward and row["calls/backward_samples"] == 4 * backward


def test_without_checkpointing_the_gradient_is_the_same(tiny_sd3: Path) -> None:
    found = []
    for changes in ({"direct.checkpoint": True}, {"direct.checkpoint": True, "direct.checkpoint_every": 2},
                    {"direct.checkpoint": False}):  # fmt: skip
        config = direct_config(tiny_sd3, "alignprop", **{
            "direct.last": 0, "direct.least": 0, "direct.per_sample": False, "objective.kl.form": "velocity",
            "objective.kl.weight": 0.1, "rollout.guidance": 2.0, "direct.stochastic": True, **changes,
        })  # fmt: skip
        trainer = make(config)
        for p in trainer.weights.parameters:  # LoRA's second factor starts at 0, where half the gradients vanish
            torch.manual_seed(p.numel())
            p.data += 0.02 * torch.randn(p.shape)
        held: list[list[torch.Tensor]] = []
        grads = trainer._step

        def spy(trainer=trainer, held=held, grads=grads) -> float:
            held.append([p.grad.clone() for p in trainer.weights.parameters])
            return grads()

        trainer._step = spy
        row = trainer.iterate()
        found.append((held[0], row["direct/loss"], row["policy/kl"]))
    for gradients, loss, kl in found[1:]:
        assert (loss, kl) == (found[0][1], found[0][2]) and kl > 0
        for a, b in zip(found[0][0], gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_that_of_the_reward(tiny_sd3: Path) -> None:
    """Along the update's direction, the reward of the same noise changes as the gradient says: through decoder and chain."""
    trainer = make(
        direct_config(tiny_sd3, "draft", **{"direct.last": 0, "batch.groups": 1, "optimizer.max_grad_norm": 1e9})
    )
    for p in trainer.weights.parameters:
        torch.manual_seed(p.numel())
        p.data += 0.02 * torch.randn(p.shape)
    held: list[torch.Tensor] = []

    def spy() -> float:
        if not held:
            held.extend(p.grad.clone() for p in trainer.weights.parameters)
        for p in trainer.weights.parameters:
            p.grad = None
        return 0.0

    trainer._step = spy
    scores = [trainer.iterate()["score/mean"]]
    norm = sum(float((g**2).sum()) for g in held) ** 0.5
    size = 0.03 / norm
    for sign in (1, -2):
        for p, g in zip(trainer.weights.parameters, held, strict=True):
            p.data -= sign * size * g
        trainer.iteration = 0  # the same noise
        scores.append(trainer.iterate()["score/mean"])
    slope = (scores[1] - scores[2]) / 2
    assert slope == pytest.approx(0.03 * norm, rel=0.05)


@pytest.mark.parametrize("where", ["value", "gradient"])
def test_faults_are_masked_and_counted(tiny_sd3: Path, where: str) -> None:
    rewards = [{"name": "tests.training.graded:Broken", "args": {"bad": 1, "where": where}}]
    changes = {"rewards": rewards, "failures.max_invalid_fraction": 0.3, "batch.micro_batch": 8, "direct.last": 0}
    trainer = make(direct_config(tiny_sd3, "alignprop", **changes))
    row = trainer.iterate()
    assert row["score/invalid"] == 1 and row["optimizer/grad_norm"] > 0
    assert all(bool(torch.isfinite(p).all()) for p in trainer.weights.parameters)
    with pytest.raises(UserError, match="1 of 8 samples have no finite reward and gradient"):
        make(direct_config(tiny_sd3, "alignprop", **(changes | {"failures.max_invalid_fraction": 0.1}))).iterate()


def test_all_samples_broken_change_no_weight(tiny_sd3: Path) -> None:
    rewards = [{"name": "tests.training.graded:Broken", "args": {"bad": 9}}]
    trainer = make(direct_config(tiny_sd3, "draft", rewards=rewards, **{"failures.max_invalid_fraction": 1.0}))
    before = [p.detach().clone() for p in trainer.weights.parameters]
    row = trainer.iterate()
    assert row["update/steps"] == 0 and row["score/mean"] is None and row["score/invalid"] == 8
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))


def test_a_reward_of_latents_decodes_nothing(tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(direct_config(tiny_sd3, "draft", rewards=[{"name": "tests.training.graded:Flat"}]))

    def refuse(*_) -> torch.Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(trainer.adapter, "decode", refuse)
    assert trainer.iterate()["score/mean"] < 0


@pytest.mark.parametrize("name", ["alignprop", "ctrl", "adjoint_matching"])
def test_resume_is_bit_exact(tiny_sd3: Path, tmp_path: Path, name: str) -> None:
    changes = {"iterations": 3, "run_dir": str(tmp_path / "run"), "checkpoint.keep": 5, "evaluation.count": 2}
    config = direct_config(tiny_sd3, name, **changes)
    api.train(config)
    other = cut_copy(tmp_path / "run", tmp_path / "cut", 1)
    api.resume(other)
    first, second = store.load(tmp_path / "run" / "checkpoints"), store.load(other / "checkpoints")
    a, b = tensors(first.state), tensors(second.state)
    assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == []
    assert [comparable(row) for row in rows_of(tmp_path / "run")] == [comparable(row) for row in rows_of(other)]
