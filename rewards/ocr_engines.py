"""Programs that read text in pictures: rapidocr (PP-OCR on onnxruntime, weights in its wheel) and tesseract."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flowrl.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Line:
    """One line of text that was read, with the engine's confidence in [0, 1]."""

    text: str
    confidence: float = 1.0


class Engine(Protocol):
    """Reads text."""

    def read(self, picture: npt.NDArray[np.uint8]) -> list[Line]:
        """Lines of one picture, uint8 [H, W, 3], in reading order."""


class RapidEngine:
    """rapidocr 3. whole: True takes the picture as one line of text (15 to 35 ms), False finds the lines first (0.2 s and
    more)."""

    def __init__(self, whole: bool = False) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(
                f"ocr: rapidocr cannot be imported ({error}); pip install 'flowrl[ocr]' (rapidocr and onnxruntime)"
            ) from error
        self._engine: Any = RapidOCR()
        self._whole = whole

    def read(self, picture: npt.NDArray[np.uint8]) -> list[Line]:
        """Lines of one picture; rapidocr takes BGR."""
        import numpy as np

        bgr = np.ascontiguousarray(picture[..., ::-1])
        found = self._engine(bgr, use_det=not self._whole, use_cls=not self._whole, use_rec=True)
        texts: Sequence[str] = found.txts or ()
        scores: Sequence[float] = found.scores if found.scores is not None else ()
        return [Line(str(text), float(score)) for text, score in zip(texts, scores, strict=True)]


class TesseractEngine:
    """The tesseract program, once a picture (about 0.14 s). psm: its page segmentation, 7 for one line, 3 for a page."""

    def __init__(self, psm: int = 7, language: str = "eng", timeout: float = 30.0) -> None:
        found = shutil.which("tesseract")
        if found is None:
            raise UserError("ocr_tesseract: no program tesseract on the path; install it (Debian: tesseract-ocr)")
        if not 0 <= psm <= 13:
            raise UserError(f"ocr_tesseract: psm is {psm}; use 0 to 13 (7 for one line)")
        self._command = [found, "stdin", "stdout", "--psm", str(psm), "-l", language]
        self._timeout = timeout

    def read(self, picture: npt.NDArray[np.uint8]) -> list[Line]:
        """Lines of one picture. Raises OSError where the program fails, TimeoutError where it hangs."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        try:
            done = subprocess.run(  # noqa: S603  the command is ours but for the language, and no shell reads it
                self._command, input=png.getvalue(), capture_output=True, timeout=self._timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"tesseract took more than {self._timeout:g} s over one picture") from error
        if done.returncode:
            told = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise OSError(f"tesseract ended with {done.returncode}: {told[0] if told else 'no message'}")
        return [Line(text) for text in done.stdout.decode("utf-8", "replace").splitlines() if text.strip()]


def upscaled(picture: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """A picture ``factor`` times larger, bicubic: engines are trained on letters of 20 pixels and more."""
    import numpy as np
    from PIL import Image

    if factor == 1:
        return picture
    size = (picture.shape[1] * factor, picture.shape[0] * factor)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
