"""advantage.whiten with every estimator that a run can use: it works, or a config says why not before anything runs."""

from __future__ import annotations

import pytest
import torch

from flowrl.advantage.catalogue import ESTIMATORS, METHODS
from flowrl.advantage.pipeline import inputs_of, run_method
from flowrl.config.engine import PLAIN, SUPPLIED, VALUES, refused
from flowrl.config.validate import validate
from flowrl.training.trainer import Trainer
from tests.advantage.registry_inputs import inputs_for
from tests.training.toy import GaussianAdapter, LatentReward, rows, toy_config

USABLE = [
    m for m in METHODS if m.kind == "estimator" and m.call is not None and not refused(m, m.call, SUPPLIED | VALUES)
]


def said(name: str, whiten: str) -> list[str]:
    found = validate(toy_config(**{"advantage.name": name, "advantage.whiten": whiten}))
    return [text for text in found if text.startswith("advantage.whiten")]


@pytest.mark.parametrize("method", USABLE, ids=lambda m: m.key)
def test_sample_is_refused_where_an_advantage_is_of_a_step(method) -> None:
    of_steps = run_method(method.key, method.call, inputs_for(method, 0), {}, None).advantage.ndim == 2
    assert said(method.key, "step") == said(method.key, "none") == []
    assert said(method.key, "sample") == (
        [
            f"advantage.whiten: sample counts every sample once, and {method.key} gives one advantage a step; use step, "
            "or none"
        ]
        if of_steps
        else []
    )
    assert of_steps == ("mask" in inputs_of(ESTIMATORS[method.key]))
    assert not of_steps or method.key not in PLAIN


@pytest.mark.parametrize(
    ("name", "changes"),
    [("dr_grpo", {}), ("rloo", {}), ("opo", {}), ("reinforce_pp", {}),
     ("gae", {"credit.values": "critic", "critic.closed": "outcome", "critic.width": 4, "critic.blocks": 1})],
)  # fmt: skip
def test_step_counts_every_trained_step(name: str, changes: dict) -> None:
    base = {
        "advantage.name": name, "batch.group_size": 8, "rollout.window.kind": "random", "rollout.window.size": 3,
        "rollout.window.last": 6, **changes,
    }  # fmt: skip
    found = {}
    for whiten in ("none", "step"):
        config = toy_config(**base, **{"advantage.whiten": whiten})
        adapter = GaussianAdapter(10)
        trainer = Trainer(config, adapter, LatentReward(lambda x0: x0.flatten(1).sum(1)), rows(4))
        found[whiten] = trainer._credit(trainer._collect())[0].advantage.double()
    plain, white = found["none"], found["step"]
    assert plain.shape == white.shape == (32, 3) and float(plain.std()) > 0
    torch.testing.assert_close(white, (plain - plain.mean()) / plain.std(), rtol=1e-4, atol=1e-5)
