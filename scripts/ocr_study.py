"""How well, and how fast, the two OCR engines read rendered words: what an OCR reward and its held-out second opinion can see.

    python scripts/ocr_study.py [--words 6] [--seed 0] [--out docs/results/ocr.json]

Renders words in several fonts and letter sizes, clean and degraded, dark on light and light on dark in turn, and pictures of
noise alone; scores all of them with the rewards ``ocr`` (rapidocr, as one line of text and with detection) and
``ocr_tesseract``. An engine that is not installed is recorded as not measured. Times are of one call with one picture; where
the load average is above the number of cores, wall times are upper bounds, and so are processor times, as onnxruntime's
threads wait busily.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from flowrl import __version__
from flowrl.errors import UserError
from flowrl.records import RewardBatch

WORDS = (
    "CAT DOG SUN RED BOX KEY TEA MAP OPEN EXIT STOP SALE WIND MOON GOLD FISH HOTEL BREAD WATER HAPPY NIGHT MUSIC GREEN "
    "SUGAR COFFEE GARDEN WINTER BRIDGE MARKET SILVER YELLOW ORANGE"
).split()
FONTS = ("pillow", "DejaVuSans-Bold", "DejaVuSerif")
SIZES = (8, 12, 16, 32)
NOISE, BLUR = 40.0, 1.0  # standard deviation in grey levels, radius in pixels
CHANGES = ("clean", "degraded")

Picture = np.ndarray[Any, np.dtype[np.uint8]]


def font(name: str, size: int) -> Any:
    """Pillow's own font, or one that matplotlib brings along."""
    if name == "pillow":
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def render(word: str, name: str, size: int, dark: bool) -> Picture:
    """A word in the middle of a plain picture: uint8 [H, W, 3], margins of half a letter and more."""
    drawn = font(name, size)
    left, top, right, bottom = drawn.getbbox(word)
    width, height = max(32, int(right - left) + size), max(32, int(bottom - top) + size)
    paper, ink = ("#e8e4d8", "#202020") if dark else ("#18304a", "#f4f4f0")
    picture = Image.new("RGB", (width, height), paper)
    place = ((width - (right - left)) / 2 - left, (height - (bottom - top)) / 2 - top)
    ImageDraw.Draw(picture).text(place, word, fill=ink, font=drawn)
    return np.asarray(picture)


def degraded(picture: Picture, generator: np.random.Generator) -> Picture:
    """The picture blurred, with Gaussian noise."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(BLUR)), np.float32)
    return np.clip(soft + generator.normal(0, NOISE, soft.shape), 0, 255).astype(np.uint8)


def engines() -> dict[str, Callable[[], Any]]:
    from flowrl.rewards.ocr import Ocr, TesseractOcr

    return {
        "rapidocr, one line, 4x": lambda: Ocr(whole=True, upscale=4),
        "tesseract, psm 7, 4x": lambda: TesseractOcr(psm=7, upscale=4),
        "rapidocr, one line": lambda: Ocr(whole=True),
        "rapidocr, detection": lambda: Ocr(whole=False),
    }


def measure(reward: Any, cells: dict[str, list[tuple[str, Picture]]], noise: list[Picture]) -> dict[str, Any]:
    """Per cell and in all: exact and edit means; milliseconds a picture; how many pictures of noise had text."""
    walls: list[float] = []
    busy = cpu_seconds()
    found: dict[str, dict[str, float]] = {}
    reward.score(batch("WARM", render("WARM", "pillow", 24, True)))
    for cell, members in cells.items():
        exact, edit = [], []
        for word, picture in members:
            start = time.perf_counter()
            result = reward.score(batch(word, picture))
            walls.append(time.perf_counter() - start)
            if not result.valid.all():
                raise SystemExit(f"{cell}: {result.errors[0]}")
            exact.append(float(result.components["exact"][0]))
            edit.append(float(result.components["edit"][0]))
        found[cell] = {"exact": round(statistics.mean(exact), 4), "edit": round(statistics.mean(edit), 4)}
    spent = cpu_seconds() - busy
    count = sum(len(members) for members in cells.values())
    read = [bool("".join(line.text for line in reward.read(picture)).strip()) for picture in noise]
    return {
        "pictures": count,
        "exact": round(sum(found[c]["exact"] * len(m) for c, m in cells.items()) / count, 4),
        "edit": round(sum(found[c]["edit"] * len(m) for c, m in cells.items()) / count, 4),
        "ms_median": round(1000 * statistics.median(walls), 2),
        "ms_90th": round(1000 * sorted(walls)[int(0.9 * len(walls))], 2),
        "cpu_ms_mean": round(1000 * spent / count, 2),
        "noise_with_text": f"{sum(read)} of {len(read)}",
        "cells": found,
    }


def cpu_seconds() -> float:
    """Processor time of this process and the programs it ran: other work on the machine does not lengthen it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def batch(word: str, picture: Picture) -> RewardBatch:
    return RewardBatch(picture[None], [f'a sign that says "{word}"'], [{"text": word}])


def machine() -> dict[str, Any]:
    """The class of machine, not its name. onnxruntime and tesseract are left to choose their threads."""
    return {"architecture": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}


def versions() -> dict[str, str]:
    told = {}
    for name in ("rapidocr", "onnxruntime", "pillow"):
        try:
            told[name] = version(name)
        except PackageNotFoundError:
            told[name] = "not installed"
    try:
        said = subprocess.run(["tesseract", "--version"], capture_output=True, text=True, check=True)
        told["tesseract"] = said.stdout.split("\n", 1)[0].partition(" ")[2]
    except (OSError, subprocess.CalledProcessError):
        told["tesseract"] = "not installed"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=int, default=6, help="of each font, size and change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/ocr.json"))
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    cells: dict[str, list[tuple[str, Picture]]] = {}
    for name in FONTS:
        for size in SIZES:
            chosen = [str(word) for word in generator.choice(WORDS, args.words, replace=False)]
            clean = [render(word, name, size, dark=index % 2 == 0) for index, word in enumerate(chosen)]
            soft = [degraded(picture, generator) for picture in clean]
            for change, pictures in zip(CHANGES, (clean, soft), strict=True):
                cells[f"{name}, {size} px, {change}"] = list(zip(chosen, pictures, strict=True))
    noise = [generator.integers(0, 256, (64, 128, 3)).astype(np.uint8) for _ in range(args.words)]
    results: dict[str, Any] = {}
    for label, make in engines().items():
        try:
            reward = make()
        except UserError as error:
            results[label] = {"not measured": str(error)}
            continue
        results[label] = measure(reward, cells, noise)
        sys.stderr.write(f"{label}: { ({k: v for k, v in results[label].items() if k != 'cells'}) }\n")
    record = {
        "command": f"python scripts/ocr_study.py --words {args.words} --seed {args.seed}", "version": __version__,
        "seed": args.seed, "machine": machine(), "load_average": os.getloadavg(), "engines": versions(),
        "pictures": {
            "fonts": FONTS, "letter_px": SIZES, "degraded": {"noise_std": NOISE, "blur_px": BLUR}, "words": args.words,
        },
        "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
