"""Size of a picture as JPEG: the compressibility and incompressibility rewards of DDPO (2305.13301, section 5.1)."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING, Literal

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BYTES_PER_KB = 1000.0


class JpegSize:
    """score = sign * (bytes - header) / 1000 / scale: the size of the JPEG in kB, in units of ``scale``.

    sign: -1 rewards pictures that compress well, +1 those that do not. header: True takes off the bytes of a flat grey
    picture of the same size (about 0.6 kB of tables and markers), which would drown the signal of a small picture.
    quality: Pillow's, 1 to 95. scale: kB, above 0 (public code divides the compressibility of 512-pixel pictures by
    500). Deterministic for one version of Pillow. Component "kilobytes" is the size before sign and scale.
    """

    name = "jpeg"
    scope = "sample"
    media = frozenset({"image"})
    minimum = float("-inf")
    backbone = ""
    deterministic = True
    licence = "Apache-2.0 (flowrl)"

    def __init__(self, quality: int = 95, scale: float = 1.0, sign: Literal[-1, 1] = -1, header: bool = True) -> None:
        if not 1 <= quality <= 95:
            raise UserError(f"jpeg: quality is {quality}; use 1 to 95")
        if not 0 < scale < float("inf"):
            raise UserError(f"jpeg: scale is {scale}; use a number of kB above 0")
        if sign not in (-1, 1):
            raise UserError(f"jpeg: sign is {sign}; use -1 (small files are good) or 1 (large files are good)")
        self.quality = quality
        self.scale = scale
        self.sign = sign
        self.header = header

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures; no prompt or metadata is read."""
        import numpy as np

        height, width = batch.images.shape[1:3]
        base = _flat_bytes(height, width, self.quality) if self.header else 0
        sizes = [len(encode(image, self.quality)) - base for image in batch.images]
        kilobytes = np.array(sizes, dtype=np.float32) / np.float32(BYTES_PER_KB)
        scores = (self.sign * kilobytes / self.scale).astype(np.float32)
        return RewardResult(scores, np.ones(len(batch), np.bool_), [None] * len(batch), {"kilobytes": kilobytes})


def encode(image: npt.NDArray[np.uint8], quality: int) -> bytes:
    """The JPEG file of one picture, uint8 [H, W, 3], without metadata."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, format="JPEG", quality=quality)
    return out.getvalue()


@functools.lru_cache(maxsize=64)
def _flat_bytes(height: int, width: int, quality: int) -> int:
    import numpy as np

    return len(encode(np.full((height, width, 3), 128, np.uint8), quality))
