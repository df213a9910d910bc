"""The compositional reward: modes, masks for wrong metadata, detectors by name."""

from __future__ import annotations

import sys
import types

import numpy as np
import numpy.typing as npt
import pytest
from flowrl.rewards.compositional import Compositional, judge

from flowrl.errors import UserError
from flowrl.records import Detection, RewardBatch
from flowrl.worlds.prompts import probe_batch
from flowrl.worlds.v1.detect import detect


def batch() -> RewardBatch:
    """Six pictures, the last three with the prompts of one another."""
    world = probe_batch(6)
    order = [0, 1, 2, 4, 5, 3]
    metadata = [world.metadata[i] for i in order]
    return RewardBatch(world.images, [world.prompts[i] for i in order], metadata)


def test_modes_agree_with_the_judge() -> None:
    own = batch()
    verdicts = [judge(m, d) for m, d in zip(own.metadata, detect(own.images), strict=True)]
    strict = np.array([v.strict for v in verdicts], np.float32)
    dense = np.array([v.dense for v in verdicts], np.float32)
    assert strict.tolist() == [1, 1, 1, 0, 0, 0] and (dense[3:] < 1).all()
    for mode, expected in (("strict", strict), ("dense", dense), ("mean", (strict + dense) / 2)):
        result = Compositional(mode=mode).score(own)
        np.testing.assert_allclose(result.scores, expected, rtol=1e-6)
        assert result.scores.dtype == np.float32 and result.valid.all() and list(result.errors) == [None] * 6
        np.testing.assert_array_equal(result.components["strict"], strict)
        np.testing.assert_array_equal(result.components["dense"], dense)
        assert [d or "" for d in result.details] == [v.reason for v in verdicts]
    assert Compositional().score(own).scores.tolist() == Compositional(mode="mean").score(own).scores.tolist()


def test_wrong_metadata_mask_their_sample_alone() -> None:
    own = batch()
    broken = RewardBatch(own.images, own.prompts, [{}, *own.metadata[1:5], {"include": [{"class": "circle"}]}])
    result, whole = Compositional().score(broken), Compositional().score(own)
    assert result.valid.tolist() == [False, True, True, True, True, False]
    assert np.isnan(result.scores[[0, 5]]).all() and np.isnan(result.components["dense"][[0, 5]]).all()
    np.testing.assert_array_equal(result.scores[1:5], whole.scores[1:5])
    assert result.errors[0] == (
        'compositional: metadata: key "include" is missing; it needs GenEval prompts or the embedded world\'s'
    )
    assert "count" in (result.errors[5] or "") and result.details[0] is None


def test_exact_is_handed_on() -> None:
    own = probe_batch(1)
    wider = {**own.metadata[0], "include": own.metadata[0]["include"][:1], "exclude": []}
    clause = {"class": wider["include"][0]["class"], "count": 1}
    found = detect(own.images)[0]
    assert len(found) > 1
    less = RewardBatch(own.images, own.prompts, [{"include": [clause]}])
    assert Compositional(mode="strict", exact=False).score(less).scores[0] == 1
    assert Compositional(mode="strict", exact=True).score(less).scores[0] == 0


def test_a_detector_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def see_circle(images: npt.NDArray[np.uint8]) -> list[list[Detection]]:
        return [[Detection("circle", 1.0, (0, 0, 4, 4), "red")] for _ in images]

    module = types.ModuleType("made_up_detector")
    vars(module).update(see=see_circle, number=3)
    monkeypatch.setitem(sys.modules, "made_up_detector", module)
    pictures = RewardBatch(
        np.zeros((2, 8, 8, 3), np.uint8), ["", ""], [{"include": [{"class": "circle", "count": 1}]}] * 2
    )
    assert Compositional("made_up_detector:see").score(pictures).scores.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"^compositional: detector 'made_up_detector:number' is not callable$"):
        Compositional("made_up_detector:number")
    with pytest.raises(UserError, match=r"^compositional: cannot load detector 'made_up_detector:no' \(KeyError"):
        Compositional("made_up_detector:no")


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match=r"^compositional: mode is 'soft'; use mean, strict or dense$"):
        Compositional(mode="soft")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^compositional: unknown detector 'yolo'; use world/v1 or module:attr$"):
        Compositional("yolo")
    with pytest.raises(UserError, match=r"cannot load detector 'no_such_module:x' \(ModuleNotFoundError"):
        Compositional("no_such_module:x")
