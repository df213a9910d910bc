"""What a config of an objective on re-noised samples may say, and what it is told."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from flowrl.comparison.methods import read_methods
from flowrl.config import load
from flowrl.config.families import family_of
from flowrl.config.validate import validate
from flowrl.methods import RUNS

PLAIN = (
    "rollout.kernel.name=ode", "rollout.window.kind=full", "rollout.window.first=0", "rollout.share_prefix=false",
)  # fmt: skip
NAMES = ("nft", "awm", "orw", "ram", "dpo_online", "dgpo", "crd")


def said(name: str, *overrides: str) -> list[str]:
    return validate(load({"rewards": [{"name": "compositional"}]}, [*PLAIN, f"objective.name={name}", *overrides]))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_runs_each_on_the_task_of_the_comparisons(name: str) -> None:
    assert family_of(name) == "forward"
    assert validate(load("credit_study", shlex.split(RUNS["objective", name]))) == []
    found, problems = read_methods(f"flow_grpo_fast,{name}", "--methods")
    assert problems == [] and [preset.label for preset in found] == ["flow_grpo_fast", name]


def test_everything_of_a_trajectory_is_refused_at_once() -> None:
    found = validate(load("credit_study", ["objective.name=nft"]))
    assert [line.split(":")[0] for line in found] == ["rollout.kernel.name", "rollout.window", "rollout.share_prefix"]
    assert "learns from finished samples alone, so no step draws noise; use ode" in found[0]
    assert "so a window has no meaning; use window.kind=full, window.first=0, fraction=1" in found[1]
    assert "members that share a start would be one sample" in found[2]


REFUSED = {
    ("nft", "objective.kl.form=paper objective.kl.weight=0.1"): "objective.kl.form: paper compares transitions, and nft has "
    "none; use velocity",
    ("nft", "credit.values=x0"): "credit.values: x0 scores transitions, and nft has none; set it to none",
    ("awm", "objective.ratio=plain"): "objective.ratio: awm has no transitions for a ratio; remove it",
    ("awm", "objective.step_weight=std"): "objective.step_weight: awm has no transitions for a step_weight; remove it",
    ("nft", "objective.loss=ppo"): "objective.loss: nft has its own loss; remove it, or use objective.name=awm",
    ("awm", "objective.loss=gspo"): "objective.loss: gspo looks at whole trajectories, and awm has single draws; use ppo or "
    "bgpo",
    ("nft", "objective.loss_options.betta=2"): "objective.loss_options: nft: no option 'betta'; did you mean 'beta'?",
    ("awm", "forward.weight=elbo"): "forward.low: the weight elbo grows without bound towards t = 0; use more than 0, such as "
    "0.02",
    ("awm", "forward.draws=0"): "forward.draws: 0 is out of range; use at least 1",
    ("awm", "forward.low=0.5 forward.high=0.5"): "forward.low, forward.high: 0.5 and 0.5 are no part of [0, 1]; use 0 <= low "
    "< high <= 1",
    ("nft", "forward.old_limit=1"): "forward.old_limit: 1.0 is out of range; use at least 0 and less than 1",
    ("nft", "advantage.name=branch_grpo"): "advantage.name: branch_grpo reads node of transitions, and nft has none; use "
    "grpo, dr_grpo, rloo or gdpo",
    ("nft", "data.preferences=pairs.jsonl"): "data.preferences: objective.name=nft draws its own samples; remove it, or use "
    "objective.name=dpo",
    ("dpo", "batch.group_size=2"): "data.preferences: dpo learns from given pairs; name a jsonl file of prompt, chosen and "
    "rejected",
    ("dpo", "batch.group_size=2 data.preferences=none.jsonl"): "data.preferences: no file 'none.jsonl'; check the path (it is "
    "relative to where you run)",
}  # fmt: skip


@pytest.mark.parametrize(("name", "overrides"), list(REFUSED))
def test_refusals(name: str, overrides: str) -> None:
    found = said(name, *overrides.split())
    assert REFUSED[name, overrides] in found, found


def test_pairs_come_two_by_two(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("{}")
    assert said("dpo", f"data.preferences={file}", "batch.group_size=2") == []
    assert any(
        line.startswith("batch.group_size: 16, and a pair has two") for line in said("dpo", f"data.preferences={file}")
    )


def test_a_section_that_nothing_reads_is_refused() -> None:
    found = validate(load({"rewards": [{"name": "compositional"}]}, ["forward.draws=4"]))
    assert found == ["forward: objective.name=flow_grpo noises no samples anew; remove the section, or use nft or awm"]


def test_models_with_timesteps_of_their_own_take_the_grid() -> None:
    changes = ("model.adapter=stable_diffusion", "model.path=owner/name", "model.height=64", "model.width=64")
    assert said("nft", *changes, "forward.times=grid") == []
    assert said("nft", *changes) == [
        "forward.times: stratified takes any t, and stable_diffusion knows its noise at its own timesteps; use grid"
    ]
