"""Pictures and videos named by a row of a prompt file: what is edited, or a video's first frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError
from flowrl.records import Request

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

IMAGE = "image"
"""Key of a row's metadata: a path, or uint8 [H, W, 3]."""


def source_picture(metadata: Mapping[str, Any], height: int, width: int) -> npt.NDArray[np.uint8]:
    """The source picture of a row at the size that is asked for: uint8 [height, width, 3].

    A picture of another size is resized (Lanczos) without keeping its shape. Raises UserError for a row without one, or a
    file that is no picture.
    """
    import numpy as np
    from PIL import Image

    given = metadata.get(IMAGE)
    if given is None:
        raise UserError(f"data.prompts: a row has no {IMAGE!r}, which this model starts from; add it to every row")
    if isinstance(given, str | Path):
        try:
            with Image.open(given) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise UserError(f"data.prompts: {IMAGE} {str(given)!r} cannot be read: {error}") from error
    else:
        picture = Image.fromarray(np.asarray(given, dtype=np.uint8)).convert("RGB")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(picture)


def references(requests: Sequence[Request]) -> npt.NDArray[np.uint8] | None:
    """The source pictures of requests, uint8 [B, H, W, 3], each read once; None where no row has one."""
    import numpy as np

    if not any(IMAGE in r.metadata for r in requests):
        return None
    read: dict[int, npt.NDArray[np.uint8]] = {}
    for r in requests:
        if r.prompt_id not in read:
            read[r.prompt_id] = source_picture(r.metadata, r.height, r.width)
    return np.stack([read[r.prompt_id] for r in requests])


def beside(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A row's metadata with its picture's path read as relative to the prompt file. Raises ValueError where it is missing."""
    given = metadata.get(IMAGE)
    if not isinstance(given, str):
        return dict(metadata)
    path = file.parent / given
    if not path.is_file():
        raise ValueError(f"{IMAGE}: no file {given!r} beside the prompt file")
    return {**metadata, IMAGE: str(path)}
