"""The field's own files, end to end: every GenEval row becomes atoms, every OCR target is found, a bad row has file and line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from flowrl.pipelines.tiny import build_sd3
from flowrl.rewards.compositional import judge
from flowrl.rewards.geneval import flow_grpo_verdict
from flowrl.rewards.ocr import targets

from flowrl import api
from flowrl.data.prompts import read_prompts
from flowrl.errors import UserError
from tests.evaluation.eval_parts import READS, distance, picture_of, recipe, samples

DATA = Path(__file__).parents[1] / "data"
GENEVAL, OCR = DATA / "geneval_test_metadata.jsonl", DATA / "ocr_test.txt"


@pytest.fixture(scope="module")
def wide_sd3(tmp_path_factory: pytest.TempPathFactory, world_words: list[str]) -> Path:
    """A tiny model whose text encoders take the files' prompts whole: they spell what is no word of the world."""
    folder = tmp_path_factory.mktemp("wide_sd3")
    size = {"layers": 1, "heads": 1, "head_dim": 32, "clip_layers": 1, "clip_hidden": 32, "vae_channels": (8, 16, 16)}
    build_sd3(world_words, text_length=320, **size).save_pretrained(folder)
    return folder


def test_every_geneval_row_is_judged_right_by_its_own_atoms() -> None:
    """A picture that shows what the row asks for passes; one object fewer, one more, or another relation fails."""
    rows = read_prompts(GENEVAL, "geneval")
    assert len(rows) == 2212
    kinds: Counter[str] = Counter()
    for row in rows:
        right = picture_of(row.metadata)
        verdict = judge(row.metadata, right)
        assert verdict.strict and verdict.dense == 1.0 and not verdict.reason, row
        assert flow_grpo_verdict(row.metadata, right).strict
        for wrong in (right[1:], [*right, replace(right[0])], []):
            assert not judge(row.metadata, wrong).strict, row
        include = row.metadata["include"]
        if any("position" in clause for clause in include):
            kinds["position"] += 1
            mirrored = [replace(d, box=tuple(-edge for edge in (*d.box[2:], *d.box[:2]))) for d in right]
            assert not judge(row.metadata, mirrored).strict, row
        if any("color" in clause for clause in include):
            kinds["color"] += 1
            assert not judge(row.metadata, [replace(d, color="grey") for d in right]).strict, row
    assert kinds == {"position": 400, "color": 776}


def test_every_ocr_target_is_found_with_and_without_metadata() -> None:
    rows = read_prompts(OCR, "ocr")
    assert len(rows) == 1018
    for row in rows:
        assert targets(row.prompt, row.metadata) == targets(row.prompt, {}) == [row.prompt.split('"')[1]]


def test_geneval_rows_end_to_end(wide_sd3: Path, tmp_path: Path) -> None:
    """A detector that sees two wine glasses everywhere: right for the rows that ask for just that."""
    count = 60
    file = recipe(
        wide_sd3, tmp_path, **{"evaluation.prompts": str(GENEVAL), "evaluation.format": "geneval", "evaluation.count": count,
        "evaluation.steps": 1, "batch.micro_batch": 16,
        "rewards": [{"name": "compositional", "args": {"detector": "tests.evaluation.eval_parts:two_glasses"}}]},
    )  # fmt: skip
    text = api.evaluate(str(file))
    rows, asked = samples(tmp_path / "out"), read_prompts(GENEVAL, "geneval")[:count]
    assert [(r["prompt"], r["tag"]) for r in rows] == [(p.prompt, p.metadata["tag"]) for p in asked]
    assert [r["strict"] for r in rows] == ["two wine glasses" in p.prompt for p in asked] and rows[0]["strict"]
    assert all(0 < r["components"]["compositional"]["dense"] <= 1 and r["errors"] == {} for r in rows)
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    block = summary["base"]["accuracy"]["compositional/strict"]
    by_tag = {tag: [r["strict"] for r in rows if r["tag"] == tag] for tag in {r["tag"] for r in rows}}
    assert len(by_tag) == 6
    for tag, verdicts in by_tag.items():
        assert block["by_tag"][tag]["mean"] == pytest.approx(sum(verdicts) / len(verdicts))
    assert block["tag_mean"]["mean"] == pytest.approx(sum(sum(v) / len(v) for v in by_tag.values()) / 6)
    assert summary["base"]["prompts"] == len({p.prompt for p in asked})
    assert "strict (compositional), mean of tags" in text and "counting" in text


def test_ocr_rows_end_to_end(wide_sd3: Path, tmp_path: Path) -> None:
    count = 24
    file = recipe(
        wide_sd3, tmp_path, **{"evaluation.prompts": str(OCR), "evaluation.format": "ocr", "evaluation.count": count,
        "evaluation.steps": 1, "batch.micro_batch": 16, "rewards": [{"name": "tests.evaluation.eval_parts:FakeOcr"}]},
    )  # fmt: skip
    text = api.evaluate(str(file))
    rows = samples(tmp_path / "out")
    read = READS.replace(" ", "").lower()
    for row, asked in zip(rows, read_prompts(OCR, "ocr")[:count], strict=True):
        wanted = "".join(asked.metadata["target"].split()).lower()
        found = row["components"]["FakeOcr"]
        assert found["exact"] == float(wanted == read)
        assert found["edit"] == pytest.approx(1 - distance(read, wanted) / max(len(read), len(wanted)), abs=1e-6)
        least = min(distance(read, wanted), len(wanted))
        assert found["substring"] == pytest.approx(1.0 if wanted in read else 1 - least / len(wanted), abs=1e-6)
    assert rows[0]["components"]["FakeOcr"]["exact"] == 1 and rows[0]["detail"] == "spring  COLLECTION 2024"
    block = json.loads((tmp_path / "out" / "evaluation.json").read_text())["base"]["accuracy"]
    assert block["FakeOcr/exact"]["overall"]["mean"] == pytest.approx(1 / count)
    assert set(block) == {"FakeOcr/exact", "FakeOcr/edit", "FakeOcr/substring"}
    assert "exact (FakeOcr)" in text and "4.2%" in text


@pytest.mark.parametrize(
    ("form", "good", "bad", "message"),
    [
        ("geneval", GENEVAL, '{"tag": "counting", "include": [{"class": "cat", "count": 0}], "prompt": "no cats"}',
         'include[0]: "count" must be an integer of at least 1, got 0'),
        ("ocr", OCR, "a sign that says hello", "expected one target in straight double quotes, found 0 quote characters"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_before_a_model_is_loaded(
    tiny_sd3: Path, tmp_path: Path, form: str, good: Path, bad: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / good.name
    broken.write_text(good.read_text().split("\n")[0] + "\n" + bad + "\n")
    file = recipe(tiny_sd3, tmp_path, **{"evaluation.prompts": str(broken), "evaluation.format": form})
    monkeypatch.setattr("flowrl.training.build.bare_adapter", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="2: ") as caught:
        api.evaluate(str(file))
    assert str(caught.value).startswith(f"{broken}:2: ") and message in str(caught.value)


def test_a_reward_without_its_metadata_says_so(tiny_sd3: Path, tmp_path: Path) -> None:
    """Prompts without targets: no score is made up, and the summary says why there is none."""
    file = recipe(tiny_sd3, tmp_path, **{"rewards": [{"name": "tests.evaluation.eval_parts:FakeOcr"}]})
    text = api.evaluate(str(file))
    assert "warning: FakeOcr: 4 of 4 pictures have no score; the first: fake_ocr: no target: give metadata" in text
    assert all(row["score"] is None and row["scores"] == {"FakeOcr": None} for row in samples(tmp_path / "out"))
