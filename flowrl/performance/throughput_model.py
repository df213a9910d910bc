"""How long an iteration takes, from how often the network is called: plain arithmetic, for plans beyond one machine.

The unit is one conditional forward of one sample, F. It predicts ratios between recipes on one system; what a system makes of
the hardware (its efficiency) must be measured once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Network work of one image.

    steps: T, of the rollout; trained: K; branches: 1, or 2 with guidance; silent: of those, branches that the update runs
    without gradient; backward: cost of a backward in forwards, 2 for full fine-tuning, about 1 for LoRA; recompute: forwards
    repeated for activation checkpointing; passes: E; reference: whether there is a KL term; shared: steps that a group of
    ``group`` images has in common.
    """

    steps: int
    trained: int
    branches: int = 1
    silent: int = 0
    backward: float = 2.0
    recompute: float = 0.0
    passes: int = 1
    reference: bool = False
    shared: int = 0
    group: int = 1

    @property
    def rollout(self) -> float:
        """``c (s / G + T - s)``."""
        return self.branches * (self.shared / self.group + self.steps - self.shared)

    @property
    def update(self) -> float:
        """``E K (c_grad (1 + b + rho) + c_silent)``."""
        gradient = self.branches - self.silent
        return self.passes * self.trained * (gradient * (1 + self.backward + self.recompute) + self.silent)

    @property
    def total(self) -> float:
        """Rollout, reference (``c K``, once whatever the passes) and update."""
        return self.rollout + self.branches * self.trained * self.reference + self.update


def iteration_seconds(
    calls: Calls, *, images: int, tflop: float, peak_tflops: float, processes: int, efficiency: float = 1.0,
    other_s: float = 0.0,
) -> float:  # fmt: skip
    """Seconds of an iteration: ``N F C / (peak processes efficiency) + other``.

    tflop: of one forward; peak_tflops: of one device a second; efficiency: in (0, 1], 1 gives the floor; other_s: what is
    not hidden behind the network: decoding, rewards, saving. ValueError for values out of range.
    """
    if min(images, processes) < 1 or min(tflop, peak_tflops) <= 0 or not 0 < efficiency <= 1 or other_s < 0:
        raise ValueError(
            f"iteration_seconds: images {images} and processes {processes} must be at least 1, tflop {tflop:g} and peak_tflops "
            f"{peak_tflops:g} above 0, efficiency {efficiency:g} in (0, 1], other_s {other_s:g} at least 0"
        )
    return images * tflop * calls.total / (peak_tflops * processes * efficiency) + other_s
