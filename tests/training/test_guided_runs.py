"""Guidance and search from a config, on the tiny random SD3: smoke, resume, network calls, `flowrl eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowrl import cost
from flowrl.config import to_yaml, validate
from flowrl.distributed.backend import Backend
from flowrl.evaluation.paired import evaluate
from flowrl.training.build import build
from flowrl.training.search import searching_of
from tests.rollout import doubles
from tests.training.helpers import comparable, make, small_config, tensors

PROCESS = [{"name": "tests.rollout.doubles:latent_mean", "label": "mean"}]
GUIDE = {"reward": "mean", "scale": 20.0}


def config_of(model: Path, **changes: Any) -> Any:
    base = {
        "process": PROCESS, "rollout.guide": GUIDE, "objective.name": "euphonium", "credit.values": "process",
        "euphonium.distil": 0.1, "rollout.window.first": 1, "rollout.window.last": 1,
    }  # fmt: skip
    config = small_config(model, **(base | changes))
    assert validate(config) == []
    return config


def test_two_iterations_and_a_bit_exact_resume(tiny_sd3: Path) -> None:
    config = config_of(tiny_sd3)
    whole, first, second = make(config), make(config), make(config)
    rows = [whole.iterate(), whole.iterate()]
    assert rows[0]["guide/pull"] > 0 and rows[0]["guide/failed"] == 0
    assert rows[1]["euphonium/distil_loss"] > 0 and "euphonium/process_loss" in rows[1]
    assert rows[0]["update/count"] == 1
    first.iterate()
    second.load_state(first.state())
    assert comparable(second.iterate()) == comparable(rows[1])
    for name, value in tensors(whole.state()).items():
        assert torch.equal(value, tensors(second.state())[name]), name


@pytest.mark.parametrize(
    "guide",
    [
        {"mode": "langevin"},
        {"mode": "langevin", "gradient": "spsa", "draws": 2, "first": 2},
        {"mode": "exact_tilt", "first": 1},
        {"mode": "langevin_weighted", "last": 2},
    ],
)
def test_calls_are_their_formula(tiny_sd3: Path, guide: dict[str, Any]) -> None:
    """The network: that of Flow-GRPO, and one reference pass for the distillation. The reward: guide_samples and values."""
    config = config_of(tiny_sd3, **{"rollout.guide": GUIDE | guide})
    doubles.ASKED.clear()
    row = make(config).iterate()
    update = cost.update_work(config)
    forward = cost.rollout_work(config) + update.forward + update.reference
    assert row["calls/forward_samples"] == forward.samples.mean
    assert row["calls/forward"] == forward.calls.mean
    assert row["calls/backward_samples"] == update.backward.samples.mean
    assert sum(doubles.ASKED) == cost.guide_samples(config).mean + 8  # and one valued state a sample


def test_a_guide_that_follows_the_policy_is_counted_as_network_calls(tiny_sd3: Path) -> None:
    """x0 by spsa: each of the 2 calls at a latent takes one network call, of guide_work."""
    config = config_of(tiny_sd3, **{
        "process": [{"name": "x0", "label": "mean", "weight": 0.0}], "euphonium.process": 0.0, "euphonium.distil": 0.0,
        "credit.values": "none", "rollout.guide": GUIDE | {"gradient": "spsa", "radius": 0.5},
    })  # fmt: skip
    row = make(config).iterate()
    forward = cost.rollout_work(config) + cost.guide_work(config)
    update = row["calls/forward_grad_samples"]
    assert row["calls/forward_samples"] - update == forward.samples.mean
    assert row["calls/forward"] - row["calls/forward_grad"] == forward.calls.mean


def test_without_distillation_the_network_is_called_as_by_flow_grpo(tiny_sd3: Path) -> None:
    plain = small_config(tiny_sd3, **{"rollout.window.first": 1, "rollout.window.last": 1})
    own = config_of(tiny_sd3, **{"euphonium.distil": 0.0, "objective.skip_silent": False})
    a, b = make(plain).iterate(), make(own).iterate()
    assert {k: v for k, v in a.items() if k.startswith("calls/")} == {
        k: v for k, v in b.items() if k.startswith("calls/")
    }


def evaluated(config: Any) -> tuple[np.ndarray, dict[str, Any] | None]:
    parts = build(config, Backend())
    trainer, prompts = parts.trainer, parts.evaluation_prompts
    searching = searching_of(config, trainer.adapter, parts.evaluation_rewards, prompts[0], parts.reference)
    draw = None if searching is None else searching.draw
    found = evaluate(config, trainer.adapter, parts.evaluation_rewards, prompts, "base", 0, None, draw)
    return found.images, None if searching is None else searching.facts()


def test_best_of_one_is_the_plain_evaluation_and_more_is_better(tiny_sd3: Path) -> None:
    settings = {"evaluation.count": 3, "evaluation.steps": 3}
    plain, none = evaluated(small_config(tiny_sd3, **settings))
    one, spent = evaluated(small_config(tiny_sd3, **settings, **{"search.kind": "best_of", "search.width": 1}))
    assert none is None and np.array_equal(plain, one)
    assert spent == {
        "kind": "best_of", "width": 1, "reward": "score", "network": 9, "scored": 0, "failed": 0, "resampled": 0,
        "pictures": 3,
    }  # fmt: skip
    best, spent = evaluated(small_config(tiny_sd3, **settings, **{"search.kind": "best_of", "search.width": 4}))
    assert (best[..., 0].mean((1, 2)) >= plain[..., 0].mean((1, 2))).all()
    assert (spent["network"], spent["scored"]) == (36, 12)


@pytest.mark.parametrize("kind", ["beam", "particles"])
def test_beam_and_particles_by_a_process_reward(tiny_sd3: Path, kind: str) -> None:
    """Three pictures, two latents each, three steps, noise at the first two. By outcome a beam's children go through the
    network to be judged; by a process reward they do not."""
    common = {"evaluation.count": 3, "evaluation.steps": 3, "search.kind": kind, "search.width": 2}
    own = small_config(tiny_sd3, **common, **{"process": PROCESS, "search.reward": "mean"})
    pictures, spent = evaluated(own)
    assert pictures.shape == (3, 36, 36, 3)
    assert spent["network"] == 3 * 2 * 3 and spent["reward"] == "mean"
    again, _ = evaluated(own)
    assert np.array_equal(pictures, again)
    _, outcome = evaluated(small_config(tiny_sd3, **common))
    assert outcome["network"] == (3 * (2 + 4 + 4) if kind == "beam" else 18)
    assert outcome["scored"] == spent["scored"] == (3 * (4 + 4 + 2) if kind == "beam" else 3 * 6)


def test_eval_prints_what_a_search_cost(tiny_sd3: Path, tmp_path: Path) -> None:
    from flowrl import api

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(small_config(tiny_sd3, **{"evaluation.count": 2, "run_dir": str(tmp_path / "run")})))
    text = api.evaluate(recipe, ["search.kind=best_of", "search.width=3"])
    assert "search: best_of of 3 by score; 12 latents through the network (6 a picture), 6 candidates scored" in text
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["search"]["network"] == 12
