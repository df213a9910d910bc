"""Rewards that fail on request, for the tests of executors; worker processes load them from this file."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import numpy as np

WOKEN = threading.Event()


def first_pixel(images: Any, prompts: Any) -> list[float]:
    return [float(image.reshape(-1)[0]) for image in images]


def faulty(images: Any, prompts: list[str]) -> Any:
    """The first pixel, unless the first prompt names a fault."""
    fault = prompts[0]
    if fault == "raise":
        raise RuntimeError("the model fell over")
    if fault == "short":
        return [0.0]
    if fault == "nan":
        return [float("nan"), *first_pixel(images, prompts)[1:]]
    if fault == "inf":
        return [float("inf"), *first_pixel(images, prompts)[1:]]
    if fault == "hang":
        WOKEN.wait(3)
    if fault == "die":
        sys.stderr.write("out of memory, says the reward\n")
        sys.stderr.flush()
        os._exit(7)
    if fault == "interrupt":
        raise KeyboardInterrupt
    if fault == "print":
        print("to standard output")
        os.write(1, b"and to its file descriptor\n")
    if fault == "scribble":
        images[:] = 255
    return first_pixel(images, prompts)


def slow(images: Any, prompts: Any, seconds: float = 0.2) -> list[float]:
    time.sleep(seconds)
    return first_pixel(images, prompts)


def process_id(images: Any, prompts: Any) -> list[float]:
    return [float(os.getpid() % 100000)] * len(images)


def prefix(images: Any, prompts: Any, expected: str) -> list[float]:
    """Whether this interpreter is the expected one, and has none of the packages of the test's own."""
    return [float(sys.prefix == expected and "torch" not in sys.modules)] * len(images)


class Counting:
    """Counts how often one is made."""

    made = 0
    name = "counting"

    def __init__(self) -> None:
        type(self).made += 1

    def score(self, batch: Any) -> Any:
        from flowrl.records import RewardResult

        if batch.prompts[0] == "hang":
            WOKEN.wait(3)
        count = len(batch)
        return RewardResult(
            scores=batch.images.reshape(count, -1)[:, 0].astype(np.float32),
            valid=np.ones(count, np.bool_),
            errors=[None] * count,
            components={"half": batch.images.reshape(count, -1)[:, 0].astype(np.float32) / 2},
            details=[f"seen {prompt}" for prompt in batch.prompts],
        )


def dies_once(images: Any, prompts: Any, mark: str) -> list[float]:
    if not os.path.exists(mark):
        with open(mark, "w"):
            os._exit(7)
    return first_pixel(images, prompts)


class Mover:
    """Scores by first pixel and notes in a file when it moves and scores; ``fail``: what raises.

    A batch whose prompt is "held" is scored once a file LOG.go is there.
    """

    name = "mover"

    def __init__(self, log: str, fail: str = "") -> None:
        self.log, self.fail, self.away = log, fail, False

    def note(self, what: str) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{what}\n")
        if what == self.fail:
            raise MemoryError(f"no room to {what}")

    def offload(self) -> None:
        self.note("offload")
        self.away = True

    def onload(self) -> None:
        self.note("onload")
        self.away = False

    def score(self, images: Any, prompts: Any) -> list[float]:
        self.note("score")
        if self.away:
            raise RuntimeError("scored while away")
        while prompts[0] == "held" and not os.path.exists(f"{self.log}.go"):
            time.sleep(0.01)
        return first_pixel(images, prompts)


def spills(images: Any, prompts: Any, log_extra: Any) -> list[float]:
    """Says the key that it was started with."""
    if prompts[0] == "raise":
        raise RuntimeError(f"401 for {os.environ['HF_TOKEN']}")
    log_extra("note", [f"key {os.environ['HF_TOKEN']}"] * len(images))
    return first_pixel(images, prompts)


def raises_its_key(images: Any, prompts: Any) -> list[float]:
    raise RuntimeError(f"login with {os.environ['WANDB_API_KEY']} failed")
