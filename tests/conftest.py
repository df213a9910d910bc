"""Fixtures that several test files share. Nothing here reaches the network."""

from __future__ import annotations

import os

# Read by the hub client, the tokenizers and the thread pools when they are first imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try a test of wall-clock time again: a busy machine is late now and then, a defect every time."""
    for item in items:
        if item.get_closest_marker("wall_clock"):
            item.add_marker(pytest.mark.flaky(reruns=3, reruns_delay=1))


@pytest.fixture(scope="session")
def world_words() -> list[str]:
    """Every word of world v1's sentences, sorted: the vocabulary of the tiny pipelines."""
    from flowrl.worlds.v1 import scenes

    pools = [pool for split in ("train", "held_out") for pool in scenes.prompts(split).values()]
    return sorted({word for pool in pools for prompt in pool for word in prompt.text.split()})


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory, world_words: list[str]) -> Path:
    """Folder of a saved random StableDiffusion3Pipeline, to be read only: 36 x 36 pixels, latents [4, 9, 9]."""
    from flowrl.pipelines.tiny import build_sd3

    folder = tmp_path_factory.mktemp("tiny_sd3")
    pipeline = build_sd3(
        world_words,
        layers=1,
        heads=1,
        head_dim=32,
        clip_layers=1,
        clip_hidden=32,
        text_length=13,
        vae_channels=(8, 16, 16),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory, world_words: list[str]) -> Path:
    """Folder of a saved random StableDiffusionPipeline (epsilon, DDIM), to be read only: 32 x 32 pixels.

    The stock pipeline takes multiples of 8 pixels only, hence not the 36 of world v1 (its
    detector takes any size). Latents [4, 16, 16].
    """
    from flowrl.pipelines.tiny import build_sd15

    folder = tmp_path_factory.mktemp("tiny_sd15")
    build_sd15(world_words, size=32, text_length=13).save_pretrained(folder)
    return folder
