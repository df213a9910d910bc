"""Scores of a dual encoder (CLIP, SigLIP): how well a picture and its prompt agree.

With u, v the L2-normalised embeddings of picture and prompt and s = exp(logit_scale): cos = u . v, logit = s cos.
Public code puts these on several scales, which a ``preset`` names, so that curves compare across papers:

    clipscore   cosine (native), 30: s cos / 30 (flow_grpo), paper: 2.5 max(cos, 0) (2104.08718 eq. 1),
                torchmetrics: 100 max(cos, 0)
    pickscore   logit (native): s cos, 26: s cos / 26 (flow_grpo, verl-omni), mixgrpo: (s cos - 18) / 8,
                cosine (DanceGRPO). Model: 2305.01569
    hpsv2       cosine (native). The picture's longest side is resized and the rest padded with black, not cropped.
                Model: HPSv2.1 (2306.09341)
    siglip2     probability (native): sigmoid(s cos + b); logit: s cos + b; cosine. Model: 2502.14786
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from flowrl.rewards.loading import Dtype, OnDevice, load_image_processor, load_network, load_tokenizer, pooled
from flowrl.rewards.media import BOTH, check_positive, chunks, frames, mean_by_owner, scored

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

BATCH = 32


@dataclass(frozen=True)
class Preset:
    """score = max(floor, factor * value + offset), value being cos, or s cos + b with ``logit``, or its sigmoid."""

    factor: float = 1.0
    offset: float = 0.0
    logit: bool = False
    floor: float = float("-inf")
    sigmoid: bool = False


class DualEncoder(OnDevice):
    """A CLIP or SigLIP checkpoint as two functions to unit vectors.

    processor: folder or hub id of the preprocessor and tokenizer, "" for ``path``. scale, bias: exp(logit_scale) and
    logit_bias (0 for CLIP) of the checkpoint.
    """

    def __init__(
        self, path: str, reward: str, device: str = "auto", dtype: Dtype = "float32", processor: str = ""
    ) -> None:
        from transformers import AutoModel

        super().__init__(device)
        network = load_network(AutoModel, path, reward, dtype)
        if not hasattr(network, "get_text_features") or not hasattr(network, "logit_scale"):
            raise UserError(
                f"{reward}: {path!r} is a {type(network).__name__}, which has no text side; give a CLIP or SigLIP model"
            )
        self.network: Any = self.hold(network)
        self.processor = load_image_processor(processor or path, reward)
        self.tokenizer = load_tokenizer(processor or path, reward)
        self.length = int(network.config.text_config.max_position_embeddings)
        # SigLIP was trained on texts padded to the full length, without a mask, and pools the last position.
        self.siglip = "siglip" in network.config.model_type
        self.scale = float(network.logit_scale.exp())
        self.bias = float(network.logit_bias) if hasattr(network, "logit_bias") else 0.0

    def images(self, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 [N, H, W, 3] to unit float32 [N, D], preprocessed as the checkpoint says."""
        import torch

        found = []
        for rows in chunks(len(pictures), BATCH):
            inputs = self.processor(list(pictures[rows]), return_tensors="pt", input_data_format="channels_last")
            found.append(self.pixels(dict(inputs)))
        return torch.cat(found)

    def pixels(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Processed pixels to unit float32 [N, D]."""
        import torch

        dtype = next(self.network.parameters()).dtype
        placed = {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        with torch.inference_mode():
            return unit(pooled(self.network.get_image_features(**placed)))

    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Texts to unit float32 [N, D]; each distinct text is encoded once."""
        import torch

        distinct = list(dict.fromkeys(prompts))
        found = []
        for rows in chunks(len(distinct), BATCH):
            padding = "max_length" if self.siglip else True
            inputs = self.tokenizer(
                distinct[rows], padding=padding, truncation=True, max_length=self.length, return_tensors="pt"
            ).to(self.device)
            inputs = {"input_ids": inputs["input_ids"]} if self.siglip else inputs
            with torch.inference_mode():
                found.append(unit(pooled(self.network.get_text_features(**inputs))))
        place = {text: index for index, text in enumerate(distinct)}
        return torch.cat(found)[[place[text] for text in prompts]]


def unit(values: torch.Tensor) -> torch.Tensor:
    """v / |v| in float32, over the last dimension."""
    import torch

    return torch.nn.functional.normalize(values.float(), dim=-1)


def apply_preset(cosine: npt.NDArray[np.float32], scale: float, bias: float, preset: Preset) -> npt.NDArray[np.float32]:
    """Put cosines on a preset's scale; see the module's text. cosine: float32 [N] in [-1, 1]."""
    import numpy as np

    value = cosine.astype(np.float64)
    if preset.logit or preset.sigmoid:
        value = scale * value + bias
    if preset.sigmoid:
        value = 1 / (1 + np.exp(-value))
    return np.maximum(preset.floor, preset.factor * value + preset.offset).astype(np.float32)


class DualEncoderReward:
    """What the rewards of this module share: load, compare, scale. Videos: the mean over frames 0, stride, 2 stride ...

    path: folder or hub id; preset: a key of ``presets``, "" for the native scale; stride: of video frames. Component
    "cosine" is the unscaled agreement.
    """

    name: ClassVar[str] = ""
    backbone: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    media = BOTH
    scope = "sample"
    deterministic = True
    minimum: float = float("-inf")
    presets: ClassVar[Mapping[str, Preset]] = MappingProxyType({})

    def __init__(self, path: str, preset: str, stride: int, device: str, dtype: Dtype, processor: str = "") -> None:
        key = preset or next(iter(self.presets))
        if key not in self.presets:
            raise UserError(f"{self.name}: preset is {preset!r}; use {', '.join(self.presets)}")
        check_positive(self.name, "stride", stride)
        self.preset = self.presets[key]
        self.stride = stride
        self.encoder = DualEncoder(path, self.name, device, dtype, processor)
        low = self.cosine_to_score(_array([-1.0]))
        self.minimum = float(low[0])

    def cosine_to_score(self, cosine: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Scores of cosines with this checkpoint's scale."""
        return apply_preset(cosine, self.encoder.scale, self.encoder.bias, self.preset)

    def embed(self, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Pictures to unit vectors; a subclass may preprocess in its own way."""
        return self.encoder.images(pictures)

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures or videos against their prompts."""
        pictures, owner = frames(batch.images, self.stride)
        texts = self.encoder.texts(batch.prompts)[owner.tolist()]
        cosine = (self.embed(pictures) * texts).sum(-1).clamp(-1, 1).cpu().numpy()
        scores = mean_by_owner(self.cosine_to_score(cosine), owner, len(batch))
        return scored(scores, {"cosine": mean_by_owner(cosine, owner, len(batch))})

    def offload(self) -> None:
        """Move the network to main memory."""
        self.encoder.offload()

    def onload(self) -> None:
        """Move the network back to its device."""
        self.encoder.onload()


class ClipScore(DualEncoderReward):
    """CLIPScore; presets cosine, 30, paper, torchmetrics (see the module's text)."""

    name = "clipscore"
    backbone = "clip-vit-l-14"
    licence = "MIT (openai/clip-vit-large-patch14)"
    presets = MappingProxyType(
        {
            "cosine": Preset(),
            "30": Preset(1 / 30, logit=True),
            "paper": Preset(2.5, floor=0.0),
            "torchmetrics": Preset(100.0, floor=0.0),
        }
    )

    def __init__(
        self, path: str = "openai/clip-vit-large-patch14", preset: str = "", stride: int = 4, device: str = "auto",
        dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        super().__init__(path, preset, stride, device, dtype)


class PickScore(DualEncoderReward):
    """PickScore; presets logit, 26, mixgrpo, cosine (see the module's text).

    processor: where the preprocessor and tokenizer are, "" for ``path``; the checkpoint on the hub was trained with those of
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which it takes.
    """

    name = "pickscore"
    backbone = "clip-vit-h-14"
    licence = "MIT code; the model card names no licence (yuvalkirstain/PickScore_v1)"
    presets = MappingProxyType(
        {
            "logit": Preset(logit=True),
            "26": Preset(1 / 26, logit=True),
            "mixgrpo": Preset(1 / 8, -18 / 8, logit=True),
            "cosine": Preset(),
        }
    )

    def __init__(
        self, path: str = "yuvalkirstain/PickScore_v1", preset: str = "", stride: int = 4, device: str = "auto",
        dtype: Dtype = "float32", processor: str = "",
    ) -> None:  # fmt: skip
        if path == "yuvalkirstain/PickScore_v1" and not processor:
            processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        super().__init__(path, preset, stride, device, dtype, processor)


class HpsV2(DualEncoderReward):
    """HPSv2.1: the cosine of a fine-tuned ViT-H/14, on letterboxed pictures.

    path: a folder made by ``flowrl rewards convert open_clip HPS_v2.1_compressed.pt`` with the files of
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K beside it.
    """

    name = "hpsv2"
    backbone = "clip-vit-h-14"
    licence = "Apache-2.0 (xswu/HPSv2)"
    presets = MappingProxyType({"cosine": Preset(), "100": Preset(100.0)})

    def __init__(
        self, path: str, preset: str = "", stride: int = 4, device: str = "auto", dtype: Dtype = "float32"
    ) -> None:
        super().__init__(path, preset, stride, device, dtype)
        self.side = int(self.encoder.network.config.vision_config.image_size)

    def embed(self, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Letterboxed pictures to unit vectors."""
        import torch

        found = []
        for rows in chunks(len(pictures), BATCH):
            boxed = letterbox(pictures[rows], self.side)
            inputs = self.encoder.processor(
                list(boxed), do_resize=False, do_center_crop=False, return_tensors="pt",
                input_data_format="channels_last",
            )  # fmt: skip
            found.append(self.encoder.pixels(dict(inputs)))
        return torch.cat(found)


class SigLip2(DualEncoderReward):
    """SigLIP 2 agreement of picture and prompt; presets probability, logit, cosine (see the module's text)."""

    name = "siglip2"
    backbone = "siglip2"
    licence = "Apache-2.0 (google/siglip2)"
    presets = MappingProxyType(
        {"probability": Preset(sigmoid=True, floor=0.0), "logit": Preset(logit=True), "cosine": Preset()}
    )

    def __init__(
        self, path: str = "google/siglip2-so400m-patch14-384", preset: str = "", stride: int = 4,
        device: str = "auto", dtype: Dtype = "float32",
    ) -> None:  # fmt: skip
        super().__init__(path, preset, stride, device, dtype)


def letterbox(pictures: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Resize the longest side to ``side`` (bicubic) and pad the other with black, the picture in the middle.

    uint8 [N, H, W, 3] to [N, side, side, 3]; with an odd remainder the extra row is at the bottom (right).
    """
    import numpy as np
    from PIL import Image

    height, width = pictures.shape[1:3]
    ratio = side / max(height, width)
    high, wide = round(height * ratio), round(width * ratio)
    top, left = (side - high) // 2, (side - wide) // 2
    out = np.zeros((len(pictures), side, side, 3), np.uint8)
    for index, picture in enumerate(pictures):
        resized = Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC)
        out[index, top : top + high, left : left + wide] = np.asarray(resized)
    return out


def _array(values: Sequence[float]) -> npt.NDArray[np.float32]:
    import numpy as np

    return np.array(values, np.float32)
