"""Stand-ins for wandb, swanlab and trackio that note every call, with the parameters of the real functions.

Parameters are those of wandb 0.31.0, swanlab 0.10.3 and trackio 0.43.0 (``init``, ``Run.log``, ``Run.finish``), so a call
with a name that they do not have fails here as it would there.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class Calls(list):
    """(function, arguments that differ from None) in order."""

    def note(self, name: str, given: dict[str, Any]) -> None:
        self.append((name, {k: v for k, v in given.items() if v is not None and k not in ("self", "state_of")}))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [given for called, given in self if called == name]


class _Run:
    def __init__(self, calls: Calls, run_id: str, name: str | None) -> None:
        self.id, self.name = run_id, name
        self._calls = calls


def wandb(calls: Calls) -> ModuleType:
    module = ModuleType("wandb")

    class Run(_Run):
        def log(self, data, step=None, commit=None):
            calls.note("log", {"data": data, "step": step, "commit": commit})

        def finish(self, exit_code=None):
            calls.note("finish", {"exit_code": exit_code})

    def init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
        config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None, mode=None,
        force=None, reinit=None, resume=None, resume_from=None, fork_from=None, save_code=None, tensorboard=None,
        sync_tensorboard=None, monitor_gym=None, settings=None,
    ):  # fmt: skip
        given = {
            "project": project,
            "dir": dir,
            "id": id,
            "name": name,
            "config": config,
            "mode": mode,
            "resume": resume,
        }
        calls.note("init", given | {"reinit": reinit})
        return Run(calls, id or f"wandb{len(calls.of('init'))}", name)

    module.init = init  # type: ignore[attr-defined]
    return module


def swanlab(calls: Calls) -> ModuleType:
    module = ModuleType("swanlab")

    class Run(_Run):
        def log(self, data, step=None):
            calls.note("log", {"data": data, "step": step})

        def finish(self, state="success", error=None, async_log_timeout=None):
            if state == "crashed" and not error:
                raise ValueError("error is needed")
            calls.note("finish", {"state": state, "error": error})

    def init(
        *, reinit=None, log_dir=None, mode=None, workspace=None, project=None, public=None, name=None, color=None,
        description=None, job_type=None, group=None, tags=None, id=None, resume=None, parallel=None, config=None,
        settings=None, callbacks=None,
    ):  # fmt: skip
        given = {"project": project, "log_dir": log_dir, "id": id, "name": name, "config": config, "mode": mode}
        calls.note("init", given | {"resume": resume})
        return Run(calls, id or f"swan{len(calls.of('init'))}", name)

    module.init = init  # type: ignore[attr-defined]
    return module


def trackio(calls: Calls) -> ModuleType:
    module = ModuleType("trackio")

    class Run(_Run):
        def log(self, metrics, step=None):
            calls.note("log", {"data": metrics, "step": step})

        def finish(self):
            calls.note("finish", {})

    def init(
        project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
        resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
        auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None,
    ):  # fmt: skip
        given = {"project": project, "name": name, "space_id": space_id, "config": config, "resume": resume}
        calls.note("init", given | {"embed": embed})
        return Run(calls, "0123", name)

    module.init = init  # type: ignore[attr-defined]
    return module


MAKERS = {"wandb": wandb, "swanlab": swanlab, "trackio": trackio}


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Calls]:
    """Put stand-ins in the place of packages; returns the calls of each."""
    calls = {name: Calls() for name in names}
    for name in names:
        monkeypatch.setitem(sys.modules, name, MAKERS[name](calls[name]))
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)
    return calls
