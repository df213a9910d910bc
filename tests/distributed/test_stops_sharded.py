"""A network in shards: signals and deaths end both processes, and what was saved before goes on bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.checkpoint import store
from flowrl.training.run import Run
from tests.distributed.processes import run, start, wait, warm
from tests.distributed.test_shards_saved import go_on, open_run
from tests.training.helpers import tensors

KIND = "full"


def happens(one: Run, rank: int, iteration: int, what: str) -> None:
    """A signal to process ``rank`` within the update of ``iteration``, between two network calls."""
    backward, trainer = one.trainer.backend.backward, one.trainer

    def hit(loss: torch.Tensor) -> None:
        if trainer.backend.rank == rank and trainer.iteration == iteration:
            trainer.backend.backward = backward  # type: ignore[method-assign]
            os.kill(os.getpid(), getattr(signal, what))
        backward(loss)

    trainer.backend.backward = hit  # type: ignore[method-assign]


def train(model: Path, folder: Path, what: str) -> None:
    """Something happens to the second process in iteration 2 of 6; ``write``: the first dies while it writes a checkpoint."""
    one = open_run(model, folder / KIND, KIND)
    if one.leads:
        one.prepare()
    if what == "write":
        plain = store.write_file

        def write(*arguments: Any) -> Any:
            if one.trainer.iteration == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments)

        store.write_file = write
    else:
        happens(one, 1, 2, what)
    code = one.go()
    (folder / f"stopped_{one.trainer.backend.rank}").write_text(str(one.trainer.iteration))
    raise SystemExit(code)


def undisturbed(model: Path, folder: Path) -> dict[str, Any]:
    one = open_run(model, folder / KIND, KIND)
    for _ in range(4):
        one.trainer.iterate()
    return one.trainer.state()


def ended(tiny: Path, folder: Path, what: str) -> list[int | None]:
    warm()
    return [one.code for one in wait(start(2, train, tiny, folder, what), 120)]


@pytest.mark.wall_clock
def test_a_signal_stops_both_after_the_iteration(tiny_sd3: Path, tmp_path: Path) -> None:
    assert ended(tiny_sd3, tmp_path, "SIGTERM") == [143, 143]
    assert [(tmp_path / f"stopped_{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert store.load(tmp_path / KIND / "checkpoints").state["progress"]["iteration"] == 3
    wanted, found = run(2, undisturbed, tiny_sd3, tmp_path)[0], run(2, go_on, tiny_sd3, tmp_path, KIND)[0]
    wanted, found = tensors(wanted), tensors(found)
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.wall_clock
@pytest.mark.parametrize(("what", "killed"), [("SIGKILL", 1), ("write", 0)])
def test_a_death_ends_the_other_and_keeps_what_was_saved(
    tiny_sd3: Path, tmp_path: Path, what: str, killed: int
) -> None:
    codes = ended(tiny_sd3, tmp_path, what)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, None)
    loaded = store.load(tmp_path / KIND / "checkpoints")
    assert loaded.state["progress"]["iteration"] == (2 if what == "SIGKILL" else 1)
    assert not loaded.warnings
