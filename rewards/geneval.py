"""GenEval (2310.11513) on photographs: a detector finds objects, CLIP names their colours, the judge checks clauses.

The soft score is that of ``compositional.judge``. Only classes that the prompt names are looked at: a photograph may show
a table under the cat. ``compat`` gives the public verdicts:

    official    1 where every clause holds ("at least n", GenEval's own rule), else 0
    flow_grpo   the mean over terms of the reward server of flow_grpo, its two defects included: a failed position adds a 0
                and a 1 all the same, and the count term 1 - |n - found| / n has no lower bound (reconstructed: read in
                descendants of that code)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from flowrl.rewards.clip import DualEncoder, unit
from flowrl.rewards.compositional import Verdict, judge, stands
from flowrl.rewards.detectors import DETECTORS, Found, TransformersDetector
from flowrl.rewards.media import IMAGE, scored

from flowrl.data.geneval import fault
from flowrl.errors import UserError
from flowrl.records import Detection, RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GREY = 0x99
COUNTING = "counting"  # the tag whose prompts need surer detections


class ColorNamer:
    """Zero-shot colour of an object: its crop, the background greyed out, against 10 colours in 3 templates.

    A colour's direction is the unit mean of its templates' unit embeddings; the colour with the largest cosine wins.
    """

    def __init__(self, path: str, device: str = "auto") -> None:
        self.encoder = DualEncoder(path, "geneval", device)

    def name(self, picture: npt.NDArray[np.uint8], objects: Sequence[Found]) -> list[Found]:
        """The same objects with ``color`` filled in. picture: uint8 [H, W, 3]."""
        import torch

        named = []
        for found in objects:
            texts = [t.format(color=c, name=found.detection.label) for c in COLORS for t in TEMPLATES]
            directions = unit(self.encoder.texts(texts).reshape(len(COLORS), len(TEMPLATES), -1).mean(1))
            crop = cut_out(picture, found)
            with torch.inference_mode():
                best = int((self.encoder.images(crop[None]) @ directions.T).argmax())
            named.append(dataclasses.replace(found, detection=dataclasses.replace(found.detection, color=COLORS[best])))
        return named


def cut_out(picture: npt.NDArray[np.uint8], found: Found) -> npt.NDArray[np.uint8]:
    """The object's box, at least one pixel, with what its mask leaves out in grey."""
    import numpy as np

    height, width = picture.shape[:2]
    left, top, right, bottom = found.detection.box
    x, y = min(int(left), width - 1), min(int(top), height - 1)
    box = np.s_[y : max(y + 1, int(np.ceil(bottom))), x : max(x + 1, int(np.ceil(right)))]
    crop = picture[box].copy()
    if found.mask is not None:
        crop[~found.mask[box]] = GREY
    return crop


def flow_grpo_verdict(metadata: Mapping[str, Any], found: Sequence[Detection]) -> Verdict:
    """The strict verdict ("exactly n") and soft score of flow_grpo's reward server, defects and all.

    Terms of a clause: 1 - |n - found| / n; where the count is wrong and a colour or position is asked for, a 0; where it
    is right, 1 - |n - right colour| / n, and for a position whose own clause and target hold so far: a 0 if any pair
    stands otherwise, then a 1; a 0 alone if the target failed. dense: their mean, at most 1, not bounded below.
    metadata: checked by ``flowrl.data.geneval``.
    """
    terms: list[float] = []
    groups: list[list[Detection] | None] = []
    for clause in metadata["include"]:
        count = clause["count"]
        mine = [d for d in found if d.label == clause["class"]]
        matched = len(mine) == count
        terms.append(1 - abs(count - len(mine)) / count)
        if not matched and ("color" in clause or "position" in clause):
            terms.append(0.0)
        if matched and "color" in clause:
            right = sum(d.color == clause["color"] for d in mine)
            terms.append(1 - abs(count - right) / count)
            matched = right == count
        if matched and "position" in clause:
            relation, target = clause["position"]
            others = groups[target] if target < len(groups) else None
            matched = others is not None and all(stands(a, relation, b) for a in mine for b in others)
            terms += [0.0] * (not matched) + [1.0] * (others is not None)
        groups.append(mine if matched else None)
    strict = all(group is not None for group in groups)
    return Verdict(strict, sum(terms) / len(terms), "" if strict else "a clause does not hold")


class GenEval:
    """Reward for photographs that show what GenEval metadata asks for.

    detector: mask2former, rtdetr, owlv2 or grounding_dino; path: its checkpoint, "" for the usual one; colors: a CLIP
    checkpoint that names colours. mode: "strict" (0 or 1), "dense" (mean over atoms) or "mean" of both. exact: exactly
    as many of the named classes as asked for. compat: see the module's text. threshold: surest detections only, with
    counting_threshold for prompts tagged "counting" (GenEval's 0.3 and 0.9); max_objects: surest ones a class.
    Components "strict", "dense"; details: the detector and the first failed atom.
    """

    name = "geneval"
    scope = "sample"
    media = IMAGE
    minimum = 0.0
    backbone = "mask2former, clip-vit-l-14"
    deterministic = True
    licence = "see the detector; MIT (openai/clip-vit-large-patch14)"

    def __init__(
        self, detector: Literal["mask2former", "rtdetr", "owlv2", "grounding_dino"] = "mask2former", path: str = "",
        colors: str = "openai/clip-vit-large-patch14", mode: Literal["mean", "strict", "dense"] = "mean",
        exact: bool = True, compat: Literal["", "official", "flow_grpo"] = "", *, threshold: float = 0.3,
        counting_threshold: float = 0.9, max_objects: int = 16, device: str = "auto",
    ) -> None:  # fmt: skip
        for what, value, known in (
            ("detector", detector, tuple(DETECTORS)),
            ("mode", mode, ("mean", "strict", "dense")),
            ("compat", compat, ("", "official", "flow_grpo")),
        ):
            if value not in known:
                raise UserError(f"{self.name}: {what} is {value!r}; use {', '.join(k or 'no value' for k in known)}")
        if not 0 <= threshold <= counting_threshold < 1 or max_objects < 1:
            raise UserError(
                f"{self.name}: threshold is {threshold}, counting_threshold {counting_threshold}, max_objects {max_objects}; "
                "use 0 <= threshold <= counting_threshold < 1 and at least one object"
            )
        self.mode, self.exact, self.compat, self.kind = mode, exact, compat, detector
        self.threshold, self.counting_threshold, self.max_objects = threshold, counting_threshold, max_objects
        self.minimum = float("-inf") if compat == "flow_grpo" else 0.0
        self.detector = _load(detector, path, threshold, device)
        self.namer = ColorNamer(colors, device)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Judge finished pictures against their metadata; a sample with wrong metadata is invalid, with the reason."""
        import numpy as np

        problems = [fault(metadata) for metadata in batch.metadata]
        errors = [f"{self.name}: metadata: {p}; it needs GenEval prompts" if p else None for p in problems]
        strict, dense = np.full(len(batch), np.nan, np.float32), np.full(len(batch), np.nan, np.float32)
        details: list[str | None] = [None] * len(batch)
        for index, found in enumerate(self.detector.find(batch.images)):
            if errors[index] is None:
                metadata = batch.metadata[index]
                verdict = self._verdict(metadata, self._objects(batch.images[index], found, metadata))
                strict[index], dense[index] = verdict.strict, verdict.dense
                details[index] = f"{self.kind}: {verdict.reason or 'all holds'}"
        mean = ((strict + dense) / 2).astype(np.float32)
        scores = {"strict": strict, "dense": dense, "mean": mean}
        chosen = {"": self.mode, "official": "strict", "flow_grpo": "dense"}[self.compat]
        return scored(scores[chosen], {"strict": strict, "dense": dense}, details, errors)

    def _objects(
        self, picture: npt.NDArray[np.uint8], found: Sequence[Found], metadata: Mapping[str, Any]
    ) -> list[Detection]:
        """Sure detections of the classes that the prompt names, surest first, with colours where one is asked for."""
        limit = self.counting_threshold if metadata.get("tag") == COUNTING else self.threshold
        clauses = [*metadata["include"], *metadata.get("exclude", ())]
        colored = {clause["class"] for clause in clauses if "color" in clause}
        objects: list[Detection] = []
        for name in dict.fromkeys(clause["class"] for clause in clauses):
            mine = [f for f in found if f.detection.label == name and f.detection.score >= limit][: self.max_objects]
            mine = self.namer.name(picture, mine) if name in colored else mine
            objects += [f.detection for f in mine]
        return objects

    def _verdict(self, metadata: Mapping[str, Any], objects: Sequence[Detection]) -> Verdict:
        if self.compat == "flow_grpo":
            return flow_grpo_verdict(metadata, objects)
        return judge(metadata, objects, exact=self.exact and not self.compat)

    def offload(self) -> None:
        """Move both networks to main memory."""
        self.detector.offload()
        self.namer.encoder.offload()

    def onload(self) -> None:
        """Move both networks back to their device."""
        self.detector.onload()
        self.namer.encoder.onload()


def _load(detector: str, path: str, threshold: float, device: str) -> TransformersDetector:
    made: Any = DETECTORS[detector]
    loaded: TransformersDetector = (
        made(path, threshold=threshold, device=device) if path else made(threshold=threshold, device=device)
    )
    return loaded
