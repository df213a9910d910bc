"""The model card of an export: it parses as the hub's cards do, says what it must, and names no path of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from flowrl import api
from flowrl.config import load
from flowrl.evaluation.card import card_text, write_card
from tests.training.helpers import small_config


def part(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def side(mean: float) -> dict:
    return {"pictures": 8, "prompts": 4, "strict": part(mean), "dense": part(mean), "scores": {"ocr": part(mean)},
            "by_tag": {}, "gold": None, "accuracy": {}, "diversity": {}}  # fmt: skip


EVALUATION = {"iteration": 7, "level": 0.95, "dense_reward": "ocr", "base": side(0.25), "tuned": side(0.5)}


def test_a_card_of_a_hub_model_parses_and_says_what_it_must(tmp_path: Path) -> None:
    prompts = tmp_path / "secret-folder" / "ocr_train.txt"
    prompts.parent.mkdir()
    prompts.write_text('a sign "x"\n')
    rewards = f"rewards=[{{name: ocr}}, {{name: '{tmp_path}/mine.py:score'}}]"
    words = [f"data.prompts={prompts}", f"evaluation.prompts={prompts}", f"run_dir={tmp_path}/my-run"]
    config = load("sd35_ocr", [*words, "model.revision=abc123", rewards])
    (tmp_path / "my-run" / "grids").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "my-run" / "grids" / "tuned.png")
    file = write_card(tmp_path / "my-run", config, EVALUATION)
    assert (file.parent / "samples.png").is_file() and file == tmp_path / "my-run" / "export" / "README.md"
    card = ModelCard.load(file)
    data = card.data
    assert data.base_model == "stabilityai/stable-diffusion-3.5-medium" and data.base_model_relation == "adapter"
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("diffusers", "text-to-image", "my-run")
    assert {"lora", "flowrl", "flow_grpo"} <= set(data.tags)
    assert {(r.metric_type, r.metric_value) for r in data.eval_results} == {("ocr", 0.5), ("strict", 0.5)}
    text = card.text
    for expected in (
        "stabilityai/stable-diffusion-3.5-medium at revision abc123", "ocr_train.txt", "arXiv:2505.05470",
        "- ocr: weight 1, trained on. Licence: Apache-2.0", "- mine.py:score: weight 1", "![samples](samples.png)",
        "7 iterations", "load_lora_weights",
    ):  # fmt: skip
        assert expected in text, expected
    assert str(tmp_path) not in file.read_text() and "secret-folder" not in file.read_text()


def test_a_folder_is_named_by_its_own_name_and_its_licence_is_read(tiny_sd3: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "hidden" / "house-model"
    shutil.copytree(tiny_sd3, model)
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: house-licence\n---\n# hello\n")
    config = small_config(model, **{"model.train": "full"})
    text = card_text(config, EVALUATION, pictures=False)
    front = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in front and front["license"] == "house-licence" and "lora" not in front["tags"]
    assert "house-model. Licence: house-licence." in text and "hidden" not in text and "samples.png" not in text
    assert "part of flowrl. Licence: apache-2.0" in text


@pytest.mark.parametrize(
    ("words", "task"),
    [(["model.adapter=wan", "model.frames=5"], "text-to-video"), (["model.adapter=wan_image"], "image-to-video"),
     (["model.adapter=flux_kontext"], "image-to-image")],
)  # fmt: skip
def test_tasks_are_the_hubs_names(words: list[str], task: str) -> None:
    config = load("sd3_fast", ["model.path=a/b", *words])
    assert f"pipeline_tag: {task}" in card_text(config, EVALUATION, pictures=False)


def test_a_run_leaves_a_card_with_its_samples(tiny_sd3: Path, tmp_path: Path) -> None:
    api.train(small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=1, **{"evaluation.count": 2}))
    export = tmp_path / "run" / "export"
    assert {"README.md", "samples.png", "pytorch_lora_weights.safetensors"} <= {p.name for p in export.iterdir()}
    card = ModelCard.load(export / "README.md")
    assert card.data.eval_results and str(tmp_path) not in card.content and str(tiny_sd3.parent) not in card.content
