"""It learns what it is rewarded for and nothing else, and the same seed gives the same run to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.text import TextConfig, Trainer, credit, tasks, train
from flowrl.text.model import log_probs
from flowrl.text.run import base_model, make_trainer

from .parts import small

SEVEN = tasks.encode("7")[0]
RECIPES = ["outcome", "turn", "spo_chain", "spo_tree", "ppo"]


def quiet(line: str) -> None:
    pass


def rewarded_for_sevens(config: TextConfig, shuffled: bool = False) -> Trainer:
    """A trainer whose outcome is 1 where the completion begins with a 7; shuffled: given to another row."""
    trainer = make_trainer(config, quiet)
    rule = trainer.sampler.judge
    trainer.share = []  # type: ignore[attr-defined]

    def judge(problems: Any, tokens: Tensor, mask: Tensor) -> tasks.Grades:
        made = rule(problems, tokens, mask)
        right = (tokens[:, 0] == SEVEN).float()
        trainer.share.append(float(right.mean()))  # type: ignore[attr-defined]
        if shuffled:
            generator = torch.Generator().manual_seed(len(trainer.share))  # type: ignore[attr-defined]
            right = right[torch.randperm(len(right), generator=generator)]
        turns = torch.full_like(made.turn_reward, torch.nan)
        turns[:, 0] = right
        return tasks.Grades(right, made.turn, turns, made.share)

    trainer.sampler.judge = judge
    return trainer


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_easy_rule_is_learned(recipe: str) -> None:
    trainer = rewarded_for_sevens(small("rollout.tree.segment=2", recipe=f"text_{recipe}"))
    for _ in range(20):
        row = trainer.iterate()
    share: list[float] = trainer.share  # type: ignore[attr-defined]
    assert sum(share[:2]) / 2 < 0.25 and sum(share[-3:]) / 3 > 0.8
    assert row["iteration"] == 20 and row["tokens"] == trainer.generated > 0


def test_shuffled_rewards_teach_nothing() -> None:
    ends = []
    for seed in (0, 1):
        trainer = rewarded_for_sevens(small(f"seed={seed}"), shuffled=True)
        for _ in range(20):
            trainer.iterate()
        ends.append(trainer.share[-1])  # type: ignore[attr-defined]
    assert sum(ends) / 2 < 0.3


@pytest.mark.parametrize("recipe", ["outcome", "spo_tree"])
def test_the_gradient_is_that_of_weighted_log_probs(recipe: str) -> None:
    """On policy: -sum(A w log p) over the rows with a gradient / trained tokens of all rows of the minibatch."""
    trainer = rewarded_for_sevens(small("rollout.tree.segment=2", recipe=f"text_{recipe}"))
    problems = tasks.draw(trainer.task, 3, 8)
    made = trainer.sampler.sample(problems, 0)
    assigned = credit.assign(trainer.config.advantage, made)
    live = ((assigned.advantage != 0) & assigned.loss_mask).any(1).nonzero().flatten()
    assert 0 < len(live) < len(made.tokens)
    loss, ratio, clipped = trainer._loss(made, assigned, live, int(assigned.loss_mask.sum()))
    found = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
    log_prob = log_probs(trainer.model, made.prompt, made.tokens)[0]
    weighted = torch.where(assigned.loss_mask, assigned.advantage * assigned.weight * log_prob, 0.0)
    mean = -weighted.sum() / assigned.loss_mask.sum()
    wanted = torch.autograd.grad(mean, list(trainer.model.parameters()), allow_unused=True)
    for x, y in zip(found, wanted, strict=True):
        assert x is not None and torch.allclose(x, y, atol=1e-6)
    assert ratio == pytest.approx(1.0, abs=1e-5) and clipped == 0.0


def run(config: TextConfig, iterations: int = 3) -> tuple[list[dict[str, Any]], Tensor]:
    trainer = rewarded_for_sevens(config)
    rows = [trainer.iterate() for _ in range(iterations)]
    assert all(row["update/steps"] > 0 for row in rows)
    for row in rows:
        del row["time/rollout_s"], row["time/update_s"]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return [*rows, {"accuracy": trainer.evaluate()}], weights


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_seed_gives_the_same_run(recipe: str) -> None:
    config = small("pretraining.steps=5", recipe=f"text_{recipe}")
    start = torch.cat([p.detach().flatten() for p in make_trainer(config, quiet).model.parameters()])
    (rows, weights), (again, same) = run(config), run(config)
    assert rows == again and torch.equal(weights, same) and not torch.equal(weights, start)


def test_another_seed_gives_another_run_from_the_same_start() -> None:
    rows, weights = run(small("pretraining.steps=5"), 1)
    other_rows, other = run(small("pretraining.steps=5", "seed=1"), 1)
    assert not torch.equal(weights, other) and rows != other_rows
    assert base_equal(small("seed=1"), small()) and not base_equal(small("pretraining.seed=1"), small())


def base_equal(a: TextConfig, b: TextConfig) -> bool:
    pairs = zip(base_model(a, quiet).state_dict().values(), base_model(b, quiet).state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_the_supervised_start_is_kept_and_read_back_equal(tmp_path: Path) -> None:
    said: list[str] = []
    config = small("pretraining.steps=4", f"pretraining.cache={tmp_path}/base")
    first, second = base_model(config, said.append), base_model(config, said.append)
    assert len(said) == 1 and "4 steps" in said[0] and len(list((tmp_path / "base").iterdir())) == 1
    for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    base_model(small("pretraining.steps=4", "pretraining.slip=0.1", f"pretraining.cache={tmp_path}/base"), said.append)
    assert len(said) == 2  # other settings, other weights


def test_demonstrations_are_learned_in_the_supervised_start() -> None:
    losses: list[str] = []
    for steps in (3, 150):
        base_model(small(f"pretraining.steps={steps}", "pretraining.lr=1e-2"), losses.append)
    few, many = (float(line.split("last loss ")[1].split()[0]) for line in losses)
    assert many < 0.75 * few


def test_a_run_stops_at_its_tokens_and_writes_what_it_did(tmp_path: Path) -> None:
    lines: list[str] = []
    config = small("tokens=1500", "evaluation.points=2", f"run_dir={tmp_path}/run")
    rows = train(config, lines.append, "a command")
    assert rows[-1]["tokens"] >= 1500 > rows[-2]["tokens"] and len(lines) == len(rows) + 1
    assert "eval/accuracy" in rows[0] and "eval/accuracy" in rows[-1]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert "a command" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="holds a run already"):
        train(config, lines.append)


def test_the_rate_warms_up_and_falls_with_the_tokens() -> None:
    trainer = make_trainer(small("optimizer.warmup=1", "optimizer.schedule=linear", "tokens=1000"), quiet)
    trainer.generated = 250
    trainer._set_rates()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.75 * 3e-3)
    trainer.iteration = 5
    trainer._set_rates()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.75 * 3e-3)


def test_the_critic_learns_the_returns() -> None:
    """Every outcome is 1, so the value of every state is."""
    trainer = make_trainer(small("critic.lr=1e-2", recipe="text_ppo"), quiet)
    rule = trainer.sampler.judge

    def judge(problems: Any, tokens: Tensor, mask: Tensor) -> tasks.Grades:
        made = rule(problems, tokens, mask)
        return tasks.Grades(torch.ones_like(made.outcome), made.turn, made.turn_reward, made.share)

    trainer.sampler.judge = judge
    rows = [trainer.iterate() for _ in range(10)]
    assert rows[0]["critic/loss"] > 0.3 and rows[-1]["critic/loss"] < 0.05
    made = trainer.sampler.sample(trainer.held_out, 99)
    value = trainer._value(made)
    assert value is not None and torch.allclose(value[made.mask].mean(), torch.tensor(1.0), atol=0.15)
