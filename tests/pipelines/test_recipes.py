"""Every shipped recipe of a real model: it dry-runs as it is, and its algorithm runs two iterations on its tiny twin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from flowrl.pipelines import tiny, tiny_families

from flowrl import api
from flowrl.config import check, load, recipes
from flowrl.plan import plan_text
from tests.pipelines.families import WORDS

DATA = Path(__file__).parents[1] / "data"
LINES = {"geneval": DATA / "geneval_test_metadata.jsonl", "ocr": DATA / "ocr_test.txt"}
EMBEDDED = (
    "demo",
    "demo_hacking",
    "demo_hacking_kl",
    "demo_video",
    "sd15_ddpo",
    "sd15_dpok",
    "tiny_test",
    "credit_study",
    "ratio_study",
)
"""Recipes of the embedded model, which other tests run."""
REAL = [name for name in recipes() if name not in EMBEDDED and not name.startswith("text_")]
TWINS = {
    "sd3": lambda: tiny.build_sd3(_words(), layers=1, heads=1, head_dim=32, clip_layers=1, clip_hidden=32, text_length=64,
                                  vae_channels=(8, 16)),
    "flux": lambda: tiny_families.build_flux(_words(), text_length=64),
    "qwen_image": tiny_families.build_qwen_image,
    "wan": lambda: tiny_families.build_wan(_words(), text_length=64, layers=1),
    "stable_diffusion": lambda: tiny.build_sd15(_words(), size=16, text_length=64),
}  # fmt: skip
SIZES = {
    "sd3": (24, 24, 1),
    "flux": (16, 16, 1),
    "qwen_image": (16, 16, 1),
    "wan": (16, 16, 5),
    "stable_diffusion": (16, 16, 1),
}


def _words() -> list[str]:
    rows = [json.loads(line)["prompt"] for line in LINES["geneval"].read_text(encoding="utf-8").splitlines()]
    return sorted({*WORDS, *(word for row in rows for word in row.split())})


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("twins")
    for name, make in TWINS.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in TWINS}


def prompts(folder: Path, format: str) -> Iterator[str]:
    """Overrides that give training and evaluation a few rows in the recipe's own format."""
    file = folder / f"prompts.{'jsonl' if format == 'geneval' else 'txt'}"
    if format == "geneval":
        rows = LINES["geneval"].read_text(encoding="utf-8").splitlines()[:3]
    elif format == "ocr":
        rows = ['a photo of "red"', 'a photo of "blue"', 'a sign "left"']
    else:
        rows = ["a photo of a red circle", "a photo of a blue square", "a photo of a green circle"]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    for section in ("data", "evaluation"):
        yield f"{section}.prompts={file}"
        yield f"{section}.format={format}"


def words_for(name: str, folder: Path) -> list[str]:
    given = load(name)
    if given.data.prompts.startswith("world/"):
        return list(prompts(folder, "lines"))
    return list(prompts(folder, given.data.format))


@pytest.mark.parametrize("name", REAL)
def test_it_dry_runs(name: str, tmp_path: Path) -> None:
    """The plan of the recipe at full size, with prompt files of the user's: no config error, and the memory is stated."""
    text = plan_text(check(load(name, words_for(name, tmp_path))))
    assert "network, an iteration" in text and "latents kept for the update" in text


@pytest.mark.parametrize("name", REAL)
def test_it_states_its_evidence(name: str) -> None:
    file = resources.files("flowrl.configs") / f"{name}.yaml"
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "not run" in " ".join(head), f"{name}: say what was run here"


@pytest.mark.parametrize("name", REAL)
def test_two_iterations_on_the_tiny_twin(name: str, twins: dict[str, Path], tmp_path: Path) -> None:
    """The recipe's kernel, window, guidance, objective, KL and optimizer; small sizes, and a reward without weights."""
    given = load(name)
    height, width, frames = SIZES[given.model.adapter]
    steps = min(given.rollout.steps, 8)
    config = load(name, [
        *words_for(name, tmp_path), f"model.path={twins[given.model.adapter]}", f"model.height={height}",
        f"model.width={width}", f"model.frames={frames}", "model.dtype=fp32", "model.lora={rank: 2, alpha: 4.0}",
        f"run_dir={tmp_path / 'run'}", "iterations=2", f"rollout.steps={steps}",
        f"batch={{groups: {given.objective.updates}, group_size: 2, micro_batch: 4}}",
        "rewards=[{name: 'tests.pipelines.test_families:redness'}]", "tracking={progress: false}",
        "evaluation.count=1", "evaluation.per_prompt=1", "evaluation.steps=2", "evaluation.every=0", "evaluation.grid=1",
        "checkpoint.every=0",
    ])  # fmt: skip
    api.train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "policy/ratio_mean" in row]
    assert len(rows) == 2 and all(row["update/skipped"] == 0 for row in rows)
    assert all(row["optimizer/grad_norm"] > 0 for row in rows)
    assert (tmp_path / "run" / "export").is_dir()
