"""The model card of an export: README.md with the hub's front matter, what it was made from and how well it does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flowrl import __version__, registry
from flowrl.advantage.catalogue import METHODS as ADVANTAGES
from flowrl.advantage.method import Method
from flowrl.config.rewards import declared, split_preset
from flowrl.config.schema import Config, RewardEntry
from flowrl.evaluation.statistics import summary_text
from flowrl.objectives import METHODS as OBJECTIVES
from flowrl.objectives.actor_critic import METHODS as ACTOR_CRITIC
from flowrl.objectives.differentiable.methods import METHODS as DIRECT
from flowrl.objectives.forward.methods import METHODS as FORWARD
from flowrl.protocols import ModelFamily

CARD, SAMPLES = "README.md", "samples.png"
OWN_LICENCE = "apache-2.0"
_PICTURE_TASKS = {"flux_kontext": "image-to-image", "qwen_image_edit": "image-to-image", "wan_image": "image-to-video"}


def write_card(run: Path, config: Config, evaluation: Mapping[str, Any]) -> Path:
    """Write export/README.md of a run, with its sample grid beside it; returns the card's path.

    evaluation: what evaluation.json holds. Only names go in, no path of this machine.
    """
    folder = run / "export"
    folder.mkdir(parents=True, exist_ok=True)
    grid = run / "grids" / "tuned.png"
    if grid.is_file():
        shutil.copyfile(grid, folder / SAMPLES)
    (folder / CARD).write_text(card_text(config, evaluation, grid.is_file()), encoding="utf-8")
    return folder / CARD


def card_text(config: Config, evaluation: Mapping[str, Any], pictures: bool) -> str:
    """The card as text. pictures: whether samples.png stands beside it."""
    front = yaml.safe_dump(front_matter(config, evaluation), sort_keys=False, allow_unicode=True)
    model = config.model
    what = f"LoRA of rank {model.lora.rank}" if model.train == "lora" else "fully fine-tuned network"
    sections = [
        f"# {run_name(config)}",
        f"A {what} for {base_name(config)}, trained by reinforcement learning with flowrl {__version__}: "
        f"{evaluation.get('iteration', config.iterations)} iterations of {config.batch.groups} prompts x "
        f"{config.batch.group_size} pictures.",
        *(["![samples](samples.png)", "Pictures spread evenly over the evaluation's prompts, chosen by no score."]
          if pictures else []),
        "## Use", _use(config),
        "## Base", f"{base_name(config)}. Licence: {base_licence(config) or 'see its own page; this card does not know it'}.",
        "## Data", _data(config),
        "## Rewards", *_rewards(config),
        "## Method", *_methods(config),
        "## Evaluation",
        f"Held-out prompts: {prompts_name(config.evaluation.prompts)}; {config.evaluation.steps} deterministic steps, guidance "
        f"{config.evaluation.guidance:g}; the same prompts and noise for base and tuned.",
        f"```\n{summary_text(evaluation)}\n```",
    ]  # fmt: skip
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(config: Config, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the hub reads. base_model is there for a hub id alone, licence where it is known."""
    model = config.model
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task(config)}
    if is_hub_id(config):
        front |= {
            "base_model": model.path,
            "base_model_relation": "adapter" if model.train == "lora" else "finetune",
        }
    licence = base_licence(config)
    if licence:
        front["license"] = licence
    front["tags"] = [
        "flowrl",
        "reinforcement-learning",
        config.objective.name,
        *(["lora"] if model.train == "lora" else []),
    ]
    results = _results(config, evaluation)
    if results:
        front["model-index"] = [{"name": run_name(config), "results": results}]
    return front


def _results(config: Config, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    side = evaluation.get("tuned") or {}
    means = {name: part["mean"] for name, part in side.get("scores", {}).items() if part}
    if side.get("strict"):
        means["strict"] = side["strict"]["mean"]
    if not means:
        return []
    dataset = prompts_name(config.evaluation.prompts)
    return [
        {
            "task": {"type": task(config)},
            "dataset": {"type": "prompts", "name": dataset},
            "metrics": [{"type": name, "value": float(value), "name": name} for name, value in means.items()],
        }
    ]


def task(config: Config) -> str:
    """The hub's name of what the model does."""
    if config.model.adapter in _PICTURE_TASKS:
        return _PICTURE_TASKS[config.model.adapter]
    return "text-to-image" if config.model.frames == 1 else "text-to-video"


def run_name(config: Config) -> str:
    return Path(config.run_dir).name or "flowrl"


def is_hub_id(config: Config) -> bool:
    path = config.model.path
    return path != "embedded" and not Path(path).expanduser().is_dir()


def base_name(config: Config) -> str:
    """A hub id as given, else the folder's own name."""
    model = config.model
    if model.path == "embedded":
        return f"the embedded {model.adapter} model of flowrl"
    if is_hub_id(config):
        return model.path + (f" at revision {model.revision}" if model.revision else "")
    return Path(model.path).expanduser().resolve().name


def base_licence(config: Config) -> str:
    """What the model's own card says, flowrl's for the embedded models, "" where nobody says."""
    if config.model.path == "embedded":
        return OWN_LICENCE
    family = registry.resolve("pipeline", config.model.adapter)
    return family.licence(config.model) if isinstance(family, ModelFamily) else ""


def prompts_name(prompts: str) -> str:
    return prompts if prompts.startswith("world/") else Path(prompts).name


def _data(config: Config) -> str:
    name = prompts_name(config.data.prompts)
    if config.data.prompts.startswith("world/"):
        return f"Prompts: the training sentences of {name}, a part of flowrl. Licence: {OWN_LICENCE}."
    return f"Prompts: {name} ({config.data.format}). Licence: the file states none; ask where it comes from."


def _rewards(config: Config) -> list[str]:
    lines = []
    for entry in (*config.rewards, *config.evaluation.rewards):
        licence = declared(entry.name, "licence") or "not stated"
        lines.append(f"- {reward_name(entry)}: weight {entry.weight:g}, {_DUTIES[entry.duty]}. Licence: {licence}.")
    return ["\n".join(dict.fromkeys(lines))]


_DUTIES = {"train": "trained on", "monitor": "watched", "gold": "watched at evaluations, never trained on"}


def reward_name(entry: RewardEntry) -> str:
    """Its key without the folders of a file of one's own."""
    key, preset = split_preset(entry.name)
    file, colon, attribute = key.rpartition(":")
    shown = f"{Path(file).name}:{attribute}" if colon else key
    return f"{shown}/{preset}" if preset else shown


def _methods(config: Config) -> list[str]:
    objective = _find((*OBJECTIVES, *FORWARD, *DIRECT, *ACTOR_CRITIC), config.objective.name)
    advantage = _find(ADVANTAGES, config.advantage.name)
    lines = [_line("Objective", config.objective.name, objective), _line("Advantage", config.advantage.name, advantage)]
    kernel = config.rollout.kernel
    return [
        "\n".join([*lines, f"- Sampling: {config.rollout.steps} steps, kernel {kernel.name} (noise {kernel.noise:g})."])
    ]


def _find(methods: tuple[Method, ...], key: str) -> Method | None:
    return next((method for method in methods if method.key == key), None)


def _line(what: str, key: str, method: Method | None) -> str:
    if method is None:
        return f"- {what}: {key}."
    paper = f" ([arXiv:{method.paper_id}](https://arxiv.org/abs/{method.paper_id}))" if method.paper_id else ""
    return f"- {what}: {key}, {method.title}{paper}."


def _use(config: Config) -> str:
    base = config.model.path if is_hub_id(config) else base_name(config)
    if config.model.train == "full":
        return "The folder of the trained network takes the place of the one of the same name in the base's folder."
    return (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("this folder")\n```'
    )
