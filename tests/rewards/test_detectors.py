"""Each transformers detector against a plain reading of its network's outputs, on tiny random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowrl.rewards.detectors import ALIASES, CLASSES, GroundingDino, Mask2Former, OwlV2, RtDetr

from flowrl.data.prompts import read_prompts
from flowrl.errors import UserError
from flowrl.records import Detection

from . import checkpoints

IMAGES = checkpoints.pictures(2)


def sigmoid(values: Any) -> Any:
    return 1 / (1 + np.exp(-values.double().numpy()))


def same(found: list[Detection], expected: list[tuple[str, float, tuple[float, ...]]]) -> None:
    assert len(found) == len(expected)
    scores = [d.score for d in found]
    assert scores == sorted(scores, reverse=True)
    for detection, (label, score, box) in zip(found, sorted(expected, key=lambda e: -e[1]), strict=True):
        assert detection.label == label and detection.color == ""
        assert detection.score == pytest.approx(score, abs=1e-4)
        np.testing.assert_allclose(detection.box, box, atol=1e-2)


def outputs(detector: Any, **inputs: Any) -> Any:
    processed = detector.processor(list(IMAGES), return_tensors="pt")
    with torch.no_grad():
        return detector.network(pixel_values=processed["pixel_values"], **inputs), processed


def test_mask2former(tmp_path: Path) -> None:
    checkpoints.save_mask2former(tmp_path, ("cat", "mouse"))
    detector = Mask2Former(str(tmp_path), 0.0, device="cpu")
    output, processed = outputs(detector)
    processed["pixel_mask"][:, 48:] = 0  # as if the lower 16 of 64 rows and the right 8 columns were padding
    processed["pixel_mask"][:, :, 56:] = 0
    with torch.no_grad():
        pages = detector.read(processed, 24, 40)
    for index in range(2):
        logits = torch.nn.functional.interpolate(output.masks_queries_logits, (64, 64), mode="bilinear")[..., :48, :56]
        masks = torch.nn.functional.interpolate(logits, (24, 40), mode="bilinear")[index]
        exp = np.exp(output.class_queries_logits[index].double().numpy())
        share = exp / exp.sum(1, keepdims=True)
        expected = []
        for p, q, c in sorted(((share[q, c], q, c) for q in range(6) for c in range(2)), reverse=True)[:6]:
            inside = masks[q].numpy() > 0
            if inside.any():
                y, x = np.nonzero(inside)
                box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
                expected.append((("cat", "computer mouse")[c], p * sigmoid(masks[q])[inside].mean(), box))
        page = sorted(pages[index], key=lambda found: -found.detection.score)
        same([found.detection for found in page], expected)
        assert all(found.mask is not None and found.mask.shape == (24, 40) for found in page)
    whole = [d for page in detector(IMAGES) for d in page]
    half = sorted(d.score for d in whole)[len(whole) // 2]
    assert sum(map(len, Mask2Former(str(tmp_path), half, device="cpu")(IMAGES))) == len(whole) - len(whole) // 2


def test_rtdetr(tmp_path: Path) -> None:
    checkpoints.save_rtdetr(tmp_path, ("cat", "tvmonitor"))
    detector = RtDetr(str(tmp_path), 0.0, device="cpu")
    output, _ = outputs(detector)
    for index, page in enumerate(detector(IMAGES)):
        scores = sigmoid(output.logits[index])
        expected = []
        for score, q, c in sorted(((scores[q, c], q, c) for q in range(6) for c in range(2)), reverse=True)[:6]:
            x, y, w, h = output.pred_boxes[index, q].tolist()
            box = (40 * (x - w / 2), 24 * (y - h / 2), 40 * (x + w / 2), 24 * (y + h / 2))
            expected.append((("cat", "tv")[c], score, box))
        same(page, expected)


def test_owlv2(tmp_path: Path) -> None:
    checkpoints.save_owlv2(tmp_path)
    detector = OwlV2(str(tmp_path), 0.0, ["cat", "fire hydrant"], device="cpu")
    ids = detector.queries["input_ids"]
    assert ids.shape == (2, 24)
    mask = detector.queries["attention_mask"]
    output, _ = outputs(detector, input_ids=ids.repeat(2, 1), attention_mask=mask.repeat(2, 1))
    pages = detector(IMAGES)
    assert np.ptp([d.score for page in pages for d in page]) > 0.01
    for index, page in enumerate(pages):
        expected = []
        for logits, (x, y, w, h) in zip(sigmoid(output.logits[index]), output.pred_boxes[index].tolist(), strict=True):
            edges = [40 * v for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
            box = tuple(min(max(v, 0), limit) for v, limit in zip(edges, (40, 24, 40, 24), strict=True))
            expected.append((("cat", "fire hydrant")[int(logits.argmax())], logits.max(), box))
        same(page, expected)


def test_grounding_dino(tmp_path: Path) -> None:
    checkpoints.save_grounding_dino(tmp_path)
    detector = GroundingDino(str(tmp_path), 0.0, ["cat", "fire hydrant", "dog"], device="cpu")
    assert detector.ids == [2, 6, 5, 9, 10, 5, 8, 5, 3] and detector.spans == [(1, 2), (3, 5), (6, 7)]
    ids = torch.tensor([detector.ids] * 2)
    output, _ = outputs(
        detector, input_ids=ids, token_type_ids=torch.zeros_like(ids), attention_mask=torch.ones_like(ids)
    )
    for index, page in enumerate(detector(IMAGES)):
        expected = []
        for tokens, (x, y, w, h) in zip(sigmoid(output.logits[index]), output.pred_boxes[index].tolist(), strict=True):
            best = [tokens[1], max(tokens[3], tokens[4]), tokens[6]]
            box = [40 * (x - w / 2), 24 * (y - h / 2), 40 * (x + w / 2), 24 * (y + h / 2)]
            box = [min(max(v, 0), limit) for v, limit in zip(box, (40, 24, 40, 24), strict=True)]
            expected.append((("cat", "fire hydrant", "dog")[int(np.argmax(best))], max(best), tuple(box)))
        same(page, expected)
    with pytest.raises(UserError, match=r"^grounding_dino: 12 classes take 26 tokens, at most 16; ask for fewer$"):
        GroundingDino(str(tmp_path), classes=["cat"] * 12, device="cpu")


def test_the_class_list_is_genevals() -> None:
    rows = read_prompts(Path(__file__).parents[1] / "data" / "geneval_test_metadata.jsonl")
    asked = {c["class"] for row in rows for c in [*row.metadata["include"], *row.metadata.get("exclude", [])]}
    assert asked == set(CLASSES) and len(CLASSES) == 80 and set(ALIASES.values()) <= set(CLASSES)
    assert not set(ALIASES) & set(CLASSES)


def test_wrong_checkpoints(tmp_path: Path) -> None:
    checkpoints.save_clip(tmp_path)
    with pytest.raises(UserError, match=r"^rtdetr: .* cannot be loaded as AutoModelForObjectDetection: "):
        RtDetr(str(tmp_path), device="cpu")
    with pytest.raises(UserError, match=r"^detector: threshold is 1.0; use 0 up to below 1$"):
        Mask2Former(str(tmp_path), 1.0)
