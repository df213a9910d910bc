"""Preference files: pairs of pictures with their prompts; every fault names file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowrl.data.preferences import load_pictures, read_preferences
from flowrl.errors import UserError


def write(folder: Path, *rows: dict) -> Path:
    for name, level in (("good", 200), ("bad", 10)):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / f"{name}.png")
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


ROW = {"prompt": "a cat", "chosen": "good.png", "rejected": "bad.png", "judge": "me"}


def test_pairs_and_their_pictures(tmp_path: Path) -> None:
    pairs = read_preferences(
        write(tmp_path, ROW, ROW | {"prompt": "a dog", "chosen": str(tmp_path / "bad.png"), "rejected": "good.png"})
    )
    assert [pair.row.prompt for pair in pairs] == ["a cat", "a dog"] and [p.row.prompt_id for p in pairs] == [0, 1]
    assert pairs[0].row.metadata == {"judge": "me"}
    assert load_pictures(pairs[0], 8, 8)[:, 0, 0, 0].tolist() == [200, 10]
    assert load_pictures(pairs[1], 4, 6).shape == (2, 4, 6, 3) and load_pictures(pairs[1], 4, 6)[1].mean() == 200


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": 3}, ':1: "chosen" must be the path of a picture, got 3'),
        ({"rejected": "none.png"}, """:1: "rejected": no file 'none.png' beside pairs.jsonl; check the path"""),
        ({"rejected": "good.png"}, ":1: chosen and rejected are one picture (good.png); a pair needs two"),
        ({"prompt": ""}, ':1: "prompt" must be a non-empty text'),
    ],
)
def test_faults(tmp_path: Path, row: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        read_preferences(write(tmp_path, ROW | row))
    assert words in str(error.value)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    pairs = read_preferences(write(tmp_path, ROW))
    (tmp_path / "bad.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"data.preferences: .*bad.png cannot be read as a picture"):
        load_pictures(pairs[0], 8, 8)
