"""HPSv3, VideoReward and ImageReward: pixels in Qwen2-VL's order, states at reward tokens, the heads' formulas."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowrl.rewards import ranking
from flowrl.rewards.image_reward import ImageReward, image_reward
from flowrl.rewards.ranking import AXES, HpsV3, VideoReward, at_tokens, fitted_size, patches, relu_stack
from safetensors.torch import save_file
from transformers import Qwen2VLImageProcessorPil

from flowrl.errors import UserError

from .checkpoints import batch, pictures, save_qwen2vl

TOKENS = tuple(f"<|{axis}_reward|>" for axis in AXES)


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("hps")
    network = save_qwen2vl(folder, ("<|Reward|>",), "rate {prompt} . <|Reward|>")
    generator = torch.Generator().manual_seed(0)
    head = {}
    for place, (wide, narrow) in ((0, (16, 6)), (3, (6, 4)), (5, (4, 2))):
        head[f"rm_head.{place}.weight"] = torch.randn(narrow, wide, generator=generator)
        head[f"rm_head.{place}.bias"] = torch.randn(narrow, generator=generator)
    save_file(head, folder / "head.safetensors")
    return str(folder), network, head


def test_patches_are_in_the_processors_order() -> None:
    image = pictures(1, 56, 84)[0]
    theirs = Qwen2VLImageProcessorPil(min_pixels=1, max_pixels=10**6)(images=[image], return_tensors="np")
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    planes = ((image / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    ours, grid = patches(planes, 14, 2, 2)
    np.testing.assert_allclose(ours, theirs["pixel_values"], atol=1e-5)
    assert grid == tuple(theirs["image_grid_thw"][0]) == (1, 4, 6)


def test_frames_go_in_pairs() -> None:
    film = np.random.default_rng(0).normal(size=(3, 3, 28, 28)).astype(np.float32)
    rows, grid = patches(film, 14, 2, 2)
    assert grid == (2, 2, 2) and rows.shape == (8, 3 * 2 * 14 * 14)
    split = rows.reshape(2, 4, 3, 2, 14, 14)
    np.testing.assert_array_equal(split[0, 0, :, 1], film[1, :, :14, :14])
    np.testing.assert_array_equal(split[1, 3, :, 0], film[2, :, 14:, 14:])
    np.testing.assert_array_equal(split[1, 3, :, 1], film[2, :, 14:, 14:])  # the last frame once more


def test_sizes_are_multiples_within_limits() -> None:
    assert fitted_size(448, 448, 28, 200704, 200704) == (448, 448)
    assert fitted_size(1024, 1024, 28, 200704, 200704) == (448, 448)
    assert fitted_size(30, 50, 28, 1, 10**6) == (28, 56)
    for height, width in ((1000, 300), (17, 400), (64, 64), (2000, 2000)):
        high, wide = fitted_size(height, width, 28, 50_000, 200_704)
        assert high % 28 == wide % 28 == 0 and 50_000 <= high * wide <= 200_704
        assert abs(np.log(high / wide * width / height)) < 0.5


def test_states_at_tokens() -> None:
    hidden, ids = torch.arange(8.0).reshape(4, 2), torch.tensor([5, 9, 5, 7])
    assert at_tokens(hidden, ids, [7, 9]).tolist() == [[6, 7], [2, 3]]
    for token, times in ((5, 2), (1, 0)):
        with pytest.raises(ValueError, match=f"reward token {token} stands {times} times in the text, not once"):
            at_tokens(hidden, ids, [token])


def test_hpsv3_is_a_relu_head_on_the_state_at_its_token(hps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, network, head = hps
    monkeypatch.setattr(ranking, "PIXELS", 4 * 28 * 28)
    images, prompts = pictures(2, 56, 56), ["a red cat", "dog"]
    result = HpsV3(folder, device="cpu", dtype="float32").score(batch(images, prompts))
    reader = HpsV3(folder, device="cpu", dtype="float32").reader
    processed = Qwen2VLImageProcessorPil(min_pixels=1, max_pixels=10**6)
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        text = (
            "<|im_start|> system You are a helpful assistant. <|im_end|> <|im_start|> user <|vision_start|>"
            + "<|image_pad|>" * 4 + f"<|vision_end|> rate {prompt} . <|Reward|> <|im_end|> <|im_start|> assistant"
        )  # fmt: skip
        ids = reader.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        inputs = processed(images=[image], return_tensors="pt")
        with torch.no_grad():
            output = network(input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1), **inputs)
        x = output.last_hidden_state[0, ids[0].tolist().index(reader.tokens[0])].double().numpy()
        for place in (0, 3, 5):
            x = head[f"rm_head.{place}.weight"].double().numpy() @ x + head[f"rm_head.{place}.bias"].double().numpy()
            x = np.maximum(x, 0) if place < 5 else x
        scores.append(x)
    np.testing.assert_allclose(result.scores, [s[0] for s in scores], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.components["log_spread"], [s[1] for s in scores], rtol=1e-4, atol=1e-4)
    assert np.ptp(result.scores) > 1e-3
    tenth = HpsV3(folder, "0.1", "cpu", "float32").score(batch(images, prompts)).scores
    np.testing.assert_allclose(tenth, 0.1 * result.scores, rtol=1e-5)


def test_relu_stands_between_layers_only() -> None:
    layers = [(torch.tensor([[1.0], [-1.0]]), torch.zeros(2)), (torch.tensor([[1.0, 2.0]]), torch.tensor([-5.0]))]
    assert relu_stack(torch.tensor([[2.0], [-2.0]]), layers).tolist() == [[-3.0], [-1.0]]


def test_video_reward_standardises_its_axes(tmp_path: Path) -> None:
    save_qwen2vl(tmp_path, TOKENS, "{prompt} " + " . ".join(TOKENS))
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    save_file({"rm_head.weight": weight}, tmp_path / "head.safetensors")
    films = pictures(10, 56, 56).reshape(2, 5, 56, 56, 3)
    reward = VideoReward(str(tmp_path), fps=4, VQ=0.5, MQ=2.0, TA=1.0, device="cpu", dtype="float32")
    result = reward.score(batch(films, ["a cat", "a red dog"]))
    numbers = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
    for index, prompt in enumerate(("a cat", "a red dog")):
        raw = (reward.reader.hidden(films[index, ::2], prompt, video=True) @ weight[0]).tolist()
        axes = [(value - mean) / std for value, (mean, std) in zip(raw, numbers.values(), strict=True)]
        assert [float(result.components[axis][index]) for axis in numbers] == pytest.approx(axes, abs=1e-4)
        assert result.scores[index] == pytest.approx(0.5 * axes[0] + 2 * axes[1] + axes[2], abs=1e-4)
    assert np.ptp([float(v) for v in result.components["VQ"]]) > 1e-4
    with pytest.raises(UserError, match="video_reward: needs videos"):
        reward.score(batch(films[0]))
    with pytest.raises(UserError, match="video_reward: every axis has weight 0"):
        VideoReward(str(tmp_path), 4, 0, 0, 0)


def test_wrong_folders(hps: Any, tmp_path: Path) -> None:
    folder = hps[0]
    with pytest.raises(UserError, match=r"^hpsv3: no folder .*; give one with the network, head.safetensors and instr"):
        HpsV3("MizzenAI/HPSv3")
    with pytest.raises(UserError, match=r"cannot read '.*instruction.txt' .*; write the checkpoint's own instruction"):
        HpsV3(str(tmp_path))
    with pytest.raises(
        UserError, match=r"instruction.txt' must have <\|VQ_reward\|>, <\|MQ_reward\|>, <\|TA_reward\|> once"
    ):
        VideoReward(folder, 8)
    with pytest.raises(UserError, match=r"^hpsv3: preset is '26'; use native, 0.1$"):
        HpsV3(folder, "26")
    save_qwen2vl(tmp_path, ("<|Other|>",), "{prompt} <|Reward|>")
    with pytest.raises(
        UserError, match=r"the tokenizer of .* does not know '<\|Reward\|>'; save it with its reward tokens"
    ):
        HpsV3(str(tmp_path), device="cpu")


def test_image_reward_formula() -> None:
    generator = np.random.default_rng(0)
    sizes = [(5, 4), (4, 3), (3, 3), (3, 2), (2, 1)]
    layers = [(generator.normal(size=(o, i)), generator.normal(size=o)) for i, o in sizes]
    state = generator.normal(size=(6, 5))
    x = state
    for w, b in layers:
        x = x @ w.T + b
    found = image_reward(torch.tensor(state), [(torch.tensor(w), torch.tensor(b)) for w, b in layers])
    np.testing.assert_allclose(found.numpy(), (x[:, 0] - 0.16717362830052426) / 1.0333394966054072, rtol=1e-9)


def test_image_reward_calls_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(UserError, match=r"^image_reward: its package cannot be imported here .*; set executor: worker"):
        ImageReward()
    loaded: list[tuple[str, str]] = []

    def load(path: str, device: str) -> Any:
        loaded.append((path, device))
        return types.SimpleNamespace(score=lambda prompt, image: len(prompt) + np.asarray(image).mean() / 1000)

    module = types.ModuleType("ImageReward")
    vars(module)["load"] = load
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    images = pictures(2)
    scores = ImageReward(device="cpu").score(batch(images, ["ab", "abc"])).scores
    np.testing.assert_allclose(scores, [2 + images[0].mean() / 1000, 3 + images[1].mean() / 1000], rtol=1e-5)
    assert loaded == [("ImageReward-v1.0", "cpu")]
