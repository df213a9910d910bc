"""Further faces of a plug-in: TRL's keywords, classes of other projects, videos, references, presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.adapt import as_reward, load_reward

HERE = __name__


def batch(count: int = 3, frames: int = 0, reference: bool = False) -> RewardBatch:
    images = np.stack([np.full((4, 5, 3), 10 * i, np.uint8) for i in range(count)])
    shown = np.stack([images] * frames, 1) if frames else images
    metadata = [{"target": f"t{i}"} for i in range(count)]
    return RewardBatch(
        shown, [f"p{i}" for i in range(count)], metadata, list(range(count)), reference=shown + 1 if reference else None
    )


def test_keywords_of_trl() -> None:
    def reward(prompts: Any, completions: Any, target: Any, log_extra: Any, log_metric: Any, **columns: Any) -> list:
        log_extra("length", [len(t) for t in target])
        log_extra("read", target)
        log_extra("seen", prompts)
        log_metric("pictures", len(completions))
        return [float(picture.mean()) if t != "t1" else None for picture, t in zip(completions, target, strict=True)]

    result = as_reward(reward, "trl", {}).score(batch())
    np.testing.assert_array_equal(result.scores, np.array([0, np.nan, 20], np.float32))
    assert result.components["length"].tolist() == [2] * 3 and result.components["pictures"].tolist() == [3] * 3
    assert list(result.details) == ["read: t0; seen: p0", "read: t1; seen: p1", "read: t2; seen: p2"]


@pytest.mark.parametrize("name", ["completion_ids", "trainer_state"])
def test_what_only_text_training_has(name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def f(completions, {name}): ...\ndef g(completions, {name}=None): return [0.0] * len(completions)", space)
    with pytest.raises(UserError, match=f"{name} belongs to text training and is not given here; remove it, or give"):
        as_reward(space["f"], "f", {})
    assert as_reward(space["g"], "g", {}).score(batch()).valid.all()


def test_an_extra_of_another_length_is_fatal() -> None:
    def f(images: Any, log_extra: Any) -> list[float]:
        log_extra("x", [1])
        return [0.0] * len(images)

    with pytest.raises(UserError, match=r"reward 'f': log_extra\('x'\) has 1 values for 3 pictures"):
        as_reward(f, "f", {}).score(batch())


class Scorer:
    """As other projects write them: made once, then called."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, images: Any, prompts: Any, metadata: Any) -> Any:
        return [self.scale * float(image.mean()) for image in images], {"note": "x"}


class Method:
    """score() that takes pictures, not a batch."""

    name = "own_name"
    backbone = "tiny"
    deterministic = True

    def score(self, prompts: Any, images: Any) -> list[float]:
        return [len(prompt) for prompt in prompts]


class One:
    """score() that takes one thing, the pictures."""

    def score(self, images: Any) -> list[float]:
        return [7.0] * len(images)


def test_classes_that_are_called() -> None:
    assert as_reward(Scorer, "scorer", {"scale": 2.0}).score(batch()).scores.tolist() == [0, 20, 40]
    assert as_reward(Scorer(3.0), "scorer", {}).score(batch()).scores.tolist() == [0, 30, 60]
    made = as_reward(Method, "method", {})
    assert made.name == "own_name" and made.score(batch()).scores.tolist() == [2, 2, 2]
    assert vars(made)["backbone"] == "tiny" and vars(made)["deterministic"] is True
    assert as_reward(One, "one", {}).score(batch()).scores.tolist() == [7] * 3
    assert load_reward(RewardEntry(name=f"{HERE}:Scorer", args={"scale": 2.0})).score(batch()).valid.all()


def test_videos_and_pictures_are_not_mixed_up() -> None:
    def of_videos(videos: Any) -> list[float]:
        return [float(len(video)) for video in videos]

    def of_pictures(images: Any) -> list[float]:
        return [0.0] * len(images)

    assert as_reward(of_videos, "f", {}).score(batch(frames=6)).scores.tolist() == [6] * 3
    with pytest.raises(UserError) as caught:
        as_reward(of_pictures, "f", {}).score(batch(frames=6))
    assert str(caught.value) == (
        "reward 'f': scores images, and these are videos [3, 6, 4, 5, 3]; name its parameter videos, or set its attribute "
        "media"
    )
    with pytest.raises(
        UserError, match=r"scores videos, and these are images \[3, 4, 5, 3\]; name its parameter images"
    ):
        as_reward(of_videos, "f", {}).score(batch())
    of_pictures.media = frozenset({"image", "video"})  # type: ignore[attr-defined]
    assert as_reward(of_pictures, "f", {}).score(batch(frames=6)).valid.all()


def test_reference_media() -> None:
    def kept(images: Any, reference: Any) -> list[float]:
        return [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(images, reference, strict=True)]

    assert as_reward(kept, "kept", {}).score(batch(reference=True)).scores.tolist() == [1] * 3
    with pytest.raises(UserError, match="reward 'kept': needs reference, and this run has none; choose another reward"):
        as_reward(kept, "kept", {}).score(batch())
    assert as_reward(lambda images, reference=None: [0.0] * 3, "f", {}).score(batch()).valid.all()


class Scaled:
    """A reward with named presets, as the built-in ones have them."""

    name = "scaled"
    presets: ClassVar = {"half": 0.5, "26": 26.0}

    def __init__(self, preset: str = "") -> None:
        self.preset = preset

    def score(self, batch: RewardBatch) -> RewardResult:
        factor = self.presets[self.preset] if self.preset else 1.0
        count = len(batch)
        return RewardResult(np.full(count, 52 * factor, np.float32), np.ones(count, np.bool_), [None] * count)


def test_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowrl import registry

    names = {**registry.REWARDS, "scaled": f"{HERE}:Scaled"}
    monkeypatch.setattr(registry, "_TABLES", {**registry._TABLES, "reward": (names, None)})
    scores = {
        p: load_reward(RewardEntry(name=f"scaled{p}")).score(batch(1)) for p in ("", "/half", "/26", "/13", "/-2")
    }
    assert {p: float(r.scores[0]) for p, r in scores.items()} == {
        "": 52,
        "/half": 26,
        "/26": 52 * 26,
        "/13": 4,
        "/-2": -26,
    }
    assert scores["/13"].components["native"].tolist() == [52]
    for wrong in ("third", "0", "nan", "inf"):
        with pytest.raises(
            UserError, match=rf"scaled has no preset '{wrong}'; use scaled/half, scaled/26, or scaled/26 to divide"
        ):
            load_reward(RewardEntry(name=f"scaled/{wrong}"))


def test_a_colon_makes_a_path_not_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "mine.py"
    file.parent.mkdir()
    file.write_text("def f(images):\n    return [1.0] * len(images)\n")
    assert load_reward(RewardEntry(name=f"{file}:f")).score(batch()).scores.tolist() == [1] * 3
