"""Savings that are on by default change no gradient: each against the same update with the saving undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowrl.dynamics.guidance import guide
from flowrl.dynamics.log_prob import log_prob
from flowrl.records import Request
from flowrl.training.trainer import Trainer
from flowrl.training.update import chunks, reference_values, replay_log_prob
from tests.training.helpers import make, small_config
from tests.training.toy import GaussianAdapter, LatentReward, reference_offsets, rows, toy_config


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    return [p.grad.clone() for p in trainer.weights.parameters]


@pytest.mark.parametrize("cfg_gradient", ["conditional", "full"])
def test_an_unconditional_branch_without_gradient_is_a_detached_one(tiny_sd3: Path, cfg_gradient: str) -> None:
    """Both branches in one call with gradients, the unconditional half detached (or not): the same gradient, a forward more."""
    config = small_config(tiny_sd3, **{"rollout.guidance": 3.0, "rollout.cfg_gradient": cfg_gradient})
    trainer = make(config)
    trainer.iterate()  # from zero, LoRA's second matrices alone have a gradient
    policy, adapter = trainer.policy, trainer.adapter
    requests = [Request("a red circle", 0, 36, 36), Request("two rings", 1, 36, 36)]
    prompted, g = policy.encode(requests), torch.Generator().manual_seed(0)
    x = torch.randn(2, *adapter.latent_shape(requests[0]), generator=g)
    x_next, step = x + 0.3 * torch.randn(x.shape, generator=g), torch.tensor([1, 1])

    trainer.counter.reset()
    made = policy.step(x, step, prompted)
    log_prob(x_next, made.mean, made.std, "sqrt").sum().backward()
    saved, counts = gradients(trainer), replace(trainer.counter.counts)
    trainer.optimizer.zero_grad()

    both = {n: torch.cat([prompted.negative.tensors[n], v]) for n, v in prompted.positive.tensors.items()}
    twice = adapter.predict(
        torch.cat([x, x]), policy.schedule.t[torch.cat([step, step])], replace(prompted.positive, tensors=both)
    )
    unconditional, conditional = twice.value.chunk(2)
    unconditional = unconditional.detach() if cfg_gradient == "conditional" else unconditional
    value = guide(conditional, unconditional, 3.0, adapter.guidance_rule)
    by_hand = policy.made_of(x, step, value, twice.kind)
    log_prob(x_next, by_hand.mean, by_hand.std, "sqrt").sum().backward()
    scale = max(float(p.abs().max()) for p in saved)
    assert scale > 0
    assert max(float((a - b).abs().max()) for a, b in zip(saved, gradients(trainer), strict=True)) < 1e-4 * scale
    # Two forwards of two samples; one of them carries a gradient where the other is detached.
    assert (counts.forward_samples, counts.forward_grad_samples, counts.backward_samples) == (
        (4, 2, 2) if cfg_gradient == "conditional" else (4, 4, 4)
    )


def test_the_two_rules_of_guidance_differ(tiny_sd3: Path) -> None:
    """Else the test above could not tell a branch without gradient from one with it."""
    found = []
    for rule in ("conditional", "full"):
        trainer = make(small_config(tiny_sd3, **{"rollout.guidance": 3.0, "rollout.cfg_gradient": rule}))
        trainer._step = lambda trainer=trainer: found.append(gradients(trainer)) or 0.0
        trainer.iterate()
    apart = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    assert apart > 0.05 * max(float(a.abs().max()) for a in found[0])


def toy(**changes: object) -> Trainer:
    adapter = GaussianAdapter(10)
    base = {
        "rollout.kernel.name": "flow_sde",
        "batch.group_size": 8,
        "optimizer.lr": 0.02,
        "objective.clip_range": 0.02,
    }
    reward = LatentReward(lambda x0: x0.flatten(1).sum(1))
    return Trainer(
        toy_config(**(base | changes)), adapter, reward, rows(4), reference=reference_offsets(adapter.network)
    )


def test_log_probs_of_the_rollout_are_those_of_the_trainer() -> None:
    """Old log-probs asked for again under the weights that drew: the same weights after two passes, nine forwards more."""
    after, forwards = [], []
    for again in (False, True):
        trainer = toy(**{"objective.passes": 2, "objective.clip_range": 0.02})
        train = trainer._train

        def asked_again(batch, trainer=trainer, train=train):
            every = torch.arange(len(batch.trajectory))
            with torch.no_grad():
                old = torch.stack([replay_log_prob(trainer.policy, batch, every, k) for k in range(9)], 1)
            return train(replace(batch, trajectory=replace(batch.trajectory, old_log_prob=old)))

        if again:
            trainer._train = asked_again
        rows_ = [trainer.iterate() for _ in range(2)]
        assert rows_[1]["policy/clip_fraction"] > 0  # the second pass is off policy
        after.append(trainer.adapter.network.delta.detach().clone())
        forwards.append(rows_[1]["calls/forward"])
    assert torch.equal(*after) and float(after[0].abs().max()) > 0.01
    assert forwards[1] - forwards[0] == 9


@pytest.mark.parametrize("form", ["paper", "velocity"])
def test_reference_values_are_the_same_before_and_after_an_update(form: str) -> None:
    """They are asked for once, before the first pass: nothing that training changes is in them."""
    trainer = toy(**{"objective.passes": 3, "objective.kl.form": form, "objective.kl.weight": 0.1})
    kept = []
    train = trainer._train

    def watched(batch):
        parts = chunks(batch, 0, 64, False)
        before = reference_values(trainer.policy, batch, parts, 9, trainer.reference)
        row = train(batch)
        kept.append((before, reference_values(trainer.policy, batch, parts, 9, trainer.reference)))
        return row

    trainer._train = watched
    trainer.iterate()
    row = trainer.iterate()
    for before, after in kept:
        assert before.keys() == after.keys() and len(before) == 9
        assert all(torch.equal(a, b) for key in before for a, b in zip(before[key], after[key], strict=True))
    assert row["policy/kl"] > 0 and float(trainer.adapter.network.delta.detach().abs().max()) > 0.01
    # 4 groups of 8 with one start each: rollout 4 + 9 x 32, every pass and the reference 4 + 8 x 32 (watched twice more).
    assert row["calls/forward_samples"] == 292 + (1 + 2 + 3) * 260


def test_text_encoded_once_a_prompt_conditions_alike(tiny_sd3: Path) -> None:
    """Rows of one encoding, repeated, are the encodings of repeated rows; so is the velocity that they ask for."""
    policy = make(small_config(tiny_sd3)).policy
    texts = ["a red circle", "two rings", "a blue square"]
    requests = [Request(text, i, 36, 36) for i, text in enumerate(texts)]
    place = torch.tensor([0, 2, 0, 1, 2, 2])
    once, each = policy.encode(requests)[place], policy.encode([requests[i] for i in place.tolist()])
    for name, value in each.positive.tensors.items():
        torch.testing.assert_close(once.positive.tensors[name], value, rtol=1e-5, atol=1e-5)
    x = torch.randn(1, *policy.adapter.latent_shape(requests[0]), generator=torch.Generator().manual_seed(1))
    x, step = x.expand(6, *x.shape[1:]), torch.full((6,), 1)
    values = [policy.predict(x, step, prompted).value for prompted in (once, each)]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(values[0][0], values[0][1], atol=1e-4)
