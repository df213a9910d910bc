"""Training of process rewards: what they learn on Gaussian data, what is written, what a run reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowrl.config.schema import Config
from flowrl.credit.process import LatentReward
from flowrl.errors import UserError
from flowrl.records import Conditioning, Prompted
from flowrl.training.reward_model import Drawer, RewardModelSettings, RewardModelTrainer, Samples
from flowrl.training.reward_model_run import Asked, Journal, train_reward_model
from flowrl.training.trainer import Trainer
from tests.training.helpers import make, small_config
from tests.training.toy import GaussianAdapter, rows, toy_config
from tests.training.toy import LatentReward as Scores

SMALL = {"steps": 120, "levels": 4, "width": 8, "blocks": 1, "lr": 1e-2, "groups": 16}


def trainer_of() -> Trainer:
    adapter = GaussianAdapter(10, mean=1.0, spread=0.5)
    config: Config = toy_config(**{"batch.groups": 16, "batch.group_size": 8})
    return Trainer(config, adapter, Scores(lambda x0: 3 * x0.flatten(1).sum(1)), rows(16))


def train(trainer: Trainer, settings: RewardModelSettings, iterations: int, folder: Path, write=str):
    asked = Asked(config=trainer.config, settings=settings, iterations=iterations)
    return train_reward_model(trainer, Journal(folder, asked), write)


@pytest.mark.parametrize("loss", ["bradley_terry", "bradley_terry_ties", "thurstone", "regression"])
def test_a_latent_network_learns_the_order_and_reports_it(tmp_path: Path, loss: str) -> None:
    """On N(m, s^2) the best order of two members at t is that of x_t: nearly sure at low noise, chance at t = 1."""
    said: list[str] = []
    found = train(trainer_of(), RewardModelSettings(loss=loss, **SMALL), 4, tmp_path, said.append)
    accuracy = [q.accuracy for q in found]
    assert accuracy[0] > 0.7 and accuracy[0] > accuracy[3] + 0.15  # 0.92 is the most that can be known at these times
    assert found[0].rank_correlation > 0.4 and found[0].explained > 0.5 and found[0].milliseconds > 0
    assert found[0].slope == pytest.approx(1.0, abs=0.35)  # calibrated to the score
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["facts"]["samples"] == 4 * 16 * 8 and card["facts"]["held_out_groups"] == 13 and len(said) == 9
    reward = LatentReward(path=str(tmp_path))
    x = torch.linspace(0, 2, 5).reshape(5, 1, 1, 1)
    scored = reward.score(x, torch.full((5,), 0.1), Prompted(Conditioning({"id": torch.zeros(5)}), None))
    assert bool((scored.values.diff() > 0).all())


def test_training_is_repeatable_and_its_noise_keyed() -> None:
    trainer = trainer_of()
    samples = Drawer(trainer)(0)
    settings = RewardModelSettings(**(SMALL | {"steps": 3}))
    weights = []
    for _ in range(2):
        made = RewardModelTrainer(trainer, settings, samples)
        made.fit(str)
        weights.append(torch.cat([p.detach().flatten() for p in made.network.parameters()]))
    assert torch.equal(*weights)
    assert not set(made.training_groups) & set(made.held_out) and len(made.training_groups) + len(made.held_out) == 16
    with pytest.raises(UserError, match="1 groups are too few"):
        RewardModelTrainer(trainer, settings, samples[samples.group == 0])


def test_a_head_on_features_of_a_transformer_trains(tiny_sd3: Path, tmp_path: Path) -> None:
    trainer = make(small_config(tiny_sd3))
    settings = RewardModelSettings(kind="features", features=("transformer_blocks.0",), **(SMALL | {"steps": 2}))
    found = train(trainer, settings, 1, tmp_path)
    assert len(found) == 4 and all(q.samples == 4 for q in found)
    before = [p for p in trainer.weights.parameters if p.grad is not None]
    assert before == [] and json.loads((tmp_path / "model.json").read_text())["features"] == ["transformer_blocks.0"]
    samples = Samples(
        torch.zeros(2, 4, 9, 9),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.int64),
        Conditioning({"hidden": torch.zeros(2, 3, 8)}),
    )
    with pytest.raises(UserError, match="features: name the modules"):
        RewardModelTrainer(trainer, RewardModelSettings(kind="features"), samples)


def test_a_recipe_that_values_states_draws_the_same_finished_samples(tiny_sd3: Path) -> None:
    """As when a process reward is trained anew by a run that uses one: only outcomes are wanted of it here."""
    plain = Drawer(make(small_config(tiny_sd3)))(0)
    valued = Drawer(make(small_config(tiny_sd3, **{"credit.values": "x0", "advantage.name": "stepwise"})))(0)
    assert torch.equal(plain.x0, valued.x0) and torch.equal(plain.score, valued.score)
