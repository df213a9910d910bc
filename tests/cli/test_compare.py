"""``flowrl compare`` end to end on a tiny model: what it plans, runs, reuses, resumes, writes and refuses."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowrl import api
from flowrl.cli import build_parser, main
from flowrl.comparison import Request, runs
from flowrl.comparison.compare import words_of
from flowrl.comparison.methods import read_methods, split
from flowrl.comparison.planning import gold_names, prepare, ratio_methods, read_seeds
from flowrl.config import load, to_yaml
from flowrl.errors import UserError
from flowrl.training import run
from flowrl.training.trainer import Trainer
from tests.evaluation.test_report import parse
from tests.training.helpers import comparable, small_config

TWO = "flow_grpo,hot:optimizer.lr=0.1,objective.clip_range=0.01"


@pytest.fixture(scope="module")
def task(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of two iterations, judged by brightness on six prompts with two pictures each."""
    config = small_config(
        tiny_sd3,
        iterations=2,
        **{"evaluation.count": 6, "evaluation.per_prompt": 2, "evaluation.every": 1, "evaluation.grid": 48},
    )
    file = tmp_path_factory.mktemp("task") / "task.yaml"
    file.write_text(to_yaml(config))
    return file


@pytest.fixture(scope="module")
def done(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two methods over two seeds."""
    out = tmp_path_factory.mktemp("compared")
    assert main(["compare", str(task), "--methods", TWO, "--seeds", "2", "--out", str(out)]) == 0
    return out


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- what is run


def test_files_of_a_comparison(done: Path) -> None:
    found = json.loads((done / "comparison.json").read_text())
    assert found["seeds"] == [0, 1] and list(found["methods"]) == ["flow_grpo", "hot"]
    assert found["command"].startswith("flowrl compare ") and found["machine"]["device"]
    assert found["measure"] == "score"  # brightness has no strict part
    hot = found["methods"]["hot"]
    assert hot["settings"] == "optimizer.lr=0.1 objective.clip_range=0.01" and hot["iterations"] == 2
    assert hot["against"]["verdict"] in ("better", "worse", "cannot tell")
    assert [Path(run).name for run in hot["runs"]] == ["hot-0", "hot-1"]
    counted = sum(
        row.get("calls/backward_samples", 0) for run in hot["runs"] for row in rows(Path(run, "metrics.jsonl"))
    )
    assert hot["calls"]["backward_samples"] == counted / 2
    assert any("hot differs from flow_grpo in ratio or clipping" in text for text in found["warnings"])
    assert "| hot |" in (done / "comparison.md").read_text()


def test_differences_are_paired_by_seed_and_picture(done: Path) -> None:
    """The table's numbers again, from samples.jsonl with plain loops."""
    found = json.loads((done / "comparison.json").read_text())
    tuned = {
        (name, seed): {
            (row["prompt_id"], row["member"]): row["score"]
            for row in rows(done / f"{name}-{seed}" / "samples.jsonl")
            if row["which"] == "tuned"
        }
        for name in ("flow_grpo", "hot")
        for seed in (0, 1)
    }
    gaps = [tuned["hot", s][key] - tuned["flow_grpo", s][key] for s in (0, 1) for key in tuned["hot", s]]
    assert len(gaps) == 2 * 6 * 2 and any(gaps)
    assert found["methods"]["hot"]["against"]["score"]["mean"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-9)


def test_the_page_holds_the_grid(done: Path) -> None:
    page = parse(done / "compare.html")
    (picture,) = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", (done / "compare.html").read_text())
    assert base64.b64decode(picture) == (done / "grid.png").read_bytes()
    text = " ".join(page.text)
    assert "hot" in text and "train score" in text and page.tags.count("svg") >= 2
    kept = np.asarray(Image.open(done / "hot-0" / "compared" / "tuned-0.png"))
    grid = np.asarray(Image.open(done / "grid.png"))
    large = kept.repeat(4, 0).repeat(4, 1)
    places = np.argwhere((grid[: -large.shape[0], : -large.shape[1]] == large[0, 0]).all(-1))
    assert any((grid[y : y + 144, x : x + 144] == large).all() for y, x in places)


def test_a_run_equals_one_of_train_and_the_base_is_judged_once(done: Path, tmp_path: Path) -> None:
    """flow_grpo with seed 1 again, by ``flowrl train``: same metrics and samples, the base's included."""
    assert len([item for item in (done / "base").iterdir()]) == 1
    config = load(done / "flow_grpo-1" / "config.yaml", [f"run_dir={tmp_path / 'run'}"])
    api.train(config)
    assert (done / "flow_grpo-1/grids/change.png").read_bytes() == (tmp_path / "run/grids/change.png").read_bytes()
    for name in ("metrics.jsonl", "samples.jsonl"):
        one, two = (
            [comparable(row) for row in rows(folder / name)] for folder in (done / "flow_grpo-1", tmp_path / "run")
        )
        assert one == two


def test_the_base_is_shared_by_what_judges_it_alike() -> None:
    def key(*overrides: str) -> str:
        return runs.base_key(load("demo", overrides))

    assert key() == key("seed=3", "objective.clip_range=0.1", "iterations=3", "run_dir=elsewhere")
    others = ("evaluation.steps=3", "model.path=elsewhere", "rewards=[{name: jpeg}]", "batch.micro_batch=8")
    assert len({key(), *(key(text) for text in others)}) == 5


def test_finished_runs_are_reused(done: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (done / name / "metrics.jsonl").stat().st_mtime_ns for name in ("flow_grpo-0", "hot-1")}
    verdict = json.loads((done / "comparison.json").read_text())["methods"]
    monkeypatch.setattr(runs, "build", None)
    assert main(["compare", str(task), "--methods", TWO, "--seeds", "0,1", "--out", str(done)]) == 0
    assert before == {name: (done / name / "metrics.jsonl").stat().st_mtime_ns for name in before}
    assert json.loads((done / "comparison.json").read_text())["methods"] == verdict


def test_a_stopped_comparison_goes_on(task: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second run's first iteration; the next call finishes it, to the numbers of an unbroken one.

    The base is judged once, by the run that ends first.
    """
    real, calls = Trainer.iterate, []
    judge, judged = run.evaluate, []
    monkeypatch.setattr(run, "evaluate", lambda *given: judged.append(given[4]) or judge(*given))

    def iterate(self: Trainer) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    words = ["compare", str(task), "--methods", TWO, "--seeds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(Trainer, "iterate", iterate)
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 130 and len(calls) == 3
    assert not (tmp_path / "comparison.json").exists() and not runs.finished(tmp_path / "hot-0")
    assert main(words) == 0
    assert len(calls) == 4 and judged.count("base") == 1 and judged.count("tuned") == 2
    for name in ("flow_grpo-0", "hot-0"):
        one, two = ([comparable(r) for r in rows(folder / name / "metrics.jsonl")] for folder in (tmp_path, done))
        assert one == two
    warnings = json.loads((tmp_path / "comparison.json").read_text())["warnings"]
    assert any(text.startswith("one seed: the intervals cover prompts only") for text in warnings)


# --------------------------------------------------------------------------------------------------------- side by side


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for runs: what each does is its name's last part."""
    started: list[str] = []

    def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
        started.append(words[-1])
        code = {
            "ok": "pass",
            "bad": "import sys; print('first'); print('error: it broke'); sys.exit(2)",
            "slow": "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); time.sleep(60)",
        }[words[-1].split("-")[1]]
        with log.open("wb") as output:
            return subprocess.Popen([sys.executable, "-S", "-c", code], stdout=output, process_group=0)

    monkeypatch.setattr(runs, "_start", start)
    return started


def named(tmp_path: Path, *names: str) -> list[tuple[str, Any]]:
    return [(name, load("tiny_test", [f"run_dir={tmp_path / name}"])) for name in names]


def test_side_by_side_does_all(children: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    runs.run_side_by_side(named(tmp_path, "a-ok", "b-ok", "c-ok"), ["compare"], 2, tmp_path / "logs", said.append)
    assert children == ["a-ok", "b-ok", "c-ok"]
    assert sorted(said)[:2] == ["a-ok: finished", "a-ok: started, 2 waiting"]


def test_side_by_side_stops_when_one_fails(children: list[str], tmp_path: Path) -> None:
    told = rf"b-bad failed: error: it broke \(whole output in {re.escape(str(tmp_path / 'logs' / 'b-bad'))}\.txt\)"
    with pytest.raises(UserError, match=told):
        runs.run_side_by_side(named(tmp_path, "a-slow", "b-bad", "c-ok"), ["x"], 2, tmp_path / "logs", lambda _: None)
    assert children == ["a-slow", "b-bad"]


def test_side_by_side_passes_one_signal_on(children: list[str], tmp_path: Path) -> None:
    def told(text: str) -> None:
        if text.startswith("b-slow"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as caught:
        runs.run_side_by_side(named(tmp_path, "a-slow", "b-slow", "c-ok"), ["x"], 2, tmp_path / "logs", told)
    assert caught.value.code == 130 and children == ["a-slow", "b-slow"]


def test_a_request_is_written_as_the_words_that_make_it() -> None:
    request = Request("demo", TWO, "0,3", "calls", Path("my out"), ("iterations=3", "batch.groups=2"), 4)
    args = build_parser().parse_args(words_of(request))
    again = Request(args.source, args.methods, args.seeds, args.budget, args.out, tuple(args.items), args.jobs)
    assert again == request


# -------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a,b", ["a", "b"]),
        (" a , m:x=1,y.z=2 ,b", ["a", "m:x=1,y.z=2", "b"]),
        ("m:x=[1, 2],y={a: 1, b: 2},n:z=3", ["m:x=[1, 2],y={a: 1, b: 2}", "n:z=3"]),
        ("m:x='a,b',c", ["m:x='a,b'", "c"]),
        ("a,,", ["a"]),
        ("", []),
    ],
)
def test_methods_are_cut_at_commas(text: str, pieces: list[str]) -> None:
    assert split(text) == pieces


def test_names_of_the_table_are_presets() -> None:
    found, problems = read_methods("rloo,grpo_guard,dapo,cps", "demo")
    words = [
        ["advantage.name=rloo"],
        ["objective.name=grpo_guard"],
        ["objective.loss=dapo"],
        ["rollout.kernel.name=cps"],
    ]
    assert not problems
    for preset, expected in zip(found, words, strict=True):
        assert set(expected) <= set(preset.words)


def test_a_recipe_brings_its_algorithm_and_leaves_the_task(tmp_path: Path) -> None:
    """own.yaml <- middle.yaml <- demo, over a task that inherits demo too: only what own and middle set is laid over it."""
    (tmp_path / "middle.yaml").write_text(
        "base: demo\ndata: {tags: {counting: 1.0}}\nobjective: {clip_range: 0.3}\nema: {decay: 0.5}\n"
    )
    (tmp_path / "own.yaml").write_text("base: middle.yaml\nobjective: {updates: 4}\nema: {decay: 0.2}\nseed: 9\n")
    (tmp_path / "task.yaml").write_text("base: demo\nbatch: {groups: 8}\niterations: 5\n")
    request = Request(
        str(tmp_path / "task.yaml"), f"flow_grpo,{tmp_path / 'own.yaml'}", "1", overrides=("ema.every=2",)
    )
    first, own = (method.config for method in prepare(request).methods)
    assert (own.objective.clip_range, own.objective.updates, own.ema.decay, own.ema.every) == (0.3, 4, 0.2, 2)
    assert (
        (own.batch.groups, own.iterations, own.seed) == (8, 5, 0) == (first.batch.groups, first.iterations, first.seed)
    )
    assert own.data == first.data and first.ema.decay == 0.9 and own.run_dir == "runs/compare/own-0"


def test_equal_samples(task: Path) -> None:
    """Two iterations of 2 x 4 samples are one of 4 x 4, and 4 of 1 x 4."""
    planned = prepare(Request(str(task), "flow_grpo,big:batch.groups=4,small:batch.groups=1", "5,3", overrides=()))
    assert [method.config.iterations for method in planned.methods] == [2, 1, 4]
    assert planned.seeds == (5, 3)
    assert [name for name, _ in planned.runs][:4] == ["flow_grpo-5", "big-5", "small-5", "flow_grpo-3"]
    assert {config.seed for _, config in planned.runs} == {5, 3}


def test_equal_calls(task: Path) -> None:
    """2 groups of 4, 4 steps, 2 trained from step 0 or 1, the prefix shared: the rollout asks for 2 + 8 + 8 + 8 = 26 or
    2 + 2 + 8 + 8 = 20 latents, 23 in the mean, the update for 2 + 8 = 10 forwards and as many backwards: 53 in all, and
    63 with a reference. 20 iterations are 1060, so 17 with a reference, 1071.
    """
    leash = "leash:objective.kl.form=velocity,objective.kl.weight=0.1"
    planned = prepare(Request(str(task), f"flow_grpo,{leash}", "1", "calls", overrides=("iterations=20",)))
    plain, kl = planned.methods
    assert (plain.config.iterations, plain.forward, plain.backward) == (20, 660.0, 200.0)
    assert (kl.config.iterations, kl.forward, kl.backward) == (17, 731.0, 170.0)


def test_what_is_gold_and_what_is_a_ratio_method(task: Path) -> None:
    rewards = "evaluation.rewards=[{name: compositional}, {name: jpeg}, {name: 'tests.training.helpers:brightness'}]"
    methods = "flow_grpo,rloo,grpo_guard,tight:objective.clip_range=0.1"
    planned = prepare(Request(str(task), methods, "1", overrides=(rewards,)))
    assert gold_names(planned.methods[0].config) == ["compositional", "jpeg"]
    watched = "rewards=[{name: 'tests.training.helpers:brightness'}, {name: jpeg, weight: 0}]"
    assert gold_names(load(str(task), [watched])) == ["jpeg"]
    assert gold_names(load(str(task))) == []
    assert ratio_methods(planned) == ["grpo_guard", "tight"]


def test_methods_without_transitions_have_no_ratio_to_warn_of(task: Path) -> None:
    for methods in ("awm,orw", "flow_grpo,awm,tight:objective.clip_range=0.1"):
        planned = prepare(Request(str(task), methods, "1"))
        assert ratio_methods(planned) == (["tight"] if "tight" in methods else [])


@pytest.mark.parametrize(
    ("text", "seeds", "problem"),
    [
        ("3", (4, 5, 6), ""), ("7,0", (7, 0), ""), ("7,", (7,), ""), ("0", (), "0 seeds; use 1 to 1000"),
        ("two", (), "'two' is neither a number of seeds"), ("-1", (), "'-1' is neither"), ("", (), "'' is neither"),
        ("1,2,1", (), "1 is given twice"), (f"{2**63},1", (), "is out of range; use at most"),
    ],
)  # fmt: skip
def test_seeds(text: str, seeds: tuple[int, ...], problem: str) -> None:
    found, problems = read_seeds(text, first=4)
    assert found == seeds
    assert [problem in line for line in problems] == ([True] if problem else [])


def test_a_long_list_of_settings_is_no_file_name() -> None:
    settings = ",".join(f"rewards.{number}.weight=0.5" for number in range(20))
    presets, _ = read_methods(f"mine:{settings}", "demo")
    assert len(settings) > 255 and presets[0].label == "mine" and len(presets[0].words) == 20
