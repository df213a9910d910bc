"""Pictures of the training show what was drawn, and change nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowrl import api
from flowrl.checkpoint import store
from flowrl.distributed.backend import Backend
from flowrl.training.batch import TrainingBatch
from flowrl.training.collection import Collected
from flowrl.training.metrics import of_credit
from flowrl.training.pictures import PictureBook, member_advantages, replayed, shown_group, step_credit
from tests.training.helpers import comparable, make, small_config, tensors

SETTINGS: dict[str, Any] = {
    "iterations": 3, "evaluation.every": 1, "evaluation.quick": 3, "objective.kl.form": "paper",
    "objective.kl.weight": 0.1, "batch.groups": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def with_pictures(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "run"
    api.train(small_config(tiny_sd3, run_dir=str(folder), **SETTINGS))
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_they_are_written_and_reported(with_pictures: Path) -> None:
    written = sorted(
        str(file.relative_to(with_pictures / "pictures")) for file in with_pictures.glob("pictures/**/*.*")
    )
    numbered = [f"evaluations/{i:06d}.{kind}" for i in range(4) for kind in ("json", "png")]
    drawn = [f"{kind}-{i:06d}.png" for kind in ("group", "steps") for i in (1, 2, 3)]
    assert written == sorted([*numbered, *drawn, "checkpoints.png"])
    page = (with_pictures / "report.html").read_text()
    assert 'alt="checkpoints"' in page and page.count('alt="iteration 2"') == 2


def test_they_change_nothing_that_is_trained(with_pictures: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    """Weights, optimizer and every metric but theirs are the same without them; so are the counted calls."""
    plain = tmp_path / "plain"
    api.train(small_config(tiny_sd3, run_dir=str(plain), **SETTINGS, **{"tracking.pictures.enabled": False}))
    assert not (plain / "pictures").exists()
    first, second = (tensors(store.load(folder / "checkpoints").state) for folder in (with_pictures, plain))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    ours = [{k: v for k, v in comparable(row).items() if k != "policy/kl_to_base"} for row in rows_of(with_pictures)]
    assert ours == [comparable(row) for row in rows_of(plain)]


def test_the_kl_is_that_of_the_loss(with_pictures: Path) -> None:
    """With one group, on policy, the KL term of the loss is the mean over the same transitions and the same weights."""
    rows = rows_of(with_pictures)[1:]
    assert rows[0]["policy/kl_to_base"] == 0.0 < rows[2]["policy/kl_to_base"]
    for row in rows:
        assert row["policy/kl_to_base"] == pytest.approx(row["policy/kl"], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rollout.share_prefix": False}, {"rollout.seeds": 2}, {"rollout.solver": "heun"},
     {"rollout.window.kind": "iso_temporal"}],
)  # fmt: skip
def test_the_replay_is_the_sample_that_was_drawn(tiny_sd3: Path, changes: dict[str, Any]) -> None:
    """Member 0 alone ends where it ended among the others; its last clean estimate is where an Euler step to t = 0 ends."""
    trainer = make(small_config(tiny_sd3, **changes))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def look(collected: Collected, batch: TrainingBatch) -> dict[str, Any]:
        for row in (collected.trajectory.member == 0).nonzero().flatten().tolist():
            seen.append((*replayed(trainer, collected, row), collected.trajectory.x0[row]))
        return {}

    trainer.observer = look
    trainer.iterate()
    assert len(seen) == 2
    for estimates, x0, stored in seen:
        assert len(estimates) == trainer.config.rollout.steps
        torch.testing.assert_close(x0[0], stored, rtol=1e-4, atol=1e-5)
        if trainer.config.rollout.solver == "euler":
            torch.testing.assert_close(estimates[-1], stored, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(estimates[0], stored, atol=1e-2)


def a_batch(advantage: list[list[float]], element: list[list[bool]], step: list[list[int]] | None = None) -> Any:
    """As much of a TrainingBatch as the small functions read: two groups (0, 1) of two members."""
    trajectory = SimpleNamespace(
        group_id=torch.tensor([0, 0, 1, 1]), member=torch.tensor([0, 1, 0, 1]), schedule=SimpleNamespace(steps=5),
        step=None if step is None else torch.tensor(step), x=None if step is None else torch.zeros(4, 2, 1),
    )  # fmt: skip
    values, kept = torch.tensor(advantage), torch.tensor(element)
    signal = ((values != 0) & kept).any(1)
    return SimpleNamespace(trajectory=trajectory, advantage=values, element=kept, signal=signal)


ON, OFF = [True, True], [False, False]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]], [2, 3]),  # the group with a signal
        ([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]], [2, 3]),  # before that: its first member has it
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]], [0, 1]),  # any signal
        ([[0.0, 0.0]] * 4, [0, 1]),  # none at all
    ],
)
def test_which_group_is_shown(advantage: list[list[float]], expected: list[int]) -> None:
    assert shown_group(a_batch(advantage, [ON] * 4)).tolist() == expected


def test_credit_of_members_and_steps_by_hand() -> None:
    advantage = [[1.0, 3.0], [2.0, 0.0], [-4.0, -2.0], [5.0, 5.0]]
    batch = a_batch(advantage, [ON, ON, [True, False], OFF], [[1, 2], [1, 2], [3, 4], [3, 4]])
    assert member_advantages(batch, torch.arange(4)) == [2.0, 1.0, -4.0, None]
    assert step_credit(batch, 0, 5) == [None, 1.0, 3.0, None, None]
    assert step_credit(batch, 2, 5) == [None, None, None, -4.0, None]
    # Step 1: (1 + 2) / 2; step 2: (3 + 0) / 2; step 3: 4 (what is not trained does not count); step 4: nothing.
    assert of_credit(batch, Backend()) == {
        "advantage/abs_mean/step_1": 1.5, "advantage/abs_mean/step_2": 1.5, "advantage/abs_mean/step_3": 4.0,
    }  # fmt: skip
    silent = a_batch(advantage, [ON] * 4)
    assert of_credit(silent, Backend()) == {} and step_credit(silent, 0, 5) == [None] * 5


def test_when_they_are_drawn(tiny_sd3: Path, tmp_path: Path) -> None:
    trainer = make(small_config(tiny_sd3, **{"iterations": 20, "evaluation.every": 8, "tracking.pictures.every": 5}))
    assert trainer.reference is not None
    book = PictureBook(trainer, trainer.reference, tmp_path / "pictures", print)
    assert [i for i in range(1, 21) if book.due(i)] == [1, 5, 8, 10, 15, 16, 20]


def test_a_full_disk_does_not_stop_the_training_and_a_cut_removes_what_came_later(
    tiny_sd3: Path, tmp_path: Path
) -> None:
    trainer = make(small_config(tiny_sd3))
    assert trainer.reference is not None
    (tmp_path / "pictures").write_text("a file where the folder would be")
    said: list[str] = []
    trainer.observer = PictureBook(trainer, trainer.reference, tmp_path / "pictures", said.append)
    assert trainer.iterate()["policy/kl_to_base"] == 0.0
    assert len(said) == 1 and said[0].startswith("warning: pictures of iteration 1 were not written: ")
    folder = tmp_path / "other"
    (folder / "evaluations").mkdir(parents=True)
    names = ["group-000001.png", "steps-000007.png", "evaluations/000006.json", "evaluations/000008.png", "mine-8.png"]
    for name in names:
        (folder / name).write_text("")
    PictureBook(trainer, trainer.reference, folder, said.append).cut(6)
    assert [name for name in names if (folder / name).exists()] == [names[0], names[2], names[4]]
