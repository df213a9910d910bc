"""Comparisons that are refused before a model is loaded, every mistake of every method at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .refusals import FIXED, Case, expect_refusal

KNOWN = "Use a key that flowrl methods gives a config for, a recipe or YAML file, or label:key=value"


def several(*lines: str) -> str:
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    return "\n  ".join([f"{count} in the configuration:", *lines])


CASES = [
    Case(
        "every_mistake_at_once",
        ["compare", "t.yaml", "--methods", "flow_grop,a:rollout.stepz=3,a:batch.groups=0,k1", "--seeds", "no"],
        several(
            f"--methods: unknown method 'flow_grop'; did you mean flow_grpo? {KNOWN}",
            "--methods: k1: no config runs this kl alone; write label:key=value with its settings",
            "--methods: a is given twice; drop one, or name it otherwise, as in other:key=value",
            "--seeds: 'no' is neither a number of seeds, as in 3, nor a list of them, as in 0,4,7",
            "a: rollout.stepz (override): unknown key; did you mean rollout.steps?",
            "a: batch.groups: 0 is out of range; use at least 1",
        ),
    ),
    Case(
        "judged_differently",
        ["compare", "t.yaml", "--methods", "flow_grpo,b:evaluation.steps=3,c:rewards=[{name: jpeg}]"],
        several(
            "b: evaluation.steps is 3, and 10 for flow_grpo; methods are judged alike, so set it for all",
            "c: rewards is [{'name': 'jpeg', 'weight': 1.0, 'args': {}}], and [{'name': 'compositional', 'weight': 1.0, "
            "'args': {}}] for flow_grpo; methods are judged alike, so set it for all (or name the judges in "
            "evaluation.rewards)",
        ),
    ),
    Case(
        "the_same_twice",
        ["compare", "t.yaml", "--methods", "flow_grpo,grpo"],
        several("grpo: has the same settings as flow_grpo; leave one of them out"),
    ),
    Case(
        "override_against_method",
        ["compare", "t.yaml", "--methods", "flow_grpo,rloo", "advantage.name=grpo"],
        several("rloo: sets advantage.name, and 'advantage.name=grpo' sets it for all methods; take one of them away",
                "rloo: has the same settings as flow_grpo; leave one of them out"),
    ),
    Case(
        "the_comparison's_own",
        ["compare", "t.yaml", "--methods", "flow_grpo,b:iterations=3,optimizer.lr=1e-3,lr=,c d:x=1,x=1"],
        several(
            "--methods: b: iterations is the comparison's own; give it for all methods (iterations=N, --seeds, --out)",
            "--methods: 'c d' names a folder, so use letters, digits, _, - and . only",
        ),
    ),
    Case(
        "no_label", ["compare", "t.yaml", "--methods", "optimizer.lr=1e-3"],
        several("--methods: 'optimizer.lr=1e-3' has no name; write label:key=value, as in mine:optimizer.lr=1e-3"),
    ),
    Case(
        "no_override", ["compare", "t.yaml", "--methods", "flow_grpo,a:fast"],
        several("--methods: a: expected key=value after the colon, found 'fast'"),
    ),
    Case(
        "no_methods", ["compare", "t.yaml"],
        "the following arguments are required: --methods; see flowrl compare --help",
    ),
    Case(
        "empty_methods", ["compare", "t.yaml", "--methods", ",", "--budget", "time", "--jobs", "0"],
        several("--methods: names no method; give some, as in --methods flow_grpo,grpo_guard",
                "--budget: 'time' is unknown; use samples or calls",
                "--jobs: 0 processes run nothing; use at least 1"),
    ),
    Case(
        "another_run_is_there",
        ["compare", "t.yaml", "--methods", "flow_grpo", "--out", "out", "--seeds", "1"],
        several("out/flow_grpo-0: holds a run with iterations 3, not 60; use another --out, or delete that folder"),
        files={"out/flow_grpo-0/config.yaml": FIXED.replace("iterations: 60", "iterations: 3")},
    ),
    Case(
        "torchrun", ["compare", "t.yaml", "--methods", "flow_grpo"],
        "flowrl compare: is one process; start it without torchrun, and use --jobs for runs side by side",
        env={"WORLD_SIZE": "2"},
    ),
    Case(
        "no_such_job",
        ["compare", "t.yaml", "--methods", "flow_grpo", "--seeds", "2", "--only", "flow_grpo-2"],
        "--only: no run 'flow_grpo-2'; use one of flow_grpo-0, flow_grpo-1",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.yaml").write_text(FIXED)
    expect_refusal(case, tmp_path, monkeypatch, capsys)
