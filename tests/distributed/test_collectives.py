"""How often the processes of a run meet: a number of the config, not of the micro-batches or of the parameters."""

from __future__ import annotations

from typing import Any

import torch

from flowrl.distributed import backend as module
from flowrl.distributed.backend import Backend
from tests.distributed.processes import run
from tests.distributed.toys import config_of, trainer_of

PLAIN = 35  # meetings of an iteration of grpo with one update, by measurement; most are gathers of a few numbers


def count(changes: dict[str, Any]) -> dict[str, list[int]]:
    """Meetings of each iteration, and those between the first backward pass of an update and its optimizer step."""
    trainer = trainer_of(config_of(**changes))
    backend, step = trainer.backend, trainer._step
    first: list[int] = []
    during, per_iteration, backwards = [], [], []

    def stepped() -> float:
        during.append(backend.collectives - first[0])
        backwards.append(trainer.counter.counts.backward)
        return step()

    def began(_: torch.Tensor) -> None:
        if not first:
            first.append(backend.collectives)

    trainer._step = stepped  # type: ignore[method-assign]
    for parameter in trainer.weights.parameters:
        parameter.register_hook(began)
    for _ in range(2):
        first.clear()
        before = backend.collectives
        trainer.iterate()
        per_iteration.append(backend.collectives - before)
    return {"during": during, "per_iteration": per_iteration, "backwards": backwards}


def count_all() -> list[dict[str, list[int]]]:
    return [count({"batch.micro_batch": 2}), count({"batch.micro_batch": 8}), count({"objective.updates": 2})]


def test_gradients_meet_once_an_update_after_the_last_micro_batch() -> None:
    for small, large, two in run(2, count_all):
        assert small["backwards"][0] == 4 * large["backwards"][0] > 0
        assert small["during"] == large["during"] == [1, 1]  # did all have the memory for it?
        assert small["per_iteration"] == large["per_iteration"] == [PLAIN, PLAIN]
        # A second update costs three questions (is there anything to learn? had all the memory?) and its gradients.
        assert two["per_iteration"] == [PLAIN + 4, PLAIN + 4]


def gradients(bucket: int) -> tuple[int, list[torch.Tensor | None]]:
    module.BUCKET = bucket
    backend = Backend()
    shapes = [(2, 3), (4,), (), (5, 1)]
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    weights += [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, (number + 1.0) * 10**backend.rank)
    backend.add_gradients(weights)
    return backend.collectives, [weight.grad for weight in weights]


def gradients_of_all() -> list[tuple[int, list[torch.Tensor | None]]]:
    return [gradients(bucket) for bucket in (1 << 24, 7, 1)]


def test_buckets_change_the_number_of_meetings_and_not_the_gradients() -> None:
    for found in run(2, gradients_of_all):
        assert [collectives for collectives, _ in found] == [2, 3, 5]
        for _, summed in found:
            for number, gradient in enumerate(summed):
                assert gradient is not None and bool((gradient == 11 * (number + 1)).all())
            assert [tuple(g.shape) for g in summed if g is not None] == [(2, 3), (4,), (), (5, 1), (3,)]
