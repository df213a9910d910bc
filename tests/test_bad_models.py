"""Models, sizes, prompts and machines that do not fit: one case each of the list, told before weights are read.

Each through the command line: exit code 2, an error that names the key and says what would fit, and no run folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flowrl.pipelines import tiny_families
from flowrl.pipelines.sd3 import Sd3Adapter

from flowrl import fit
from flowrl.cli import main
from flowrl.config.render import to_yaml
from tests.pipelines.families import WORDS
from tests.training.helpers import small_config


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "some-flux"
    tiny_families.build_flux(WORDS).save_pretrained(folder)
    return folder


def no_loading(path: str, dtype: object, device: object) -> None:
    raise AssertionError("weights were read")


def say(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    """What flowrl train says, once it has refused."""
    recipe = tmp_path / "recipe.yaml"
    run = tmp_path / "run"
    recipe.write_text(to_yaml(small_config(model, run_dir=str(run), **changes)))
    assert main(["train", str(recipe)]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and not run.exists()
    return said.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture(autouse=True)
def _weights_stay_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sd3Adapter, "load", no_loading)


def test_a_missing_prompt_file(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tiny_sd3, tmp_path, capsys, **{"data.prompts": "nowhere.txt"})
    assert said.endswith("data.prompts: no file 'nowhere.txt'; check the path (it is relative to where you run)")


def test_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tmp_path / "no/such/model", tmp_path, capsys)
    assert "model.path: no folder" in said and "give one of them, or embedded" in said


def test_a_folder_without_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    said = say(tmp_path / "model", tmp_path, capsys)
    assert said.startswith("model.path: ") and "holds no model_index.json" in said


def test_a_checkpoint_of_another_family(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(flux, tmp_path, capsys)
    assert said == (
        f"model.path: {flux} holds a FluxPipeline, and this adapter drives StableDiffusion3Pipeline; use model.adapter=flux"
    )


def test_a_checkpoint_that_no_adapter_drives(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    index = json.loads((flux / "model_index.json").read_text()) | {"_class_name": "MochiPipeline"}
    (other / "model_index.json").write_text(json.dumps(index))
    said = say(other, tmp_path, capsys)
    assert said.endswith("holds a MochiPipeline, and this adapter drives StableDiffusion3Pipeline; no adapter drives it; "
                         "give another model")  # fmt: skip


def test_a_resolution_that_does_not_divide(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tiny_sd3, tmp_path, capsys, **{"model.height": 40})
    assert said == "model.height: 40 is not a multiple of 12, which this model needs; use 36"


def test_frames_of_a_picture_model(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tiny_sd3, tmp_path, capsys, **{"model.frames": 5})
    assert said == "model.frames: 5, and this model makes pictures; use 1"


def test_a_lora_group_that_does_not_exist(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tiny_sd3, tmp_path, capsys, **{"model.lora.targets": ["norms"]})
    assert said == "model.lora.targets: unknown group 'norms'; use attention, feed_forward"


def test_a_lora_target_that_matches_nothing(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"attention": ("attn.to_q",), "adapters": ("adapter.down",)}
    monkeypatch.setattr(Sd3Adapter, "target_groups", groups)
    said = say(tiny_sd3, tmp_path, capsys, **{"model.lora.targets": ["attention", "adapters"]})
    assert said == (
        "model.lora.targets: adapters matches no layer of this transformer (layers that end in adapter.down); use attention"
    )


def test_a_prompt_longer_than_the_encoder_takes(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red circle\n" + "a red circle " * 9 + "\n")
    said = say(tiny_sd3, tmp_path, capsys, **{"data.prompts": str(prompts)})
    assert (
        said.startswith("prompts (data or evaluation): one of ")
        and "tokens is longer than the 13 that the text encoder" in said
    )
    assert "shorten it: 'a red circle a red circle" in said


def test_a_process_count_that_cannot_split_the_batch(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowrl.cli.world_size", lambda environment: 5)
    said = say(tiny_sd3, tmp_path, capsys)
    assert "batch.groups: 2 groups cannot be shared out over 5 processes" in said


def test_a_gpu_too_small(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowrl.training.build.device_bytes", lambda device: fit.GIB >> 12)
    said = say(tiny_sd3, tmp_path, capsys)
    assert (
        said.startswith("model: the plan takes about ") and "and the accelerator has 0.25 MiB; use a larger one" in said
    )


def test_a_missing_attention_package(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tiny_sd3, tmp_path, capsys, **{"model.attention": "flash", "model.dtype": "bf16"})
    assert said.startswith("model.attention: flash needs flash-attn >= 2.6.3, which is not installed")


def test_attention_in_float32(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tiny_sd3, tmp_path, capsys, **{"model.attention": "xformers"})
    assert "model.attention: xformers computes in bf16 or fp16, and model.dtype is fp32; use one of those" in said


def test_a_damaged_weights_file(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(flux, broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 32)
    said = say(broken, tmp_path, capsys, **{"model.adapter": "flux"})
    assert "diffusion_pytorch_model.safetensors is no safetensors file (" in said and "download it again" in said


def test_fp16_in_shards(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(tiny_sd3, tmp_path, capsys, **{"model.dtype": "fp16", "distributed.sharding": "fsdp2"})
    assert "model.dtype: fp16 scales the gradients of whole weights" in said and "use bf16" in said
