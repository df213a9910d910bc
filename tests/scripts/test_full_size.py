"""The full-size measurement: its tiny twin runs, its architectures have the published sizes, and no GPU is said so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "full_size.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("full_size", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["sd35", "flux"])
def test_the_tiny_twin_runs_the_recipe(script, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert script.main([model, "--tiny", "--out", str(out), "--peak-tflops", "1"]) == 0
    found = json.loads(out.read_text())
    assert found["recipe"] == script.RECIPES[model] and found["iterations"] == 3 and found["skipped_updates"] == 0
    assert found["images_per_s"] == pytest.approx(found["samples"] / found["seconds"]["time/iteration_s"])
    assert found["model_flop_utilisation"] == pytest.approx(found["tflops_per_s"]) and found["tflops_per_s"] > 0
    assert 0 < found["backward_flops_a_sample"] < 3 * found["forward_flops_a_sample"]
    assert found["peak_memory_bytes"] is None and found["device"] == "cpu"


def test_without_a_gpu_it_measures_nothing(
    script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(["sd35"]) == 2
    assert "no GPU here, so nothing is measured; --tiny" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "billions"), [("sd35", 2.243), ("flux", 11.901)])
def test_the_architectures_have_the_published_sizes(script, model: str, billions: float) -> None:
    """Counted on the meta device: parameters of the network alone."""
    with torch.device("meta"):
        network = getattr(script, f"{model}_network")()
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_recipes_check_at_full_size(script, tmp_path: Path) -> None:
    for model in script.RECIPES:
        config = script.config_of(model, False, tmp_path, [])
        assert config.iterations == 3 and config.model.train == "lora" and config.model.dtype == "bf16"
        assert config.model.height == 512
