"""Prompt files with videos beside pictures: paths, frames, and errors with file and line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowrl.data.pictures import references, source_video
from flowrl.data.prompts import read_prompts
from flowrl.errors import UserError
from flowrl.records import Request

CLIP = np.stack([np.full((8, 8, 3), 20 * i, dtype=np.uint8) for i in range(9)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frames = [Image.fromarray(frame) for frame in CLIP]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{number:03d}.png")
    frames[3].save(tmp_path / "first.png")
    return tmp_path


def write(folder: Path, *rows: dict) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_are_read_unchanged_with_paths_beside_the_file(folder: Path) -> None:
    file = write(folder, {"prompt": "a", "video": "clip.webp", "image": "first.png", "fps": 8}, {"prompt": "b"})
    first, second = read_prompts(file)
    assert first.metadata == {"video": str(folder / "clip.webp"), "image": str(folder / "first.png"), "fps": 8}
    assert (first.prompt, first.prompt_id, second.metadata) == ("a", 0, {})
    assert read_prompts(write(folder, {"prompt": "a", "video": "frames"}))[0].metadata["video"] == str(
        folder / "frames"
    )


@pytest.mark.parametrize("key", ["image", "video"])
def test_a_missing_file_names_file_and_line(folder: Path, key: str) -> None:
    file = write(folder, {"prompt": "a", key: "first.png"}, {"prompt": "b", key: "gone.webp"})
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    assert str(caught.value) == f"{file}:2: {key}: no file 'gone.webp' beside the prompt file"


@pytest.mark.parametrize("name", ["clip.webp", "frames"])
def test_frames_are_taken_evenly_from_first_to_last(folder: Path, name: str) -> None:
    video = source_video({"video": str(folder / name)}, 5, 4, 6)
    assert video.shape == (5, 4, 6, 3) and video.dtype == np.uint8
    assert video[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]


def test_references_are_videos_where_a_video_is_asked_for(folder: Path) -> None:
    metadata = {"video": str(folder / "clip.webp"), "image": str(folder / "first.png")}
    asked = [Request("a", 0, 8, 8, 5, metadata=metadata)] * 2
    found = references(asked)
    assert found is not None and found.shape == (2, 5, 8, 8, 3)
    still = references([Request("a", 0, 8, 8, 1, metadata=metadata)])
    assert still is not None and still.shape == (1, 8, 8, 3) and int(still.max()) == 60
    assert references([Request("a", 0, 8, 8, 5)]) is None
    held = references([Request("a", 0, 8, 8, 2, metadata={"video": CLIP})])
    assert held is not None and held[0, :, 0, 0, 0].tolist() == [0, 160]


def test_videos_that_do_not_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"clip.webp' has 9 frames, fewer than model.frames=17"):
        source_video({"video": str(folder / "clip.webp")}, 17, 8, 8)
    with pytest.raises(UserError, match="a row has no 'video'; add it to every row"):
        source_video({}, 5, 8, 8)
    (folder / "film.mp4").write_bytes(b"not a film")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"film.mp4' cannot be read: .* need PyAV \(pip install av\)"):
        source_video({"video": str(folder / "film.mp4")}, 5, 8, 8)
