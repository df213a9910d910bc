"""The cost model against published times: MixGRPO's table (2507.21802), verl-omni's Qwen-Image OCR runs."""

from __future__ import annotations

import pytest

from flowrl.performance.throughput_model import Calls, iteration_seconds

LORA = {"steps": 10, "backward": 1.0}


@pytest.mark.parametrize(
    ("calls", "total"),
    [
        (Calls(**LORA, trained=9, branches=2, reference=True), 74),
        (Calls(**LORA, trained=9, branches=2, silent=1, reference=True), 65),
        (Calls(**LORA, trained=2, branches=2, silent=1, reference=True), 30),
        (Calls(**LORA, trained=2, reference=True), 16),
        (Calls(**LORA, trained=2), 14),
        (Calls(**LORA, trained=2, shared=4, group=24), 10 + 1 / 6),
        (Calls(steps=10, trained=2, recompute=1.0, passes=2), 10 + 2 * 2 * 4),
    ],
)
def test_counts_by_hand(calls: Calls, total: float) -> None:
    assert calls.total == pytest.approx(total)


def test_ratios_of_published_iterations_are_predicted_within_seven_percent() -> None:
    whole, window = (
        Calls(steps=25, trained=k).total for k in (14, 4)
    )  # DanceGRPO and MixGRPO on FLUX, full fine-tuning
    assert (whole, window) == (67, 37)
    assert window / whole == pytest.approx(151 / 291, rel=0.07)
    assert (8 + 12) / whole == pytest.approx(83 / 291, rel=0.07)  # 8 rollout evaluations with a fast solver


@pytest.mark.parametrize(
    ("calls", "seconds", "efficiency"),
    [
        (Calls(**LORA, trained=2, branches=2, silent=1, reference=True), 420, 0.15),  # LoRA with guidance, 4 H800
        (Calls(steps=10, trained=2, recompute=1.0), 250, 0.15),  # full, no guidance, 4 H200
    ],
)
def test_published_runs_use_a_sixth_of_the_floor(calls: Calls, seconds: float, efficiency: float) -> None:
    floor = iteration_seconds(calls, images=512, tflop=16, peak_tflops=989, processes=4)
    assert floor / seconds == pytest.approx(efficiency, abs=0.03)


def test_time_is_inverse_in_processes_and_other_time_is_not() -> None:
    settings = {"images": 64, "tflop": 2.0, "peak_tflops": 100.0, "other_s": 3.0}
    one, four = (iteration_seconds(Calls(**LORA, trained=2), processes=p, **settings) for p in (1, 4))
    assert one - 3 == pytest.approx(4 * (four - 3)) and one == pytest.approx(64 * 2 * 14 / 100 + 3)
    for wrong in ({"efficiency": 0.0}, {"efficiency": 1.5}, {"images": 0}, {"tflop": 0.0}, {"other_s": -1.0}):
        with pytest.raises(ValueError, match="iteration_seconds"):
            iteration_seconds(Calls(**LORA, trained=2), processes=1, **(settings | wrong))
