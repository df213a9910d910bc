"""Every built-in reward says what it is: name, scope, media, bound, backbone, licence, repeatability."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from flowrl.registry import REWARDS, resolve

NETWORKS = {
    "clip-vit-l-14",
    "clip-vit-h-14",
    "siglip2",
    "dinov2",
    "qwen2-vl-7b",
    "qwen2-vl-2b",
    "blip-l",
    "pp-ocr",
    "tesseract",
}
NETWORKS |= {"vit-b-16-nsfw", "mask2former, clip-vit-l-14", "vlm", "unified-reward", "tiny-clip", ""}


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_a_reward_describes_itself(name: str) -> None:
    reward = resolve("reward", name)
    assert reward.name == name and inspect.getdoc(reward)
    assert reward.scope in ("sample", "pair", "group")
    assert isinstance(reward.media, frozenset) and reward.media and reward.media <= {"image", "video"}
    assert isinstance(reward.minimum, float) and reward.backbone in NETWORKS
    assert isinstance(reward.deterministic, bool) and reward.licence
    method = reward.compare if reward.scope == "pair" else reward.score
    assert inspect.getdoc(method)
    for parameter in inspect.signature(reward).parameters.values():
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def test_rewards_on_one_network_say_so() -> None:
    by_name = {name: resolve("reward", name).backbone for name in REWARDS}
    assert by_name["pickscore"] == by_name["hpsv2"] != by_name["clipscore"]
    assert by_name["clipscore"] == by_name["aesthetic"] == by_name["clip_similarity"]
    assert by_name["ocr"] != by_name["ocr_tesseract"]


def test_importing_every_reward_imports_no_network_library() -> None:
    modules = sorted({target.partition(":")[0] for target in REWARDS.values()} - {"flowrl.rewards.tiny_clip"})
    heavy = ("torch", "transformers", "scipy", "PIL")
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nprint(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
