"""A critic learns the same from 1 and from 2 processes: one buffer, one draw, one gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowrl.training.critics import in_order
from tests.distributed.processes import run
from tests.distributed.toys import SHAPE, config_of, trainer_of

SMALL = {"steps": 3, "batch": 5, "width": 8, "blocks": 1, "warmup": 1, "min_explained": -1e9, "lr": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "gae": {"credit.values": "critic", "advantage.name": "gae", "objective.updates": 2},
    "ac_flow": {
        "objective.name": "ac_flow", "rollout.kernel.name": "ode", "rollout.window.kind": "full",
        "rollout.window.size": 1, "rollout.window.last": 0, "objective.clip_range": 0.2,
    },
}  # fmt: skip


def learn(case: str) -> dict[str, Any]:
    changes = CASES[case] | {f"critic.{key}": value for key, value in SMALL.items()}
    trainer = trainer_of(config_of(**changes))
    rows = [trainer.iterate() for _ in range(2)]
    state = trainer.state()
    part = state["critic"]["recent"]["critic"] if case == "gae" else state["learner"]["recent"]
    critic = trainer.learner.critic if case == "ac_flow" else trainer.critics.critics["critic"]
    # Values, not weights: a bias before a norm of its own has no gradient but rounding, which Adam makes large.
    probe = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        value = critic.network(probe, torch.linspace(0, 1, 16), torch.zeros(16, critic.network.text))[:, 0]
    own = dict(critic.network.named_parameters())
    weights = {name: p.detach().clone() for name, p in own.items()}
    return {"rows": rows, "buffer": part, "weights": weights, "value": value}


def learn_all() -> dict[str, Any]:
    return {case: learn(case) for case in CASES}


@pytest.fixture(scope="module")
def learnt() -> dict[int, list[dict[str, Any]]]:
    return {world: run(world, learn_all) for world in (1, 2)}


@pytest.mark.parametrize("case", CASES)
def test_one_and_two_processes_agree(case: str, learnt: dict[int, list[dict[str, Any]]]) -> None:
    (alone,), (first, second) = ([part[case] for part in learnt[world]] for world in (1, 2))
    for name in ("critic/loss", "critic/explained_variance", "critic/open"):
        for row, other in zip(alone["rows"], first["rows"], strict=True):
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), name
    assert alone["rows"][1]["critic/loss"] is not None and alone["rows"][1]["critic/open"] == 1
    for one, two, copy in zip(alone["buffer"], first["buffer"], second["buffer"], strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert torch.equal(two[name], copy[name])  # so that any process may write the checkpoint
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone["value"], first["value"], rtol=1e-3, atol=1e-3)
    assert float(alone["value"].std()) > 0.01
    assert all(torch.equal(weight, second["weights"][name]) for name, weight in first["weights"].items())


def test_alone_the_order_is_the_one_there_was() -> None:
    class Alone:
        @staticmethod
        def gather(rows: torch.Tensor) -> torch.Tensor:
            return rows

    found = in_order(Alone(), torch.tensor([3, 3, 7, 5]), {"x": torch.arange(4)})
    assert found["x"].tolist() == [0, 1, 3, 2]
