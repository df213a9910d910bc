"""What ``flowrl eval`` is pointed at: a run, one of its checkpoints, an exported LoRA, the folder of a pipeline, or a recipe.

Everything that can be wrong with it is found here, before a model is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowrl import registry
from flowrl.checkpoint.manifest import DIRECTORY_NAME, MANIFEST
from flowrl.config import Config, check, load
from flowrl.config.load import replace
from flowrl.data.prompts import read_prompts
from flowrl.errors import UserError

Kind = Literal["run", "checkpoint", "lora", "pipeline", "recipe"]

CONFIG, LORA, PIPELINE = "config.yaml", "pytorch_lora_weights.safetensors", "model_index.json"
FOLDERS = f"a run ({CONFIG}), a checkpoint ({MANIFEST}), an exported LoRA ({LORA}) or a diffusers pipeline ({PIPELINE})"


@dataclass(frozen=True)
class Source:
    """config: checked; path: as given; out: where results go; iteration: of a checkpoint, None for a run's newest one."""

    kind: Kind
    config: Config
    path: Path
    out: Path
    iteration: int | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of a run lie."""
        return self.path.parent if self.kind == "checkpoint" else self.path / "checkpoints"


def find(source: str | Path, overrides: Sequence[str] = (), config: str = "", out: str | Path | None = None) -> Source:
    """Tell what ``source`` is, and read and check its config with ``overrides`` on top.

    config: a recipe that says which model, prompts and rewards; by default the run's own, and for the folder of a pipeline
    the schema's defaults. out: folder for the results. Default: the run itself; ``evaluations/NAME`` in the run for one of its
    checkpoints or its LoRA; else run_dir, or ``run_dir/evaluations/NAME`` where run_dir holds a run. Raises UserError.
    """
    path = Path(source)
    kind = _kind(path)
    run = _run_of(kind, path)
    if config:
        settings = load(config, overrides)
    elif kind == "recipe":
        settings = load(str(source), overrides)
    elif run is not None:
        settings = load(run / CONFIG, overrides)
    elif kind == "pipeline":
        settings = load({}, overrides)
    else:
        raise UserError(
            f"{path}: no run stands around it that says which model, prompts and rewards; name a recipe that does, with "
            "--config"
        )
    if kind == "pipeline":
        settings = _of_pipeline(settings, path, sized=any(item.startswith("model.height=") for item in overrides))
    settings = check(settings)
    if not settings.evaluation.prompts.startswith("world/"):
        read_prompts(settings.evaluation.prompts, settings.evaluation.format)
    folder = Path(out) if out is not None else _out(kind, path, run, settings)
    return Source(kind, settings, path, folder, _iteration(path) if kind == "checkpoint" else None)


def _kind(path: Path) -> Kind:
    if not path.is_dir():
        return "recipe"
    marks: tuple[tuple[Kind, str], ...] = (
        ("run", CONFIG), ("checkpoint", MANIFEST), ("lora", LORA), ("pipeline", PIPELINE),
    )  # fmt: skip
    for kind, mark in marks:
        if (path / mark).is_file():
            return kind
    raise UserError(f"{path}: nothing to evaluate; give the folder of {FOLDERS}")


def _run_of(kind: Kind, path: Path) -> Path | None:
    """The run around a folder, or None."""
    levels = {"run": 0, "lora": 1, "checkpoint": 2}
    if kind not in levels:
        return None
    folder = path.resolve()
    for _ in range(levels[kind]):
        folder = folder.parent
    folder = path if kind == "run" else folder
    return folder if (folder / CONFIG).is_file() else None


def _iteration(path: Path) -> int:
    name = re.fullmatch(DIRECTORY_NAME, path.resolve().name)
    if name is None:
        raise UserError(f"{path}: a checkpoint's folder is called iteration-00000012 or alike; give it its name back")
    return int(name.group(1))


def _out(kind: Kind, path: Path, run: Path | None, config: Config) -> Path:
    if kind == "run":
        return path
    name = {"recipe": "base", "pipeline": "base"}.get(kind, path.resolve().name)
    if run is not None:
        return run / "evaluations" / name
    folder = Path(config.run_dir)
    return folder / "evaluations" / name if (folder / CONFIG).is_file() else folder


def _of_pipeline(config: Config, path: Path, *, sized: bool) -> Config:
    """The config with the folder's model: its adapter, and unless ``sized`` the picture size that it was trained on."""
    index = _json(path / PIPELINE)
    changes: dict[str, Any] = {"model.path": str(path), "model.adapter": _adapter(path, str(index.get("_class_name")))}
    if not sized:
        size = _picture_size(path)
        if size is None:
            raise UserError(
                f"{path}: its files do not say how large its pictures are; add model.height=... model.width=..."
            )
        changes |= {"model.height": size, "model.width": size}
    return replace(config, changes)


def _adapter(path: Path, class_name: str) -> str:
    for name in registry.names("pipeline"):
        if vars(registry.resolve("pipeline", name)).get("pipeline_name") == class_name:
            return name
    raise UserError(
        f"{path}: holds a {class_name}, for which there is no adapter; there are {', '.join(registry.names('pipeline'))}"
    )


def _picture_size(path: Path) -> int | None:
    """Pixels a side: the network's sample_size times the autoencoder's factor, None where the files say nothing."""
    sizes = [
        _json(path / part / "config.json").get("sample_size")
        for part in ("transformer", "unet")
        if (path / part / "config.json").is_file()
    ]
    blocks = _json(path / "vae" / "config.json").get("block_out_channels") if (path / "vae").is_dir() else None
    if not sizes or type(sizes[0]) is not int or not isinstance(blocks, list):
        return None
    return sizes[0] << (len(blocks) - 1)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); download or save the pipeline again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no object; download or save the pipeline again")
    return found
