"""Pictures of a run while it trains: one group by advantage, one sample step by step, evaluations side by side.

They read the rollout and change nothing that is trained: noise is keyed, and the few network calls made here carry no
gradient and are left out of the counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.dynamics.log_prob import reference_kl
from flowrl.evaluation.checkpoint_grid import checkpoint_grid
from flowrl.evaluation.drawing import MAX_SIDE, Images, resized
from flowrl.evaluation.group_view import group_view, order_of
from flowrl.evaluation.paired import Evaluated
from flowrl.evaluation.previews import preview_strip
from flowrl.evaluation.video_sheets import save_animation, stills, video_sheet
from flowrl.records import Prompted
from flowrl.rollout.policy import Policy, Step
from flowrl.rollout.requests import request_of
from flowrl.rollout.sampling import Groups, rollout
from flowrl.scoring.runtime import Scored
from flowrl.training.batch import TrainingBatch, Visit
from flowrl.training.collection import Collected
from flowrl.training.trainer import Trainer
from flowrl.training.update import Reference

MAX_COLUMNS = 4  # in-training evaluations on the page of checkpoints
_NUMBERED = re.compile(r"(?:\w+-)?(\d{6})\.\w+")


def shown_group(batch: TrainingBatch) -> Tensor:
    """Rows int64 [G] of the group that is drawn: the first whose first member carries a signal, else the first that has any."""
    trajectory, signal = batch.trajectory, batch.signal.cpu()
    lead = signal & (trajectory.member == 0)
    for mask in (lead, signal, torch.ones_like(signal)):
        if bool(mask.any()):
            group = trajectory.group_id[mask.nonzero()[0, 0]]
            break
    return (trajectory.group_id == group).nonzero().flatten()


def member_advantages(batch: TrainingBatch, rows: Tensor) -> list[float | None]:
    """Mean advantage of each row over its trained steps, None where none is trained."""
    kept = batch.element[rows].cpu()
    values = torch.where(kept, batch.advantage[rows].cpu(), 0.0).sum(1) / kept.sum(1)
    return [value if count else None for value, count in zip(values.tolist(), kept.sum(1).tolist(), strict=True)]


def step_credit(batch: TrainingBatch, row: int, steps: int) -> list[float | None]:
    """Advantage of each step of the schedule for one sample, None where the step is not trained."""
    found: list[float | None] = [None] * steps
    if batch.trajectory.step is None or batch.trajectory.x is None:
        return found
    columns = zip(
        batch.trajectory.step[row].tolist(), batch.advantage[row].tolist(), batch.element[row].tolist(), strict=True
    )
    for step, advantage, trained in columns:
        found[step] = advantage if trained else None
    return found


@torch.no_grad()
def base_kl(policy: Policy, batch: TrainingBatch, rows: Tensor, size: int, reference: Reference) -> float | None:
    """Mean KL to the reference over the trained transitions of ``rows``, in nats a latent element (the ``paper`` form).

    ``(mean - mean_ref)^2 / (2 std^2)`` with the weights that drew the rollout; None where no transition is stored.
    size: samples a network call.
    """
    trajectory = batch.trajectory
    if trajectory.x is None or trajectory.step is None:
        return None
    found = []
    for part in torch.split(rows, size):
        prompted = batch.prompted[batch.row[part]]
        for k in range(trajectory.step.shape[1]):
            x, step = trajectory.x[part, k].float(), trajectory.step[part, k]
            made = policy.step(x, step, prompted)
            with reference():
                other = policy.step(x, step, prompted)
            found.append(reference_kl("paper", made.mean, other.mean, made.std, made.point, made.value, other.value))
    mean = float(torch.cat(found).mean())
    return mean if math.isfinite(mean) else None


@dataclass(frozen=True)
class _Recording(Policy):
    """A policy that remembers the clean estimate of the first call at each step."""

    seen: dict[int, Tensor] = field(default_factory=dict)

    def step(self, x: Tensor, step: Tensor, prompted: Prompted, kernel: str | None = None) -> Step:
        made = super().step(x, step, prompted, kernel)
        self.seen.setdefault(int(step[0]), made.x0_hat)
        return made


def replayed(trainer: Trainer, collected: Collected, row: int) -> tuple[Tensor, Tensor]:
    """Draw the first member of a group again, alone: (x0_hat [T, ...] before each step, x0 [1, ...]).

    row: of the trajectory, its ``member`` 0, whose noise depends on no other member, so it follows the same path (to
    rounding: another batch shape).
    """
    trajectory, one = collected.trajectory, torch.tensor([row])
    groups = Groups(
        trajectory.prompt_id[one], trajectory.occurrence[one], trajectory.group_id[one],
        collected.prompted[collected.row[one]], 1,
    )  # fmt: skip
    visit = Visit(trainer.seed, trainer.iteration, trainer.updates)
    plan = replace(trainer.collector.plan(groups, visit), shared=False, seeds=1, splits={}, chunk=1, keep=frozenset())
    recording = _Recording(**vars(trainer.policy))
    (made,) = rollout(recording, groups, plan)
    return torch.cat([recording.seen[k] for k in sorted(recording.seen)]), made.x0


class PictureBook:
    """Writes RUN/pictures; an observer of the trainer. write: takes a line of text for the user."""

    def __init__(self, trainer: Trainer, reference: Reference, folder: Path, write: Callable[[str], object]) -> None:
        self.trainer, self.reference, self.write = trainer, reference, write
        self.folder, self.evaluations = folder, folder / "evaluations"
        self.settings = trainer.config.tracking.pictures

    def due(self, iteration: int) -> bool:
        """Whether an iteration (from 1) is drawn."""
        config = self.trainer.config
        often = [every for every in (config.evaluation.every, self.settings.every) if every]
        return iteration in (1, config.iterations) or any(iteration % every == 0 for every in often)

    def __call__(self, collected: Collected, batch: TrainingBatch) -> dict[str, Any]:
        """Draw one group of a rollout where it is due; returns metrics."""
        iteration = self.trainer.iteration + 1
        if not self.due(iteration):
            return {}
        rows = shown_group(batch)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._group(collected, batch, rows, iteration)
            self._steps(collected, batch, int(rows[0]), iteration)
        except OSError as error:  # a full disk: training is worth more than its pictures
            self.write(f"warning: pictures of iteration {iteration} were not written: {error}")
        kl = base_kl(self.trainer.policy, batch, rows, self.trainer.config.batch.micro_batch, self.reference)
        return {} if kl is None else {"policy/kl_to_base": kl}

    def _pixels(self, latents: Tensor, prompt_id: int) -> Images:
        request = request_of(self.trainer.config, self.trainer.rows[prompt_id])
        parts = torch.split(latents, self.trainer.config.batch.micro_batch)
        with torch.no_grad():
            pixels: Images = torch.cat([self.trainer.collector.pixels(part, request) for part in parts]).numpy()
        return pixels

    def _group(self, collected: Collected, batch: TrainingBatch, rows: Tensor, iteration: int) -> None:
        prompt_id = int(collected.trajectory.prompt_id[rows[0]])
        prompt, pixels = self.trainer.rows[prompt_id].prompt, self._pixels(collected.trajectory.x0[rows], prompt_id)
        scored, advantages = collected.scored, member_advantages(batch, rows)
        scores = [float(scored.scores[row]) if scored.valid[row] else None for row in rows.tolist()]
        page = group_view(
            stills(pixels), scores, advantages, prompt, notes=[_note(scored, row) for row in rows.tolist()],
            title=f"One group of iteration {iteration}, by advantage",
        )  # fmt: skip
        page.save(self.folder / f"group-{iteration:06d}.png")
        if pixels.ndim == 5:
            order = order_of(advantages)
            ends = [order[0], order[-1]]
            told = [f"{name}: reward {scores[i]}" for name, i in zip(("best", "worst"), ends, strict=True)]
            sheet = video_sheet(pixels[ends], told, title=f"Best and worst member of iteration {iteration}: {prompt}")
            sheet.save(self.folder / f"video-{iteration:06d}.png")
            save_animation(self.folder / f"video-{iteration:06d}.webp", pixels[ends])

    def _steps(self, collected: Collected, batch: TrainingBatch, row: int, iteration: int) -> None:
        estimates, x0 = replayed(self.trainer, collected, row)
        stored = collected.trajectory.x0[row]
        if not torch.allclose(x0[0].float(), stored.float(), rtol=0.05, atol=0.05 * float(stored.float().std())):
            self.write(
                f"iteration {iteration}: no step preview, as this rollout draws its first member with the others"
            )
            return
        prompt_id = int(collected.trajectory.prompt_id[row])
        pixels = stills(self._pixels(torch.cat([estimates, x0]), prompt_id))
        schedule, scored = collected.trajectory.schedule, collected.scored
        page = preview_strip(
            pixels[:-1], schedule.t[: len(estimates)].tolist(), step_credit(batch, row, schedule.steps),
            self.trainer.rows[prompt_id].prompt, final=pixels[-1:],
            score=float(scored.scores[row]) if scored.valid[row] else None,
            title=f"The first member of that group, iteration {iteration}, step by step",
        )  # fmt: skip
        page.save(self.folder / f"steps-{iteration:06d}.png")

    # -- evaluations -----------------------------------------------------------------------------------------------

    def keep(self, evaluated: Evaluated, iteration: int) -> None:
        """Remember some pictures of an in-training evaluation, at most 256 pixels wide, for the page of checkpoints."""
        firsts = [index for index, row in enumerate(evaluated.rows) if row["member"] == 0]
        count = min(self.settings.rows, len(firsts))
        picked = [firsts[index * len(firsts) // count] for index in range(count)]
        try:
            self.evaluations.mkdir(parents=True, exist_ok=True)
            _save_strip(self.evaluations / f"{iteration:06d}", evaluated, picked)
        except OSError as error:
            self.write(f"warning: pictures of the evaluation of iteration {iteration} were not written: {error}")

    def finish(self, base: Evaluated, tuned: Evaluated) -> None:
        """Write checkpoints.png: base, some in-training evaluations and the tuned weights, on the same prompts and noise."""
        done = self.trainer.iteration
        numbers = sorted(int(file.stem) for file in self.evaluations.glob("[0-9]*.json"))
        between = [number for number in numbers if 0 < number < done]
        if not between:
            return
        if len(between) > MAX_COLUMNS:
            between = [between[(2 * i + 1) * len(between) // (2 * MAX_COLUMNS)] for i in range(MAX_COLUMNS)]
        strips = [_read_strip(self.evaluations / f"{number:06d}") for number in between]
        ends = [{_place(row): index for index, row in enumerate(side.rows)} for side in (base, tuned)]
        known = [set(rows) for rows, _ in strips] + [set(found) for found in ends]
        keys = [key for key in strips[0][0] if all(key in found for found in known)]
        if not keys:
            return
        columns = [_column("base", base, [ends[0][key] for key in keys])]
        for number, (rows, images) in zip(between, strips, strict=True):
            places = [rows[key][0] for key in keys]
            columns.append((f"iteration {number}", images[places], [rows[key][1] for key in keys]))
        columns.append(_column(f"tuned, iteration {done}", tuned, [ends[1][key] for key in keys]))
        prompts = [base.rows[ends[0][key]]["prompt"] for key in keys]
        checkpoint_grid(columns, prompts, limit=self.settings.rows).save(self.folder / "checkpoints.png")

    def cut(self, iteration: int) -> None:
        """Remove pictures of later iterations, which a resumed run draws again."""
        for file in [*self.folder.glob("*-[0-9]*.*"), *self.evaluations.glob("[0-9]*.*")]:
            found = _NUMBERED.fullmatch(file.name)
            if found and int(found[1]) > iteration:
                file.unlink()


def _note(scored: Scored, row: int) -> str | None:
    """What stands below a member: its error, else what the first reward that says anything saw."""
    if not scored.valid[row]:
        return scored.errors[row]
    details = [result.details[row] for result in scored.per_reward.values() if result.details]
    return next((text for text in details if text), None)


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["prompt_id"], row["member"]


def _thumbnails(images: Images) -> Images:
    """Stills at most MAX_SIDE pixels wide: uint8 [N, h, w, 3]."""
    return np.stack([resized(image, MAX_SIDE) for image in stills(images)])


def _column(label: str, side: Evaluated, places: Sequence[int]) -> tuple[str, Images, list[float | None]]:
    return label, _thumbnails(side.images[list(places)]), [side.rows[place]["score"] for place in places]


def _save_strip(path: Path, evaluated: Evaluated, picked: Sequence[int]) -> None:
    from PIL import Image

    images = _thumbnails(evaluated.images[list(picked)])
    Image.fromarray(images.reshape(-1, *images.shape[2:])).save(path.with_suffix(".png"))
    rows = [{key: evaluated.rows[index][key] for key in ("prompt_id", "member", "score")} for index in picked]
    path.with_suffix(".json").write_text(json.dumps(rows, allow_nan=False), encoding="utf-8")


def _read_strip(path: Path) -> tuple[dict[tuple[int, int], tuple[int, float | None]], Images]:
    """(place in the strip and score by prompt and member, uint8 [N, H, W, 3])."""
    from PIL import Image

    rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    with Image.open(path.with_suffix(".png")) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    found = {_place(row): (index, row["score"]) for index, row in enumerate(rows)}
    return found, pixels.reshape(len(rows), -1, *pixels.shape[1:])
