"""A micro-batch that does not fit is halved, in all processes at once, and the work is done again to the same end."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from flowrl.distributed.backend import Backend
from flowrl.errors import UserError
from flowrl.training.micro import MicroBatch
from flowrl.training.trainer import Trainer
from tests.distributed.processes import run
from tests.distributed.toys import config_of, seen, trainer_of

KL: dict[str, Any] = {"objective.kl.form": "paper", "objective.kl.weight": 0.1, "objective.passes": 2}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "rollout": (KL, "no_grad"),
    "update": (KL | {"rollout.window.size": 1}, "grad"),
    "forward_process": (
        {
            "objective.name": "awm",
            "rollout.window.kind": "full",
            "objective.kl.form": "velocity",
            "objective.kl.weight": 0.5,
        },
        "grad",
    ),
    "neighbours": ({"objective.name": "neighbor_grpo", "batch.group_size": 8}, "grad"),
}


def limit(trainer: Trainer, most: int, where: str, iteration: int = 1) -> list[int]:
    """From ``iteration`` on, every second call of more than ``most`` samples runs out of memory; returns the sizes that did.

    The first one leaves latents or gradients behind that must not count.
    """
    plain, failed, large = trainer.adapter.predict, [], []

    def predict(x: torch.Tensor, t: torch.Tensor, conditioning: Any, features: Any = ()) -> Any:
        made = plain(x, t, conditioning, features)
        guarded = where == "both" or (where == "grad") == torch.is_grad_enabled()
        if guarded and trainer.iteration >= iteration and len(x) > most:
            large.append(len(x))
            if len(large) % 2 and most:
                return made
            failed.append(len(x))
            raise torch.OutOfMemoryError("injected")
        return made

    trainer.adapter.predict = predict  # type: ignore[method-assign]
    return failed


def train(case: str, size: int, most: int, rank: int) -> dict[str, Any]:
    changes, where = CASES[case]
    trainer = trainer_of(config_of(**changes, **{"batch.micro_batch": size}))
    failed = limit(trainer, most, where) if trainer.backend.rank == rank else []
    found = seen(trainer, 3)
    return found | {"failed": failed, "size": trainer.collector.micro.size}


def train_all() -> dict[str, Any]:
    return {case: (train(case, 8, 2, 1), train(case, 2, 8, -1)) for case in CASES}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for a, b in zip(found["metrics"], wanted["metrics"], strict=True):
        for name in ("policy/loss", "optimizer/grad_norm", "score/mean", "update/count"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    for name, weight in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_one_process_goes_on_with_what_fits(case: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = train(case, 8, 2, 0)
    assert found["failed"] and max(found["failed"]) > 2 and found["size"] == 2
    same(found, train(case, 2, 8, -1))
    told = [record.getMessage() for record in caplog.records]
    assert [text.rpartition("=")[2] for text in told] == ["4 to start there", "2 to start there"], told


def test_two_processes_halve_together() -> None:
    first, second = run(2, train_all)
    for case in CASES:
        for found, wanted in (first[case], second[case]):
            assert found["size"] == 2
            same(found, wanted)
        assert not first[case][0]["failed"] and second[case][0]["failed"]


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    trainer = trainer_of(config_of(**{"batch.micro_batch": 2}))
    limit(trainer, 0, "no_grad", 0)
    words = "out of memory in the rollout, with one sample a call .injected.. Use model.activation_checkpointing=true"
    with pytest.raises(UserError, match=words):
        trainer.iterate()


class OneByOne(Backend):
    can_go_back = False  # type: ignore[assignment]


def test_where_no_process_can_go_back_the_error_says_so() -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(UserError, match=r"at 6 samples a call; .* cannot go back[.] Use batch[.]micro_batch=3, "):
        MicroBatch(6, OneByOne()).attempt("the update", work)
