"""Policy losses that a config names, through the real rollout and update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.advantage.catalogue import JOINT_LOSSES, POLICY_LOSSES
from flowrl.config import engine
from flowrl.config.validate import validate
from flowrl.plan import plan
from flowrl.training import losses
from flowrl.training.batch import TrainingBatch
from flowrl.training.trainer import Trainer
from flowrl.training.update import accumulate, chunks, replay_log_prob
from tests.training.helpers import make, small_config

RUNNABLE = [
    m.key
    for m in __import__("flowrl.advantage.catalogue", fromlist=["METHODS"]).METHODS
    if m.kind == "policy_loss" and m.call is not None and not engine.refused(m, m.call, engine.LOSS_INPUTS)
]


def prepared(folder: Path, **changes: Any) -> tuple[Trainer, TrainingBatch, torch.Tensor]:
    """A trainer off its rollout's policy, its batch, and the weight of every element."""
    trainer = make(small_config(folder, **changes))
    batches: list[TrainingBatch] = []
    real = trainer._train
    trainer._train = lambda batch: batches.append(batch) or real(batch)  # type: ignore[func-returns-value, assignment]
    trainer.iterate()
    batch = batches[0]
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(batch.advantage.shape, generator=generator) / 16
    weight[2, 1] = 0.0
    trainer.optimizer.zero_grad()
    return trainer, batch, weight


def gradient(trainer: Trainer) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in trainer.weights.parameters if p.grad is not None]
    trainer.optimizer.zero_grad()
    return found


def reference(trainer: Trainer, batch: TrainingBatch, weight: torch.Tensor) -> list[torch.Tensor]:
    """The whole loss in one graph: every step of every row at once, one backward."""
    rows = torch.arange(len(batch.row))
    now = torch.stack([replay_log_prob(trainer.policy, batch, rows, k) for k in range(weight.shape[1])], 1)
    made = losses.choose(trainer.config.objective).surrogate(
        now, batch.trajectory.old_log_prob, batch.advantage, weight != 0
    )
    (made.loss * weight).sum().backward()
    return gradient(trainer)


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_update_has_the_gradient_of_the_whole_loss(tiny_sd3: Path, name: str) -> None:
    """Step by step and chunk by chunk, off policy, against one graph over everything."""
    trainer, batch, weight = prepared(tiny_sd3, **{"objective.loss": name, "optimizer.lr": 3e-2})
    expected = reference(trainer, batch, weight)
    parts = chunks(batch, 0, 3, False)
    terms = list(accumulate(trainer.policy, trainer.learner.objective, batch, parts, weight, {}, False))
    assert max(float(t.ratio_max_deviation) for _, t in terms) > 1e-3  # off policy indeed
    norm = sum(float(g.square().sum()) for g in expected) ** 0.5
    error = sum(float((a - b).square().sum()) for a, b in zip(gradient(trainer), expected, strict=True)) ** 0.5
    assert norm > 0 and error < 1e-4 * norm


def moves_with_others(name: str, seed: int, size: float) -> bool:
    """Whether the gradient of step 0 of row 0 changes when every other log-prob does."""
    generator = torch.Generator().manual_seed(seed)
    old, noise = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    advantage = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    found = []
    for shift in (0.0, size):
        now = old - 3 + size * noise
        now[:, 1:] += shift
        now[1:] += shift
        leaf = now.requires_grad_()
        loss = POLICY_LOSSES[name](leaf, old - 3, advantage, torch.ones_like(old, dtype=torch.bool)).loss
        found.append(torch.autograd.grad(loss.sum(), leaf)[0][0, 0])
    return bool(found[0] != found[1])


# kl_cov's share takes no step of so few, and bapo's bounds move in the steps of a grid.
@pytest.mark.parametrize("name", [n for n in RUNNABLE if n not in ("kl_cov", "bapo")])
def test_joint_losses_are_those_whose_steps_depend_on_others(name: str) -> None:
    moves = any(moves_with_others(name, seed, size) for seed in range(5) for size in (1e-4, 0.4))
    assert moves == (name in JOINT_LOSSES)


@pytest.mark.parametrize(("passes", "extra"), [(1, 0), (2, 10)])
def test_a_joint_loss_costs_forwards_only_off_policy(tiny_sd3: Path, passes: int, extra: int) -> None:
    """8 samples, 2 trained steps, the first from one latent a group: a second pass needs the present log-probs first."""
    configs = [
        small_config(tiny_sd3, **{"objective.loss": name, "objective.passes": passes, "objective.skip_silent": False})
        for name in ("ppo", "gspo")
    ]
    rows = [make(config).iterate() for config in configs]
    assert plan(configs[1]).loss.samples.mean == extra and plan(configs[0]).loss.samples.mean == 0
    assert rows[1]["calls/backward_samples"] == rows[0]["calls/backward_samples"] == 10 * passes
    assert rows[1]["calls/forward_samples"] - rows[0]["calls/forward_samples"] == extra


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage.name": "lite_pp"}, "advantage.name: unknown advantage 'lite_pp'; did you mean lite_ppo?"),
        ({"advantage.options": {"dof": 1}}, "advantage.options: grpo: no option 'dof'; did you mean 'ddof'?"),
        (
            {"advantage.name": "v0"},
            "advantage.name: v0 needs 'prompt_value' (predicted reward of the row's prompt)",
        ),
        ({"advantage.name": "ktae"}, "advantage.name: ktae has no meaning on denoising steps: "),
        ({"objective.loss": "gppoo"}, "objective.loss: unknown policy_loss 'gppoo'; did you mean gppo?"),
        ({"objective.loss": "dppo"}, "objective.loss: dppo needs probabilities, and a denoising step has a density; "),
        ({"objective.loss_options": {"hi": 1}}, "objective.loss_options: ppo: no option 'hi'"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_a_model_is_loaded(
    tiny_sd3: Path, settings: dict[str, Any], message: str
) -> None:
    problems = validate(small_config(tiny_sd3, **settings))
    assert len(problems) == 1 and problems[0].startswith(message), problems
