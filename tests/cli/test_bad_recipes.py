"""YAML files that are refused: what is wrong, in which file and line, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl.config import recipes

from .refusals import Case, expect_refusal, one_problem

CASES = [
    Case(
        "empty",
        ["train", "my.yaml"],
        "my.yaml: the recipe is empty; write settings such as 'iterations: 100', or 'base: demo'",
        files={"my.yaml": ""},
    ),
    Case(
        "list",
        ["train", "my.yaml"],
        "my.yaml: expected a mapping of settings, found a list of 2; write key: value lines",
        files={"my.yaml": "- a\n- b\n"},
    ),
    Case(
        "broken_yaml",
        ["train", "my.yaml"],
        "my.yaml:2: not valid YAML: expected ',' or '}', but got ':'; mend the line, or put the text in quotes",
        files={"my.yaml": "batch: {groups: 2\niterations: 3\n"},
    ),
    Case(
        "tab",
        ["train", "my.yaml"],
        (
            "my.yaml:2: not valid YAML: found character '\\t' that cannot start any token; mend the line, or "
            "put the text in quotes"
        ),
        files={"my.yaml": "batch:\n\tgroups: 2\n"},
    ),
    Case(
        "duplicate",
        ["train", "my.yaml"],
        one_problem("iterations (my.yaml:4): given twice, first at line 2; keep one"),
        files={"my.yaml": "base: demo\niterations: 3\nseed: 1\niterations: 4\n"},
    ),
    Case(
        "duplicate_nested",
        ["train", "my.yaml"],
        one_problem("batch.groups (my.yaml:4): given twice, first at line 3; keep one"),
        files={"my.yaml": "base: demo\nbatch:\n  groups: 3\n  groups: 4\n"},
    ),
    Case(
        "bad_utf8",
        ["train", "my.yaml"],
        "my.yaml:2: not UTF-8 (byte 0xe9); save the file as UTF-8",
        files={"my.yaml": b"base: demo\nrun_dir: caf\xe9\n"},
    ),
    Case(
        "tag",
        ["train", "my.yaml"],
        (
            "my.yaml:2: not valid YAML: the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' is not "
            "allowed; mend the line, or put the text in quotes"
        ),
        files={"my.yaml": "base: demo\nrun_dir: !!python/object/apply:os.getcwd []\n"},
    ),
    Case(
        "two_documents",
        ["train", "my.yaml"],
        (
            "my.yaml:2: not valid YAML: expected a single document in the stream, but found another document; "
            "mend the line, or put the text in quotes"
        ),
        files={"my.yaml": "base: demo\n---\nbase: demo\n"},
    ),
    Case(
        "anchor_loop",
        ["train", "my.yaml"],
        "my.yaml:2: not valid YAML: an anchor contains itself; mend the line, or put the text in quotes",
        files={"my.yaml": "base: demo\nrewards: &a [*a]\n"},
    ),
    Case(
        "misspelt",
        ["train", "my.yaml"],
        one_problem("rollout.stepz (my.yaml:3): unknown key; did you mean rollout.steps?"),
        files={"my.yaml": "base: demo\nrollout:\n  stepz: 4\n"},
    ),
    Case(
        "wrong_level",
        ["train", "my.yaml"],
        one_problem("lr (my.yaml:2): unknown key; did you mean critic.lr or optimizer.lr?"),
        files={"my.yaml": "base: demo\nlr: 1e-3\n"},
    ),
    Case(
        "nothing_near",
        ["train", "my.yaml"],
        one_problem(
            "zzz (my.yaml:2): unknown key; a recipe takes run_dir, seed, iterations, threads, model, data, "
            "batch, rollout, process, critic, actor_critic, credit, advantage, objective, direct, euphonium, forward, "
            "neighbours, condition, optimizer, ema, rewards, failures, alarm, evaluation, checkpoint, tracking, search, "
            "distributed"
        ),
        files={"my.yaml": "base: demo\nzzz: 1\n"},
    ),
    Case(
        "text_for_int",
        ["train", "my.yaml"],
        one_problem("batch.groups (my.yaml:2): expected a whole number, found 'many' (text)"),
        files={"my.yaml": "base: demo\nbatch: {groups: many}\n"},
    ),
    Case(
        "number_in_quotes",
        ["train", "my.yaml"],
        one_problem("iterations (my.yaml:2): expected a whole number, found '8' (text); write it without quotes"),
        files={"my.yaml": 'base: demo\niterations: "8"\n'},
    ),
    Case(
        "float_for_int",
        ["train", "my.yaml"],
        one_problem("iterations (my.yaml:2): expected a whole number, found 8.0 (a number); write 8"),
        files={"my.yaml": "base: demo\niterations: 8.0\n"},
    ),
    Case(
        "bool_for_int",
        ["train", "my.yaml"],
        one_problem("seed (my.yaml:2): expected a whole number, found true"),
        files={"my.yaml": "base: demo\nseed: true\n"},
    ),
    Case(
        "yes_for_bool",
        ["train", "my.yaml"],
        one_problem("tracking.tensorboard (my.yaml:2): expected true or false, found 'yes' (text)"),
        files={"my.yaml": "base: demo\ntracking: {tensorboard: yes}\n"},
    ),
    Case(
        "number_for_text",
        ["train", "my.yaml"],
        one_problem("run_dir (my.yaml:2): expected text, found 2024 (a whole number); put it in quotes"),
        files={"my.yaml": "base: demo\nrun_dir: 2024\n"},
    ),
    Case(
        "literal",
        ["train", "my.yaml"],
        one_problem("model.train (my.yaml:2): expected one of lora, full, found 'lorra' (text); did you mean lora?"),
        files={"my.yaml": "base: demo\nmodel: {train: lorra}\n"},
    ),
    Case(
        "null_section",
        ["train", "my.yaml"],
        one_problem(
            "rollout (my.yaml:2): expected a section with steps, kernel, window, share_prefix, seeds, "
            "splits, children, solver, guidance, guidance_low, cfg_gradient, storage_dtype, guide, found nothing (null)"
        ),
        files={"my.yaml": "base: demo\nrollout:\n"},
    ),
    Case(
        "scalar_section",
        ["train", "my.yaml"],
        one_problem(
            "rollout (my.yaml:2): expected a section with steps, kernel, window, share_prefix, seeds, "
            "splits, children, solver, guidance, guidance_low, cfg_gradient, storage_dtype, guide, found 8 (a whole number)"
        ),
        files={"my.yaml": "base: demo\nrollout: 8\n"},
    ),
    Case(
        "scalar_list",
        ["train", "my.yaml"],
        one_problem(
            "model.lora.targets (my.yaml:2): expected a list, each text, found 'attention' (text); write [attention]"
        ),
        files={"my.yaml": "base: demo\nmodel: {lora: {targets: attention}}\n"},
    ),
    Case(
        "tuple_length",
        ["train", "my.yaml"],
        one_problem("optimizer.betas (my.yaml:2): expected a list of 2, each a number, found a list of 1"),
        files={"my.yaml": "base: demo\noptimizer: {betas: [0.9]}\n"},
    ),
    Case(
        "nan",
        ["train", "my.yaml"],
        one_problem("optimizer.lr (my.yaml:2): expected a number, found nan (a number); give a finite number"),
        files={"my.yaml": "base: demo\noptimizer: {lr: .nan}\n"},
    ),
    Case(
        "base_type",
        ["train", "my.yaml"],
        "base (my.yaml:1): expected the name or path of a recipe, found a list of 1",
        files={"my.yaml": "base: [demo]\n"},
    ),
    Case(
        "base_missing",
        ["train", "my.yaml"],
        f"base (my.yaml:1): demmo: no such file or recipe; did you mean demo? Shipped are {', '.join(recipes())}",
        files={"my.yaml": "base: demmo\n"},
    ),
    Case(
        "base_circle",
        ["train", "a.yaml"],
        (
            "base: recipes inherit from each other in a circle (a.yaml -> b.yaml -> a.yaml); remove one of the "
            "base lines"
        ),
        files={"a.yaml": "base: b.yaml\n", "b.yaml": "base: a.yaml\n"},
    ),
    Case(
        "several",
        ["train", "my.yaml", "seed=x"],
        (
            "4 errors in the configuration:\n"
            "  iteration (my.yaml:2): unknown key; did you mean iterations?\n"
            "  seed (override): expected a whole number, found 'x' (text)\n"
            "  batch.group_sise (my.yaml:3): unknown key; did you mean batch.group_size?\n"
            "  batch.groups (my.yaml:3): expected a whole number, found -1.5 (a number)"
        ),
        files={"my.yaml": "base: demo\niteration: 3\nbatch: {groups: -1.5, group_sise: 4}\n"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_refusal(case, tmp_path, monkeypatch, capsys)
