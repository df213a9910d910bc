"""Rewards that stand on a vision-language model with a head at special tokens: HPSv3 and VideoReward.

The tokens are read from left to right with plain positions 0, 1, 2 ..., as both were trained. With h the last hidden state
at a reward token:

    hpsv3         W3 relu(W2 relu(W1 h + b1) + b2) + b3, its first output (the second is the logarithm of a spread)
                  (2508.03789, github.com/MizzenAI/HPSv3); presets native, 0.1
    video_reward  (w . h_axis - mean_axis) / std_axis for visual quality VQ, motion quality MQ and text alignment TA,
                  then the weighted sum (2501.13918, github.com/KwaiVGI/VideoAlign)

A folder holds the network (Qwen2-VL, save_pretrained, with the LoRA merged), its tokenizer and preprocessor,
``head.safetensors``, and ``instruction.txt``: the checkpoint's own instruction, with {prompt} and the reward tokens in it.
The instruction is part of the checkpoint: other words give other scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from flowrl.rewards.heads import Layer, read_linear_stack
from flowrl.rewards.loading import Dtype, OnDevice, load_head, load_image_processor, load_network, load_tokenizer
from flowrl.rewards.media import IMAGE, VIDEO, check_positive, scored, videos

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
END = "<|im_end|>\n<|im_start|>assistant\n"
PIXELS = 256 * 28 * 28  # of a picture, and the most of a frame
AXES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}
)
"""Mean and standard deviation of VideoReward's axes."""


def fitted_size(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """Height and width as multiples of ``unit`` near the given ones, with least to most pixels and about their ratio."""
    high, wide = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
    if high * wide > most:
        shrink = (height * width / most) ** 0.5
        high, wide = (max(unit, int(side / shrink / unit) * unit) for side in (height, width))
    elif high * wide < least:
        grow = (least / (height * width)) ** 0.5
        high, wide = (-int(-side * grow // unit) * unit for side in (height, width))
    return high, wide


def patches(
    film: npt.NDArray[np.float32], patch: int, merge: int, temporal: int
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """Qwen2-VL's rows of pixels: a picture or video cut into patches, those that are merged later side by side.

    film: normalised float32 [F, 3, H, W], F filled up to a multiple of ``temporal`` by repeating the last frame; H and W
    multiples of patch * merge. Returns [rows, 3 * temporal * patch * patch] and the grid (time, height, width).
    """
    import numpy as np

    short = -len(film) % temporal
    film = np.concatenate([film, np.repeat(film[-1:], short, 0)])
    t, h, w = len(film) // temporal, film.shape[2] // patch, film.shape[3] // patch
    split = film.reshape(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
    order = split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return order.reshape(t * h * w, -1), (t, h, w)


def at_tokens(hidden: torch.Tensor, ids: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Hidden states [L, D] at the one place of each token, [T, D]. Raises ValueError where one is missing or twice there."""
    import torch

    found = []
    for token in tokens:
        places = (ids == token).nonzero()[:, 0]
        if len(places) != 1:
            raise ValueError(f"reward token {token} stands {len(places)} times in the text, not once")
        found.append(hidden[places[0]])
    return torch.stack(found)


def relu_stack(x: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """Linear layers with max(0, .) between them. x: float32 [N, D]."""
    for index, (weight, bias) in enumerate(layers):
        x = (x if index == 0 else x.relu()) @ weight.T + bias
    return x


class Reader(OnDevice):
    """A Qwen2-VL folder as a function from pictures and prompt to hidden states at reward tokens."""

    def __init__(
        self, path: str, reward: str, tokens: Sequence[str], least: int, device: str = "auto", dtype: Dtype = "bfloat16"
    ) -> None:
        from transformers import AutoModel

        super().__init__(device)
        if not Path(path).is_dir():
            raise UserError(
                f"{reward}: no folder {path!r}; give one with the network, head.safetensors and instruction.txt"
            )
        self.instruction = self._read_instruction(path, reward, tokens)
        network = load_network(AutoModel, path, reward, dtype)
        if not hasattr(network.config, "image_token_id"):
            raise UserError(f"{reward}: {path!r} is a {type(network).__name__}; give a Qwen2-VL folder")
        self.network: Any = self.hold(network)
        self.processor = load_image_processor(path, reward)
        self.tokenizer = load_tokenizer(path, reward)
        self.tokens = [int(self.tokenizer.convert_tokens_to_ids(token)) for token in tokens]
        for token, place in zip(tokens, self.tokens, strict=True):
            if self.tokenizer.unk_token_id == place or self.tokenizer.convert_ids_to_tokens(place) != token:
                raise UserError(
                    f"{reward}: the tokenizer of {path!r} does not know {token!r}; save it with its reward tokens"
                )
        self.reward, self.least = reward, least

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.network.config.text_config.hidden_size)

    def hidden(self, film: npt.NDArray[np.uint8], prompt: str, *, video: bool) -> torch.Tensor:
        """Hidden states at the reward tokens, float32 [T, D]. film: uint8 [F, H, W, 3], one frame for a picture."""
        import torch

        rows, grid = self._patches(film)
        config = self.network.config
        merged = grid[0] * grid[1] * grid[2] // config.vision_config.spatial_merge_size**2
        pad = config.video_token_id if video else config.image_token_id
        encode = self.tokenizer.encode
        text = "<|vision_end|>" + self.instruction.replace("{prompt}", prompt) + END
        ids = [*encode(SYSTEM, add_special_tokens=False), *[pad] * merged, *encode(text, add_special_tokens=False)]
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(len(ids), device=self.device).expand(3, 1, -1)
        pixels = torch.tensor(rows).to(self.device, next(self.network.parameters()).dtype)
        place = torch.tensor([grid], device=self.device)
        kind = "video" if video else "image"
        media = {"pixel_values_videos" if video else "pixel_values": pixels, f"{kind}_grid_thw": place}
        with torch.inference_mode():
            output = self.network(input_ids=tokens, position_ids=positions, use_cache=False, **media)
        return at_tokens(output.last_hidden_state[0], tokens[0], self.tokens).float().cpu()

    def _patches(self, film: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
        import numpy as np
        from PIL import Image

        vision = self.network.config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        high, wide = fitted_size(film.shape[1], film.shape[2], unit, self.least, PIXELS)
        sized = [np.asarray(Image.fromarray(f).resize((wide, high), Image.Resampling.BICUBIC)) for f in film]
        mean, std = (np.array(v, np.float32) for v in (self.processor.image_mean, self.processor.image_std))
        planes = ((np.stack(sized).astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        return patches(
            planes.astype(np.float32), vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        )

    @staticmethod
    def _read_instruction(path: str, reward: str, tokens: Sequence[str]) -> str:
        file = Path(path) / "instruction.txt"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{reward}: cannot read {str(file)!r} ({error}); write the checkpoint's own instruction there"
            ) from error
        missing = [part for part in ("{prompt}", *tokens) if text.count(part) != 1]
        if missing:
            raise UserError(f"{reward}: {str(file)!r} must have {', '.join(missing)} once each")
        return text


class HpsV3:
    """HPSv3 of a picture for its prompt. preset: "" or "native" (the mean), "0.1" (a tenth, verl-omni).

    path: see the module's text; dtype of the network, the head works in float32. Component "log_spread": the second output.
    """

    name = "hpsv3"
    scope = "sample"
    media = IMAGE
    minimum = float("-inf")
    backbone = "qwen2-vl-7b"
    deterministic = True
    licence = "MIT (MizzenAI/HPSv3)"
    presets = ("native", "0.1")

    def __init__(self, path: str, preset: str = "", device: str = "auto", dtype: Dtype = "bfloat16") -> None:
        if preset not in ("", *self.presets):
            raise UserError(f"{self.name}: preset is {preset!r}; use {', '.join(self.presets)}")
        self.factor = 0.1 if preset == "0.1" else 1.0
        self.reader = Reader(path, self.name, ["<|Reward|>"], PIXELS, device, dtype)
        self.layers = read_linear_stack(path, self.name, self.reader.width, (0, 3, 5), "rm_head")

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures."""
        import numpy as np
        import torch

        if batch.images.ndim != 4:
            raise UserError(
                f"{self.name}: scores pictures, got {list(batch.images.shape)}; use video_reward for videos"
            )
        hidden = [
            self.reader.hidden(image[None], prompt, video=False)[0]
            for image, prompt in zip(batch.images, batch.prompts, strict=True)
        ]
        values = relu_stack(torch.stack(hidden), self.layers).numpy()
        scores = (self.factor * values[:, 0]).astype(np.float32)
        return scored(scores, {"log_spread": values[:, 1]} if values.shape[1] > 1 else None)

    def offload(self) -> None:
        """Move the network to main memory."""
        self.reader.offload()

    def onload(self) -> None:
        """Move the network back to its device."""
        self.reader.onload()


class VideoReward:
    """Weighted sum of VideoReward's standardised axes; each is a component.

    path: see the module's text. fps: of the videos; they are shown at 2 frames a second, which the network was trained
    on (another rate gives strongly negative scores for good clips). VQ, MQ, TA: weights; the default leaves out text
    alignment, which DanceGRPO found unstable to train on.
    """

    name = "video_reward"
    scope = "sample"
    media = VIDEO
    minimum = float("-inf")
    backbone = "qwen2-vl-2b"
    deterministic = True
    licence = "check the model card (KwaiVGI/VideoReward)"

    def __init__(
        self, path: str, fps: int, VQ: float = 1.0, MQ: float = 1.0, TA: float = 0.0, device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    ) -> None:  # fmt: skip
        check_positive(self.name, "fps", fps)
        self.weights = {"VQ": VQ, "MQ": MQ, "TA": TA}
        if not any(self.weights.values()):
            raise UserError(f"{self.name}: every axis has weight 0; give VQ, MQ or TA one")
        self.stride = max(1, round(fps / 2))
        self.reader = Reader(path, self.name, [f"<|{axis}_reward|>" for axis in AXES], 4 * 28 * 28, device, dtype)
        self.head = load_head(path, self.name, {"rm_head.weight": (1, self.reader.width)})["rm_head.weight"][0]

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished videos."""
        import numpy as np

        films = videos(batch, self.name)[:, :: self.stride]
        raw = np.stack(
            [
                (self.reader.hidden(film, prompt, video=True) @ self.head).numpy()
                for film, prompt in zip(films, batch.prompts, strict=True)
            ]
        )
        axes = {
            axis: ((raw[:, column] - mean) / std).astype(np.float32)
            for column, (axis, (mean, std)) in enumerate(AXES.items())
        }
        total = sum(
            (np.float32(weight) * axes[axis] for axis, weight in self.weights.items()), np.zeros(len(batch), np.float32)
        )
        return scored(np.asarray(total, np.float32), axes)

    def offload(self) -> None:
        """Move the network to main memory."""
        self.reader.offload()

    def onload(self) -> None:
        """Move the network back to its device."""
        self.reader.onload()
