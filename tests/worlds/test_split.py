"""The held-out split of world v1, and its prompts as rows."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from flowrl.data.geneval import fault
from flowrl.errors import UserError
from flowrl.worlds.prompts import evaluation_rows, tag_weights, world_rows
from flowrl.worlds.v1 import scenes

SENTENCES = {
    "train": {
        "single_object": 3, "colors": 22, "counting": 75, "two_object": 196, "color_attr": 750, "position": 3200,
    },
    "held_out": {
        "single_object": 2, "colors": 8, "counting": 30, "two_object": 64, "color_attr": 120, "position": 360,
    },
}  # fmt: skip
HASHES = {
    "train": "f55175158e1d21d68bcadfa5c2d2ed850077857c289ac3f4b85fcbf1e789d74e",
    "held_out": "1f39a83aaeda016b46e4e0e23a669542c1b3e9e2f65cc71983530a8a88357bd4",
}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_golden_sentences(split: str) -> None:
    pools = scenes.prompts(split)
    assert {tag: len(pool) for tag, pool in pools.items()} == SENTENCES[split]
    text = "\n".join(prompt.text for pool in pools.values() for prompt in pool)
    assert hashlib.sha256(text.encode()).hexdigest() == HASHES[split]


def test_held_out_sentences_and_combinations_are_never_trained_on() -> None:
    train, held = ([p for pool in scenes.prompts(s).values() for p in pool] for s in ("train", "held_out"))
    assert not {p.text for p in train} & {p.text for p in held}
    assert not {(p.tag, p.combination) for p in train} & {(p.tag, p.combination) for p in held}


def meaning(prompt: scenes.Prompt) -> tuple[object, ...]:
    """What a sentence says, whichever way round it says it; written apart from the world's own combination keys."""
    first, second = prompt.kinds[0], prompt.kinds[-1]
    if prompt.relation in ("right of", "below"):
        return ({"right of": "left of", "below": "above"}[prompt.relation], second, first)
    if prompt.relation:
        return (prompt.relation, first, second)
    return (prompt.count, *sorted(prompt.kinds))


def test_both_phrasings_of_a_combination_stand_on_one_side() -> None:
    sides: dict[tuple[object, ...], Counter[str]] = {}
    for split in ("train", "held_out"):
        for pool in scenes.prompts(split).values():
            for prompt in pool:
                sides.setdefault(meaning(prompt), Counter())[split] += 1
    assert all(len(side) == 1 for side in sides.values())
    pairs = [side for key, side in sides.items() if len(key) == 3]
    assert all(sum(side.values()) == 2 for side in pairs) and len(pairs) == 98 + 375 + 1600 + 32 + 60 + 180


def test_sentences_say_what_their_metadata_say() -> None:
    """Parse each sentence with a grammar of its own and compare the clauses."""
    words = {"a": 1, **{word: number for number, word in scenes.NUMBER_WORDS.items()}}
    singular = {plural: shape for shape, plural in scenes.PLURALS.items()} | {s: s for s in scenes.SHAPES}

    def clause(text: str) -> dict[str, object]:
        number, *rest = text.split()
        found: dict[str, object] = {"class": singular[rest[-1]], "count": words[number]}
        return found | ({"color": rest[0]} if len(rest) == 2 else {})

    for split in ("train", "held_out"):
        for prompt in (p for pool in scenes.prompts(split).values() for p in pool):
            text, metadata = prompt.text.removeprefix("a photo of "), prompt.metadata
            assert fault(metadata) == "" and metadata["tag"] == prompt.tag
            relation = next((f" {r} " for r in scenes.INVERSE if f" {r} " in text), " and ")
            clauses = [clause(part) for part in text.split(relation)]
            if relation != " and ":
                clauses = [clauses[1], clauses[0] | {"position": [relation.strip(), 0]}]
            assert metadata["include"] == clauses
            expected = [{"class": clauses[0]["class"], "count": prompt.count + 1}] if prompt.tag == "counting" else None
            assert metadata.get("exclude") == expected


def test_rows_of_the_world() -> None:
    for split, sizes in SENTENCES.items():
        rows = world_rows("world/v1", split)
        assert [row.prompt_id for row in rows] == list(range(sum(sizes.values())))
        assert Counter(row.metadata["tag"] for row in rows) == sizes
        assert all("prompt" not in row.metadata for row in rows)
    with pytest.raises(
        UserError, match=r"^unknown world 'world/v9'; use world/v1, world/video1, or give a prompt file$"
    ):
        world_rows("world/v9", "train")
    with pytest.raises(UserError, match=r"^unknown split 'test' of world/v1; use train or held_out$"):
        world_rows("world/v1", "test")


def test_tag_weights_draw_a_tag_first() -> None:
    rows = world_rows("world/v1", "train")
    weights = tag_weights(rows)
    for tag, share in scenes.TAG_WEIGHT.items():
        own = [weight for row, weight in zip(rows, weights, strict=True) if row.metadata["tag"] == tag]
        assert sum(own) == pytest.approx(share) and len(set(own)) == 1


@pytest.mark.parametrize("count", [1, 6, 100, 252, 500, 584])
def test_an_evaluation_pick_is_distinct_held_out_and_repeatable(count: int) -> None:
    rows = evaluation_rows(count, seed=1234)
    assert len({row.prompt for row in rows}) == count == len({row.prompt_id for row in rows})
    assert rows == evaluation_rows(count, seed=1234)
    held = world_rows("world/v1", "held_out")
    assert all(held[row.prompt_id] == row for row in rows)


def test_an_evaluation_pick_is_stratified() -> None:
    """252 by hand: 2, 8 and 30 are all there is of three tags; 212 remain for shares .16 : .22 : .22."""
    tags = Counter(row.metadata["tag"] for row in evaluation_rows(252, seed=0))
    assert tags == {
        "single_object": 2, "colors": 8, "counting": 30, "two_object": 56, "color_attr": 78, "position": 78,
    }  # fmt: skip
    for seed in (0, 1):
        for length in (50, 100):
            prefix = Counter(row.metadata["tag"] for row in evaluation_rows(252, seed)[:length])
            for tag, number in tags.items():
                assert prefix[tag] == pytest.approx(number * length / 252, abs=1)
    assert {r.prompt_id for r in evaluation_rows(100, 0)} != {r.prompt_id for r in evaluation_rows(100, 1)}


@pytest.mark.parametrize("count", [0, 585])
def test_more_than_there_is_cannot_be_picked(count: int) -> None:
    with pytest.raises(UserError) as caught:
        evaluation_rows(count, seed=0)
    assert str(caught.value) == (
        f"evaluation.count: {count} distinct prompts asked for; world/v1 holds out 584; use 1 to 584"
    )


def test_draws_follow_the_tag_weights() -> None:
    generator = np.random.default_rng(0)
    tags = Counter(scenes.draw_prompt(generator).tag for _ in range(4000))
    for tag, share in scenes.TAG_WEIGHT.items():
        assert tags[tag] / 4000 == pytest.approx(share, abs=0.03)
