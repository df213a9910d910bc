"""The report is one valid file with the numbers in it, needs nothing outside, and survives what runs leave behind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowrl.errors import UserError
from flowrl.evaluation.grids import save_grids
from flowrl.evaluation.report import write_report
from flowrl.evaluation.report_curves import moving
from flowrl.evaluation.statistics import summarise

HOSTILE = '</pre></p><script>alert("x")</script><img src=x onerror=alert(1)>&'
VOID = {"meta", "img", "br", "rect", "path", "circle"}


class Balanced(HTMLParser):
    """Collects tags, text and attributes, and fails where a tag closes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.values: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(path: Path) -> Balanced:
    page = path.read_text(encoding="utf-8")
    found = Balanced()
    found.feed(page)
    found.close()
    assert not found.open
    assert "script" not in found.tags and "link" not in found.tags and "iframe" not in found.tags
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert "url(" not in page and "@import" not in page
    return found


def text_of(path: Path) -> str:
    return " ".join(" ".join(parse(path).text).split())


def samples() -> list[dict[str, Any]]:
    rows = []
    for prompt in range(10):
        for member in range(2):
            for which in ("base", "tuned"):
                good = member == 0 or (which == "tuned" and prompt % 2 == 0)
                rows.append({
                    "iteration": 60 * (which == "tuned"), "which": which, "prompt_id": prompt, "prompt": f"{prompt} {HOSTILE}",
                    "tag": ["even", "<odd>"][prompt % 2], "member": member, "seed": 1,
                    "scores": {"compositional": 0.5 + 0.5 * good}, "strict": good, "score": 0.5 + 0.5 * good,
                    "detail": f"saw {which}",
                })  # fmt: skip
    return rows


def metrics(count: int = 40) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(count):
        rows.append({
            "iteration": i, "reward/compositional/mean": 0.5 + 0.01 * i, "score/mean": 0.5, "policy/ratio_mean": 1.0,
            "policy/clip_fraction": 0.05, "policy/kl": 0.001 * i, "policy/ratio_mean/step_0": 1.001,
            "policy/ratio_mean/step_2": 1.0,
            "policy/ratio_mean/step_10": 0.999, "policy/clip_fraction/step_0": 0.03, "group/live_fraction": 0.7,
            "advantage/abs_mean/step_2": 0.6, "optimizer/grad_norm": 0.4, "optimizer/lr": 1e-3, "score/invalid": i % 2,
            "score/invalid_fraction": 0.01 * (i % 2), "reward/compositional/variance_share": 0.7,
            "reward/short/variance_share": 0.3, "update/skipped": 2,
            "time/iteration_s": 4.0, "time/rollout_s": 3.0, "time/other_s": 1.0,
            "calls/forward": 55, "calls/backward": 12, "memory/rss_mb": 1234.5,
        })  # fmt: skip
    rows[3]["reward/short/error"] = f"ValueError: {HOSTILE}"
    for i, score in ((0, 0.4), (20, 0.6), (count - 1, 0.7)):
        rows[i] |= {
            "eval/score": score, "eval/diversity": 0.3 - 0.2 * score, "gold/judge": 0.5 - 0.1 * score,
            "gold/judge_low": 0.4 - 0.1 * score, "gold/judge_high": 0.6 - 0.1 * score, "policy/kl_to_base": 0.1 * i,
            "picture/brightness": 0.5, "alarm/fired": int(i > 20), "alarm/streak": int(i > 0) + int(i > 20),
            "alarm/gold/judge": -0.02, "alarm/gold/judge_low": -0.03, "alarm/gold/judge_high": -0.01,
            "alarm/gold/judge/score": 0.2, "alarm/gold/judge/score_low": 0.1, "alarm/gold/judge/score_high": 0.3,
        }  # fmt: skip
    rows[0] = {key: value for key, value in rows[0].items() if not key.startswith("policy/kl")}  # the base has none
    rows[0] |= {"eval/strict": 0.4, "eval/strict_low": 0.35, "eval/strict_high": 0.45}
    rows[-1] |= {"eval/strict": 0.6, "eval/strict_low": 0.55, "eval/strict_high": 0.65}
    return rows


def make_run(folder: Path, *, config: str = "seed: 0\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    head = {"command": "flowrl train <x>", "version": "0.1.0+abc", "machine": {"device": "cpu", "threads": 2}}
    (folder / "evaluation.json").write_text(json.dumps(head | {"settings": {"count": 10}} | summarise(samples())))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples()))
    (folder / "best.json").write_text(json.dumps({"best_proxy": {"iteration": 39, "mean": 0.7}}))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13", "device": HOSTILE}))
    images = np.full((4, 36, 36, 3), 90, np.uint8)
    save_grids(folder / "grids", images, images, [HOSTILE] * 4, [0.1] * 4, [0.2] * 4)
    return folder


def test_one_run_has_its_numbers(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "demo")])
    assert path == tmp_path / "demo" / "report.html"
    text = text_of(path)
    for part in (
        "50.0% [50.0, 50.0]", "75.0% [60.0, 90.0]", "+25.0 [+10.0, +40.0]", "20 paired pictures", "even", "<odd>",
        "flowrl train <x>", "0.1.0+abc", "device cpu, threads 2", "rollout 3 s (75.0%)", "calls/forward 55.0",
        "1,234.5",
        "ratio, step 0", "ratio, step 10", "clipped, step 0", "KL to the reference", "eval/strict", "seed: 0",
    ):  # fmt: skip
        assert part in text, part
    assert text.index("ratio, step 2") < text.index("ratio, step 10")
    assert sum(value.startswith("data:image/png;base64,") for value in parse(path).values) == 3
    assert not list((tmp_path / "demo").glob("*.part"))


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "one"), make_run(tmp_path / "b" / "two")]
    path = write_report(runs, tmp_path / "out" / "both.html")
    page = path.read_text()
    chart = re.search(r'<svg[^>]*aria-label="eval/strict".*?</svg>', page, re.DOTALL)
    assert chart is not None
    assert chart[0].count(">one</text>") == chart[0].count(">two</text>") == 1
    assert chart[0].count('stroke="') == 2
    assert text_of(path).count("+25.0 [+10.0, +40.0]") == 2
    assert "20, 20 paired pictures" in text_of(path)


def test_runs_of_the_same_name_keep_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a" / "demo"), make_run(tmp_path / "b" / "demo")]
    assert f"{tmp_path / 'b' / 'demo'}" in text_of(write_report(runs, tmp_path / "r.html"))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", config=f"# {HOSTILE}\n")
    summary = json.loads((run / "evaluation.json").read_text())
    summary |= {
        "command": HOSTILE,
        "machine": {HOSTILE: HOSTILE},
        "settings": {HOSTILE: HOSTILE},
        "warnings": [HOSTILE],
    }
    for side in ("base", "tuned", "difference"):
        summary[side]["by_tag"][HOSTILE] = summary[side]["by_tag"]["even"]
        summary[side]["scores"][HOSTILE] = None
    (run / "evaluation.json").write_text(json.dumps(summary))
    rows = [row | {f"reward/{HOSTILE}/mean": 0.5, f"time/{HOSTILE}_s": 1.0, f"calls/{HOSTILE}": 1} for row in metrics()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "grids" / 'a"><script>b.png').write_bytes((run / "grids" / "change.png").read_bytes())
    found = parse(write_report([run]))
    assert sum(HOSTILE in text for text in found.text) >= 6


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "evaluation.json", "grids"])
def test_a_missing_piece_is_stated(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "demo")
    (run / missing).rename(tmp_path / "away")
    (run / "samples.jsonl").unlink()
    text = text_of(write_report([run]))
    stated = {
        "config.yaml": "config.yaml is missing", "metrics.jsonl": "metrics.jsonl is missing or has no rows",
        "evaluation.json": "No evaluation yet", "grids": "No grids yet",
    }  # fmt: skip
    assert stated[missing] in text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("# flowrl 0.1.0: flowrl train demo\nseed: 0\n")
    text = text_of(write_report([tmp_path]))
    for missing in (
        "No reward in metrics.jsonl yet", "No evaluation yet", "No times", "so nothing was watched", "No environment.json",
        "Not two evaluations", "No figures on failures", "No pair of pictures whose score fell",
    ):  # fmt: skip
        assert missing in text, missing
    assert "flowrl train demo" in text and "0.1.0" in text


def test_samples_stand_in_for_a_missing_summary(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    (run / "evaluation.json").unlink()
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples()))
    assert "+25.0 [+10.0, +40.0]" in text_of(write_report([run]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", "{", "evaluation.json could not be read"),
        ("evaluation.json", "[]", "evaluation.json holds no object"),
        ("evaluation.json", '{"base": {"strict": 1}}', "evaluation.json: not a summary"),
        ("evaluation.json", '{"base": {"strict": {}, "scores": {}, "by_tag": {}}}', "not a summary"),
        ("metrics.jsonl", '{"iteration": 0}\n{"itera', "1 broken lines left out, the first is line 2"),
        ("metrics.jsonl", '\xff\xfe\n[1]\n{"iteration": 0, "lr": NaN}\n', "not finite at least once: lr"),
        ("metrics.jsonl", '{"iteration": "x", "score/mean": null, "lr": "a", "policy/kl": [1]}\n', "No policy figures"),
        ("metrics.jsonl", '{"iteration": 0, "group/live_fraction": 0.1}\n', "only 10% of the groups carried a signal"),
    ],
)  # fmt: skip
def test_broken_files_are_warnings(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = make_run(tmp_path / "demo")
    (run / name).write_bytes(content.encode("latin-1"))
    assert message in text_of(write_report([run]))


def test_no_gain_and_hacking_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    summary = json.loads((run / "evaluation.json").read_text())
    summary["difference"]["strict"] = {"mean": 0.01, "low": -0.02, "high": 0.04}
    (run / "evaluation.json").write_text(json.dumps(summary))
    assert "strict: the interval of the change includes 0" in text_of(write_report([run]))
    summary["difference"] |= {
        "strict": {"mean": -0.1, "low": -0.2, "high": -0.05}, "dense": {"mean": 0.1, "low": 0.05, "high": 0.2},
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(summary))
    text = text_of(write_report([run]))
    assert "look for reward hacking" in text and "includes 0" not in text


def test_user_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="no run directory given"):
        write_report([])
    assert not (tmp_path / "report.html").exists()


def test_a_large_picture_is_embedded_as_webp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.evaluation.page.MAX_PNG", 10)
    path = write_report([make_run(tmp_path / "demo")])
    assert sum(value.startswith("data:image/webp;base64,UklGR") for value in parse(path).values) == 3


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    assert write_report([run]).read_bytes() == write_report([run]).read_bytes()


def test_moving_mean_by_hand() -> None:
    """Nine neighbours 0..8 have mean 4 and standard deviation sqrt(7.5); the first has 0..4; None is left out."""
    mean, low, high = moving([float(i) for i in range(20)])
    assert mean[4] == 4.0 and mean[0] == 2.0
    assert low[4] == pytest.approx(4 - 2 * (7.5**0.5) / 3) and high[4] == pytest.approx(4 + 2 * (7.5**0.5) / 3)
    assert moving([None, 3.0])[0] == [3.0, 3.0]


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    row = metrics()[1]
    rows = [row | {"iteration": i} for i in range(5000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(write_report([run]).read_text()) < 700_000


# ------------------------------------------------------------------------------------- what the numbers of a run mean


def section(page: str, name: str) -> str:
    """The HTML of one section."""
    return page.split(f"<h2>{name}</h2>")[1].split("</section>")[0]


def test_the_alarm_is_told_with_its_evaluations(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "demo")]).read_text()
    told = section(page, "Alarm")
    assert "Fired first at iteration 39." in told and "Best evaluations: proxy 0.700 at iteration 39." in told
    assert told.count("<tr>") == 1 + 2  # the head, and iterations 20 (against) and 39 (fired)
    assert "gold/judge <b>-0.02</b>" in told and "[+0.1, +0.3]" in told


def test_a_quiet_alarm_says_how_often_it_looked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    rows = [row | ({"alarm/fired": 0, "alarm/streak": 0} if "alarm/fired" in row else {}) for row in metrics()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = section(write_report([run]).read_text(), "Alarm")
    assert "Not fired in 3 evaluations." in told and "<table" not in told


def test_scatters_join_the_evaluations(tmp_path: Path) -> None:
    """Three evaluations: score against gold and diversity, score and gold against KL, the base at KL 0."""
    told = section(write_report([make_run(tmp_path / "demo")]).read_text(), "Score against gold, diversity and KL")
    titles = ["gold: judge against held-out score", "diversity against held-out score"]
    titles += ["held-out score against KL to the base", "gold: judge against KL to the base"]
    for title in titles:
        chart = re.search(rf'<svg[^>]*aria-label="{title}".*?</svg>', told, re.DOTALL)
        assert chart is not None and chart[0].count("<circle") == 3, title
        assert all(f">{name}</text>" in chart[0] for name in (0, 20, 39))
    assert told.count("<svg") == 4


def test_without_a_kl_there_is_no_scatter_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    rows = [{key: 0.0 if key.startswith("policy/kl") else value for key, value in row.items()} for row in metrics()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run]).read_text()
    assert "against KL" not in section(page, "Score against gold, diversity and KL")
    assert "KL to the reference" not in section(page, "Policy")  # 0 throughout: there is no KL term


def test_failures_are_counted_and_their_errors_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    rows = samples()
    rows[5] |= {"score": None, "errors": {"judge": "TimeoutError: 120 s"}}
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_report([run])
    text = text_of(path)
    assert "samples without a score 20, at most 1 in an iteration" in text
    assert "evaluated pictures without a score 1 of 40" in text and "updates skipped 2" in text
    assert f"short: ValueError: {HOSTILE}" in text and "judge: TimeoutError: 120 s" in text
    assert 'aria-label="samples without a score"' in section(path.read_text(), "Failures")


def test_the_largest_losses_come_with_what_was_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    rows = samples()
    worst = next(row for row in rows if row["which"] == "tuned" and row["prompt_id"] == 3 and row["member"] == 0)
    worst |= {"score": 0.1, "detail": "no circle"}
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = section(write_report([run]).read_text(), "Largest losses")
    assert told.count("<tr>") == 2 and "1.00 to 0.10" in told and "-0.90" in told and "no circle" in told


def test_credit_by_step_and_shares_of_variance(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "demo")]).read_text()
    assert 'aria-label="mean |advantage|, step 2"' in section(page, "Ratio, clipping and credit by step")
    chart = re.search(r'<svg[^>]*aria-label="share of the score&#x27;s variance".*?</svg>', page, re.DOTALL)
    assert chart is not None and ">compositional</text>" in chart[0] and ">short</text>" in chart[0]
    assert 'aria-label="gradient norm"' in page and 'aria-label="learning rate"' in page
    assert "torch</th><td>2.13</td>" in section(page, "Environment")


def test_pictures_of_the_training_are_embedded_but_not_all(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    (run / "pictures" / "evaluations").mkdir(parents=True)
    small = (run / "grids" / "change.png").read_bytes()
    for iteration in (1, 16, 32, 48, 64, 80):
        (run / "pictures" / f"group-{iteration:06d}.png").write_bytes(small)
        (run / "pictures" / "evaluations" / f"{iteration:06d}.png").write_bytes(small)
    (run / "pictures" / "checkpoints.png").write_bytes(small)
    told = section(write_report([run]).read_text(), "Pictures")
    assert re.findall(r'alt="iteration (\d+)"', told) == ["1", "32", "48", "80"]
    assert told.count("<img") == 3 + 4 + 1 and 'alt="checkpoints"' in told


def test_wins_and_distances_are_shown_where_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    summary = json.loads((run / "evaluation.json").read_text())
    summary["difference"]["wins"] = {
        "judge": {"rate": {"mean": 0.7, "low": 0.6, "high": 0.8}, "better": 12, "same": 4, "worse": 4}, "none": None,
    }  # fmt: skip
    summary["distances"] = {"cells": {"base_tuned": {"kid": {"mean": 0.012, "std": 0.001, "size": 10}, "fid": 3.25}}}
    (run / "evaluation.json").write_text(json.dumps(summary))
    text = text_of(write_report([run]))
    assert "judge 70.0% [60.0, 80.0] 12 4 4" in text and "cells, base to tuned 0.012 std 0.001 - 3.25" in text


def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    """What a phone needs, as far as text shows it; test_browser.py opens the page."""
    page = write_report([make_run(tmp_path / "demo")]).read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table") == page.count('<div class="wide"><table')
    assert page.count("<img") == page.count('<div class="picture"><img')
    assert "max-width: 100%" in page and "overflow-x: auto" in page
