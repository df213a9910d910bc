"""The OCR reward: its formula, its targets, what must not pay, and both engines behind stand-ins."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flowrl.rewards.ocr import Ocr, TesseractOcr, distance, flow_grpo_similarity, normalise, similarity, targets
from flowrl.rewards.ocr_engines import Line, RapidEngine, TesseractEngine
from PIL import Image, ImageDraw

from flowrl.errors import UserError

from .checkpoints import batch

BLANK = np.zeros((6, 8, 8, 3), np.uint8)


def slow_distance(a: str, b: str) -> int:
    """Levenshtein by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    same = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


def test_distance_is_levenshteins() -> None:
    generator = np.random.default_rng(0)
    for _ in range(150):
        read, wanted = ("".join(generator.choice(list("abc"), generator.integers(0, 5))) for _ in range(2))
        assert distance(read, wanted) == slow_distance(read, wanted)
        parts = [read[i:j] for i, j in itertools.combinations_with_replacement(range(len(read) + 1), 2)]
        assert distance(read, wanted, anywhere=True) == min(slow_distance(part, wanted) for part in parts)


def test_worked_similarities() -> None:
    assert similarity("hello", ["hello"]) == (1, 1)
    assert similarity("helloworld", ["hello"]) == (0, 0.5)
    assert similarity("helloworld", ["hello"], extra=False) == (1, 1)
    assert similarity("", ["hello"]) == (0, 0) == similarity("", ["hello"], extra=False)
    assert similarity("hallo", ["hello"]) == (0, pytest.approx(0.8))
    assert similarity("worldhello", ["hello", "world"]) == (1, 1)
    assert similarity("hello", ["hello", "world"]) == (0, 0.5)
    assert similarity("hello", ["hello", "world"], extra=False) == (0, 0.6)  # the l of world is in hello
    assert similarity("zzzzzzzzzzzz", ["hello"], extra=False) == (0, 0)
    assert similarity("edcba", list("abcde"))[0] == 0 and similarity("dcba", list("abcd"))[0] == 1


def test_the_public_formula_and_its_defect() -> None:
    def public(read: str, prompt: str) -> float:
        read, prompt = read.replace(" ", "").lower(), prompt.replace(" ", "").lower()
        dist = 0 if prompt in read else min(slow_distance(read, prompt), len(prompt))
        return 1 - dist / len(prompt)

    for read, wanted in (("Hal lo", "Hello"), ("x", "Hello"), ("", "Hi"), ("say Hi now", "Hi"), ("oh hell", "Hello")):
        assert flow_grpo_similarity(read, wanted) == pytest.approx(public(read, wanted))
    spam = "hi" * 20
    assert flow_grpo_similarity(spam, "hi") == 1 and similarity(spam, ["hi"])[1] == pytest.approx(2 / 40)


def test_targets() -> None:
    assert targets('a sign that says "Open 24h" in red', {}) == ["Open 24h"]
    assert targets('“Eins” and "two" and «trois» and „vier“', {}) == ["Eins", "two", "trois", "vier"]
    assert targets('says "no"', {"target": "yes"}) == ["yes"] and targets("", {"text": ["a", "b"], "target": "c"}) == [
        "a",
        "b",
    ]
    with pytest.raises(ValueError, match='no target: give metadata "text" or "target"'):
        targets("a sign", {})
    for wrong in ("", " ", ["a", " "]):
        with pytest.raises(ValueError, match="a target is empty"):
            targets("", {"text": wrong})
    for odd in (3, [], [3], {"a": 1}):
        with pytest.raises(ValueError, match="the target must be a text or a list of texts"):
            targets("", {"text": odd})
    assert normalise(" Ｏｐｅｎ\n ﬁne STRASSE ß ") == "openfinestrassess"


class Scripted:
    """An engine that reads what it is told, picture by picture."""

    def __init__(self, *pages: list[Line]) -> None:
        self.pages = list(pages)
        self.sizes: list[tuple[int, ...]] = []

    def read(self, picture: Any) -> list[Line]:
        self.sizes.append(picture.shape)
        return self.pages[(len(self.sizes) - 1) % len(self.pages)]


@pytest.fixture
def fake_rapidocr(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A rapidocr that reads the top left pixel, and the calls that it got."""
    calls: list[dict[str, Any]] = []

    class RapidOCR:
        def __call__(self, image: Any, **options: Any) -> Any:
            calls.append(options | {"pixel": image[0, 0].tolist()})
            if not image.any():
                return types.SimpleNamespace(txts=None, scores=None)
            return types.SimpleNamespace(txts=("HEL", "LO"), scores=(0.9, 0.4))

    module = types.ModuleType("rapidocr")
    vars(module)["RapidOCR"] = RapidOCR
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    return calls


def test_rapidocr_is_called_as_it_wants(fake_rapidocr: list[dict[str, Any]]) -> None:
    images = BLANK[:2].copy()
    images[1, 0, 0] = (1, 2, 3)
    own = batch(images, ['"Hello"'] * 2)
    result = Ocr().score(own)
    assert result.scores.tolist() == [0, 1] and result.valid.all()
    assert result.components["exact"].tolist() == [0, 1] and list(result.details) == ["", "HEL LO"]
    assert fake_rapidocr[1] == {"use_det": True, "use_cls": True, "use_rec": True, "pixel": [3, 2, 1]}
    assert Ocr("mean").score(own).scores.tolist() == [0, 1] and Ocr(min_confidence=0.4).score(own).scores[1] == 1
    unsure = Ocr(min_confidence=0.5, whole=True).score(own)
    assert unsure.scores[1] == pytest.approx(0.6) and fake_rapidocr[-1]["use_det"] is False
    both = Ocr("mean", min_confidence=0.5).score(own)
    assert both.scores[1] == pytest.approx(0.3) and Ocr("exact").score(own).scores.tolist() == [0, 1]


def reading(reward: Ocr, *pages: list[Line]) -> Scripted:
    engine = Scripted(*pages)
    reward.engine = engine
    return engine


def test_a_sample_without_a_target_is_invalid_alone(fake_rapidocr: Any) -> None:
    reward = Ocr(upscale=3)
    engine = reading(reward, [Line("Hi")])
    result = reward.score(batch(BLANK[:3], ["no quotes", 'say "Hi"', ""], [{}, {}, {"text": 5}]))
    assert result.valid.tolist() == [False, True, False] and result.scores[1] == 1
    assert np.isnan(result.scores[[0, 2]]).all() and np.isnan(result.components["edit"][[0, 2]]).all()
    assert (result.errors[0] or "").startswith("ocr: no target") and "list of texts" in (result.errors[2] or "")
    assert engine.sizes == [(24, 24, 3)]


def test_every_frame_of_a_video_counts(fake_rapidocr: Any) -> None:
    film = batch(BLANK[None].repeat(2, 1), ['"Hi"'])
    pages = [[Line("Hi")], [], [Line("Ho")]]
    ours = Ocr(stride=4)
    engine = reading(ours, *pages)
    assert ours.score(film).scores[0] == pytest.approx((1 + 0 + 0.5) / 3) and len(engine.sizes) == 3
    public = Ocr(compat="flow_grpo")
    reading(public, *pages)
    assert public.score(film).scores[0] == pytest.approx((1 + 0.5) / 2)
    reading(public, [])
    assert public.score(film).scores[0] == 0


def test_spam_pays_in_compat_alone(fake_rapidocr: Any) -> None:
    own, spam = batch(BLANK[:1], ['"Hi"']), [Line("hi hi hi"), Line("hi")]
    for args, expected in (({}, 0.25), ({"extra": False}, 1.0), ({"compat": "flow_grpo"}, 1.0)):
        reward = Ocr(**args)  # type: ignore[arg-type]
        reading(reward, spam)
        assert reward.score(own).scores[0] == pytest.approx(expected)


def test_wrong_arguments(fake_rapidocr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mode", "soft"), ("compat", "x"), ("upscale", 0), ("stride", 0), ("min_confidence", 2)):
        with pytest.raises(UserError, match=rf"^ocr: {name} is {value!r}; use"):
            Ocr(**{name: value})  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"^ocr: rapidocr cannot be imported .* pip install 'flowrl\[ocr\]'"):
        Ocr()


def program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "tesseract"
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_tesseract_is_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, f'echo "$@" > {tmp_path}/args; cat > {tmp_path}/in.png; printf "Hal\\n\\nlo\\n"', monkeypatch)
    result = TesseractOcr(psm=6).score(batch(BLANK[:1], ['"Hello"']))
    assert result.scores[0] == pytest.approx(0.8) and list(result.details) == ["Hal lo"]
    assert (tmp_path / "args").read_text().split() == ["stdin", "stdout", "--psm", "6", "-l", "eng"]
    assert Image.open(tmp_path / "in.png").size == (32, 32)
    program(tmp_path, "echo broken >&2; exit 3", monkeypatch)
    with pytest.raises(OSError, match="tesseract ended with 3: broken"):
        TesseractEngine().read(BLANK[0])
    program(tmp_path, "exec sleep 5", monkeypatch)
    with pytest.raises(TimeoutError, match=r"took more than 0.2 s"):
        TesseractEngine(timeout=0.2).read(BLANK[0])
    with pytest.raises(UserError, match=r"^ocr_tesseract: psm is 14; use 0 to 13"):
        TesseractOcr(psm=14)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no program tesseract on the path; install it"):
        TesseractOcr()


def word(text: str) -> Any:
    image = Image.new("RGB", (240, 64), "white")
    ImageDraw.Draw(image).text((12, 8), text, fill="black", font_size=44)
    return np.asarray(image)


def test_real_rapidocr_reads_a_rendered_word() -> None:
    pytest.importorskip("rapidocr", reason="needs the extra ocr")
    assert normalise("".join(line.text for line in RapidEngine(whole=True).read(word("FLOWER")))) == "flower"


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")
def test_real_tesseract_reads_a_rendered_word() -> None:
    assert normalise("".join(line.text for line in TesseractEngine().read(word("FLOWER")))) == "flower"
