"""Feature networks through one protocol: cells, the rewards' own networks, and one of the user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flowrl.rewards.clip import DualEncoder
from flowrl.rewards.embeddings import Cells
from flowrl.rewards.similarity import Dino
from flowrl.rewards.tiny_clip import TinyClip, TinyClipConfig
from PIL import Image

from flowrl import registry
from flowrl.config import check, load
from flowrl.config.dialect import ConfigError
from flowrl.config.evaluation import FeatureEntry
from flowrl.errors import UserError
from flowrl.evaluation.features import embed, embed_all, embed_folder, load_features
from tests.evaluation.eval_parts import Halves
from tests.rewards import checkpoints

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 24, 30, 3), dtype=np.uint8)


def test_cells_by_hand() -> None:
    """24 x 30 pixels: rows of 3; columns of 3 and 4, at 0, 3, 7, 11, 15, 18, 22, 26."""
    found = Cells()(PICTURES)
    assert found.shape == (5, 192) and found.dtype == np.float32
    edges = [0, 3, 7, 11, 15, 18, 22, 26, 30]
    cell = PICTURES[3, 6:9, edges[5] : edges[6]].reshape(-1, 3).mean(0) / 255
    np.testing.assert_allclose(found[3].reshape(8, 8, 3)[2, 5], cell, rtol=1e-6)
    assert Cells()(np.full((1, 3, 5, 3), 51, np.uint8)).tolist() == [pytest.approx([0.2] * 45)]


@pytest.mark.parametrize("kind", ["clip", "siglip", "dino", "tiny_clip"])
def test_the_rewards_networks_are_reached_by_name(kind: str, tmp_path: Path) -> None:
    """Unit vectors, the same as those that the reward of that network compares."""
    if kind == "tiny_clip":
        TinyClip(TinyClipConfig(("red", "circle"), dimensions=8)).save(str(tmp_path))
    else:
        {"clip": checkpoints.save_clip, "siglip": checkpoints.save_siglip, "dino": checkpoints.save_dino}[kind](
            tmp_path
        )
    networks = load_features([FeatureEntry(name=kind, args={"path": str(tmp_path), "device": "cpu"})])
    found = embed_all(networks, PICTURES)[kind]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert networks[kind].metric == "cosine" and found.dtype == np.float32
    if kind in ("clip", "siglip"):
        np.testing.assert_allclose(found, DualEncoder(str(tmp_path), "t", "cpu").images(PICTURES).numpy(), rtol=1e-5)
    if kind == "dino":
        np.testing.assert_allclose(found, Dino(str(tmp_path), "t", "cpu").images(PICTURES).numpy(), rtol=1e-5)


def test_a_network_of_ones_own_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mean:\n    metric = 'rms'\n    def __init__(self, scale: float = 1.0): self.scale = scale\n"
        "    def __call__(self, pictures): return pictures.mean((1, 2)) * self.scale\n"
    )
    entry = FeatureEntry(name=f"{file}:Mean", args={"scale": 2.0})
    found = embed_all(load_features([entry]), PICTURES)
    np.testing.assert_allclose(found["Mean"], 2 * PICTURES.mean((1, 2)), rtol=1e-6)


def test_videos_are_the_mean_over_their_frames() -> None:
    clips = PICTURES[:4].reshape(2, 2, 24, 30, 3)
    np.testing.assert_allclose(embed("h", Halves(), clips), Halves()(PICTURES[:4]).reshape(2, 2, 6).mean(1), rtol=1e-6)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embed("h", Halves(), PICTURES)
    monkeypatch.setattr("flowrl.evaluation.features.BATCH", 2)
    np.testing.assert_array_equal(embed("h", Halves(), PICTURES), whole)


def test_a_network_is_on_its_device_only_while_it_works() -> None:
    class Moved(Halves):
        def __init__(self) -> None:
            self.log: list[str] = []

        def __call__(self, pictures):
            self.log.append("call")
            return super().__call__(pictures)

        def offload(self) -> None:
            self.log.append("off")

        def onload(self) -> None:
            self.log.append("on")

    network = Moved()
    embed_all({"m": network}, PICTURES)
    assert network.log == ["on", "call", "off"]


def test_a_folder_of_pictures_of_any_size(tmp_path: Path) -> None:
    sizes = {"b.png": (24, 30), "a.jpg": (24, 30), "c.webp": (50, 20), "d.PNG": (24, 30)}
    for index, (name, (high, wide)) in enumerate(sizes.items()):
        Image.fromarray(np.full((high, wide, 3), 40 * index, np.uint8)).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no picture")
    found = embed_folder({"cells": Cells()}, str(tmp_path))["cells"]
    np.testing.assert_allclose(found[:, 0] * 255, [40, 0, 80, 120], atol=1)  # by name
    (tmp_path / "e.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"e\.png cannot be read as a picture"):
        embed_folder({"cells": Cells()}, str(tmp_path))


class NoMetric:
    def __call__(self, pictures):
        return pictures.mean((1, 2))


class Flat(Halves):
    def __call__(self, pictures):
        return super().__call__(pictures)[:, 0]


class Broken(Halves):
    def __call__(self, pictures):
        return super().__call__(pictures) * np.nan


@pytest.mark.parametrize("name", ["Flat", "Broken"])
def test_features_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} made .* or values that are not finite"):
        embed(name, {"Flat": Flat, "Broken": Broken}[name](), PICTURES)


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"NoMetric is no feature network; it needs __call__\(pictures\) and metric"):
        load_features([FeatureEntry(name="tests.evaluation.test_features:NoMetric")])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluation.features=[{name: clap}]",
            "evaluation.features.0.name: unknown feature 'clap'; did you mean clip?",
        ),
        (
            "evaluation.features=[{name: clip, args: {pth: x}}]",
            "evaluation.features.0.args.pth: unknown argument of clip",
        ),
        ("evaluation.features=[{name: tiny_clip}]", "evaluation.features.0.args.path: missing; tiny_clip needs it"),
        ("evaluation.features=[{name: cells}, {name: cells}]", "evaluation.features: cells is given 2 times"),
        ("evaluation.features=[{name: cells, label: a/b}]", "evaluation.features.0.label: 'a/b' cannot name a result"),
        ("evaluation.distances=[kid, kid]", "evaluation.distances: kid is given 2 times"),
        ("evaluation.reference=/none", "evaluation.reference: no folder '/none'"),
        ("evaluation.reference=tests/data", "evaluation.reference: tests/data holds 0 pictures"),
    ],
)
def test_mistakes_are_found_in_the_config(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(load("tiny_test", [override]))
    assert message in str(caught.value)


def test_a_reference_with_nothing_to_measure_is_a_conflict(tmp_path: Path) -> None:
    for name in "ab":
        Image.fromarray(PICTURES[0]).save(tmp_path / f"{name}.png")
    changes = [f"evaluation.reference={tmp_path}", "evaluation.features=[]"]
    with pytest.raises(ConfigError, match="nothing is measured against it"):
        check(load("tiny_test", changes))
    check(load("tiny_test", changes[:1]))


def test_names_of_the_registry() -> None:
    assert registry.names("feature") == ["cells", "clip", "dino", "siglip", "tiny_clip"]
