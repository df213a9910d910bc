"""The small CLIP: its formula, its folder, and that it can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flowrl.rewards.tiny_clip import TinyClip, TinyClipConfig, TinyClipScore

from flowrl.errors import UserError
from flowrl.records import Request

from .checkpoints import batch, pictures

CONFIG = TinyClipConfig(("a", "red", "blue", "circle", "square"), side=16, width=16, dimensions=8, length=6)


def made(seed: int = 0) -> TinyClip:
    torch.manual_seed(seed)
    return TinyClip(CONFIG).eval()


def test_the_score_is_the_cosine(tmp_path: Path) -> None:
    network = made()
    network.save(str(tmp_path))
    images, prompts = pictures(3, 16, 16), ["A red circle.", "blue square", "a dog"]
    with torch.no_grad():
        u = network.vision(torch.tensor(images / 127.5 - 1, dtype=torch.float32).permute(0, 3, 1, 2)).double().numpy()
        v = network.encode_texts(network.tokens(prompts)).double().numpy()
    cosine = (u * v).sum(1) / np.sqrt((u**2).sum(1))
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    result = TinyClipScore(str(tmp_path), device="cpu").score(batch(images, prompts))
    np.testing.assert_allclose(result.scores, cosine, atol=1e-5)
    logit = TinyClipScore(str(tmp_path), "logit", device="cpu")
    np.testing.assert_allclose(
        logit.score(batch(images, prompts)).scores, np.exp(2.6592) * cosine, rtol=1e-4, atol=1e-4
    )
    assert logit.minimum == pytest.approx(-np.exp(2.6592), rel=1e-5)
    film = TinyClipScore(str(tmp_path), device="cpu").score(batch(images[None], prompts[:1])).scores
    single = TinyClipScore(str(tmp_path), device="cpu").score(batch(images, prompts[:1] * 3)).scores
    assert film[0] == pytest.approx(single.mean(), abs=1e-5)
    larger = TinyClipScore(str(tmp_path), device="cpu").score(batch(images.repeat(2, 1).repeat(2, 2), prompts)).scores
    assert np.abs(larger - cosine).max() < 0.1


def test_words() -> None:
    network = made()
    assert network.tokens(["A red, circle.", "dog blue " * 9, ""]).tolist() == [
        [2, 3, 5, 0, 0, 0], [1, 4, 1, 4, 1, 4], [0] * 6,
    ]  # fmt: skip
    with torch.no_grad():
        alone = network.encode_texts(network.tokens(["red circle"]))
        beside = network.encode_texts(network.tokens(["red circle", "a a a a a a", ""]))
    torch.testing.assert_close(alone[0], beside[0])
    assert torch.isfinite(beside).all()


def test_it_can_learn() -> None:
    """Eight steps of the symmetric CLIP loss on two colours bring each caption to its picture."""
    network = made()
    images = torch.zeros(2, 3, 16, 16)
    images[0, 0], images[1, 2] = 1, 1
    tokens, target = network.tokens(["red", "blue"]), torch.arange(2)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        logits = network.logit_scale.exp() * network.encode_images(images) @ network.encode_texts(tokens).T
        loss = torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tiny_clip: cannot read '.*config.json'"):
        TinyClipScore(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        TinyClipScore(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds another model; give a folder written by TinyClip.save"):
        TinyClipScore(str(tmp_path))
    made().save(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot be loaded: "):
        TinyClipScore(str(tmp_path))
    made().save(str(tmp_path))
    with pytest.raises(UserError, match=r"^tiny_clip: preset is '26'; use cosine, logit$"):
        TinyClipScore(str(tmp_path), "26")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use multiples of 8 and of 4"):
        TinyClip(TinyClipConfig((), side=12))


def test_its_gradient_is_that_of_the_score(tmp_path: Path) -> None:
    """value on float pictures equals score on the same uint8 ones, and differences agree with autograd."""
    made().save(str(tmp_path))
    images, prompts = pictures(2, 20, 20), ["a red circle", "blue square"]
    reward = TinyClipScore(str(tmp_path), "logit", device="cpu")
    requests = [Request(prompt, 0, 20, 20) for prompt in prompts]
    x = (torch.tensor(images).float().permute(0, 3, 1, 2) / 255).requires_grad_()
    value = reward.value(x, requests)
    np.testing.assert_allclose(value.detach(), reward.score(batch(images, prompts)).scores, atol=1e-5)
    value.sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ahead, behind = (reward.value(x + step * direction, requests).sum() for step in (1e-3, -1e-3))
    slope = float((ahead - behind) / 2e-3)
    assert slope == pytest.approx(float((x.grad * direction).sum()), rel=0.02, abs=1e-3)
    assert all(p.grad is None for p in reward.network.parameters())
