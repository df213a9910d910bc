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

IMAGE, VIDEO = "image", "video"
"""Keys of a row's metadata. image: a path, or uint8 [H, W, 3]; video: a path, a folder of frames, or uint8 [F, H, W, 3]."""
FRAMES = (".png", ".jpg", ".jpeg", ".webp")


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
    """What requests start from or shall resemble, each read once; None where no row has any.

    Pictures uint8 [B, H, W, 3]; videos uint8 [B, F, H, W, 3] where a video is asked for and every row has one.
    """
    import numpy as np

    moving = all(VIDEO in r.metadata and r.frames > 1 for r in requests)
    if not moving and not any(IMAGE in r.metadata for r in requests):
        return None
    read: dict[int, npt.NDArray[np.uint8]] = {}
    for r in requests:
        if r.prompt_id not in read:
            size = r.height, r.width
            read[r.prompt_id] = (
                source_video(r.metadata, r.frames, *size) if moving else source_picture(r.metadata, *size)
            )
    return np.stack([read[r.prompt_id] for r in requests])


def source_video(metadata: Mapping[str, Any], frames: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """The video of a row at the size that is asked for: uint8 [frames, height, width, 3].

    Frames are taken evenly from the first to the last, and resized as pictures are. Raises UserError for a row without one,
    a file that cannot be read, or one of fewer frames.
    """
    import numpy as np

    given = metadata.get(VIDEO)
    if given is None:
        raise UserError(f"data.prompts: a row has no {VIDEO!r}; add it to every row")
    read = _frames(Path(given)) if isinstance(given, str | Path) else list(np.asarray(given, dtype=np.uint8))
    if len(read) < frames:
        raise UserError(
            f"data.prompts: {VIDEO} {_named(given)} has {len(read)} frames, fewer than model.frames={frames}"
        )
    chosen = np.linspace(0, len(read) - 1, frames).round().astype(int)
    return np.stack([source_picture({IMAGE: read[i]}, height, width) for i in chosen])


def _named(given: object) -> str:
    return repr(str(given)) if isinstance(given, str | Path) else "(an array)"


def _frames(path: Path) -> list[npt.NDArray[np.uint8]]:
    """Every frame of a folder of pictures (in the order of their names), an animated WebP, GIF or PNG, or a film by PyAV."""
    import numpy as np
    from PIL import Image, ImageSequence

    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FRAMES)
        opened = [Image.open(file) for file in files]
        return [np.array(picture.convert("RGB")) for picture in opened]
    try:
        with Image.open(path) as film:
            return [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    except OSError as error:
        return _film(path, error)


def _film(path: Path, error: OSError) -> list[npt.NDArray[np.uint8]]:
    """What Pillow cannot read, by PyAV where it is installed."""
    try:
        import av
    except ModuleNotFoundError:
        raise UserError(
            f"data.prompts: {VIDEO} {str(path)!r} cannot be read: {error}; films such as mp4 need PyAV (pip install av), or "
            "give an animated WebP or GIF, or a folder of frames"
        ) from error
    try:
        with av.open(str(path)) as film:
            return [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    except (av.FFmpegError, IndexError) as broken:
        raise UserError(f"data.prompts: {VIDEO} {str(path)!r} cannot be read: {broken}") from broken


def beside(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A row's metadata with its picture's and video's paths read as relative to the prompt file.

    Raises ValueError where one is missing; a video may be a folder of frames.
    """
    found = dict(metadata)
    for key in (IMAGE, VIDEO):
        given = metadata.get(key)
        if not isinstance(given, str):
            continue
        path = file.parent / given
        if not (path.is_file() or (key == VIDEO and path.is_dir())):
            raise ValueError(f"{key}: no file {given!r} beside the prompt file")
        found[key] = str(path)
    return found
