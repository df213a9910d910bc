"""The reward runtime: weighted sums, masks for failures, monitors that touch nothing, order in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowrl.config.schema import Failures, RewardEntry
from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.runtime import RewardFailure, RewardRuntime, Scored, join, labels

STARTED, RELEASE = threading.Event(), threading.Event()


def first_pixel(images: Any, prompts: Any) -> list[float]:
    return [float(image[0, 0, 0]) for image in images]


def ones(images: Any, prompts: Any) -> list[float]:
    return [1.0] * len(images)


def says(images: Any, prompts: list[str]) -> list[float | None]:
    """Reads the score off the prompt."""
    return [None if p == "none" else float(p) for p in prompts]


def raises(images: Any, prompts: Any) -> list[float]:
    raise RuntimeError("the model fell over")


def interrupts(images: Any, prompts: Any) -> list[float]:
    raise KeyboardInterrupt


def leaves(images: Any, prompts: Any) -> list[float]:
    raise SystemExit(3)


def short(images: Any, prompts: Any) -> list[float]:
    return [0.0]


def scribbles(images: Any, prompts: Any) -> list[float]:
    images[:] = 255
    return [0.0] * len(images)


def waits(images: Any, prompts: Any) -> list[float]:
    STARTED.set()
    RELEASE.wait(20)
    return first_pixel(images, prompts)


class Typed:
    """Returns a result that breaks one part of the contract."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def score(self, batch: RewardBatch) -> Any:
        count = len(batch)
        good: dict[str, Any] = {
            "scores": np.zeros(count, np.float32),
            "valid": np.ones(count, np.bool_),
            "errors": [None] * count,
            "components": {"part": np.zeros(count, np.float32)},
            "details": ["seen"] * count,
        }
        bad: dict[str, Any] = {
            "list": {"scores": [0.0] * count},
            "float64": {"scores": np.zeros(count)},
            "shape": {"scores": np.zeros((count, 1), np.float32)},
            "valid": {"valid": np.ones(count)},
            "errors": {"errors": []},
            "details": {"details": ["one"]},
            "component": {"components": {"part": np.zeros(1, np.float32)}},
            "none": {},
        }
        return 3.0 if self.fault == "number" else RewardResult(**(good | bad[self.fault]))


def entry(name: str, weight: float = 1.0, **args: Any) -> RewardEntry:
    return RewardEntry(name=f"{__name__}:{name}", weight=weight, args=args)


def batch(*values: float | str) -> RewardBatch:
    pixels = [v if isinstance(v, int) else 7 for v in values]
    images = np.stack([np.full((2, 2, 3), p, np.uint8) for p in pixels])
    return RewardBatch(images, [str(v) for v in values], [{}] * len(values), list(range(len(values))))


def run(*entries: RewardEntry, values: tuple[float | str, ...] = (1, 2, 3)) -> Scored:
    with RewardRuntime(entries, Failures()) as runtime:
        return runtime.score(batch(*values))


def test_scores_are_the_weighted_sum() -> None:
    scored = run(entry("first_pixel", 2.0), entry("ones", -0.5))
    assert scored.scores.tolist() == [1.5, 3.5, 5.5] and scored.scores.dtype == np.float32
    assert scored.valid.all() and scored.valid.dtype == np.bool_ and scored.seconds > 0
    assert {name: r.scores.tolist() for name, r in scored.per_reward.items()} == {
        "first_pixel": [1, 2, 3],
        "ones": [1] * 3,
    }


@pytest.mark.parametrize("bad", ["none", "nan", "inf", "-inf", "1e39"])
def test_no_value_and_no_finite_value_mask_their_sample_alone(bad: str) -> None:
    scored = run(entry("says"), entry("ones", 3.0), values=("1", bad, "5"))
    assert scored.valid.tolist() == [True, False, True]
    np.testing.assert_array_equal(scored.scores, np.array([4, np.nan, 8], np.float32))
    result = scored.per_reward["says"]
    assert np.isnan(result.scores[1]) and result.valid.tolist() == [True, False, True]
    value = {"none": "", "nan": "", "inf": "inf", "-inf": "-inf", "1e39": "inf"}[bad]
    expected = f"says: score is {value}, which is not finite" if value else "says: returned no value (None or NaN)"
    assert list(scored.errors) == [None, expected, None] == list(result.errors)
    assert scored.per_reward["ones"].valid.all(), "one reward's failure is not another's"


def test_an_exception_masks_the_batch_with_its_text() -> None:
    scored = run(entry("ones"), entry("raises"))
    assert not scored.valid.any() and np.isnan(scored.scores).all()
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "fell over" in text)
    assert set(scored.errors) == {f"raises: RuntimeError: the model fell over (test_runtime.py:{line})"}


@pytest.mark.parametrize(("name", "kind"), [("interrupts", KeyboardInterrupt), ("leaves", SystemExit)])
def test_a_wish_to_stop_passes_through(name: str, kind: type[BaseException]) -> None:
    with RewardRuntime([entry(name)], Failures()) as runtime:
        with pytest.raises(kind):
            runtime.score(batch(1))
        with pytest.raises(kind):
            runtime.submit(batch(1)).result()


def test_a_monitor_stops_nothing_and_masks_nothing() -> None:
    monitors = [entry(n, 0.0) for n in ("raises", "short", "says")] + [entry("Typed", 0.0, fault="float64")]
    scored = run(entry("first_pixel"), *monitors, values=(1, 2, "none"))
    assert scored.scores.tolist() == [1, 2, 7] and scored.valid.all() and list(scored.errors) == [None] * 3
    assert not scored.per_reward["raises"].valid.any() and not scored.per_reward["Typed"].valid.any()
    assert scored.per_reward["short"].errors[0] == (
        "reward 'short': returned 1 scores for 3 pictures; return one float (or None) a picture, 3 in all"
    )
    assert scored.per_reward["says"].valid.tolist() == [True, True, False]
    with RewardRuntime([entry("ones"), entry("raises", 0.0)], Failures(max_invalid_fraction=0.0)) as runtime:
        runtime.check_failures(runtime.score(batch(1, 2)).valid)


def test_a_wrong_length_is_fatal() -> None:
    with pytest.raises(UserError, match="returned 1 scores for 3 pictures"):
        run(entry("ones"), entry("short"))


RETURN = "return numpy float32 [3]"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("number", "score() returned float; return a RewardResult"),
        ("list", f"scores is list; {RETURN}"),
        ("float64", f"scores is float64 [3] for 3 pictures; {RETURN}"),
        ("shape", f"scores is float32 [3, 1] for 3 pictures; {RETURN}"),
        ("valid", "valid is float64 [3] for 3 pictures; return numpy bool [3]"),
        ("errors", "0 errors for 3 pictures; return one a picture"),
        ("details", "1 details for 3 pictures; return one a picture"),
        ("component", f"components['part'] is float32 [1] for 3 pictures; {RETURN}"),
    ],
)
def test_a_broken_contract_is_fatal(fault: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        run(entry("Typed", fault=fault))
    assert str(caught.value) == f"reward 'Typed': {message}"


def test_details_and_components_pass_through() -> None:
    result = run(entry("Typed", fault="none")).per_reward["Typed"]
    assert result.details == ["seen"] * 3 and result.components["part"].tolist() == [0] * 3


def test_a_sum_beyond_float32_is_invalid() -> None:
    scored = run(entry("says", 1e30), values=("1", "1e20"))
    assert scored.valid.tolist() == [True, False] and np.isnan(scored.scores[1])
    assert scored.errors[1] == "the weighted sum 1e+50 is beyond float32; lower the weights"


def test_a_reward_cannot_change_the_pictures_of_the_next() -> None:
    own = batch(1, 2)
    with RewardRuntime([entry("scribbles"), entry("first_pixel")], Failures()) as runtime:
        assert runtime.score(own).scores.tolist() == [1, 2]
    assert own.images[:, 0, 0, 0].tolist() == [1, 2]


@pytest.fixture
def gate() -> Iterator[None]:
    STARTED.clear()
    RELEASE.clear()
    yield
    RELEASE.set()


@pytest.mark.wall_clock
@pytest.mark.usefixtures("gate")
def test_submitted_batches_are_scored_beside_the_caller_and_in_order() -> None:
    with RewardRuntime([entry("waits")], Failures()) as runtime:
        futures = [runtime.submit(batch(i, i + 1)) for i in range(5)]
        assert STARTED.wait(20) and not any(f.done() for f in futures), "submit must not wait for the score"
        done: list[int] = []
        for index, future in enumerate(futures):
            future.add_done_callback(lambda _, i=index: done.append(i))
        RELEASE.set()
        assert [f.result().scores.tolist() for f in futures] == [[i, i + 1] for i in range(5)]
        deadline = time.monotonic() + 5
        while len(done) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert done == list(range(5))
        inline = runtime.score(batch(3, 4))
        np.testing.assert_array_equal(inline.scores, futures[3].result().scores)


@pytest.mark.usefixtures("gate")
def test_close_drops_what_waits() -> None:
    runtime = RewardRuntime([entry("waits")], Failures())
    first, second = runtime.submit(batch(1)), runtime.submit(batch(2))
    assert STARTED.wait(20)
    threading.Timer(0.1, RELEASE.set).start()
    runtime.close()
    assert first.done() and second.cancelled()


def test_failures_stop_the_run_above_the_limit_only() -> None:
    with RewardRuntime([entry("says")], Failures(max_invalid_fraction=0.25)) as runtime:
        runtime.check_failures(runtime.score(batch("1", "2", "3", "none")).valid)
        valid = runtime.score(batch("1", "none", "x", "4")).valid
        assert not valid.any(), "one exception takes the batch"
        with pytest.raises(RewardFailure) as caught:
            runtime.check_failures(valid)
        assert isinstance(caught.value, UserError)
        assert str(caught.value).startswith(
            "4 of 4 samples could not be scored, more than failures.max_invalid_fraction (0.25) allows; first error: "
            "says: ValueError: could not convert string to float: 'x' (test_runtime.py:"
        )
        with pytest.raises(RewardFailure, match=r"first error: in another process, see its log; mend the reward$"):
            runtime.check_failures(np.array([True, False]))
        runtime.check_failures(np.zeros(0, np.bool_))


def test_labels_for_metrics() -> None:
    named = [RewardEntry(name=n) for n in ("jpeg", "pkg.mod:sharp", "a/b.py:sharp", "jpeg", "pkg:A.sharp")]
    assert labels(named) == ["jpeg", "sharp", "sharp_2", "jpeg_2", "A.sharp"]
    scored = run(entry("first_pixel"), entry("first_pixel", 0.0), values=(4,))
    assert list(scored.per_reward) == ["first_pixel", "first_pixel_2"] and scored.scores.tolist() == [4]


def test_what_cannot_be_run() -> None:
    with pytest.raises(UserError, match=r"^rewards: none has a weight other than 0, so nothing can be scored"):
        RewardRuntime([entry("ones", 0.0)], Failures())
    with pytest.raises(UserError, match="weight is nan; use a finite number"):
        RewardRuntime([entry("ones", float("nan"))], Failures())
    with pytest.raises(UserError, match="unknown reward 'misspelt'"):
        RewardRuntime([entry("ones"), RewardEntry(name="misspelt", weight=0.0)], Failures())
    good = batch(1, 2)
    with RewardRuntime([entry("ones")], Failures()) as runtime:
        with pytest.raises(ValueError, match=r"or \[B, F, H, W, 3\], got float64 \[2, 2, 2, 3\]"):
            runtime.score(RewardBatch(good.images.astype(float), good.prompts, good.metadata))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="2 images, 1 prompts, 2 metadata, 0 group ids"):
            runtime.score(RewardBatch(good.images, ["one"], good.metadata))


def test_parts_joined_are_the_whole() -> None:
    rewards = [entry("says"), entry("Typed", 0.0, fault="none")]
    whole = run(*rewards, values=("1", "none", "3"))
    parts = join([run(*rewards, values=("1",)), run(*rewards, values=("none", "3"))])
    np.testing.assert_array_equal(parts.scores, whole.scores)
    assert parts.valid.tolist() == [True, False, True] and list(parts.errors) == list(whole.errors)
    for label, result in whole.per_reward.items():
        np.testing.assert_array_equal(parts.per_reward[label].scores, result.scores)
        assert list(parts.per_reward[label].errors) == list(result.errors)
        assert parts.per_reward[label].components.keys() == result.components.keys()
    assert parts.per_reward["Typed"].details == ["seen"] * 3
