"""Objectives on re-noised samples through the real pipeline: they learn, cost what the plan says, and resume bit-exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl.checkpoint import store
from flowrl.config.validate import validate
from flowrl.plan import plan, plan_text
from flowrl.training.learners.forward import pack, whole_groups
from tests.training.forward_tools import ONLINE, forward_config, write_pairs
from tests.training.helpers import comparable, make, tensors

ANCHORED = {
    "objective.kl.form": "velocity", "objective.kl.weight": 0.1, "forward.anchor": "old", "forward.old_rate": 0.2,
    "forward.sampler": "live",
}  # fmt: skip
COUNTS = ("forward", "forward_samples", "forward_grad", "forward_grad_samples", "backward", "backward_samples")


def counted(row: dict) -> list[int]:
    return [row[f"calls/{name}"] for name in COUNTS]


def foretold(config) -> list[float]:
    p = plan(config)
    back = [p.update_backward.calls.mean, p.update_backward.samples.mean]
    grad = [p.update_forward.calls.mean, p.update_forward.samples.mean]
    return [p.forward.calls.mean, p.forward.samples.mean, *grad, *back]


@pytest.mark.parametrize("name", ONLINE)
def test_two_iterations_of_each(tiny_sd3: Path, name: str) -> None:
    config = forward_config(tiny_sd3, name, **{"objective.updates": 2})
    assert validate(config) == []
    trainer = make(config)
    before = [p.detach().clone() for p in trainer.weights.parameters]
    seen = [trainer.iterate() for _ in range(2)]
    assert all(row["update/steps"] == 2 and row["policy/loss"] is not None for row in seen)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))
    assert counted(seen[0]) == foretold(config)
    if name == "dpo_online":
        assert seen[0]["policy/matching_error"] > 0 and seen[0]["calls/backward_samples"] == 2 * 2 * 2


def test_calls_of_nft_by_hand(tiny_sd3: Path) -> None:
    """8 samples in calls of 4. Rollout by Heun: 2 (2 + 2 + 2 + 1) = 14 calls, 56 samples. Two draws: old 4 calls, 16
    samples; reference 4 and 16; two passes of 4 calls and 16 samples, forward and backward. Guidance doubles the rollout
    alone."""
    config = forward_config(tiny_sd3, "nft", **{
        "rollout.solver": "heun", "rollout.guidance": 2.0, "objective.passes": 2, "objective.kl.form": "velocity",
        "objective.kl.weight": 0.1,
    })  # fmt: skip
    row = make(config).iterate()
    assert counted(row) == [28 + 4 + 4 + 8, 112 + 16 + 16 + 32, 8, 32, 8, 32] == foretold(config)
    assert row["policy/kl"] > 0 and row["policy/shift"] > 0  # the second pass is off the old policy


def test_a_group_larger_than_a_call_costs_a_pass_more_and_has_the_same_gradient(tiny_sd3: Path) -> None:
    """Groups of 4 in calls of 4 or of 3: the same loss and gradient; the split one needs all errors first."""
    found = []
    for size in (4, 3):
        config = forward_config(tiny_sd3, "crd", **{"batch.micro_batch": size, "objective.skip_silent": False})
        trainer = make(config)
        kept: list[torch.Tensor] = []
        trainer._step = lambda t=trainer, k=kept: k.extend(p.grad.clone() for p in t.weights.parameters) or 0.0
        row = trainer.iterate()
        assert counted(row) == foretold(config)
        found.append((row["policy/loss"], kept))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_awm_with_a_ratio_bounded_by_the_engine(tiny_sd3: Path) -> None:
    """objective.loss ppo and bgpo: the old policy's errors are needed; on policy both give the plain method's gradient."""
    gradients = []
    for loss in ("", "ppo", "bgpo"):
        trainer = make(forward_config(tiny_sd3, "awm", **{"objective.loss": loss}))
        kept: list[torch.Tensor] = []
        trainer._step = lambda t=trainer, k=kept: k.extend(p.grad.clone() for p in t.weights.parameters) or 0.0
        row = trainer.iterate()
        assert row["calls/forward"] == 8 + 4 + (4 if loss else 0)
        gradients.append(kept)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("nft", {"ema.decay": 0.5}),
        ("nft", {"model.train": "full", "optimizer.lr": 1e-4}),
        ("awm", ANCHORED),
    ],
    ids=["nft-lora", "nft-full", "awm-anchored"],
)  # fmt: skip
def test_resume_is_bit_exact(tiny_sd3: Path, tmp_path: Path, name: str, changes: dict) -> None:
    config = forward_config(tiny_sd3, name, **changes)
    first, second = make(config), make(config)
    for _ in range(2):
        first.iterate()
    store.save(tmp_path, 2, first.state(), info={}, keep=2)
    second.load_state(store.load(tmp_path).state)
    assert comparable(first.iterate()) == comparable(second.iterate())
    a, b = tensors(first.state()), tensors(second.state())
    assert a.keys() == b.keys() and any(key.startswith("/learner/old/") for key in a)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_checkpoint_without_an_old_policy_is_refused(tiny_sd3: Path) -> None:
    plain = make(forward_config(tiny_sd3, "awm"))
    assert "learner" not in plain.state()
    with pytest.raises(ValueError, match="it holds no old policy that fits"):
        make(forward_config(tiny_sd3, "nft")).load_state(plain.state())


def test_dpo_learns_from_given_pairs(tiny_sd3: Path, tmp_path: Path) -> None:
    """Three pairs, two an iteration: no rollout; log 2 at the reference; pictures are encoded once; resumes bit-exactly."""
    config = forward_config(tiny_sd3, "dpo", **{
        "data.preferences": str(write_pairs(tmp_path, 3)), "batch.group_size": 2, "objective.loss_options": {"beta": 50.0},
    })  # fmt: skip
    assert validate(config) == []
    trainer, other = make(config), make(config)
    encoded: list[int] = []
    encode = trainer.adapter.encode_media
    trainer.adapter.encode_media = lambda media, request: encoded.append(len(media)) or encode(media, request)
    seen = [trainer.iterate() for _ in range(3)]
    assert seen[0]["policy/loss"] == pytest.approx(0.693147, abs=1e-5) and seen[0]["score/mean"] is None
    assert encoded == [2, 2, 2]
    assert counted(seen[0]) == foretold(config) == [4, 16, 2, 8, 2, 8]
    assert "pictures are given" in plan_text(config)
    for _ in range(2):
        other.iterate()
    third = make(config)
    third.load_state(other.state())
    assert comparable(third.iterate()) == comparable(seen[2])


def test_plan_says_what_the_method_costs(tiny_sd3: Path) -> None:
    text = plan_text(forward_config(tiny_sd3, "nft"))
    assert (
        "8 samples, each at 2 draws of (t, noise)" in text and "solver euler" in text and "old policy, forward" in text
    )
    assert "old policy" not in plan_text(forward_config(tiny_sd3, "awm"))


def test_calls_hold_whole_groups() -> None:
    rows = torch.arange(9)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    assert [c.tolist() for c in pack(rows, group, 5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert [c.tolist() for c in pack(rows, group, 4)] == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    assert [c.tolist() for c in pack(rows, group, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert whole_groups(pack(rows, group, 4), group) and not whole_groups(pack(rows, group, 3), group)
    assert pack(rows[:0], group[:0], 4) == [] and whole_groups([], group)
