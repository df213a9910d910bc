"""Upstream files become safetensors: names, values, and that nothing in them is run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flowrl.errors import UserError
from flowrl.scoring.convert import convert, open_clip_to_transformers, read_upstream


class Block(nn.Module):
    """A residual block of open_clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class OpenClip(nn.Module):
    """open_clip's layout of a ViT CLIP, small: its names, its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, 16, 8, 8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(16))
        self.visual.positional_embedding = nn.Parameter(torch.randn(17, 16))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(16), nn.LayerNorm(16)
        self.visual.transformer = nn.Module()
        self.visual.transformer.resblocks = nn.ModuleList([Block(16), Block(16)])
        self.visual.proj = nn.Parameter(torch.randn(16, 8))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([Block(16)])
        self.token_embedding = nn.Embedding(30, 16)
        self.positional_embedding = nn.Parameter(torch.randn(7, 16))
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def images(self, x: torch.Tensor) -> torch.Tensor:
        v = self.visual
        x = v.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x)
        return v.ln_post(x[:, 0]) @ v.proj  # type: ignore[no-any-return]

    def texts(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((7, 7), float("-inf")).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        last = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
        return last @ self.text_projection  # type: ignore[no-any-return]


def test_open_clip_gives_the_same_features(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    theirs = OpenClip().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "clip.pt")
    side = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = side | {"num_hidden_layers": 1, "vocab_size": 30, "max_position_embeddings": 7, "eos_token_id": 29}
    vision = side | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    (tmp_path / "base").mkdir()
    CLIPConfig(text_config=text, vision_config=vision, projection_dim=8).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    out = tmp_path / "out"
    written = convert("open_clip", str(tmp_path / "clip.pt"), str(out), str(tmp_path / "base"))
    assert written == [str(out / "config.json"), str(out / "model.safetensors")]
    ours, report = CLIPModel.from_pretrained(out, output_loading_info=True, use_safetensors=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels, ids = torch.randn(3, 3, 32, 32), torch.tensor([[1, 5, 9, 29, 0, 0, 0], [1, 2, 3, 4, 5, 6, 29]])
    with torch.no_grad():
        images = ours.get_image_features(pixel_values=pixels).pooler_output
        texts = ours.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(images, theirs.images(pixels), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(texts, theirs.texts(ids), rtol=1e-4, atol=1e-4)
        assert ours.logit_scale.item() == 1.5


def test_foreign_names_are_refused() -> None:
    for name in (
        "layers.0.weight",
        "visual.transformer.resblocks.0.odd.weight",
        "visual.trunk.transformer.resblocks.0.ln_1.bias",
    ):
        with pytest.raises(UserError, match="is no weight of open_clip's CLIP; use kind plain"):
            open_clip_to_transformers({name: torch.zeros(1)})
    assert open_clip_to_transformers({"attn_mask": torch.zeros(2, 2)}) == {}


def test_plain_and_head(tmp_path: Path) -> None:
    tensors = {"layers.0.weight": torch.randn(2, 3), "rm_head.weight": torch.randn(1, 3)}
    tensors["tied"] = tensors["layers.0.weight"]
    torch.save(tensors, tmp_path / "a.pth")
    assert convert("plain", str(tmp_path / "a.pth"), str(tmp_path / "x")) == [str(tmp_path / "x" / "head.safetensors")]
    back = load_file(tmp_path / "x" / "head.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in tensors)
    save_file({k: v for k, v in tensors.items() if k != "tied"}, tmp_path / "b.safetensors")
    convert("head", str(tmp_path / "b.safetensors"), str(tmp_path / "y"))
    assert list(load_file(tmp_path / "y" / "head.safetensors")) == ["rm_head.weight"]
    assert list(load_file(tmp_path / "y" / "model.safetensors")) == ["layers.0.weight"]
    with pytest.raises(UserError, match=r"head.safetensors' is there already; give an empty folder"):
        convert("plain", str(tmp_path / "a.pth"), str(tmp_path / "x"))


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Trap(str(tmp_path / "hit"))}, tmp_path / "trap.pt")
    with pytest.raises(
        UserError, match=r"is no file of plain tensors .* ask its author for a state dict or safetensors"
    ):
        read_upstream(str(tmp_path / "trap.pt"))
    assert not (tmp_path / "hit").exists()


def test_wrong_input(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "number.pt")
    torch.save({}, tmp_path / "empty.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "fine.pt")
    (tmp_path / "text.pt").write_text(json.dumps({}))
    cases = [
        (("zip", "fine.pt", "o", ""), "kind is 'zip'; use plain, open_clip, head"),
        (("plain", "none.pt", "o", ""), "convert: no file"),
        (("plain", "number.pt", "o", ""), "holds dict, not a dict of named tensors"),
        (("plain", "empty.pt", "o", ""), "holds dict, not a dict of named tensors"),
        (("plain", "text.pt", "o", ""), "is no file of plain tensors"),
        (("plain", "fine.pt", "o", str(tmp_path / "none")), "give a local copy of the base model"),
        (("head", "fine.pt", "o", ""), r"the file has no rm_head"),
    ]
    for (kind, source, folder, base), message in cases:
        with pytest.raises(UserError, match=message):
            convert(kind, str(tmp_path / source), str(tmp_path / folder), base)
    assert not (tmp_path / "o").exists()
