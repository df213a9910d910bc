"""GenEval on photographs: colours, thresholds, the judge's verdicts and the two public ones with their defects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowrl.rewards.detectors import Found
from flowrl.rewards.geneval import COLORS, ColorNamer, GenEval, cut_out, flow_grpo_verdict

from flowrl.errors import UserError
from flowrl.records import Detection

from . import checkpoints
from .checkpoints import batch, pictures


def box(label: str, x: float = 10, score: float = 0.95, color: str = "") -> Detection:
    return Detection(label, score, (x - 4, 6, x + 4, 14), color)


def want(*clauses: dict[str, Any], tag: str = "t", exclude: Any = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(clauses), "exclude": list(exclude)}


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


LEFT = want(clause("cat"), clause("dog", position=["left of", 0]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    detector, colors = tmp_path_factory.mktemp("detector"), tmp_path_factory.mktemp("colors")
    checkpoints.save_mask2former(detector, ("cat", "mouse"))
    checkpoints.save_clip(colors)
    return str(detector), str(colors)


def scripted(folders: tuple[str, str], *pages: list[Detection], **args: Any) -> GenEval:
    reward = GenEval("mask2former", *folders, device="cpu", **args)
    reward.detector.find = lambda images: [[Found(d) for d in page] for page in pages]  # type: ignore[method-assign]
    return reward


@pytest.mark.parametrize(
    ("metadata", "found", "strict", "terms"),
    [
        (want(clause("cat")), [box("cat")], True, [1]),
        (want(clause("cat")), [], False, [0]),
        (want(clause("cat")), [box("cat")] * 16, False, [-14]),
        (want(clause("cat", 3)), [box("cat")] * 2, False, [2 / 3]),
        (want(clause("cat", color="red")), [box("cat")] * 2, False, [0, 0]),
        (want(clause("cat", 2, color="red")), [box("cat", color="red"), box("cat", color="blue")], False, [1, 0.5]),
        (LEFT, [box("cat", 30), box("dog", 10)], True, [1, 1, 1]),
        (LEFT, [box("cat", 10), box("dog", 30)], False, [1, 1, 0, 1]),
        (LEFT, [box("dog", 30)], False, [0, 1, 0]),
        (LEFT, [box("cat", 30)], False, [1, 0, 0]),
    ],
)
def test_the_public_soft_score_keeps_its_defects(metadata: Any, found: Any, strict: bool, terms: list[float]) -> None:
    verdict = flow_grpo_verdict(metadata, found)
    assert verdict.strict is strict and verdict.dense == pytest.approx(sum(terms) / len(terms))


def test_our_score_mends_both_and_compat_does_not(folders: tuple[str, str]) -> None:
    wrong, crowd = [box("cat", 10), box("dog", 30)], [box("cat") for _ in range(16)]
    own = batch(pictures(2), metadata=[LEFT, want(clause("cat"))])
    fixed = scripted(folders, wrong, crowd, mode="dense").score(own)
    # Ours: presence and count of both, position, nothing beyond what was asked: 4 of 6 atoms plus that one; then 1, 0, 1/16.
    np.testing.assert_allclose(fixed.scores, [5 / 6, (1 + 0 + 1 / 16) / 3], rtol=1e-6)
    public = scripted(folders, wrong, crowd, compat="flow_grpo")
    np.testing.assert_allclose(public.score(own).scores, [0.75, -14], rtol=1e-6)
    assert public.minimum == float("-inf") and fixed.scores.min() >= GenEval.minimum == 0
    official = scripted(folders, [box("cat"), box("cat")], [box("dog")], compat="official").score(
        batch(pictures(2), metadata=[want(clause("cat")), want(clause("cat"))])
    )
    assert official.scores.tolist() == [1, 0]


def test_only_named_classes_count_and_counting_needs_surer_ones(folders: tuple[str, str]) -> None:
    page = [box("cat"), box("couch"), box("cat", 30, score=0.6)]
    metadata = [want(clause("cat")), want(clause("cat"), tag="counting"), want(clause("cat", 2)), {"include": []}]
    result = scripted(folders, page, page, page, page, mode="strict").score(batch(pictures(4), metadata=metadata))
    assert result.scores[:3].tolist() == [0, 1, 1] and result.valid.tolist() == [True, True, True, False]
    assert (result.errors[3] or "").startswith("geneval: metadata: ") and np.isnan(result.scores[3])
    assert list(result.details) == ["mask2former: 2 x cat, 1 asked for"] + ["mask2former: all holds"] * 2 + [None]
    few = scripted(folders, [box("cat") for _ in range(9)], mode="dense", max_objects=3)
    assert few.score(batch(pictures(1), metadata=[want(clause("cat", 3))])).scores.tolist() == [1]


def test_a_colour_is_the_nearest_of_ten_mean_directions(folders: tuple[str, str]) -> None:
    namer = ColorNamer(folders[1], "cpu")
    picture = pictures(1, 32, 48)[0]
    objects = [Found(box("cat", x)) for x in (6, 20, 40)]
    found = [f.detection.color for f in namer.name(picture, objects)]
    encoder = namer.encoder
    for name, thing in zip(found, objects, strict=True):
        left, top, right, bottom = map(int, thing.detection.box)
        u = encoder.images(picture[None, top:bottom, left:right])[0].double()
        scores = []
        for color in COLORS:
            texts = [f"a photo of a {color} cat", f"a photo of a {color}-colored cat", f"a photo of a {color} object"]
            mean = torch.stack([encoder.texts([text])[0].double() for text in texts]).mean(0)
            scores.append(float(u @ mean / mean.norm()))
        assert name == COLORS[int(np.argmax(scores))]
    assert len(set(found)) > 1 or len(found) == 3


def test_what_the_mask_leaves_out_is_grey() -> None:
    picture = np.full((8, 8, 3), 7, np.uint8)
    mask = np.zeros((8, 8), np.bool_)
    mask[2, 3] = True
    crop = cut_out(picture, Found(Detection("cat", 1.0, (3.0, 2.0, 4.6, 4.0)), mask))
    assert crop.shape == (2, 2, 3) and crop[..., 0].tolist() == [[7, 0x99], [0x99, 0x99]]
    assert (picture == 7).all() and cut_out(picture, Found(Detection("cat", 1.0, (7.9, 8.0, 8.0, 8.0)))).shape == (
        1,
        1,
        3,
    )


def test_colours_are_named_where_asked_for(folders: tuple[str, str]) -> None:
    reward = scripted(folders, [box("cat"), box("cat", 30)], mode="strict")
    asked: list[int] = []

    def name(picture: Any, objects: Any) -> list[Found]:
        asked.append(len(objects))
        return [Found(box(o.detection.label, color=c)) for o, c in zip(objects, ("red", "blue"), strict=True)]

    reward.namer.name = name  # type: ignore[method-assign]
    both = want(clause("cat", color="red"), clause("cat", color="blue"))
    assert reward.score(batch(pictures(1), metadata=[both])).scores.tolist() == [1] and asked == [2]
    reward.score(batch(pictures(1), metadata=[want(clause("cat", 2))]))
    assert asked == [2]


def test_whole_on_tiny_networks(folders: tuple[str, str]) -> None:
    reward = GenEval("mask2former", *folders, threshold=0.1, counting_threshold=0.2, device="cpu")
    metadata = [want(clause("cat")), want(clause("computer mouse", 2, color="red"))]
    first = reward.score(batch(pictures(2), metadata=metadata))
    reward.offload()
    reward.onload()
    np.testing.assert_array_equal(first.scores, reward.score(batch(pictures(2), metadata=metadata)).scores)
    assert first.valid.all() and (0 <= first.scores).all() and (first.scores <= 1).all()


def test_wrong_arguments(folders: tuple[str, str], tmp_path: Path) -> None:
    for name, value in (("detector", "yolo"), ("mode", "soft"), ("compat", "mmdet")):
        with pytest.raises(UserError, match=rf"^geneval: {name} is '{value}'; use "):
            GenEval(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^geneval: threshold is 0.9, counting_threshold 0.5"):
        GenEval(threshold=0.9, counting_threshold=0.5)
    with pytest.raises(UserError, match=r"^mask2former: no folder"):
        GenEval(path=str(tmp_path / "none"))
