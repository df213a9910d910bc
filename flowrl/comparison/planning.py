"""From methods to checked configs at an equal budget, before any model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowrl.comparison.methods import Preset, clashes, read_methods
from flowrl.config import Config, ConfigError, check, load, to_mapping
from flowrl.config.engine import loss_name
from flowrl.config.rewards import concise, judging, labels
from flowrl.config.validate import MAX_SEED
from flowrl.errors import UserError
from flowrl.objectives.forms import FORMS
from flowrl.plan import plan
from flowrl.training.build import held_out_prompts, training_prompts

Budget = Literal["samples", "calls"]
BUDGETS: tuple[Budget, ...] = ("samples", "calls")


@dataclass(frozen=True)
class Request:
    """What the user asked for. seeds: "3" (the config's and the two after it) or "0,4,7"; jobs: runs side by side."""

    source: str
    methods: str
    seeds: str = "3"
    budget: str = "samples"
    out: Path = Path("runs/compare")
    overrides: tuple[str, ...] = ()
    jobs: int = 1


@dataclass(frozen=True)
class PlannedMethod:
    """A method with a config a seed, all alike but for seed and folder. forward, backward: network samples a whole run."""

    label: str
    settings: str
    configs: tuple[Config, ...]
    forward: float
    backward: float

    @property
    def config(self) -> Config:
        return self.configs[0]

    @property
    def names(self) -> list[str]:
        return [Path(config.run_dir).name for config in self.configs]


@dataclass(frozen=True)
class Planned:
    """Everything to run. The first method is the baseline."""

    methods: tuple[PlannedMethod, ...]
    seeds: tuple[int, ...]
    budget: Budget

    @property
    def runs(self) -> list[tuple[str, Config]]:
        """(name, config), all methods of one seed before the next seed, so that a stopped comparison is still fair."""
        return [(m.names[i], m.configs[i]) for i in range(len(self.seeds)) for m in self.methods]


def prepare(request: Request) -> Planned:
    """Read, budget and check every method. Raises UserError for the task's CONFIG, ConfigError with everything else."""
    task = load(request.source, request.overrides)
    presets, problems = read_methods(request.methods, request.source)
    seeds, more = read_seeds(request.seeds, task.seed)
    problems += more
    if request.budget not in BUDGETS:
        problems.append(f"--budget: {request.budget!r} is unknown; use samples or calls")
    if request.jobs < 1:
        problems.append(f"--jobs: {request.jobs} processes run nothing; use at least 1")
    loaded: list[tuple[Preset, Config]] = []
    for preset in presets:
        wrong = clashes(preset, request.overrides)
        try:
            config = _load(preset, request)
            check(config)
            for read in (training_prompts, held_out_prompts):
                read(config)
            loaded.append((preset, config))
        except ConfigError as error:
            wrong += [f"{preset.label}: {problem}" for problem in error.problems]
        except UserError as error:
            wrong.append(f"{preset.label}: {error}")
        problems += wrong
    problems += _unlike([(preset.label, config) for preset, config in loaded])
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    budget = next(name for name in BUDGETS if name == request.budget)
    return Planned(_budgeted(loaded, task.iterations, seeds, budget, request), seeds, budget)


def read_seeds(text: str, first: int) -> tuple[tuple[int, ...], list[str]]:
    """Read ``3`` as three seeds from ``first`` on, ``0,4,7`` as these; returns the seeds and what is wrong with them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdecimal() for part in parts):
        return (), [f"--seeds: {text!r} is neither a number of seeds, as in 3, nor a list of them, as in 0,4,7"]
    numbers = tuple(int(part) for part in parts)
    if "," not in text:
        if not 1 <= numbers[0] <= 1000:
            return (), [f"--seeds: {numbers[0]} seeds; use 1 to 1000, or a list of seeds, as in 0,4,7"]
        numbers = tuple(range(first, first + numbers[0]))
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        return (), [f"--seeds: {twice[0]} is given twice"]
    if max(numbers) > MAX_SEED:
        return (), [f"--seeds: {max(numbers)} is out of range; use at most {MAX_SEED}"]
    return numbers, []


def _load(preset: Preset, request: Request) -> Config:
    """CONFIG, the method over it, and the overrides for all over both."""
    if preset.layer is None:
        return load(request.source, [*preset.words, *request.overrides])
    return load({"base": request.source, **preset.layer}, request.overrides)


def _unlike(loaded: Sequence[tuple[str, Config]]) -> list[str]:
    """What makes methods incomparable: another model or judge, or no difference at all."""
    if not loaded:
        return []
    name, first = loaded[0]
    problems = []
    seen: dict[str, str] = {}
    for label, config in loaded:
        for key, here, there in differences(_judge(first), _judge(config)):
            problems.append(
                f"{label}: {key} is {there!r}, and {here!r} for {name}; methods are judged alike, so set it for all"
                + (" (or name the judges in evaluation.rewards)" if key.startswith("rewards") else "")
            )
        same = repr(to_mapping(config))
        if same in seen:
            problems.append(f"{label}: has the same settings as {seen[same]}; leave one of them out")
        seen.setdefault(same, label)
    return problems


def _judge(config: Config) -> dict[str, Any]:
    """The settings that decide what is judged, and by what."""
    plain = to_mapping(config)
    model = {key: plain["model"][key] for key in ("adapter", "path", "height", "width")}
    rewards = {} if config.evaluation.rewards else {"rewards": [concise(entry) for entry in config.rewards]}
    evaluation = plain["evaluation"] | {"rewards": [concise(entry) for entry in config.evaluation.rewards]}
    return {"model": model, "evaluation": evaluation, **rewards}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the dotted keys at which two nested mappings differ, with both values; None where one has no such key."""
    found = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [(f"{key}.{inner}", x, y) for inner, x, y in differences(a, b)]
        elif a != b:
            found.append((str(key), a, b))
    return found


def units(config: Config) -> tuple[float, float]:
    """Planned network samples of one iteration: forwards and backwards, the mean over the window's starts."""
    made = plan(config)
    return made.forward.samples.mean, made.update_backward.samples.mean


def _budgeted(
    loaded: Sequence[tuple[Preset, Config]], iterations: int, seeds: Sequence[int], budget: Budget, request: Request
) -> tuple[PlannedMethod, ...]:
    """Give each method the iterations whose samples, or network calls, come nearest to the first method's."""

    def spent(config: Config) -> float:
        forward, backward = units(config)
        return config.batch.samples if budget == "samples" else forward + 2 * backward

    whole = iterations * spent(loaded[0][1])
    methods, problems = [], []
    for preset, config in loaded:
        count = max(1, round(whole / spent(config)))
        threads = 1 if request.jobs > 1 else config.threads
        configs = tuple(
            dataclasses.replace(
                config,
                iterations=count,
                seed=seed,
                threads=threads,
                run_dir=str(request.out / f"{preset.label}-{seed}"),
            )
            for seed in seeds
        )
        try:
            check(configs[0])
        except ConfigError as error:
            problems += [f"{preset.label}, at {count} iterations: {problem}" for problem in error.problems]
        forward, backward = units(config)
        methods.append(PlannedMethod(preset.label, preset.text, configs, count * forward, count * backward))
    if problems:
        raise ConfigError(problems)
    return tuple(methods)


def budget_text(planned: Planned) -> str:
    """State the budget in a sentence."""
    first = planned.methods[0]
    samples = first.config.iterations * first.config.batch.samples
    if planned.budget == "samples":
        return f"Equal samples: about {samples:,} training pictures a run; network samples differ, as the table shows."
    work = first.forward + 2 * first.backward
    return f"Equal network samples: about {work:,.0f} planned a run, a backward counted twice, to within one iteration."


def gold_names(config: Config) -> list[str]:
    """Labels of evaluated rewards that training gives no weight."""
    trained = [(entry.name, entry.args) for entry in config.rewards if entry.duty == "train"]
    judges = judging(config)
    return [
        label for label, entry in zip(labels(judges), judges, strict=True) if (entry.name, entry.args) not in trained
    ]


def ratio_methods(planned: Planned) -> list[str]:
    """Methods whose ratio, loss or clip range differs from the first one's, among those that have a ratio of transitions."""
    first = _ratio(planned.methods[0].config)
    found = {method.label: _ratio(method.config) for method in planned.methods[1:]}
    return [label for label, ratio in found.items() if first and ratio and ratio != first]


def _ratio(config: Config) -> tuple[Any, ...]:
    o = config.objective
    if o.name not in FORMS:
        return ()
    form = FORMS[o.name]
    return o.ratio or form.ratio, loss_name(o), o.loss_options or form.loss_options, o.clip_range, o.log_prob_reduction
