"""Does the picture show the text that was asked for? Exact and edit similarity of what an OCR engine reads.

Texts are compared after NFKC, case folding and removal of white space. With r the text read and t the target (several
targets in the order that fits best), n = |t|, m = |r|, lev the Levenshtein distance:

    exact   1 if r = t, else 0
    edit    1 - lev(r, t) / max(n, m)                 text beyond the target costs as much as text that is missing
    edit, extra=False   mean over targets of 1 - min(d, n) / n, d the least distance of t to any part of r
    compat  flow_grpo: t within r gives 1, else 1 - min(lev(r, t), n) / n, with spaces removed and lower case only

The public form pays in full for any amount of further text around the target, and its video form drops the frames that
read nothing, so that one readable frame is enough; the form here does neither.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowrl.rewards.media import BOTH, check_positive, frames, scored
from flowrl.rewards.ocr_engines import Engine, Line, RapidEngine, TesseractEngine, upscaled

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')
PERMUTED = 4  # up to so many targets every order is tried: 24 comparisons
Mode = Literal["edit", "exact", "mean"]


def targets(prompt: str, metadata: Mapping[str, Any]) -> list[str]:
    """What the picture should say: ``metadata["text"]`` or ``["target"]`` (a text or a list), else the prompt's quotes.

    Straight, curly and angle double quotes count. Raises ValueError where there is no target, or one without a letter
    that counts.
    """
    given = metadata.get("text", metadata.get("target"))
    if given is None:
        given = [next(filter(None, found)) for found in QUOTED.findall(prompt)]
        if not given:
            raise ValueError('no target: give metadata "text" or "target", or put it in double quotes in the prompt')
    wanted = [given] if isinstance(given, str) else given
    if not isinstance(wanted, list | tuple) or not wanted or any(not isinstance(text, str) for text in wanted):
        raise ValueError(f"the target must be a text or a list of texts, got {given!r}")
    if any(not normalise(text) for text in wanted):
        raise ValueError("a target is empty; write the text that the picture should show")
    return list(wanted)


def normalise(text: str) -> str:
    """NFKC, case folded, without white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def distance(read: str, wanted: str, *, anywhere: bool = False) -> int:
    """Levenshtein distance; with ``anywhere`` the least one of ``wanted`` to any part of ``read``."""
    row = [0] * (len(read) + 1) if anywhere else list(range(len(read) + 1))
    for i, letter in enumerate(wanted, start=1):
        above, row = row, [i]
        for j, other in enumerate(read, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return min(row) if anywhere else row[-1]


def similarity(read: str, wanted: Sequence[str], *, extra: bool = True) -> tuple[float, float]:
    """(exact, edit) of normalised texts, both in [0, 1]; see the module's text. extra: further text costs."""
    orders = itertools.permutations(wanted) if len(wanted) <= PERMUTED else [tuple(wanted)]
    joined = {"".join(order) for order in orders}
    if not extra:
        shares = [1 - min(distance(read, text, anywhere=True), len(text)) / len(text) for text in wanted]
        return float(min(shares) == 1), sum(shares) / len(shares)
    return float(read in joined), max(1 - distance(read, text) / max(len(text), len(read)) for text in joined)


def flow_grpo_similarity(read: str, wanted: str) -> float:
    """The OCR reward of flow_grpo's ``ocr.py``, in [0, 1]. read: all lines joined."""
    read, wanted = read.replace(" ", "").lower(), wanted.replace(" ", "").lower()
    if wanted in read:
        return 1.0
    return 1 - min(distance(read, wanted), len(wanted)) / len(wanted)


class Ocr:
    """Score in [0, 1] for the text in a picture, read by rapidocr; of a video, the mean over frames 0, stride, ...

    mode: "edit", "exact" or "mean" (of both). extra: text beyond the target costs. whole: the picture is one line of text,
    which is ten times faster. upscale: factor for small pictures. min_confidence: lines below it are not read. compat:
    "flow_grpo" for the public formula, which takes the first target. Components "exact", "edit" and "substring" (the public
    formula, whatever ``compat`` says); details: what was read. A sample without a target is invalid.
    """

    name: ClassVar[str] = "ocr"
    scope = "sample"
    media = BOTH
    minimum = 0.0
    backbone = "pp-ocr"
    deterministic = True
    licence = "Apache-2.0 (rapidocr, PP-OCR)"

    def __init__(
        self, mode: Mode = "edit", extra: bool = True, whole: bool = False, upscale: int = 1, stride: int = 4,
        min_confidence: float = 0.0, compat: Literal["", "flow_grpo"] = "",
    ) -> None:  # fmt: skip
        self._setup(mode, extra, upscale, stride, min_confidence, compat)
        self.engine: Engine = RapidEngine(whole)

    def _setup(self, mode: Mode, extra: bool, upscale: int, stride: int, min_confidence: float, compat: str) -> None:
        if mode not in ("edit", "exact", "mean"):
            raise UserError(f"{self.name}: mode is {mode!r}; use edit, exact or mean")
        if compat not in ("", "flow_grpo"):
            raise UserError(f'{self.name}: compat is {compat!r}; use "" or flow_grpo')
        check_positive(self.name, "upscale", upscale)
        check_positive(self.name, "stride", stride)
        if not 0 <= min_confidence <= 1:
            raise UserError(f"{self.name}: min_confidence is {min_confidence}; use 0 to 1")
        self.mode, self.extra, self.upscale, self.stride = mode, extra, upscale, stride
        self.min_confidence, self.compat = min_confidence, compat

    def score(self, batch: RewardBatch) -> RewardResult:
        """Read finished pictures or videos and compare with the targets."""
        import numpy as np

        count = len(batch)
        wanted, errors = self._targets(batch)
        exact, edit, substring = (np.full(count, np.nan, np.float32) for _ in range(3))
        details: list[str | None] = [None] * count
        for index, texts in enumerate(wanted):
            if texts is None:
                continue
            pictures, _ = frames(batch.images[index : index + 1], self.stride)
            reads = [self.read(picture) for picture in pictures]
            pairs = np.array([self._compare(read, texts) for read in reads])
            exact[index], edit[index] = self._mean(pairs)
            joined = ["".join(line.text for line in read) for read in reads]
            substring[index] = np.mean([flow_grpo_similarity(text, texts[0]) for text in joined])
            details[index] = "; ".join(dict.fromkeys(" ".join(line.text for line in read) for read in reads))
        mean = ((edit + exact) / 2).astype(np.float32)
        scores = {"edit": edit, "exact": exact, "mean": mean}[self.mode]
        return scored(scores, {"exact": exact, "edit": edit, "substring": substring}, details, errors)

    def read(self, picture: npt.NDArray[np.uint8]) -> list[Line]:
        """Lines of one picture that are sure enough."""
        lines = self.engine.read(upscaled(picture, self.upscale))
        return [line for line in lines if line.confidence >= self.min_confidence]

    def _targets(self, batch: RewardBatch) -> tuple[list[list[str] | None], list[str | None]]:
        wanted: list[list[str] | None] = []
        errors: list[str | None] = []
        for prompt, metadata in zip(batch.prompts, batch.metadata, strict=True):
            try:
                wanted.append(targets(prompt, metadata))
                errors.append(None)
            except ValueError as error:
                wanted.append(None)
                errors.append(f"{self.name}: {error}")
        return wanted, errors

    def _compare(self, lines: Sequence[Line], wanted: Sequence[str]) -> tuple[float, float]:
        if self.compat:
            edit = flow_grpo_similarity("".join(line.text for line in lines), wanted[0])
            return float(edit == 1), edit
        read = normalise("".join(line.text for line in lines))
        return similarity(read, [normalise(text) for text in wanted], extra=self.extra)

    def _mean(self, pairs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        import numpy as np

        if self.compat:  # frames that score nothing are dropped there
            found = pairs[pairs[:, 1] > 0]
            return found.mean(0) if len(found) else np.zeros(2)
        mean: npt.NDArray[np.float64] = pairs.mean(0)
        return mean


class TesseractOcr(Ocr):
    """``Ocr`` read by tesseract: a second opinion on a policy that was trained on the other engine. psm: 7 for one line."""

    name = "ocr_tesseract"
    backbone = "tesseract"
    licence = "Apache-2.0 (tesseract)"

    def __init__(
        self, mode: Mode = "edit", extra: bool = True, psm: int = 7, upscale: int = 4, stride: int = 4,
        compat: Literal["", "flow_grpo"] = "", timeout: float = 30.0,
    ) -> None:  # fmt: skip
        self._setup(mode, extra, upscale, stride, 0.0, compat)
        self.engine = TesseractEngine(psm, timeout=timeout)
