"""tensorboard: event files by choice, a clear word where the package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowrl import tracking
from flowrl.config.tracking import Tracking
from flowrl.errors import UserError

ON = Tracking(tensorboard=True)


def test_the_package_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'flowrl\[tensorboard\]', or set tracking.tensorboard=false"):
        tracking.open_trackers(tmp_path, ON)


def test_scalars_land_in_event_files_and_a_resume_hides_what_it_redoes(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = tracking.open_trackers(tmp_path, ON)
    for iteration in (1, 2, 3):
        tracker.scalars({"reward/x/mean": iteration / 4, "policy/kl": None, "note": "text", "calls": 7}, iteration)
    tracker.close()
    tracker = tracking.open_trackers(tmp_path, ON, start=3)
    tracker.scalars({"reward/x/mean": 9.0}, 3)
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["calls", "reward/x/mean"]
    points = [(event.step, event.value) for event in events.Scalars("reward/x/mean")]
    assert points == [(1, 0.25), (2, 0.5), (3, 9.0)]


def test_importing_tracking_and_progress_is_light() -> None:
    code = (
        "import sys, flowrl.tracking, flowrl.tracking.jsonl, flowrl.tracking.progress, flowrl.checkpoint.signals, "
        "flowrl.checkpoint.manifest, flowrl.checkpoint.retention;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'tqdm', 'tensorboard')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
