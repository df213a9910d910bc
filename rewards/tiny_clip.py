"""A CLIP of half a million weights for small synthetic pictures: convolutions on one side, one transformer layer on words on
the other. It is scored as the large ones are: score = cos(picture, prompt), or s cos with s = exp(logit_scale).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from flowrl.rewards.clip import unit
from flowrl.rewards.loading import OnDevice, read_config
from flowrl.rewards.media import BOTH, chunks, frames, mean_by_owner, scored
from torch import nn

from flowrl.errors import UserError
from flowrl.records import Request, RewardBatch, RewardResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BATCH = 256
PAD, UNKNOWN = 0, 1


@dataclass(frozen=True)
class TinyClipConfig:
    """vocabulary: words, lower case, from id 2 on (0 pads, 1 is unknown); side: pixels that pictures are resized to, a
    multiple of 8; width: channels of the last convolution and of words; dimensions: of the shared space; length: words."""

    vocabulary: tuple[str, ...]
    side: int = 32
    width: int = 96
    dimensions: int = 64
    length: int = 24


class TinyClip(nn.Module):
    """Two towers to unit vectors, and ``logit_scale``, the logarithm of s."""

    def __init__(self, config: TinyClipConfig) -> None:
        super().__init__()
        if config.side % 8 or config.side < 8 or config.width % 4:
            raise ValueError(f"TinyClip: side {config.side}, width {config.width}; use multiples of 8 and of 4")
        self.config = config
        self.places = {word: index + 2 for index, word in enumerate(config.vocabulary)}
        wide, half = config.width, config.width // 2
        self.vision = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, 1), nn.GELU(), nn.Conv2d(half, wide, 3, 2, 1), nn.GELU(),
            nn.Conv2d(wide, wide, 3, 2, 1), nn.GELU(), nn.Flatten(),
            nn.Linear(wide * (config.side // 8) ** 2, config.dimensions),
        )  # fmt: skip
        self.words = nn.Embedding(len(config.vocabulary) + 2, wide, padding_idx=PAD)
        self.positions = nn.Parameter(0.02 * torch.randn(config.length, wide))
        self.layer = nn.TransformerEncoderLayer(wide, 4, 2 * wide, dropout=0.0, batch_first=True, norm_first=True)
        self.text = nn.Linear(wide, config.dimensions)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Word ids, int64 [N, length]; what is too long is cut."""
        rows = torch.zeros(len(prompts), self.config.length, dtype=torch.long)
        for row, prompt in zip(rows, prompts, strict=True):
            words = prompt.lower().replace(",", " ").replace(".", " ").split()[: self.config.length]
            row[: len(words)] = torch.tensor([self.places.get(word, UNKNOWN) for word in words], dtype=torch.long)
        return rows

    def encode_images(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, side, side] in [0, 1] to unit [N, D]."""
        return unit(self.vision(2 * pictures - 1))

    def encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [N, length] to unit [N, D]: the mean over words after one transformer layer."""
        known = (tokens != PAD).unsqueeze(-1)
        # A text without a word still has its first place, so that no row is masked whole.
        masked = tokens == PAD
        masked[:, 0] = False
        hidden = self.layer(self.words(tokens) + self.positions, src_key_padding_mask=masked)
        mean = (hidden * known).sum(1) / known.sum(1).clamp(min=1)
        return unit(self.text(mean))

    def save(self, folder: str) -> None:
        """Write config.json and model.safetensors."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        settings = {"model": "tiny_clip", **dataclasses.asdict(self.config)}
        (path / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()},
            path / "model.safetensors",
        )

    @classmethod
    def load(cls, folder: str) -> TinyClip:
        """Read what ``save`` wrote. Raises UserError for another folder."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        settings = read_config(folder, "config.json", "tiny_clip")
        if settings.pop("model", "") != "tiny_clip":
            raise UserError(f"tiny_clip: {folder!r} holds another model; give a folder written by TinyClip.save")
        try:
            network = cls(TinyClipConfig(**(settings | {"vocabulary": tuple(settings["vocabulary"])})))
            network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"tiny_clip: {folder!r} cannot be loaded: {error}; write it again with TinyClip.save"
            ) from error
        return network


class TinyClipScore(OnDevice):
    """cos(picture, prompt) of a TinyClip in [-1, 1]; preset "logit": s cos. path: a folder written by ``TinyClip.save``."""

    name = "tiny_clip"
    scope = "sample"
    media = BOTH
    minimum = -1.0
    backbone = "tiny-clip"
    deterministic = True
    licence = "Apache-2.0 (flowrl)"
    presets = ("cosine", "logit")
    differentiable = "pictures"

    def __init__(
        self, path: str, preset: Literal["", "cosine", "logit"] = "", stride: int = 1, device: str = "auto"
    ) -> None:
        super().__init__(device)
        if preset not in ("", *self.presets):
            raise UserError(f"{self.name}: preset is {preset!r}; use {', '.join(self.presets)}")
        self.network: TinyClip = self.hold(TinyClip.load(path))
        self.scale = float(self.network.logit_scale.exp()) if preset == "logit" else 1.0
        self.minimum = -self.scale
        self.stride = stride

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished pictures or videos against their prompts."""
        import numpy as np

        pictures, owner = frames(batch.images, self.stride)
        with torch.inference_mode():
            texts = self.network.encode_texts(self.network.tokens(batch.prompts).to(self.device))[owner.tolist()]
            cosine = (self.images(pictures) * texts).sum(-1).cpu().numpy()
        return scored(np.float32(self.scale) * mean_by_owner(cosine, owner, len(batch)))

    @torch.inference_mode()
    def images(self, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 [N, H, W, 3] to unit float32 [N, D]."""
        return torch.cat([self._embed(pictures[rows]) for rows in chunks(len(pictures), BATCH)])

    def value(self, x: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """The score with its gradient. x: float [B, 3, H, W] in [0, 1]."""
        with torch.no_grad():
            texts = self.network.encode_texts(self.network.tokens([r.prompt for r in requests]).to(self.device))
        return self.scale * (self._planes(x.to(self.device)) * texts).sum(-1)

    def _embed(self, pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
        return self._planes(torch.tensor(pictures).to(self.device, torch.float32).permute(0, 3, 1, 2) / 255)

    def _planes(self, planes: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, H, W] in [0, 1] to unit [N, D]."""
        side = self.network.config.side
        if planes.shape[-2:] != (side, side):
            planes = nn.functional.interpolate(planes, (side, side), mode="bilinear", antialias=True)
        return self.network.encode_images(planes)
