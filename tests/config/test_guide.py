"""What a config may not ask of guidance, euphonium and search: refused before a model is loaded."""

from __future__ import annotations

import pytest

from flowrl.config import load, validate

PROCESS = 'process=[{"name":"tests.rollout.doubles:latent_mean","label":"mean"},{"name":"x0"}]'
GUIDED = (PROCESS, "rollout.guide.reward=mean")
OWN = (*GUIDED, "objective.name=euphonium", "credit.values=process")


def test_what_is_asked_for_rightly_is_taken() -> None:
    for words in (
        GUIDED,
        OWN,
        (*OWN, "euphonium.distil=1.0", "rollout.guide.log_prob=guided"),
        (*OWN, "rollout.guide.mode=langevin_weighted"),
        (*GUIDED, "rollout.guide.mode=exact_tilt", "rollout.guide.first=1", "rollout.guide.last=3"),
        ("objective.name=euphonium", "euphonium.process=0.0"),
        ("search.kind=beam", "search.at=[0,3]"),
        (PROCESS, "search.kind=particles", "search.reward=mean"),
    ):
        assert validate(load("demo", words)) == [], words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((PROCESS, "rollout.guide.scale=2.0"), "rollout.guide.reward: is empty, so nothing is guided"),
        ((PROCESS, "rollout.guide.reward=other"), "no process reward has the label 'other'; use one of mean, x0"),
        (("rollout.guide.reward=mean",), "no process reward has the label 'mean'; there is none; add an entry to process"),
        ((PROCESS, "rollout.guide.reward=x0"), "rollout.guide.gradient: the process reward x0 has no gradient"),
        ((*GUIDED, "rollout.guide.scale=-1.0"), "rollout.guide.scale: -1.0 would lead away"),
        ((*GUIDED, "rollout.guide.first=8"), "rollout.guide.first, last: 8 to 7 is no range of steps; use 0 to 7"),
        ((*GUIDED, "rollout.guide.last=8"), "rollout.guide.first, last: 0 to 8 is no range of steps"),
        ((*GUIDED, "rollout.guide.gradient=spsa", "rollout.guide.radius=0.0"), "spsa needs a radius above 0"),
        ((*GUIDED, "rollout.guide.mode=exact_tilt"), "rollout.guide.first: exact_tilt has no share at pure noise"),
        ((*GUIDED, "rollout.guide.mode=exact_tilt", "rollout.guide.first=1", "rollout.solver=heun"),
         "rollout.solver: exact_tilt guides steps without noise too"),
        ((*GUIDED, "rollout.guide.log_prob=guided"), "rollout.guide.log_prob: guided is learned from by"),
        ((*GUIDED, "rollout.guide.mode=langevin_weighted"), "rollout.guide.mode: langevin_weighted is learned from by"),
        ((*GUIDED, "objective.name=nft"), "rollout.guide: nft draws its samples without noise"),
        ((*OWN, "rollout.guide.log_prob=guided", "objective.ratio=normalised"), "objective.ratio: normalised compares means"),
        (("euphonium.process=0.5",), "euphonium: objective.name=flow_grpo does not read it"),
        ((*OWN, "euphonium.distil=-1.0"), "euphonium.distil: -1.0 would learn the opposite"),
        (("objective.name=euphonium", "euphonium.process=0.0", "euphonium.outcome=0.0"), "are all 0, so nothing is learned"),
        (("objective.name=euphonium",), "credit.values: euphonium.process learns from values of intermediate states"),
        (("objective.name=euphonium", "euphonium.process=0.0", "euphonium.distil=1.0"), "there is no guidance to bring into"),
        ((*OWN, "objective.loss=gspo"), "objective.loss: gspo looks at whole trajectories"),
        (("search.width=3",), "search.kind: none, yet other settings of search are given"),
        (("search.kind=best_of", "search.width=0"), "search.width: 0 is out of range"),
        (("search.kind=beam", "search.children=1"), "search.children: a beam of 1 children has nothing to choose from"),
        (("search.kind=best_of", "search.at=[1]"), "search.at: best_of draws no noise on the way"),
        (("search.kind=beam", "search.at=[9]"), "search.at: step 9 draws no noise; use 0 to 8 (evaluation.steps=10)"),
        (("search.kind=particles", "search.scale=-1.0"), "search.scale: -1.0 would look for the worst"),
        (("search.kind=particles", "search.threshold=1.5"), "search.threshold: 1.5 is out of range"),
        (("search.kind=beam", "search.reward=mean"), "search.reward: no process reward has the label 'mean'"),
        (("search.kind=beam", "rewards=[{name: pref_grpo, args: {url: x, model: m}}]"), "candidates of a search are none"),
        (("search.kind=beam", "rewards=[{name: jpeg, shaping: [{rank: {}}]}]"), "candidates of a search are none"),
    ],
)  # fmt: skip
def test_refusals(words: tuple[str, ...], message: str) -> None:
    found = validate(load("demo", words))
    assert any(message in line for line in found), found


def test_a_plain_run_reads_none_of_it() -> None:
    config = load("demo")
    assert not config.rollout.guide.active and config.search.kind == "none"
