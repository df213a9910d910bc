"""A reward is one plain function: which signatures are understood, what they may return, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.adapt import as_reward, load_reward
from flowrl.scoring.returned import read_scores


def batch(count: int = 3) -> RewardBatch:
    images = np.stack([np.full((4, 5, 3), 10 * i, np.uint8) for i in range(count)])
    metadata = [{"target": f"t{i}", "weight": i} for i in range(count)]
    return RewardBatch(images, [f"p{i}" for i in range(count)], metadata, list(range(count)))


def brightness(images: Any, prompts: Any) -> list[float]:
    assert images.dtype == np.uint8 and images.shape[1:] == (4, 5, 3)
    return [float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


def test_images_and_prompts() -> None:
    result = as_reward(brightness, "bright", {}).score(batch())
    assert result.scores.dtype == np.float32 and result.scores.tolist() == [2, 12, 22]
    assert result.valid.tolist() == [True] * 3 and list(result.errors) == [None] * 3


def seen_by(function: Callable[..., Any], **args: Any) -> RewardResult:
    return as_reward(function, "mine", args).score(batch())


def test_each_signature_gets_what_it_names() -> None:
    def with_metadata(images: Any, prompts: Any, metadata: Any) -> list[float]:
        return [m["weight"] + len(images) for m in metadata]

    def keywords(*, prompts: list[str], images: Any, target: list[str], **others: Any) -> list[float]:
        assert others == {"weight": [0, 1, 2]}
        return [float(t == "t" + p[1:]) for t, p in zip(target, prompts, strict=True)]

    def column(images: Any, weight: list[int]) -> list[int]:
        return weight

    def groups(batch: RewardBatch, group_ids: list[int]) -> list[float]:
        return [len(batch) + g for g in group_ids]

    assert seen_by(with_metadata).scores.tolist() == [3, 4, 5]
    assert seen_by(keywords).scores.tolist() == [1, 1, 1]
    assert seen_by(column).scores.tolist() == [0, 1, 2]
    assert seen_by(groups).scores.tolist() == [3, 4, 5]
    assert seen_by(lambda images, prompts: np.arange(3)).scores.tolist() == [0, 1, 2]


def test_args_go_to_parameters_and_defaults_stay() -> None:
    def scaled(images: Any, prompts: Any, scale: float, *, weight: float = 2.0) -> list[float]:
        return [scale * weight] * len(images)

    assert seen_by(scaled, scale=3.0).scores.tolist() == [6] * 3
    assert seen_by(scaled, scale=3.0, weight=5.0).scores.tolist() == [15] * 3


def test_a_sample_without_the_column_is_masked_alone() -> None:
    def f(images: Any, target: list[str]) -> tuple[list[float], dict[str, Any]]:
        return [float(image.max()) for image in images], {"length": [len(t) for t in target]}

    full = batch()
    part = RewardBatch(full.images, full.prompts, [full.metadata[0], {}, full.metadata[2]], [0, 1, 2])
    result = as_reward(f, "ocr", {}).score(part)
    assert result.valid.tolist() == [True, False, True]
    np.testing.assert_array_equal(result.scores, np.array([0, np.nan, 20], np.float32))
    np.testing.assert_array_equal(result.components["length"], np.array([2, np.nan, 2], np.float32))
    assert list(result.errors) == [None, "ocr: the prompt's metadata has no 'target'", None]
    none = as_reward(f, "ocr", {}).score(RewardBatch(full.images, full.prompts, [{}] * 3))
    assert not none.valid.any() and np.isnan(none.scores).all()


def test_extras_of_flow_grpo() -> None:
    def f(images: Any, prompts: Any, metadata: Any) -> Any:
        return np.array([1.0, 2.0, 3.0]), {"strict": torch.tensor([0, 1, 1]), "note": ["a", "b", "c"], "all": 3.0}

    result = seen_by(f)
    assert result.scores.tolist() == [1, 2, 3]
    assert {name: values.tolist() for name, values in result.components.items()} == {"strict": [0, 1, 1]}
    assert seen_by(lambda images, prompts: ([1, 2, 3], None)).scores.tolist() == [1, 2, 3]
    two = as_reward(lambda images: (0.5, None), "pair", {}).score(batch(2))
    assert two.valid.tolist() == [True, False], "a tuple of two scores is not (scores, extras)"


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, None],
        (1, 2.5, float("nan")),
        np.array([1, 2.5, np.nan]),
        np.array([1, 2.5, None], dtype=object),
        torch.tensor([1, 2.5, float("nan")], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1), np.float16(2.5), None],
        [np.int64(1), np.array(2.5), np.float32("nan")],
    ],
)
def test_scores_in_any_container(value: Any) -> None:
    np.testing.assert_array_equal(read_scores(value, "x", 3), np.array([1, 2.5, np.nan], np.float32))
    result = seen_by(lambda images: value)
    assert result.valid.tolist() == [True, True, False]
    assert list(result.errors) == [None, None, "mine: returned no value (None or NaN)"]


ONE = "return one float (or None) a picture, 3 in all"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], f"returned 1 scores for 3 pictures; {ONE}"),
        (np.zeros(4), f"returned 4 scores for 3 pictures; {ONE}"),
        (torch.zeros(0), f"returned 0 scores for 3 pictures; {ONE}"),
        (np.zeros((3, 1)), f"returned shape [3, 1] for 3 pictures; {ONE}"),
        (torch.tensor(1.0), f"returned shape [] for 3 pictures; {ONE}"),
        (1.0, f"returned float for 3 pictures; {ONE}"),
        (None, f"returned NoneType for 3 pictures; {ONE}"),
        ({"a": [1, 2, 3]}, f"returned dict for 3 pictures; {ONE}"),
        ("abc", f"returned str for 3 pictures; {ONE}"),
        ([1.0, "2", 3.0], f"returned str '2' for picture 1; {ONE}"),
        ([1.0, [2.0], 3.0], f"returned list [2.0] for picture 1; {ONE}"),
        ([1.0, 2j, 3.0], f"returned complex 2j for picture 1; {ONE}"),
        (np.array(["1", "2", "3"]), f"returned dtype <U1 for 3 pictures; {ONE}"),
        (np.zeros(3, complex), f"returned dtype complex128 for 3 pictures; {ONE}"),
    ],
)
def test_what_is_not_one_number_a_picture_is_fatal(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        seen_by(lambda images, prompts: value)
    assert str(caught.value) == f"reward 'mine': {message}"


ADVICE = "write it as f(images, prompts) or f(images, prompts, metadata), further parameters being args or columns"


def test_unusable_signatures() -> None:
    def positional_only(images: Any, prompts: Any, /) -> None: ...
    def starred(*everything: Any) -> None: ...
    def both(images: Any, metadata: Any, **rest: Any) -> None: ...
    def other_names(pictures: Any, texts: Any) -> None: ...
    async def later(images: Any, prompts: Any) -> None: ...

    for function, message in [
        (positional_only, f"parameter images cannot be passed by name; {ADVICE}"),
        (starred, f"parameter *everything cannot be passed by name; {ADVICE}"),
        (both, "takes both metadata and **rest; remove **rest"),
        (other_names, f"f(pictures, texts) takes no pictures; {ADVICE}"),
        (lambda prompts: [0.0], f"f(prompts) takes no pictures; {ADVICE}"),
        (later, "is an async function; make it a plain one"),
        (3, "int is neither a class with score(batch) nor a function"),
        (int, "class int has no method score(batch: RewardBatch) -> RewardResult"),
    ]:
        with pytest.raises(UserError) as caught:
            as_reward(function, "mine", {})
        found = str(caught.value).replace(": Any", "").replace(": 'Any'", "")
        assert found == f"reward 'mine': {message}"


def test_args_that_a_function_does_not_take() -> None:
    def f(images: Any, prompts: Any, threshold: float = 0.5, **rest: Any) -> list[float]:
        return [threshold] * len(images)

    for args, message in [
        ({"treshold": 1.0}, "unknown argument 'treshold'; did you mean 'threshold'?"),
        ({"images": 1}, "unknown argument 'images'; it takes threshold"),
    ]:
        with pytest.raises(UserError) as caught:
            as_reward(f, "mine", args)
        assert str(caught.value) == f"reward 'mine': args: {message}"
    with pytest.raises(UserError, match=r"unknown argument 'x'; it takes none$"):
        as_reward(brightness, "bright", {"x": 1})


class Constant:
    """A class reward with one required and one optional argument."""

    def __init__(self, value: float, sign: int = 1) -> None:
        if value < 0:
            raise ValueError("value must be at least 0")
        self.value = value * sign

    def score(self, batch: RewardBatch) -> RewardResult:
        count = len(batch)
        return RewardResult(np.full(count, self.value, np.float32), np.ones(count, np.bool_), [None] * count)


def test_classes_and_objects() -> None:
    made = as_reward(Constant, "constant", {"value": 2.0, "sign": -1})
    assert made.name == "constant" and made.score(batch()).scores.tolist() == [-2] * 3
    assert as_reward(Constant(3.0), "object", {}).score(batch()).scores.tolist() == [3] * 3
    for args, message in [
        ({}, "args: missing a required argument: 'value'; its signature is"),
        ({"valu": 1}, "args: unknown argument 'valu'; did you mean 'value'?"),
        ({"value": -1.0}, "cannot be made: ValueError: value must be at least 0"),
    ]:
        with pytest.raises(UserError) as caught:
            as_reward(Constant, "constant", args)
        assert str(caught.value).startswith(f"reward 'constant': {message}")
    with pytest.raises(UserError, match=r"^reward 'object': it is an object that is made already; remove args a$"):
        as_reward(Constant(3.0), "object", {"a": 1})


def test_load_by_key_module_and_file(tmp_path: Path) -> None:
    jpeg = load_reward(RewardEntry(name="jpeg", args={"sign": 1}))
    assert jpeg.name == "jpeg" and jpeg.score(batch()).valid.all()
    file = tmp_path / "mine.py"
    file.write_text("def dark(images, prompts, scale=1.0):\n    return [-scale * i.mean() for i in images]\n")
    dark = load_reward(RewardEntry(name=f"{file}:dark", args={"scale": 2.0}))
    assert dark.score(batch()).scores.tolist() == [0, -20, -40]
    with pytest.raises(
        UserError, match=r"^reward 'jpeg': args: qualty: unknown argument of jpeg; did you mean quality\?"
    ):
        load_reward(RewardEntry(name="jpeg", args={"qualty": 3}))
    with pytest.raises(UserError, match=r"^reward 'jpeg': args: quality: expected int"):
        load_reward(RewardEntry(name="jpeg", args={"quality": "high"}))
    with pytest.raises(UserError, match=r"did you mean jpeg\?"):
        load_reward(RewardEntry(name="jpg"))
    with pytest.raises(UserError, match=r"has no 'dork'; did you mean dark\?"):
        load_reward(RewardEntry(name=f"{file}:dork"))
