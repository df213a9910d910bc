"""Stop signals, failures and deaths of one of two processes end both, at one iteration, and leave a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from flowrl.checkpoint import store
from flowrl.errors import UserError
from flowrl.training.build import Parts
from flowrl.training.run import Run
from tests.distributed.processes import Ended, start, wait, warm
from tests.distributed.toys import config_of, trainer_of

STOPPING = ("tracking.pictures.enabled", "tracking.progress")


def train(folder: Path, rank: int, iteration: int, what: str) -> None:
    """A run of 50 iterations in which something happens to process ``rank`` within an iteration; exits as the CLI does."""
    changes: dict[str, Any] = dict.fromkeys(STOPPING, False)
    config = config_of(**changes, **{"iterations": 50, "run_dir": str(folder), "checkpoint.every": 0})
    trainer = trainer_of(config)
    learn = trainer._train

    def happens(batch: Any) -> dict[str, Any]:
        if trainer.backend.rank == rank and trainer.iteration == iteration:
            if what == "error":
                raise UserError("the disk of this process is full")
            if what == "sleep":
                time.sleep(3600)
            os.kill(os.getpid(), getattr(signal, what))
        return learn(batch)

    trainer._train = happens  # type: ignore[method-assign]
    run = Run(config, Parts(trainer, trainer.rewards, [], None, {}), folder, "test", lambda text: None)  # type: ignore[arg-type]
    if trainer.backend.leads:
        run.prepare()
    code = run.go()
    (folder / f"stopped_{trainer.backend.rank}").write_text(str(trainer.iteration))
    raise SystemExit(code)


def ended(folder: Path, rank: int, iteration: int, what: str, limit: float = 40) -> tuple[list[Ended], float]:
    warm()
    began = time.monotonic()
    found = wait(start(2, train, folder, rank, iteration, what), limit)
    return found, time.monotonic() - began


@pytest.mark.wall_clock
@pytest.mark.parametrize(
    ("what", "code", "rank", "iteration"),
    [("SIGTERM", 143, 1, 2), ("SIGTERM", 143, 0, 0), ("SIGINT", 130, 1, 1)],
)
def test_a_signal_to_one_process_stops_both_at_one_iteration(
    tmp_path: Path, what: str, code: int, rank: int, iteration: int
) -> None:
    found, _ = ended(tmp_path, rank, iteration, what)
    assert [one.code for one in found] == [code, code], found
    assert [(tmp_path / f"stopped_{r}").read_text() for r in (0, 1)] == [str(iteration + 1)] * 2
    loaded = store.load(tmp_path / "checkpoints")
    assert loaded.state["progress"]["iteration"] == iteration + 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == iteration + 1


@pytest.mark.wall_clock
@pytest.mark.parametrize(("what", "rank"), [("SIGKILL", 1), ("SIGKILL", 0), ("error", 1)])
def test_the_death_of_one_process_ends_the_other(tmp_path: Path, what: str, rank: int) -> None:
    found, seconds = ended(tmp_path, rank, 1, what)
    assert seconds < 30
    assert found[rank].code == (1 if what == "error" else -signal.SIGKILL)
    assert found[1 - rank].code not in (0, None)
    if what == "error":
        assert "the disk of this process is full" in found[rank].error


def silent(folder: Path) -> None:
    from flowrl.distributed.backend import Backend

    trainer = trainer_of(config_of(), backend=Backend(2, timeout_s=3.0))
    if trainer.backend.rank == 1:
        time.sleep(3600)
    trainer.iterate()


@pytest.mark.wall_clock
def test_a_process_that_never_answers_is_given_up_after_the_time_limit(tmp_path: Path) -> None:
    warm()
    began = time.monotonic()
    started = start(2, silent, tmp_path)
    first = wait(started[:1], 30)
    assert first[0].code == 1 and time.monotonic() - began < 25
    assert "imed out" in first[0].error or "timeout" in first[0].error.lower()
    wait(started[1:], 0)
