"""Dual-encoder rewards: every preset's formula, preprocessing, and what a wrong checkpoint says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowrl.rewards.clip import ClipScore, HpsV2, PickScore, Preset, SigLip2, apply_preset, letterbox
from PIL import Image

from flowrl.errors import UserError

from .checkpoints import batch, clip_processor, pictures, save_classifier, save_clip, save_siglip

PROMPTS = ["a red cat", "dog", "a red cat", "two blue birds over the sea and far away"]
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("clip")
    return str(folder), save_clip(folder)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("siglip")
    return str(folder), save_siglip(folder)


def crop_to_square(picture: np.ndarray[Any, Any], side: int = 32) -> np.ndarray[Any, Any]:
    """CLIP's own preprocessing in PIL: shortest side, bicubic, centre crop."""
    height, width = picture.shape[:2]
    ratio = side / min(height, width)
    image = Image.fromarray(picture).resize((int(width * ratio), int(height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def text_ids(text: str, length: int = 32) -> list[int]:
    """The letters of each word, the last one marked, between the start and the end token."""
    ids = [
        3 + "abcdefghijklmnopqrstuvwxyz".index(c) + 26 * (i == len(w) - 1)
        for w in text.split()
        for i, c in enumerate(w)
    ]
    return [1, *ids[: length - 2], 2]


def cosines(network: Any, squares: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """cos of picture i and prompt i, one at a time, without padding, in numpy after the towers."""
    found = []
    for square, prompt in zip(squares, PROMPTS, strict=True):
        pixels = torch.tensor(((square / 255 - MEAN) / STD).transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.no_grad():
            u = network.get_image_features(pixel_values=pixels).pooler_output[0].double().numpy()
            v = network.get_text_features(input_ids=torch.tensor([text_ids(prompt)])).pooler_output[0].double().numpy()
        found.append(u @ v / math.sqrt((u @ u) * (v @ v)))
    return np.array(found)


def test_clipscore_and_pickscore_presets(clip: tuple[str, Any]) -> None:
    folder, network = clip
    images = pictures()
    cos = cosines(network, [crop_to_square(p) for p in images])
    assert np.ptp(cos) > 0.02
    s = math.exp(2.6592)
    expected = {
        (ClipScore, ""): cos,
        (ClipScore, "30"): s * cos / 30,
        (ClipScore, "paper"): 2.5 * np.clip(cos, 0, None),
        (ClipScore, "torchmetrics"): 100 * np.clip(cos, 0, None),
        (PickScore, ""): s * cos,
        (PickScore, "26"): s * cos / 26,
        (PickScore, "mixgrpo"): (s * cos - 18) / 8,
        (PickScore, "cosine"): cos,
    }
    for (kind, preset), values in expected.items():
        reward = kind(folder, preset, device="cpu")  # type: ignore[operator]
        result = reward.score(batch(images, PROMPTS))
        np.testing.assert_allclose(result.scores, values, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result.components["cosine"], cos, atol=1e-5)
        assert result.scores.dtype == np.float32 and result.valid.all() and (result.scores >= reward.minimum).all()


def test_hpsv2_letterboxes(clip: tuple[str, Any]) -> None:
    folder, network = clip
    images = pictures(height=20, width=41)
    boxed = []
    for picture in images:
        small = np.asarray(Image.fromarray(picture).resize((32, 16), Image.Resampling.BICUBIC))
        canvas = np.zeros((32, 32, 3), np.uint8)
        canvas[8:24] = small
        boxed.append(canvas)
    np.testing.assert_array_equal(letterbox(images, 32), boxed)
    scores = HpsV2(folder, device="cpu").score(batch(images, PROMPTS)).scores
    np.testing.assert_allclose(scores, cosines(network, boxed), atol=1e-5)
    assert np.abs(scores - ClipScore(folder, device="cpu").score(batch(images, PROMPTS)).scores).max() > 1e-2


def test_letterbox_puts_an_odd_remainder_last() -> None:
    tall = np.full((1, 10, 5, 3), 9, np.uint8)
    columns = letterbox(tall, 10)[0, 0, :, 0]
    assert columns.tolist() == [0, 0, 9, 9, 9, 9, 9, 0, 0, 0]
    assert letterbox(np.full((1, 8, 8, 3), 7, np.uint8), 8).min() == 7


def test_siglip_probability(siglip: tuple[str, Any]) -> None:
    folder, network = siglip
    images = pictures(height=32, width=32)
    with torch.no_grad():
        pixels = torch.tensor((images / 127.5 - 1).transpose(0, 3, 1, 2), dtype=torch.float32)
        ids = [ids + [2] * (32 - len(ids)) for ids in map(text_ids, PROMPTS)]
        out = network(input_ids=torch.tensor(ids), pixel_values=pixels)
    logits = out.logits_per_image.diagonal().double().numpy()
    values = {"": 1 / (1 + np.exp(-logits)), "logit": logits, "cosine": (logits + 0.7) / math.exp(1.2)}
    for preset, expected in values.items():
        reward = SigLip2(folder, preset, device="cpu")
        np.testing.assert_allclose(reward.score(batch(images, PROMPTS)).scores, expected, atol=2e-5)
    assert np.ptp(logits) > 0.1 and 0 <= SigLip2(folder, device="cpu").minimum < 0.2


def test_worked_numbers() -> None:
    cos = np.array([0.2, -0.1], np.float32)
    np.testing.assert_allclose(apply_preset(cos, 100, 0, PickScore.presets["26"]), [0.769231, -0.384615], atol=1e-6)
    np.testing.assert_allclose(apply_preset(cos, 100, 0, PickScore.presets["mixgrpo"]), [0.25, -3.5], atol=1e-6)
    np.testing.assert_allclose(apply_preset(cos, 100, 0, ClipScore.presets["30"]), [0.666667, -0.333333], atol=1e-6)
    np.testing.assert_allclose(apply_preset(cos, 100, 0, ClipScore.presets["paper"]), [0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(apply_preset(cos, 100, 0, HpsV2.presets["100"]), [20, -10], atol=1e-5)
    np.testing.assert_allclose(apply_preset(cos, 100, 0, ClipScore.presets["torchmetrics"]), [20, 0], atol=1e-5)
    np.testing.assert_allclose(apply_preset(cos, 10, -2, Preset(sigmoid=True)), [0.5, 1 / (1 + math.e**3)], atol=1e-6)


def test_a_video_scores_the_mean_of_its_frames(clip: tuple[str, Any]) -> None:
    reward = ClipScore(clip[0], stride=2, device="cpu")
    frames = pictures(10)
    video = reward.score(batch(frames.reshape(2, 5, *frames.shape[1:]), PROMPTS[:2])).scores
    single = [reward.score(batch(frames[5 * i : 5 * i + 5], [PROMPTS[i]] * 5)).scores for i in range(2)]
    np.testing.assert_allclose(video, [s[[0, 2, 4]].mean() for s in single], atol=1e-5)


def test_a_score_does_not_depend_on_its_neighbours(clip: tuple[str, Any]) -> None:
    reward, images = ClipScore(clip[0], device="cpu"), pictures()
    alone = [reward.score(batch(images[i : i + 1], PROMPTS[i : i + 1])).scores[0] for i in range(4)]
    np.testing.assert_allclose(reward.score(batch(images, PROMPTS)).scores, alone, atol=1e-5)
    reward.offload()
    reward.onload()
    np.testing.assert_allclose(reward.score(batch(images, PROMPTS)).scores, alone, atol=1e-5)


def test_wrong_arguments_and_checkpoints(clip: tuple[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^clipscore: preset is '26'; use cosine, 30, paper, torchmetrics$"):
        ClipScore(clip[0], "26")
    with pytest.raises(UserError, match=r"^pickscore: stride is 0; use 1 or more$"):
        PickScore(clip[0], stride=0)
    with pytest.raises(UserError, match=r"device is 'gpu'; use auto, cpu, cuda"):
        ClipScore(clip[0], device="gpu")
    with pytest.raises(UserError, match=r"dtype is 'half'; use float32, bfloat16, float16"):
        ClipScore(clip[0], dtype="half")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^clipscore: no folder '.*/none'; give a folder with the model, or a hub id"):
        ClipScore(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^hpsv2: .* cannot be loaded as AutoModel: .*save_pretrained"):
        HpsV2(str(tmp_path))
    save_classifier(tmp_path, ("a", "b"))
    with pytest.raises(UserError, match=r"is a ViTModel, which has no text side|lacks \d+ weights of ViTModel"):
        SigLip2(str(tmp_path))


def test_weights_that_a_checkpoint_lacks_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "text_projection" not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        UserError, match=r"lacks 1 weights of CLIPModel \(text_projection.weight, ...\): it holds another"
    ):
        ClipScore(str(tmp_path), device="cpu")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        ClipScore(str(tmp_path), device="cpu")


def test_a_missing_processor_says_so(tmp_path: Path, clip: tuple[str, Any]) -> None:
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded as an image processor: .* preprocessor and tokenizer files"):
        PickScore(str(tmp_path), device="cpu")
    assert PickScore(str(tmp_path), device="cpu", processor=clip[0]).name == "pickscore"
    assert clip_processor().size is not None
