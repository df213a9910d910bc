"""Preference pairs: prompts with a picture that was preferred and one that was not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.data.pictures import IMAGE, source_picture
from flowrl.data.prompts import read_prompts
from flowrl.errors import UserError
from flowrl.records import PromptRow

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KEYS = ("chosen", "rejected")


@dataclass(frozen=True)
class PreferencePair:
    """One judgement. row: the prompt, its number in the file, and what else came with it; chosen, rejected: picture files."""

    row: PromptRow
    chosen: Path
    rejected: Path


def read_preferences(path: str | Path) -> list[PreferencePair]:
    """Read a jsonl file whose lines hold "prompt", "chosen" and "rejected"; other keys become metadata.

    Pictures are files beside this one, or absolute paths. Raises UserError with file and line for a missing key, a missing
    picture, and a pair of one and the same picture.
    """
    folder = Path(path).parent
    pairs = []
    for row in read_prompts(path, "jsonl"):
        place = f"{path}:{row.prompt_id + 1}"
        files = []
        for key in KEYS:
            given = row.metadata.get(key)
            if not isinstance(given, str) or not given:
                raise UserError(f'{place}: "{key}" must be the path of a picture, got {given!r}')
            file = folder / given
            if not file.is_file():
                raise UserError(f'{place}: "{key}": no file {given!r} beside {Path(path).name}; check the path')
            files.append(file)
        if files[0] == files[1]:
            raise UserError(f"{place}: chosen and rejected are one picture ({files[0].name}); a pair needs two")
        rest = {key: value for key, value in row.metadata.items() if key not in KEYS}
        pairs.append(PreferencePair(PromptRow(row.prompt, row.prompt_id, rest), files[0], files[1]))
    return pairs


def load_pictures(pair: PreferencePair, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Read both pictures of a pair, chosen first: uint8 [2, height, width, 3].

    One of another size is resized as the source pictures of editing models are. Raises UserError for a file that is no
    picture.
    """
    import numpy as np

    pictures = []
    for file in (pair.chosen, pair.rejected):
        try:
            pictures.append(source_picture({IMAGE: file}, height, width))
        except UserError as error:
            raise UserError(f"data.preferences: {file} cannot be read as a picture; replace it") from error
    return np.stack(pictures)
