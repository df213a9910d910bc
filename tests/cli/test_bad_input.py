"""Commands, plug-in rewards and prompt files that are refused, each with its exact message."""

from __future__ import annotations

from pathlib import Path

import pytest

from .refusals import RECIPES, REWARDS, Case, expect_refusal, one_problem

CASES = [
    Case(
        "unknown_command",
        ["trian"],
        "unknown command 'trian'; did you mean train?",
    ),
    Case(
        "unknown_option",
        ["train", "demo", "--resum", "x"],
        "flowrl train: unknown word '--resum'; see flowrl train --help",
    ),
    Case(
        "no_config",
        ["train"],
        "flowrl train: CONFIG is missing; give a YAML file or a shipped recipe first, as in flowrl train demo",
    ),
    Case(
        "override_before_config",
        ["train", "iterations=3"],
        "flowrl train: CONFIG is missing; give a YAML file or a shipped recipe first, as in flowrl train demo",
    ),
    Case(
        "missing_positional",
        ["plan"],
        "the following arguments are required: CONFIG; see flowrl plan --help",
    ),
    Case(
        "unknown_recipe",
        ["train", "dmeo"],
        f"dmeo: no such file or recipe; did you mean demo? Shipped are {RECIPES}",
    ),
    Case(
        "missing_file",
        ["train", "missing.yaml"],
        (f"missing.yaml: no such file or recipe; give a YAML file or one of {RECIPES}"),
    ),
    Case(
        "folder",
        ["train", "sub"],
        "sub: is a folder, not a recipe; give a YAML file",
        files={"sub/x.txt": "a"},
    ),
    Case(
        "run_folder_as_config",
        ["plan", "sub"],
        "sub: is a folder, not a recipe; give sub/config.yaml",
        files={"sub/config.yaml": "base: demo\n"},
    ),
    Case(
        "reward_file_syntax",
        ["train", "demo", 'rewards=[{name: "mine.py:score"}]'],
        one_problem("rewards.0.name: mine.py: line 1 is not Python ('(' was never closed); mend it"),
        files={"mine.py": "def score(images:\n    return 1\n"},
    ),
    Case(
        "reward_file_raises",
        ["train", "demo", 'rewards=[{name: "mine.py:score"}]'],
        one_problem(
            "rewards.0.name: mine.py: fails to import: ZeroDivisionError: division by zero (mine.py:3); mend it"
        ),
        files={"mine.py": "import math\n\nLIMIT = 1 / 0\n"},
    ),
    Case(
        "reward_file_attribute",
        ["train", "demo", 'rewards=[{name: "mine.py:scor"}]'],
        one_problem("rewards.0.name: mine.py:scor: mine.py has no 'scor'; did you mean score?"),
        files={"mine.py": "def score(images):\n    return [0.0] * len(images)\n"},
    ),
    Case(
        "reward_file_argument",
        ["train", "demo", 'rewards=[{name: "mine.py:score", args: {strenght: 2.0}}]'],
        one_problem("rewards.0.args.strenght: unknown argument of mine.py:score; did you mean strength?"),
        files={"mine.py": "def score(images, strength: float = 1.0):\n    return [0.0] * len(images)\n"},
    ),
    Case(
        "reward_module_is_a_file",
        ["train", "demo", 'rewards=[{name: "mine:score"}]'],
        one_problem("rewards.0.name: mine:score: no module named 'mine'; write mine.py:score"),
        files={"mine.py": "x = 1\n"},
    ),
    Case(
        "reward_needs_package",
        ["train", "demo", 'rewards=[{name: "mine.py:score"}]'],
        one_problem("rewards.0.name: mine.py: needs the package 'no_such_package', which is not installed; install it"),
        files={"mine.py": "import no_such_package\n"},
    ),
    Case(
        "processes",
        ["train", "demo", "batch.groups=3"],
        one_problem(
            "batch.groups: 3 groups cannot be shared out over 4 processes, each of which needs one; use at least 4, or fewer "
            "processes"
        ),
        env={"WORLD_SIZE": "4"},
    ),
    Case(
        "world_size",
        ["train", "demo"],
        "WORLD_SIZE is 'two' in the environment; torchrun sets it to the number of processes, else unset it",
        env={"WORLD_SIZE": "two"},
    ),
    Case(
        "run_dir_file",
        ["train", "demo", "run_dir=out"],
        one_problem("run_dir: out is a file; name a folder"),
        files={"out": "x"},
    ),
    Case(
        "prompts_folder",
        ["train", "demo", "data.prompts=sub"],
        one_problem("data.prompts: sub is a folder; give a prompt file"),
        files={"sub/x": "1"},
    ),
    Case(
        "prompts_suffix",
        ["train", "demo", "data.prompts=prompts.csv"],
        one_problem(
            "data.format: auto knows .txt and .jsonl, not 'prompts.csv'; name it: lines, jsonl, geneval or ocr"
        ),
        files={"prompts.csv": "a cat\n"},
    ),
    Case(
        "prompts_empty",
        ["train", "demo", "data.prompts=prompts.txt"],
        "prompts.txt: the prompt file is empty; give it at least one prompt",
        files={"prompts.txt": ""},
    ),
    Case(
        "prompts_blank",
        ["train", "demo", "data.prompts=prompts.txt"],
        "prompts.txt:2: blank line; remove it (prompt ids are rows, so none is skipped)",
        files={"prompts.txt": "a cat\n\na dog\n"},
    ),
    Case(
        "prompts_utf8",
        ["train", "demo", "data.prompts=prompts.txt"],
        (
            "prompts.txt:2: not UTF-8: byte 0xe9 at offset 11 of the file (invalid continuation byte); save "
            "the file as UTF-8"
        ),
        files={"prompts.txt": b"a cat\na caf\xe9\n"},
    ),
    Case(
        "prompts_json",
        ["train", "demo", "data.prompts=prompts.jsonl"],
        "prompts.jsonl:2: broken JSON at column 19: Expecting ',' delimiter",
        files={"prompts.jsonl": '{"prompt": "a cat"}\n{"prompt": "a dog"\n'},
    ),
    Case(
        "prompts_key",
        ["train", "demo", "data.prompts=prompts.jsonl"],
        'prompts.jsonl:1: key "prompt" is missing',
        files={"prompts.jsonl": '{"text": "a cat"}\n'},
    ),
    Case(
        "prompts_geneval",
        ["train", "demo", "data.prompts=p.jsonl", "data.format=geneval"],
        'p.jsonl:1: include[0]: "count" must be an integer of at least 1, got 0',
        files={"p.jsonl": '{"tag": "counting", "prompt": "two cats", "include": [{"class": "cat", "count": 0}]}\n'},
    ),
    Case(
        "prompts_ocr",
        ["train", "demo", "data.prompts=p.txt", "data.format=ocr"],
        'p.txt:1: expected one target in straight double quotes, found 0 quote characters (") instead of 2',
        files={"p.txt": "a sign that says hello\n"},
    ),
    Case(
        "eval_not_a_run",
        ["eval", "sub"],
        "sub: nothing to evaluate; give the folder of a run (config.yaml), a checkpoint (manifest.json), an exported LoRA "
        "(pytorch_lora_weights.safetensors) or a diffusers pipeline (model_index.json)",
        files={"sub/x": "1"},
    ),
    Case(
        "eval_reference",
        ["eval", "demo", "evaluation.reference=sub"],
        one_problem(
            "evaluation.reference: sub holds 1 pictures (.png, .jpg, .jpeg, .webp, .bmp); give at least 2, and some "
            "thousands for a distance that says something"
        ),
        files={"sub/a.png": "1", "sub/b.txt": "1"},
    ),
    Case(
        "eval_missing",
        ["eval", "runs/none"],
        f"runs/none: no such file or recipe; give a YAML file or one of {RECIPES}",
    ),
    Case(
        "eval_override",
        ["eval", "sub", "evaluation.cuont=3"],
        one_problem("evaluation.cuont (override): unknown key; did you mean evaluation.count?"),
        files={"sub/config.yaml": "base: demo\n"},
    ),
    Case(
        "resume_missing",
        ["train", "--resume", "runs/none"],
        "runs/none: no such run folder; check the path",
    ),
    Case(
        "resume_and_config",
        ["train", "--resume", "sub", "demo"],
        "flowrl train --resume sub: takes no CONFIG, found 'demo'; the run has its own",
        files={"sub/config.yaml": "base: demo\n"},
    ),
    Case(
        "report_missing",
        ["report", "runs/none"],
        "runs/none: no such run folder; check the path",
    ),
    Case(
        "report_without_metrics",
        ["report", "sub"],
        "sub: has no metrics.jsonl yet; train or evaluate it first",
        files={"sub/config.yaml": "base: demo\n"},
    ),
    Case(
        "plan_error",
        ["plan", "demo", "batch.groups=-1"],
        one_problem("batch.groups: -1 is out of range; use at least 1"),
    ),
    Case(
        "probe_unknown",
        ["rewards", "probe", "jpg"],
        (f"unknown reward 'jpg'; did you mean jpeg? Known are {REWARDS}, package.module:name or path/to/file.py:name"),
    ),
    Case(
        "probe_argument",
        ["rewards", "probe", "jpeg", "qality=50"],
        one_problem("qality: unknown argument of jpeg; did you mean quality?"),
    ),
    Case(
        "no_action",
        ["rewards"],
        "the following arguments are required: ACTION; see flowrl rewards --help",
    ),
    Case(
        "doctor_words",
        ["doctor", "now"],
        "flowrl doctor: unknown word 'now'; see flowrl doctor --help",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_refusal(case, tmp_path, monkeypatch, capsys)
