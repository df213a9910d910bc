"""Every executor: right scores, in order, and each fault a mask that leaves other batches alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.executors import Executor, ExecutorSettings, FailedCall, gather, make_executor
from flowrl.scoring.service import RewardService, ServiceSettings

from . import executor_rewards
from .executor_tools import batch, entry

KINDS = ("inline", "thread", "process", "http")


def opened(kind: str, name: str, stack: ExitStack, **settings: Any) -> Executor:
    """An executor of a reward of executor_rewards.py; over HTTP, with its service."""
    settings = {"timeout_s": 20.0, "retries": 0, **settings}
    if kind == "http":
        own = ServiceSettings(port=0, timeout_s=settings["timeout_s"] * 0.75)
        service = stack.enter_context(RewardService(entry(name), own))
        settings["url"] = service.url
    return stack.enter_context(make_executor(name, entry(name), ExecutorSettings(kind=kind, **settings)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[str, Executor]]:
    """One of each kind, for the tests that need no setting."""
    with ExitStack() as stack:
        yield {kind: opened(kind, "faulty", stack, breaker=0) for kind in KINDS}


@pytest.fixture(autouse=True)
def _asleep() -> Iterator[None]:
    executor_rewards.WOKEN.clear()
    yield
    executor_rewards.WOKEN.set()  # what a test left hanging in this process ends


def same(result: RewardResult, *scores: float) -> None:
    assert result.scores.dtype == np.float32 and result.valid.dtype == np.bool_
    assert result.scores.tolist() == list(scores)
    assert result.valid.all() and list(result.errors) == [None] * len(scores)


def all_failed(result: RewardResult, count: int, *words: str) -> None:
    assert np.isnan(result.scores).all() and result.scores.shape == (count,)
    assert not result.valid.any() and result.valid.shape == (count,)
    assert len(result.errors) == count
    for text in result.errors:
        assert text and all(word in text for word in words), text


def around(executor: Executor, middle: RewardBatch) -> RewardResult:
    """The result of ``middle`` between two good batches, which must not notice."""
    first, result, last = gather([executor.submit(b) for b in (batch(3, 4, 5), middle, batch(200, 7))])
    same(first, 3.0, 4.0, 5.0)
    same(last, 200.0, 7.0)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_batch_is_scored(executors: dict[str, Executor], kind: str) -> None:
    same(executors[kind].score(batch(9, 0, 250)), 9.0, 0.0, 250.0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_masks_its_batch(executors: dict[str, Executor], kind: str) -> None:
    result = around(executors[kind], batch(1, 2, prompt="raise"))
    all_failed(result, 2, "faulty: RuntimeError: the model fell over", "executor_rewards.py")
    assert isinstance(result, FailedCall) and not result.fatal


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_length_masks_its_batch_and_is_fatal(executors: dict[str, Executor], kind: str) -> None:
    result = around(executors[kind], batch(1, 2, prompt="short"))
    all_failed(result, 2, "returned 1 scores for 2 pictures")
    assert isinstance(result, FailedCall) and result.fatal


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fault", "word"), [("nan", "no value"), ("inf", "not finite")])
def test_a_score_that_is_no_number_masks_its_sample_alone(
    executors: dict[str, Executor], kind: str, fault: str, word: str
) -> None:
    result = around(executors[kind], batch(1, 2, prompt=fault))
    assert not isinstance(result, FailedCall)
    assert result.valid.tolist() == [False, True] and np.isnan(result.scores[0]) and result.scores[1] == 2.0
    assert word in (result.errors[0] or "") and result.errors[1] is None


@pytest.mark.wall_clock
@pytest.mark.parametrize("kind", KINDS)
def test_a_hang_masks_its_batch_in_time(kind: str) -> None:
    with ExitStack() as stack:
        executor = opened(kind, "faulty", stack, timeout_s=0.3 if kind != "process" else 0.6)
        same(executor.score(batch(3)), 3.0)
        start = time.perf_counter()
        result = executor.submit(batch(1, 2, prompt="hang")).result()
        assert time.perf_counter() - start < 1.2
        all_failed(result, 2, "faulty: ", "within")
        if kind != "process":  # starting a process anew is tested on its own
            same(executor.score(batch(200, 7)), 200.0, 7.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_writes_into_pictures_changes_nothing(executors: dict[str, Executor], kind: str) -> None:
    own = batch(1, 2, prompt="scribble")
    before = own.images.copy()
    same(executors[kind].score(own), 255.0, 255.0)
    assert (own.images == before).all()


@pytest.mark.parametrize("kind", ["inline", "thread"])
def test_an_interrupt_passes(executors: dict[str, Executor], kind: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        executors[kind].submit(batch(1, prompt="interrupt")).result()
    same(executors[kind].score(batch(4)), 4.0)


@pytest.mark.parametrize("kind", ["inline", "thread", "process"])
def test_what_cannot_be_loaded_is_said_at_once(kind: str) -> None:
    settings = ExecutorSettings(kind=kind)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown argument 'second'; did you mean 'seconds'"):
        make_executor("x", entry("slow", second=1.0), settings)


def test_videos_go_and_components_and_details_arrive() -> None:
    with ExitStack() as stack:
        for kind in ("inline", "process", "http"):
            result = opened(kind, "Counting", stack).score(batch(8, 10, prompt="a cat", frames=2))
            same(result, 8.0, 10.0)
            assert result.components["half"].tolist() == [4.0, 5.0]
            assert result.components["half"].dtype == np.float32
            assert list(result.details) == ["seen a cat"] * 2


def test_inline_scores_in_the_callers_thread_where_no_limit_is_set() -> None:
    seen: list[str] = []

    class Here:
        name = "here"

        def score(self, batch: RewardBatch) -> RewardResult:
            seen.append(threading.current_thread().name)
            return RewardResult(np.zeros(1, np.float32), np.ones(1, np.bool_), [None])

    settings = ExecutorSettings(kind="inline", timeout_s=None, total_s=None)
    with make_executor("here", Here, settings) as executor:
        future = executor.submit(batch(1))
        assert future.done() and seen == [threading.current_thread().name]


def test_a_call_left_behind_keeps_its_reward_and_the_next_one_gets_another() -> None:
    executor_rewards.Counting.made = 0
    with make_executor("counting", executor_rewards.Counting, ExecutorSettings(timeout_s=0.15)) as executor:
        assert executor_rewards.Counting.made == 1
        all_failed(executor.score(batch(1, prompt="hang")), 1, "counting: no result within 0.15 s")
        same(executor.score(batch(5)), 5.0)
        same(executor.score(batch(6)), 6.0)
        assert executor_rewards.Counting.made == 2


@pytest.mark.wall_clock
def test_calls_that_hang_are_not_piled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.scoring.executors.threads.MAX_LEFT_BEHIND", 2)
    settings = ExecutorSettings(timeout_s=0.05, breaker=0)
    with make_executor("counting", executor_rewards.Counting, settings) as executor:
        for _ in range(2):
            all_failed(executor.score(batch(1, prompt="hang")), 1, "within 0.05 s")
        all_failed(executor.score(batch(1)), 1, "not called: 2 of its calls hang")
        executor_rewards.WOKEN.set()
        until = time.perf_counter() + 1
        while not (result := executor.score(batch(1))).valid.all():
            assert time.perf_counter() < until, result.errors
        same(result, 1.0)


def test_a_reward_that_times_out_inside_is_not_taken_for_late() -> None:
    class Inner:
        name = "inner"

        def score(self, batch: RewardBatch) -> RewardResult:
            raise TimeoutError("its own clock")

    with make_executor("inner", Inner, ExecutorSettings(timeout_s=5.0)) as executor:
        all_failed(executor.score(batch(1)), 1, "inner: TimeoutError: its own clock")


def test_results_come_in_the_order_of_submission() -> None:
    with make_executor("slow", entry("slow", seconds=0.02), ExecutorSettings(workers=3)) as executor:
        results = gather([executor.submit(batch(pixel)) for pixel in range(12)])
    assert [float(result.scores[0]) for result in results] == [float(pixel) for pixel in range(12)]


@pytest.mark.wall_clock
def test_workers_score_at_a_time() -> None:
    with make_executor("slow", entry("slow", seconds=0.15), ExecutorSettings(workers=4)) as executor:
        start = time.perf_counter()
        gather([executor.submit(batch(pixel)) for pixel in range(4)])
        assert time.perf_counter() - start < 0.4


@pytest.mark.wall_clock
def test_the_queue_is_bounded() -> None:
    with make_executor("slow", entry("slow", seconds=0.1), ExecutorSettings(queue=1)) as executor:
        times = []
        for pixel in range(4):
            start = time.perf_counter()
            executor.submit(batch(pixel))
            times.append(time.perf_counter() - start)
    # One is scored and one waits: the third has to wait for a place.
    assert sum(times) > 0.1


def rollout(submit: Callable[[RewardBatch], Future[RewardResult]], seconds: float) -> float:
    """Three batches are made, each scored as soon as it is there; the time until all have scores."""
    start = time.perf_counter()
    futures = []
    for pixel in range(3):
        time.sleep(seconds)
        futures.append(submit(batch(pixel, pixel + 1)))
    for pixel, result in enumerate(gather(futures)):
        same(result, pixel, pixel + 1.0)
    return time.perf_counter() - start


@pytest.mark.wall_clock
def test_a_slow_reward_hides_behind_the_rollout() -> None:
    """0.2 s of scoring behind 0.22 s of rollout, three times: only the last batch's scoring is waited for."""
    with make_executor("slow", entry("slow"), ExecutorSettings(kind="thread")) as beside:
        overlapped = rollout(beside.submit, 0.22)
    with make_executor("slow", entry("slow"), ExecutorSettings(kind="inline")) as inline:
        serial = rollout(inline.submit, 0.02)
    scoring = serial - 3 * 0.02
    hidden = scoring - (overlapped - 3 * 0.22)
    assert scoring >= 0.6 and hidden > 0.25, (serial, overlapped)


@pytest.mark.wall_clock
def test_closing_drops_what_waits() -> None:
    executor = make_executor("slow", entry("slow", seconds=0.3), ExecutorSettings())
    futures = [executor.submit(batch(pixel)) for pixel in range(5)]
    while not (futures[0].running() or futures[0].done()):
        time.sleep(0.001)
    executor.close()
    same(futures[0].result(timeout=0), 0.0)
    assert all(future.cancelled() for future in futures[1:])
    with pytest.raises(ValueError, match="is closed"):
        executor.submit(batch(1))


@pytest.mark.wall_clock
def test_closing_does_not_wait_for_a_hang() -> None:
    executor = make_executor("faulty", entry("faulty"), ExecutorSettings())
    executor.submit(batch(1, prompt="hang"))
    time.sleep(0.03)
    start = time.perf_counter()
    executor.close(grace_s=0.1)
    assert time.perf_counter() - start < 0.6


def test_a_made_reward_cannot_be_sent_to_a_process() -> None:
    with pytest.raises(UserError, match="kind process needs a reward by name"):
        make_executor("x", executor_rewards.Counting, ExecutorSettings(kind="process"))
