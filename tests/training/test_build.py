"""From config to parts: which prompts are drawn how often."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl.config import load
from flowrl.data.sampler import weights_by_tag
from flowrl.errors import UserError
from flowrl.training.build import training_prompts

GENEVAL = Path(__file__).parents[1] / "data" / "geneval_test_metadata.jsonl"


def shares(rows, weights) -> dict[str, float]:
    found: dict[str, float] = {}
    for row, weight in zip(rows, weights, strict=True):
        found[row.metadata["tag"]] = found.get(row.metadata["tag"], 0.0) + weight
    return {tag: weight for tag, weight in found.items() if weight}


def test_tags_of_the_world() -> None:
    rows, weights = training_prompts(
        load({"rewards": [{"name": "jpeg"}], "data": {"tags": {"position": 3, "colors": 1}}})
    )
    assert shares(rows, weights) == pytest.approx({"position": 3.0, "colors": 1.0})


def test_without_tags_the_world_has_its_own_weights() -> None:
    from flowrl.worlds.v1.scenes import TAG_WEIGHT

    rows, weights = training_prompts(load({"rewards": [{"name": "jpeg"}]}))
    assert shares(rows, weights) == pytest.approx(TAG_WEIGHT)


def test_tags_of_a_geneval_file() -> None:
    """The mix that Flow-GRPO trains with: position 7, counting 5, attributes 3, colours 1, two objects 1."""
    mix = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
    config = {"rewards": [{"name": "jpeg"}], "data": {"prompts": str(GENEVAL), "format": "geneval", "tags": mix}}
    rows, weights = training_prompts(load(config))
    assert shares(rows, weights) == pytest.approx(mix)
    config["data"].pop("tags")
    assert training_prompts(load(config))[1] is None


def test_wrong_tags() -> None:
    rows, _ = training_prompts(load({"rewards": [{"name": "jpeg"}]}))
    with pytest.raises(UserError, match=r"data\.tags: no prompt has the tag 'colour'; the tags are color_attr, colors"):
        weights_by_tag(rows, {"colour": 1})
    for bad in ({"colors": -1}, {"colors": "much"}, {"colors": 0}):
        with pytest.raises(UserError, match=r"data\.tags.colors: weights are numbers of at least 0"):
            weights_by_tag(rows, bad)
