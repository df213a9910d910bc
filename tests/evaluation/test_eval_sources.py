"""``flowrl eval`` on a run, a checkpoint, a LoRA, a pipeline and a recipe; what it writes can be recomputed from its samples."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowrl import api
from flowrl.errors import UserError
from flowrl.evaluation.distances import fid, mmd2, polynomial
from flowrl.evaluation.measures import read, summary_of
from flowrl.evaluation.sources import find
from tests.evaluation.eval_parts import recipe, samples
from tests.training.helpers import small_config

REWARDS = [
    {"name": "tests.training.helpers:brightness"},
    {"name": "statistics", "role": "gold", "weight": 2.0, "args": {"statistic": "contrast"}},
]


@pytest.fixture(scope="module")
def run(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations with a learning rate that changes pictures, and a reference folder."""
    folder = tmp_path_factory.mktemp("runs")
    reference = folder / "reference"
    reference.mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(reference / f"{number}.png")
    config = small_config(
        tiny_sd3, run_dir=str(folder / "run"), iterations=2, rewards=REWARDS,
        **{"evaluation.count": 6, "evaluation.per_prompt": 2, "evaluation.reference": str(reference),
           "evaluation.features": [{"name": "cells"}, {"name": "tests.evaluation.eval_parts:Halves"}],
           "optimizer.lr": 5e-2, "batch.micro_batch": 8},
    )  # fmt: skip
    api.train(config)
    return folder / "run"


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def scores(folder: Path, which: str) -> list[dict[str, float]]:
    return [row["scores"] for row in samples(folder) if row["which"] == which]


def test_the_summary_follows_from_what_is_on_disk(run: Path) -> None:
    """Recomputed from samples.jsonl and features.safetensors alone, to the last digit."""
    written = summary(run)
    again = summary_of(read(run))
    assert {key: written[key] for key in again} == json.loads(json.dumps(again))
    assert set(again) == {"dense_reward", "level", "base", "tuned", "difference", "distances", "warnings"}
    assert {"command", "version", "seed", "iteration", "machine", "settings", "alarm"} <= set(written)


def test_the_summary_against_sums_by_hand(run: Path) -> None:
    written, rows = summary(run), samples(run)
    sides: dict[str, dict[tuple[int, int], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        sides[row["which"]][row["prompt_id"], row["member"]] = row
    assert len(sides["base"]) == len(sides["tuned"]) == 12 == len(rows) // 2
    changes = [
        sides["tuned"][key]["scores"]["brightness"] - row["scores"]["brightness"] for key, row in sides["base"].items()
    ]
    assert written["difference"]["scores"]["brightness"]["mean"] == pytest.approx(sum(changes) / 12)
    wins = written["difference"]["wins"]["brightness"]
    better, same = sum(c > 0 for c in changes), sum(c == 0 for c in changes)
    assert (wins["better"], wins["same"], wins["worse"]) == (better, same, 12 - better - same)
    assert wins["rate"]["mean"] == pytest.approx((better + same / 2) / 12)
    gold = [2 * row["scores"]["statistics"] for row in sides["tuned"].values()]
    assert written["tuned"]["gold"]["mean"] == pytest.approx(sum(gold) / 12)


def test_diversity_within_prompts(run: Path) -> None:
    """Two pictures a prompt: both have the one distance, and Vendi of two at similarity k has eigenvalues (1 +- k) / 2."""
    measured, rows = read(run), samples(run)
    features = measured.features["tuned/cells"].astype(float)
    tuned = [row for row in rows if row["which"] == "tuned"]
    for first in range(0, 12, 2):
        apart = math.sqrt(((features[first] - features[first + 1]) ** 2).mean())
        share = np.array([1 + s * math.exp(-(apart**2) / 0.02) for s in (1, -1)]) / 2
        for row in tuned[first : first + 2]:
            assert row["diversity"]["cells"]["spread"] == pytest.approx(apart, rel=1e-6)
            assert row["diversity"]["cells"]["vendi"] == pytest.approx(
                math.exp(-(share * np.log(share)).sum()), rel=1e-6
            )
    spreads = [row["diversity"]["cells"]["spread"] for row in tuned]
    assert summary(run)["tuned"]["diversity"]["cells"]["spread"]["mean"] == pytest.approx(np.mean(spreads))
    assert set(summary(run)["difference"]["diversity"]) == {"cells", "Halves"}


def test_distances_between_sets(run: Path) -> None:
    written, features = summary(run), read(run).features
    assert set(features) == {
        f"{side}/{name}" for side in ("base", "tuned", "reference") for name in ("cells", "Halves")
    }
    assert features["reference/cells"].shape == (9, 192) and features["tuned/Halves"].shape == (12, 6)
    found = written["distances"]["Halves"]
    assert set(found) == {"base_tuned", "base_reference", "tuned_reference"}
    assert found["tuned_reference"]["fid"] == pytest.approx(fid(features["tuned/Halves"], features["reference/Halves"]))
    rng = np.random.default_rng(0)
    base, tuned, values = features["base/Halves"], features["tuned/Halves"], []
    for _ in range(100):  # pairs stay pairs
        rows = rng.permutation(12)[:6]
        values.append(mmd2(base[rows], tuned[rows], polynomial, paired=True))
    assert found["base_tuned"]["kid"]["mean"] == pytest.approx(np.mean(values))
    told = "\n".join(written["warnings"])
    assert "fid (cells): 9 pictures cannot fill a covariance of 192 dimensions" in told
    assert "kid (cells): uncertain below 1,000 pictures (12 here)" in told


def test_a_run_is_evaluated_again_in_its_place(run: Path, tmp_path: Path) -> None:
    before = samples(run)
    text = api.evaluate(run, out=tmp_path)
    assert samples(tmp_path) == before
    for words in (
        "wins of tuned over base",
        "gold, weighted",
        "spread (cells)",
        "vendi (Halves)",
        "base to reference",
        "warning: kid",
    ):
        assert words in text
    assert str(tmp_path / "report.html") in text and (tmp_path / "grids" / "change.png").is_file()
    assert summary(tmp_path)["command"] == summary(run)["command"] and summary(tmp_path)["kind"] == "run"


def test_an_exported_lora_is_the_run_it_came_from(run: Path) -> None:
    api.evaluate(run / "export")
    out = run / "evaluations" / "export"
    for which in ("base", "tuned"):
        for a, b in zip(scores(out, which), scores(run, which), strict=True):
            assert a == pytest.approx(b, abs=1e-6)
    assert scores(out, "base") != scores(out, "tuned")
    assert summary(out)["command"].startswith("flowrl eval ") and summary(out)["kind"] == "lora"


def test_a_lora_alone_needs_a_recipe(run: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    alone = tmp_path / "lora"
    shutil.copytree(run / "export", alone)
    with pytest.raises(UserError, match=r"no run stands around it .* name a recipe that does, with --config"):
        api.evaluate(alone)
    file = recipe(
        tiny_sd3,
        tmp_path,
        rewards=REWARDS,
        **{"evaluation.count": 6, "evaluation.per_prompt": 2, "batch.micro_batch": 8},
    )
    api.evaluate(alone, ["evaluation.distances=[]"], config=str(file))
    assert scores(tmp_path / "out", "tuned") == [pytest.approx(row, abs=1e-6) for row in scores(run, "tuned")]
    assert summary(tmp_path / "out")["distances"] == {}


def test_a_checkpoint_is_judged_at_its_iteration(run: Path) -> None:
    api.evaluate(run / "checkpoints" / "iteration-00000001", ["evaluation.count=5"])
    out = run / "evaluations" / "iteration-00000001"
    rows = samples(out)
    assert {row["iteration"] for row in rows} == {1} and len(rows) == 20
    assert scores(out, "tuned")[:4] != scores(run, "tuned")[:4]
    assert summary(out)["iteration"] == 1


def test_a_pipelines_folder_is_judged_as_it_is(tiny_sd3: Path, run: Path, tmp_path: Path) -> None:
    """Adapter and picture size are read from its files."""
    api.evaluate(tiny_sd3, [
        f"run_dir={tmp_path / 'p'}", "rewards=[{name: 'tests.training.helpers:brightness'}]", "evaluation.count=6",
        "evaluation.per_prompt=2", "evaluation.steps=2", "batch.micro_batch=8", "evaluation.grid=2",
    ])  # fmt: skip
    found = scores(tmp_path / "p", "base")
    assert [row["brightness"] for row in found] == [
        pytest.approx(row["brightness"], abs=1e-6) for row in scores(run, "base")
    ]
    assert summary(tmp_path / "p")["tuned"] is None and (tmp_path / "p" / "grids" / "base.png").is_file()
    assert find(tiny_sd3, ["rewards=[{name: jpeg}]"]).config.model.height == 36


def test_results_never_land_on_a_run(tiny_sd3: Path, run: Path, tmp_path: Path) -> None:
    """A recipe whose run_dir holds a run: the base is judged beside the run's own results."""
    file = recipe(tiny_sd3, tmp_path, run_dir=str(run))
    assert find(str(file)).out == run / "evaluations" / "base"
    assert find(run).out == run and find(str(file), out=tmp_path / "x").out == tmp_path / "x"


def test_what_cannot_be_evaluated_is_named(tiny_sd3: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to evaluate; give the folder of a run"):
        find(tmp_path / "empty")
    other = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "iteration-00000001", other)
    with pytest.raises(UserError, match="a checkpoint's folder is called iteration-00000012"):
        find(other, config=str(recipe(tiny_sd3, tmp_path)))
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(UserError, match="holds a OtherPipeline, for which there is no adapter; there are"):
        find(strange)
    (strange / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(UserError, match=r"do not say how large its pictures are; add model\.height"):
        find(strange)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_encoder.a.lora_A.weight", "changes a text encoder as well"),
        ("unet.a.lora_A.weight", "it belongs to another model"),
    ],
)
def test_loras_that_would_be_judged_wrongly_are_refused(
    tiny_sd3: Path, tmp_path: Path, name: str, message: str
) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.zeros((2, 2), np.float32)}, tmp_path / "pytorch_lora_weights.safetensors")
    file = recipe(tiny_sd3, tmp_path)
    with pytest.raises(UserError, match=message):
        api.evaluate(tmp_path, config=str(file))
