"""Object detectors of transformers behind one face: pictures in, ``Detection`` lists out, names as GenEval writes them.

Thresholds of GenEval (2310.11513) were chosen for one Mask2Former of another code base; results with any of these carry
the detector's name. Scores: mask2former, class probability times the mean mask probability inside the mask; rtdetr and
owlv2, the sigmoid of the class logit; grounding_dino, the largest sigmoid over the tokens of the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flowrl.rewards.loading import Dtype, OnDevice, load_image_processor, load_network, load_tokenizer
from flowrl.rewards.media import chunks

from flowrl.errors import UserError
from flowrl.records import Detection

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

BATCH = 8
CLASSES = tuple(
    (
        "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
        "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
        "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
        "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
        "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
        "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
    ).split(",")
)
"""The 80 classes of COCO under GenEval's names."""
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "mouse": "computer mouse",
        "remote": "tv remote",
        "keyboard": "computer keyboard",
        "sofa": "couch",
        "tvmonitor": "tv",
        "motorbike": "motorcycle",
        "aeroplane": "airplane",
        "pottedplant": "potted plant",
        "diningtable": "dining table",
        "hair dryer": "hair drier",
        "doughnut": "donut",
    }
)
"""Names of other COCO label lists to GenEval's."""


@dataclass(frozen=True)
class Found:
    """A detection and, where the detector segments, its pixels (bool [H, W])."""

    detection: Detection
    mask: npt.NDArray[np.bool_] | None = field(default=None, compare=False)


class TransformersDetector(OnDevice, ABC):
    """What the detectors share. threshold: detections below it are dropped.

    ``find`` gives detections with their masks, the instance itself is a ``flowrl.protocols.Detector``.
    """

    licence = ""

    def __init__(self, device: str, threshold: float) -> None:
        super().__init__(device)
        if not 0 <= threshold < 1:
            raise UserError(f"detector: threshold is {threshold}; use 0 up to below 1")
        self.threshold = threshold
        self.network: Any = None
        self.processor: Any = None

    def __call__(self, images: npt.NDArray[np.uint8]) -> list[list[Detection]]:
        """uint8 [B, H, W, 3] to one list of detections a picture, surest first."""
        return [[found.detection for found in page] for page in self.find(images)]

    def find(self, images: npt.NDArray[np.uint8]) -> list[list[Found]]:
        """uint8 [B, H, W, 3] to one list a picture, surest first."""
        import torch

        pages = []
        for rows in chunks(len(images), BATCH):
            inputs = self.processor(list(images[rows]), return_tensors="pt", input_data_format="channels_last")
            with torch.inference_mode():
                pages += self.read(inputs, images.shape[1], images.shape[2])
        return [sorted(page, key=lambda found: -found.detection.score) for page in pages]

    @abstractmethod
    def read(self, inputs: Mapping[str, Any], height: int, width: int) -> list[list[Found]]:
        """Detections of one batch of processed pictures."""

    def pixels(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The processed pixels where the network is, in its dtype."""
        placed: torch.Tensor = inputs["pixel_values"].to(self.device, next(self.network.parameters()).dtype)
        return placed

    def boxes(
        self, scores: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor, names: Sequence[str]
    ) -> list[Found]:
        """One picture's rows above the threshold. scores, labels: [Q]; boxes: (left, top, right, bottom) [Q, 4]."""
        found = []
        for score, label, box in zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True):
            if score >= self.threshold:
                left, top, right, bottom = box
                found.append(Found(Detection(names[label], score, (left, top, right, bottom))))
        return found


class Mask2Former(TransformersDetector):
    """Instance segmentation: facebook/mask2former-swin-small-coco-instance is the architecture of GenEval's detector."""

    licence = "MIT code; the model card says other (facebook/mask2former-swin-small-coco-instance)"

    def __init__(
        self, path: str = "facebook/mask2former-swin-small-coco-instance", threshold: float = 0.3,
        device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        from transformers import Mask2FormerForUniversalSegmentation

        super().__init__(device, threshold)
        self.network = self.hold(load_network(Mask2FormerForUniversalSegmentation, path, "mask2former", dtype))
        self.processor = load_image_processor(path, "mask2former")
        self.names = coco_names(self.network.config.id2label)

    def read(self, inputs: Mapping[str, Any], height: int, width: int) -> list[list[Found]]:
        """The best Q of all query-class pairs, each with its query's mask at the picture's own size."""
        import torch

        output = self.network(pixel_values=self.pixels(inputs))
        side = inputs["pixel_values"].shape[-2:]
        resize = torch.nn.functional.interpolate
        masks = resize(output.masks_queries_logits.float(), size=side, mode="bilinear", align_corners=False)
        high, wide = side
        if "pixel_mask" in inputs:  # padding is at the bottom and on the right
            high, wide = int(inputs["pixel_mask"][0, :, 0].sum()), int(inputs["pixel_mask"][0, 0].sum())
        masks = resize(masks[..., :high, :wide], size=(height, width), mode="bilinear", align_corners=False)
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        return [self._page(c.cpu(), m.cpu()) for c, m in zip(classes, masks, strict=True)]

    def _page(self, classes: torch.Tensor, masks: torch.Tensor) -> list[Found]:
        queries, count = classes.shape
        best, places = classes.flatten().topk(min(queries, classes.numel()))
        found = []
        for probability, place in zip(best.tolist(), places.tolist(), strict=True):
            logits = masks[place // count]
            inside = logits > 0
            if not inside.any():
                continue
            score = probability * float(logits.sigmoid()[inside].mean())
            if score >= self.threshold:
                rows, columns = inside.any(1).nonzero()[:, 0].tolist(), inside.any(0).nonzero()[:, 0].tolist()
                box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
                found.append(Found(Detection(self.names[place % count], score, box), inside.numpy()))
        return found


class RtDetr(TransformersDetector):
    """RT-DETR (2407.17140) and other closed-vocabulary detectors that transformers calls ForObjectDetection."""

    licence = "Apache-2.0 (PekingU/rtdetr_v2_r50vd)"

    def __init__(
        self, path: str = "PekingU/rtdetr_v2_r50vd", threshold: float = 0.3, device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        from transformers import AutoModelForObjectDetection

        super().__init__(device, threshold)
        self.network = self.hold(load_network(AutoModelForObjectDetection, path, "rtdetr", dtype))
        self.processor = load_image_processor(path, "rtdetr")
        self.names = coco_names(self.network.config.id2label)

    def read(self, inputs: Mapping[str, Any], height: int, width: int) -> list[list[Found]]:
        """The checkpoint's own post-processing at the picture's size."""
        output = self.network(pixel_values=self.pixels(inputs))
        sizes = [(height, width)] * len(inputs["pixel_values"])
        pages = self.processor.post_process_object_detection(output, threshold=self.threshold, target_sizes=sizes)
        return [self.boxes(p["scores"].cpu(), p["labels"].cpu(), p["boxes"].cpu(), self.names) for p in pages]


class OwlV2(TransformersDetector):
    """OWLv2 (2306.09683): any classes, asked for as "a photo of a <class>"."""

    licence = "Apache-2.0 (google/owlv2)"

    def __init__(
        self, path: str = "google/owlv2-base-patch16-ensemble", threshold: float = 0.3,
        classes: Sequence[str] = CLASSES, device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        from transformers import Owlv2ForObjectDetection

        super().__init__(device, threshold)
        self.network = self.hold(load_network(Owlv2ForObjectDetection, path, "owlv2", dtype))
        self.processor = load_image_processor(path, "owlv2")
        tokenizer = load_tokenizer(path, "owlv2")
        self.names = list(classes)
        self.queries = tokenizer(
            [f"a photo of a {name}" for name in classes], padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.network.config.text_config.max_position_embeddings,
        )  # fmt: skip

    def read(self, inputs: Mapping[str, Any], height: int, width: int) -> list[list[Found]]:
        """Each box with its best class. Boxes are shares of the picture padded to a square."""
        count = len(inputs["pixel_values"])
        output = self.network(
            pixel_values=self.pixels(inputs),
            input_ids=self.queries["input_ids"].to(self.device).repeat(count, 1),
            attention_mask=self.queries["attention_mask"].to(self.device).repeat(count, 1),
        )
        scores, labels = output.logits.float().sigmoid().max(-1)
        boxes = corners(output.pred_boxes.float()) * max(height, width)
        return [
            self.boxes(s, label, clip(b, height, width), self.names)
            for s, label, b in zip(scores.cpu(), labels.cpu(), boxes.cpu(), strict=True)
        ]


class GroundingDino(TransformersDetector):
    """Grounding DINO (2303.05499): any classes, as one text "<class>. <class>. ..."; a class owns its words' tokens."""

    licence = "Apache-2.0 (IDEA-Research/grounding-dino)"

    def __init__(
        self, path: str = "IDEA-Research/grounding-dino-tiny", threshold: float = 0.3,
        classes: Sequence[str] = CLASSES, device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        from transformers import GroundingDinoForObjectDetection

        super().__init__(device, threshold)
        self.network = self.hold(load_network(GroundingDinoForObjectDetection, path, "grounding_dino", dtype))
        self.processor = load_image_processor(path, "grounding_dino")
        tokenizer = load_tokenizer(path, "grounding_dino")
        self.names = list(classes)
        self.ids, self.spans = spell(tokenizer, classes)
        limit = int(self.network.config.max_text_len)
        if len(self.ids) > limit:
            raise UserError(
                f"grounding_dino: {len(classes)} classes take {len(self.ids)} tokens, at most {limit}; ask for fewer"
            )

    def read(self, inputs: Mapping[str, Any], height: int, width: int) -> list[list[Found]]:
        """Each box with the class whose best token fits best."""
        import torch

        pixels = self.pixels(inputs)
        ids = torch.tensor([self.ids], device=self.device).repeat(len(pixels), 1)
        mask = inputs["pixel_mask"].to(self.device) if "pixel_mask" in inputs else None
        output = self.network(
            pixel_values=pixels, pixel_mask=mask, input_ids=ids, token_type_ids=torch.zeros_like(ids),
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        tokens = output.logits.float().sigmoid().cpu()
        scores, labels = torch.stack([tokens[..., a:b].amax(-1) for a, b in self.spans], -1).max(-1)
        scale = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = corners(output.pred_boxes.float().cpu()) * scale
        return [
            self.boxes(s, n, clip(b, height, width), self.names) for s, n, b in zip(scores, labels, boxes, strict=True)
        ]


def spell(tokenizer: Any, classes: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of "<class>. <class>. ..." between the start and end tokens, and the span of each class in them."""
    dot = tokenizer.encode(".", add_special_tokens=False)
    ids, spans = [int(tokenizer.cls_token_id)], []
    for name in classes:
        word = tokenizer.encode(name, add_special_tokens=False)
        spans.append((len(ids), len(ids) + len(word)))
        ids += [*word, *dot]
    return [*ids, int(tokenizer.sep_token_id)], spans


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(centre x, centre y, width, height) to (left, top, right, bottom), [..., 4]."""
    import torch

    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def clip(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes [..., 4] kept within the picture."""
    import torch

    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def coco_names(labels: Mapping[int, str]) -> list[str]:
    """A checkpoint's label list with GenEval's names, by label id."""
    return [ALIASES.get(labels[index], labels[index]) for index in range(len(labels))]


DETECTORS: Mapping[str, type[TransformersDetector]] = MappingProxyType(
    {"mask2former": Mask2Former, "rtdetr": RtDetr, "owlv2": OwlV2, "grounding_dino": GroundingDino}
)
