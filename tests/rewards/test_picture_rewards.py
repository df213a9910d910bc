"""Aesthetic score, likeness to a reference, the unsafe-picture gate: their formulas on tiny networks."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowrl.rewards.aesthetic import Aesthetic
from flowrl.rewards.safety import NsfwGate
from flowrl.rewards.similarity import ClipSimilarity, DinoSimilarity
from safetensors.torch import save_file

from flowrl.errors import UserError

from .checkpoints import batch, pictures, save_classifier, save_clip, save_dino

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
SQUARE = pictures(5, 32, 32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("clip")
    return str(folder), save_clip(folder)


def embed_clip(network: Any, images: Any) -> Any:
    pixels = torch.tensor(((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        found = network.get_image_features(pixel_values=pixels).pooler_output.double().numpy()
    return found / np.sqrt((found**2).sum(1, keepdims=True))


def save_head(path: Path, sizes: tuple[int, ...] = (8, 6, 5, 4, 3, 1)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for place, (wide, narrow) in zip((0, 2, 4, 6, 7), itertools.pairwise(sizes), strict=True):
        tensors[f"layers.{place}.weight"] = torch.randn(narrow, wide, generator=generator)
        tensors[f"layers.{place}.bias"] = torch.randn(narrow, generator=generator)
    save_file(tensors, path)
    return tensors


def test_aesthetic_is_five_affine_maps_of_the_unit_embedding(clip: tuple[str, Any], tmp_path: Path) -> None:
    tensors = save_head(tmp_path / "head.safetensors")
    x = embed_clip(clip[1], SQUARE)
    for place in (0, 2, 4, 6, 7):
        w, b = (tensors[f"layers.{place}.{what}"].double().numpy() for what in ("weight", "bias"))
        x = np.einsum("oi,ni->no", w, x) + b
    assert np.ptp(x) > 0.1
    for preset, factor in (("", 1), ("native", 1), ("10", 0.1)):
        reward = Aesthetic(str(tmp_path), clip[0], preset, device="cpu")
        np.testing.assert_allclose(reward.score(batch(SQUARE)).scores, factor * x[:, 0], rtol=1e-4, atol=1e-4)
    video = np.stack([SQUARE, SQUARE[::-1]])
    found = Aesthetic(str(tmp_path), clip[0], stride=2, device="cpu").score(batch(video)).scores
    np.testing.assert_allclose(found, [x[[0, 2, 4], 0].mean()] * 2, rtol=1e-4, atol=1e-4)


def test_a_wrong_aesthetic_head_says_so(clip: tuple[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^aesthetic: no file '.*head.safetensors'; give a .safetensors of the head"):
        Aesthetic(str(tmp_path), clip[0])
    save_head(tmp_path / "head.safetensors", (7, 6, 5, 4, 3, 1))
    with pytest.raises(
        UserError, match=r"layers.0 takes 7 numbers where 8 arrive; the head belongs to another backbone"
    ):
        Aesthetic(str(tmp_path), clip[0])
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"expected tensor 'layers.0.weight' of shape \[-1, -1\], found none"):
        Aesthetic(str(tmp_path / "other.safetensors"), clip[0])
    (tmp_path / "head.pth").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(
        UserError, match=r"is no safetensors file .* convert an upstream .pt with flowrl rewards convert"
    ):
        Aesthetic(str(tmp_path / "head.pth"), clip[0])
    with pytest.raises(UserError, match=r"^aesthetic: preset is '26'; use native, 10$"):
        Aesthetic(str(tmp_path), clip[0], "26")


def test_likeness_is_the_cosine_to_the_reference(clip: tuple[str, Any], tmp_path: Path) -> None:
    dino = save_dino(tmp_path)
    other = pictures(5, 32, 32, seed=3)
    other[0] = SQUARE[0]
    edited = dataclasses.replace(batch(SQUARE), reference=other)
    u, v = embed_clip(clip[1], SQUARE), embed_clip(clip[1], other)
    cosine = (u * v).sum(1)
    result = ClipSimilarity(clip[0], device="cpu").score(edited)
    np.testing.assert_allclose(result.scores, cosine, atol=1e-5)
    capped = ClipSimilarity(clip[0], 0.5, device="cpu").score(edited)
    np.testing.assert_allclose(capped.scores, np.minimum(cosine, 0.5), atol=1e-5)
    np.testing.assert_allclose(capped.components["cosine"], cosine, atol=1e-5)
    reward = DinoSimilarity(str(tmp_path), device="cpu")
    with torch.no_grad():
        ours, theirs = (
            dino(reward.encoder.processor(list(x), return_tensors="pt")["pixel_values"])
            .last_hidden_state[:, 0]
            .double()
            for x in (SQUARE, other)
        )
    expected = (ours * theirs).sum(1) / (ours.square().sum(1) * theirs.square().sum(1)).sqrt()
    found = reward.score(edited).scores
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert found[0] == pytest.approx(1, abs=1e-5) and found[1:].max() < 0.9999
    films = dataclasses.replace(batch(np.stack([SQUARE, SQUARE])), reference=other[:2])
    against = reward.score(films).scores
    frame = [
        reward.score(dataclasses.replace(batch(SQUARE[[0, 4]]), reference=other[[i, i]])).scores.mean() for i in (0, 1)
    ]
    np.testing.assert_allclose(against, frame, atol=1e-5)


def test_likeness_needs_a_reference(clip: tuple[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^clip_similarity: the batch has no reference pictures; use it with an editing"
    ):
        ClipSimilarity(clip[0], device="cpu").score(batch(SQUARE))
    with pytest.raises(UserError, match=r"^clip_similarity: ceiling is 1.5; use a cosine"):
        ClipSimilarity(clip[0], ceiling=1.5)
    with pytest.raises(UserError, match=r"is a CLIPModel; give a DINO or DINOv2 model"):
        DinoSimilarity(clip[0])


def test_the_gate_closes_on_unsafe_pictures(tmp_path: Path) -> None:
    network = save_classifier(tmp_path, ("normal", "nsfw"))
    pixels = torch.tensor((SQUARE / 127.5 - 1).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        logits = network(pixels).logits.double().numpy()
    unsafe = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    threshold = float(np.sort(unsafe)[2])
    soft = NsfwGate(str(tmp_path), mode="soft", device="cpu").score(batch(SQUARE))
    np.testing.assert_allclose(soft.scores, 1 - unsafe, atol=1e-5)
    gate = NsfwGate(str(tmp_path), threshold=threshold, device="cpu").score(batch(SQUARE))
    np.testing.assert_array_equal(gate.scores, soft.components["unsafe"] < np.float32(threshold))
    assert 0 < gate.scores.sum() < 5
    film = NsfwGate(str(tmp_path), mode="soft", stride=1, device="cpu").score(batch(SQUARE[None]))
    np.testing.assert_allclose(film.scores, [1 - unsafe.max()], atol=1e-5)
    with pytest.raises(UserError, match=r"^nsfw: .* has no label 'porn'; use one of normal, nsfw$"):
        NsfwGate(str(tmp_path), label="porn")
    for wrong in ({"threshold": 0.0}, {"mode": "hard"}, {"stride": 0}):
        with pytest.raises(UserError, match=rf"^nsfw: {next(iter(wrong))} is"):
            NsfwGate(str(tmp_path), **wrong)  # type: ignore[arg-type]
