"""The runs of a comparison: ordinary run folders, reused where finished, resumed where not, one after another or several."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.checkpoint import store
from flowrl.checkpoint.signals import StopSignals
from flowrl.comparison.planning import differences
from flowrl.config import Config, ConfigError, load, to_mapping
from flowrl.distributed.backend import Backend
from flowrl.errors import UserError
from flowrl.evaluation.comparison import picture_spread
from flowrl.evaluation.paired import Evaluated
from flowrl.training.build import build
from flowrl.training.run import Run

SHOWN = 8
"""Pictures of a run kept for the comparison's grid."""
DONE = "compared.json"
"""Written last into a run's folder: diversity by prompt, and which pictures were kept in compared/."""
FREE = ("run_dir", "threads", "tracking", "checkpoint")
"""Settings in which a run on disk may differ from the planned one."""

Write = Callable[[str], object]
Images = npt.NDArray[np.uint8]


class ComparedRun(Run):
    """A run that takes the base's evaluation from its siblings where it is there, and keeps what a comparison shows."""

    def evaluate(self, which: str, prompts: Sequence[Any]) -> Evaluated:
        if which != "base":
            return super().evaluate(which, prompts)
        folder = self.folder.parent / "base" / base_key(self.config)
        if not folder.is_dir():
            save_evaluated(folder, super().evaluate(which, prompts))
        found = load_evaluated(folder)
        rows = [{**row, "iteration": self.trainer.iteration} for row in found.rows]
        return Evaluated(rows, found.images)

    def write_evaluation(self, base: Evaluated, tuned: Evaluated) -> None:
        """As for every run; then diversity, and some pictures of both sides, one a prompt, chosen by no score."""
        super().write_evaluation(base, tuned)
        firsts = [index for index, row in enumerate(base.rows) if row["member"] == 0]
        picks = [firsts[i] for i in np.linspace(0, len(firsts) - 1, min(SHOWN, len(firsts))).astype(int)]
        folder = self.folder / "compared"
        folder.mkdir(exist_ok=True)
        for which, side in (("base", base), ("tuned", tuned)):
            for number, index in enumerate(picks):
                _save_png(folder / f"{which}-{number}.png", side.images[index])
        ids = [row["prompt_id"] for row in base.rows]
        found = {
            "spread": {"base": picture_spread(base.images, ids), "tuned": picture_spread(tuned.images, ids)},
            "pictures": [
                {"prompt": base.rows[i]["prompt"], "base": base.rows[i]["score"], "tuned": tuned.rows[i]["score"]}
                for i in picks
            ],
        }
        draft = self.folder / f"{DONE}.part"
        draft.write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(draft, self.folder / DONE)


def base_key(config: Config) -> str:
    """Name everything that the base's evaluation depends on, as 12 hex digits."""
    plain = to_mapping(config)
    parts = [plain[key] for key in ("model", "evaluation", "rewards", "failures", "threads")]
    text = json.dumps([*parts, config.batch.micro_batch], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def save_evaluated(folder: Path, found: Evaluated) -> None:
    """Write rows and pictures to a folder that appears whole or not at all; one that is there already stays."""
    draft = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    draft.mkdir(parents=True)
    for index, image in enumerate(found.images):
        _save_png(draft / f"{index:06d}.png", image)
    (draft / "rows.json").write_text(json.dumps(found.rows, allow_nan=False), encoding="utf-8")
    try:
        os.rename(draft, folder)
    except OSError:
        shutil.rmtree(draft)
        if not folder.is_dir():  # else another process was first, with the same pictures
            raise


def load_evaluated(folder: Path) -> Evaluated:
    """Read what `save_evaluated` wrote. Raises UserError where a part is missing."""
    from PIL import Image

    try:
        rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        images = []
        for index in range(len(rows)):
            with Image.open(folder / f"{index:06d}.png") as image:
                images.append(np.asarray(image.convert("RGB")))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read ({error}); delete this folder, and it is made again") from error
    return Evaluated(rows, np.stack(images))


def _save_png(file: Path, image: Images) -> None:
    from PIL import Image

    Image.fromarray(image).save(file)


# ------------------------------------------------------------------------------------------------------------- one run


def finished(folder: Path) -> bool:
    """Whether a run has ended, with all that the comparison reads."""
    return (folder / DONE).is_file() and (folder / "evaluation.json").is_file()


def check_folder(config: Config) -> list[str]:
    """Say what keeps a planned run from continuing, or being, the one in its folder."""
    folder = Path(config.run_dir)
    if not (folder / "config.yaml").exists():
        return []
    try:
        there = load(folder / "config.yaml")
    except ConfigError as error:
        return [
            f"{folder}: holds a run whose config.yaml this version cannot read ({error.problems[0]}); use another --out"
        ]
    found = differences(*(_fixed(each) for each in (there, config)))
    if not found:
        return []
    key, old, new = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [f"{folder}: holds a run with {key} {old!r}, not {new!r}{more}; use another --out, or delete that folder"]


def _fixed(config: Config) -> dict[str, Any]:
    return {key: value for key, value in to_mapping(config).items() if key not in FREE}


def run_one(config: Config, command: str, write: Write) -> None:
    """Start a run, or go on with the one in its folder. Raises SystemExit with 143 or 130 after a stop signal."""
    folder = Path(config.run_dir)
    begun = (folder / "config.yaml").exists()
    root = folder / "checkpoints"
    loaded = store.load(root) if begun and store.list_checkpoints(root) else None
    backend = Backend()
    run = ComparedRun(config, build(config, backend), folder, command, write)
    try:
        if loaded is not None:
            run.restore(loaded)
        else:
            run.prepare()
            run.cut(-1)
        code = run.go()
    finally:
        run.trainer.rewards.close()
        run.parts.evaluation_rewards.close()
        backend.close()
    if code:
        raise SystemExit(code)


def run_all(runs: Sequence[tuple[str, Config]], command: str, write: Write) -> None:
    """Do the runs one after another in this process; finished ones are left as they are."""
    for number, (name, config) in enumerate(runs, start=1):
        done = finished(Path(config.run_dir))
        write(f"[{number}/{len(runs)}] {name}" + (": finished before" if done else ""))
        if not done:
            run_one(config, command, write)
            gc.collect()  # a model's hooks refer to one another; its memory is wanted for the next one


# -------------------------------------------------------------------------------------------------------- side by side


def run_side_by_side(
    runs: Sequence[tuple[str, Config]], words: Sequence[str], jobs: int, logs: Path, write: Write
) -> None:
    """Do the runs in ``jobs`` processes, each this command with ``--only NAME``; their output goes to ``logs``.

    A stop signal, or a run that fails, asks the others to save and end (once: they lie in process groups of their own, so
    a terminal's Ctrl-C reaches this process alone). Raises SystemExit with 143 or 130, or UserError with the failed
    run's last line.
    """
    waiting = [name for name, config in runs if not finished(Path(config.run_dir))]
    logs.mkdir(parents=True, exist_ok=True)
    children: dict[str, subprocess.Popen[bytes]] = {}
    failed: str | None = None
    with StopSignals() as stop:
        try:
            while children or (waiting and failed is None and not stop.requested):
                while waiting and len(children) < jobs and failed is None and not stop.requested:
                    name = waiting.pop(0)
                    children[name] = _start([*words, "--only", name], logs / f"{name}.txt")
                    write(f"{name}: started, {len(waiting)} waiting")
                time.sleep(0.1)
                for name in [name for name, child in children.items() if child.poll() is not None]:
                    code = children.pop(name).returncode
                    write(f"{name}: " + ("finished" if code == 0 else f"ended with code {code}"))
                    failed = failed or (name if code not in (0, 130, 143) else None)
                if (failed or stop.requested) and children:
                    write(f"asking {', '.join(children)} to save and end")
                    _end(children)
                    children = {}
        finally:
            _end(children)
    if stop.requested:
        raise SystemExit(stop.exit_code)
    if failed:
        raise UserError(f"{failed} failed: {_last_line(logs / f'{failed}.txt')} (whole output in {logs / failed}.txt)")


def _start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        output.write(f"$ flowrl {shlex.join(words)}\n".encode())
        output.flush()
        command = [sys.executable, "-m", "flowrl", *words]
        return subprocess.Popen(  # noqa: S603  this program, with the words that it was given
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )


def _end(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for child in children.values():
        child.terminate()
    for child in children.values():
        child.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
