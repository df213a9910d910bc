"""The probe says what a reward does on synthetic pictures, and what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flowrl.errors import UserError
from flowrl.scoring.probe import probe

HERE = __name__
CALLS = [0]


def restless(images: Any, prompts: Any) -> list[float]:
    CALLS[0] += 1
    return [CALLS[0] + float(image.mean()) for image in images]


def constant(images: Any, prompts: Any) -> list[float]:
    return [0.5] * len(images)


def relative(images: Any, prompts: Any) -> list[float]:
    return [float(image.mean() - images.mean()) for image in images]


def choosy(images: Any, prompts: Any) -> list[float | None]:
    return [None if image.std() == 0 else float(image.mean()) for image in images]


def broken(images: Any, prompts: Any) -> list[float]:
    raise RuntimeError("no weights")


def reads(images: Any, target: list[str]) -> list[float]:
    return [len(text) * float(image.mean()) for image, text in zip(images, target, strict=True)]


def test_a_good_reward_is_usable() -> None:
    lines = probe("compositional", {"mode": "strict"}).splitlines()
    assert lines[0] == "reward compositional" and lines[-1] == "usable"
    assert lines[1] == "  world renders  8/8 scored   min 1  mean 1  max 1"
    assert lines[2] == "  flat           8/8 scored   min 0  mean 0  max 0"
    assert lines[3] == "  noise          8/8 scored   min 0  mean 0  max 0"
    assert lines[4:6] == ["  same pictures again    same scores", "  one picture a call     same scores"]
    assert re.fullmatch(r"  time {19}\d+\.\d{3} ms a picture of 36x36, 8 a call", lines[6])


def test_args_are_handed_on_and_columns_are_there() -> None:
    bright, dark = probe("jpeg", {"sign": 1}).splitlines(), probe("jpeg", {}).splitlines()
    assert "min -" not in bright[1] and "min -" in dark[1]
    assert probe(f"{HERE}:reads", {}).endswith("usable")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("restless", "a second call gave the same pictures other scores; seed it, or put its model in eval mode"),
        (
            "constant",
            "every picture got the same score: no group would carry a signal; check that it reads the pictures",
        ),
        (
            "relative",
            "a picture's score depends on the pictures beside it, so results would change with batch.micro_batch; "
            "score each picture by itself",
        ),
        ("choosy", "8 of 8 flat pictures got no score: choosy: returned no value (None or NaN)"),
    ],
)
def test_problems_are_named(name: str, problem: str) -> None:
    report = probe(f"{HERE}:{name}", {})
    problems = [line for line in report.splitlines() if line.startswith("problem: ")]
    assert problems == [f"problem: {problem}"]
    assert not report.endswith("usable")


def test_an_unusable_reward_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"broken' gave none of 24 test pictures a score: broken: RuntimeError: no weights"
    ):
        probe(f"{HERE}:broken", {})
    with pytest.raises(UserError, match="unknown reward 'nothing'"):
        probe("nothing", {})
    with pytest.raises(UserError, match="unknown argument of jpeg"):
        probe("jpeg", {"qualty": 1})


def films(videos: Any, reference: Any) -> list[float]:
    assert videos.shape == reference.shape and videos.ndim == 5
    return [float(video.mean()) for video in videos]


def duel(first: Any, second: Any) -> Any:
    a, b = (part.images.mean((1, 2, 3)) for part in (first, second))
    return (a > b) + 0.5 * (a == b)


class Declares:
    backbone = "tiny"
    licence = "MIT"
    media = frozenset({"image"})
    presets = frozenset({"26", "raw"})

    def score(self, images: Any, prompts: Any) -> list[float]:
        return [float(image.mean()) for image in images]


def test_videos_references_and_pairs_are_tried_as_such() -> None:
    report = probe(f"{HERE}:films", {})
    assert "  declares               scope sample" in report and report.endswith("usable")
    report = probe(f"{HERE}:duel", {})
    assert "  one group a call       same scores" in report and "  declares               scope pair" in report
    assert report.splitlines()[2].startswith("  flat           8/8 scored   min 0  mean 0.5  max 1")


def test_what_a_reward_says_of_itself_is_shown() -> None:
    report = probe(f"{HERE}:Declares", {})
    assert "declares               scope sample; media image; backbone tiny; licence MIT; presets 26, raw\n" in report


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(pictures, texts): ...", "f(pictures, texts) takes no pictures; write it as f(images, prompts)"),
        ("def f(images, trainer_state): ...", "trainer_state belongs to text training"),
        ("async def f(images, prompts): ...", "is an async function; make it a plain one"),
        ("def f(images, prompts, /): ...", "parameter images cannot be passed by name"),
        ("class f:\n    pass", "class f has no method score(batch: RewardBatch) -> RewardResult"),
        (
            "def f(images):\n    return images.mean()",
            "returned float64 for 8 pictures; return one float (or None) a picture",
        ),
        ("def f(images):\n    return [[0.0]] * 8", "returned list [0.0] for picture 0"),
        ("def f(first, second):\n    return [2.0] * len(first)", "compare() returned 2; return how much better"),
        ("def f(images, style):\n    return [0.0] * 8", "f: the prompt's metadata has no 'style'"),
        ("f = 3", "int is neither a class with score(batch) nor a function"),
    ],
)
def test_each_signature_is_told_what_is_wrong_with_it(source: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source + "\n")
    with pytest.raises(UserError) as caught:
        probe(f"{file}:f", {})
    assert message in str(caught.value)
