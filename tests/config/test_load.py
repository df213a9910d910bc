"""Loading: the YAML dialect, precedence, inheritance, overrides, and that no wrong key or type passes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from flowrl.config import Config, ConfigError, from_mapping, load, recipes, replace, to_mapping
from flowrl.config.build import build, fields_of
from flowrl.config.dialect import parse
from flowrl.config.evaluation import FeatureEntry
from flowrl.config.load import parse_arguments
from flowrl.config.process import ProcessEntry
from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError


def settings(schema: type = Config, prefix: str = "") -> list[tuple[str, Any]]:
    """Every single setting as (dotted name, annotation), sections left out."""
    found: list[tuple[str, Any]] = []
    for name, annotation in fields_of(schema).items():
        if dataclasses.is_dataclass(annotation):
            found += settings(annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, annotation))
    return found


SETTINGS = settings()
IDS = [name for name, _ in SETTINGS]


OTHERS: dict[Any, Any] = {
    tuple[int, ...]: (1, 2),
    tuple[str, ...]: ("other",),
    tuple[float, float]: (0.25, 0.75),
    tuple[RewardEntry, ...]: (RewardEntry(name="other", weight=0.5, args={"k": [1, "two", None]}),),
    tuple[ProcessEntry, ...]: (ProcessEntry(name="other", weight=0.5),),
    tuple[FeatureEntry, ...]: (FeatureEntry(name="other"),),
    dict[str, float]: {"colors": 2.5},
    dict[str, int]: {"colors": 2},
    dict[str, Any]: {"k": [1, "two", None]},
    int: 7,
    float: 0.125,
    str: "other",
}
"""A value of each type of setting that no default has."""


def other_value(annotation: Any, now: Any) -> Any:
    """A value of the right type that differs from ``now``."""
    inside = get_args(annotation)
    if annotation is bool:
        return not now
    if get_origin(annotation) is Literal:
        return next(option for option in inside if option != now)
    if get_origin(annotation) is tuple and get_origin(inside[0]) is Literal:
        return get_args(inside[0])[: 2 if len(now) == 1 else 1]
    if type(None) in inside:
        return None if now is not None else OTHERS[inside[0]]
    return OTHERS[annotation]


def value_at(config: Config, name: str) -> Any:
    here: Any = config
    for part in name.split("."):
        here = getattr(here, part)
    return here


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("3.", 3.0),
        (".5", 0.5),
        ("1_000", "1_000"),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-31", "2024-01-31"),
        ("'1e-4'", "1e-4"),
        ("-.inf", float("-inf")),
        ("=", "="),
        ("[1, {a: no}]", [1, {"a": "no"}]),
    ],
)
def test_dialect(text: str, value: Any) -> None:
    got = parse(text, "text").value
    assert got == value and type(got) is type(value)


def test_merge_keys_are_not_duplicates() -> None:
    document = parse("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n", "file")
    assert document.value["b"] == {"p": 1, "q": 3}
    assert document.places["b", "q"] == "file:4"


def test_all_duplicates_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("a: 1\nb: {c: 1, c: 2}\na: 3\n", "file")
    assert sorted(caught.value.problems) == [
        "a (file:3): given twice, first at line 1; keep one",
        "b.c (file:2): given twice, first at line 2; keep one",
    ]


@pytest.mark.parametrize(("name", "annotation"), SETTINGS, ids=IDS)
def test_every_setting_takes_effect(name: str, annotation: Any) -> None:
    wanted = other_value(annotation, value_at(Config(), name))
    assert value_at(from_mapping(nested(name, wanted)), name) == wanted


@pytest.mark.parametrize("name", IDS)
def test_every_misspelt_setting_is_refused(name: str) -> None:
    head, _, last = name.rpartition(".")
    wrong = f"{head}.{last}x" if head else f"{last}x"
    with pytest.raises(ConfigError) as caught:
        load({}, [f"{wrong}=1"])
    assert caught.value.problems == (f"{wrong} (override): unknown key; did you mean {name}?",)


@pytest.mark.parametrize("name", ["advantage.options", "objective.loss_options"])
def test_options_are_a_mapping(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(nested(name, 1))
    assert caught.value.problems[0].startswith(f"{name}: expected ")


@pytest.mark.parametrize("name", [n for n, annotation in SETTINGS if annotation != dict[str, Any]])
def test_every_wrong_type_is_refused(name: str) -> None:
    numbers = {
        "data.tags": "a number",
        "condition.attributes": "a whole number",
    }  # the settings that map names to numbers
    wrong = {"a": "b"} if name in numbers else {"a": 1}
    with pytest.raises(ConfigError) as caught:
        from_mapping(nested(name, wrong))
    if name in numbers:
        assert caught.value.problems[0].startswith(f"{name}.a: expected {numbers[name]}")
        return
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{name}: expected ")
    assert ", found a mapping" in caught.value.problems[0]


@pytest.mark.parametrize(("name", "annotation"), [setting for setting in SETTINGS if setting[1] in (int, float)])
def test_numbers_are_not_guessed(name: str, annotation: type) -> None:
    too_large = [10**400] if annotation is float else [1.0]
    for value in [True, "1", None, float("nan"), float("inf"), *too_large]:
        with pytest.raises(ConfigError, match=f"^1 error in the configuration:\n  {name}: expected a "):
            from_mapping(nested(name, value))


@pytest.mark.parametrize("value", ["true", "1.0", "batch", "null"])
def test_options_are_compared_with_their_type(value: str) -> None:
    assert load({}, ["advantage.whiten=step"]).advantage.whiten == "step"
    with pytest.raises(
        ConfigError, match=r"advantage\.whiten \(override\): expected one of none, step, sample, found "
    ):
        load({}, [f"advantage.whiten={value}"])


def test_an_int_is_taken_for_a_float() -> None:
    config = from_mapping({"optimizer": {"lr": 1}})
    assert type(config.optimizer.lr) is float


def test_precedence_of_defaults_base_recipe_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("seed: 1\niterations: 1\nbatch: {groups: 1, group_size: 11}\n")
    (tmp_path / "high.yaml").write_text("base: low.yaml\niterations: 2\nbatch: {groups: 2}\n")
    config = load(tmp_path / "high.yaml", ["batch.groups=3"])
    assert (config.threads, config.seed, config.iterations) == (0, 1, 2)
    assert (config.batch.groups, config.batch.group_size) == (3, 11)


def test_a_list_replaces_the_list_below_it(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("rewards: [{name: jpeg}, {name: other}]\n")
    (tmp_path / "high.yaml").write_text("base: low.yaml\nrewards:\n  - weight: 2\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "high.yaml")
    assert caught.value.problems == (f"rewards.0.name ({tmp_path / 'high.yaml'}:3): missing; give text",)


def test_base_of_a_file_is_found_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "low.yaml").write_text("seed: 5\n")
    (tmp_path / "sub" / "high.yaml").write_text("base: low.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert load("sub/high.yaml").seed == 5


def test_a_shipped_name_wins_over_a_file_and_a_path_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").write_text("seed: 77\n")
    monkeypatch.chdir(tmp_path)
    assert load("demo").seed != 77
    assert load("./demo").seed == load(Path("demo")).seed == 77


def test_overrides_reach_into_lists_and_args() -> None:
    recipe = {"rewards": [{"name": "jpeg"}, {"name": "other"}]}
    config = load(recipe, ["rewards.1.weight=2", "rewards.0.args.quality=50", "model.lora.targets.0=attn"])
    assert [entry.weight for entry in config.rewards] == [1.0, 2.0]
    assert config.rewards[0].args == {"quality": 50}
    assert config.model.lora.targets == ("attn", "feed_forward")
    assert recipe == {"rewards": [{"name": "jpeg"}, {"name": "other"}]}


def test_the_last_override_wins_and_a_later_one_reaches_into_it() -> None:
    config = load({}, ["seed=1", "seed=2", "rollout.kernel={name: cps}", "rollout.kernel.noise=0.5"])
    assert config.seed == 2
    assert (config.rollout.kernel.name, config.rollout.kernel.noise) == ("cps", 0.5)


def test_override_values_keep_their_equals_signs() -> None:
    assert load({}, ["run_dir=a=b"]).run_dir == "a=b"


def test_all_errors_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"nope": 1, "batch": {"groups": "a", "group_sise": 2}, "rewards": [{"weight": "b"}]}, ["seed=c", "oops"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "override 'oops'",
        "nope",
        "seed (override)",
        "batch.group_sise",
        "batch.groups",
        "rewards.0.name",
        "rewards.0.weight",
    ]


def test_a_key_that_is_not_text_is_unknown() -> None:
    with pytest.raises(ConfigError, match="1: unknown key"):
        from_mapping({1: 2})  # type: ignore[dict-item]


def test_args_must_be_plain_data() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.0\.args\.f: expected text, a number"):
        from_mapping({"rewards": [{"name": "jpeg", "args": {"f": object()}}]})
    with pytest.raises(ConfigError, match=r"rewards\.0\.args\.1 \(override\): a key must be text"):
        load({}, ["rewards=[{name: jpeg, args: {1: 2}}]"])


def test_replace_is_as_strict_as_loading() -> None:
    config = load("tiny_test")
    changed = replace(config, {"rollout.steps": 6, "rewards.0.weight": 2})
    assert (changed.rollout.steps, changed.rewards[0].weight) == (6, 2.0)
    assert to_mapping(config) == to_mapping(load("tiny_test"))
    with pytest.raises(ConfigError, match=r"rollout\.stepz: unknown key; did you mean rollout\.steps"):
        replace(config, {"rollout.stepz": 6})


def test_unions_and_other_annotations_of_a_plug_in() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        scale: float | None = None
        table: dict[str, int] = dataclasses.field(default_factory=dict)

    made, problems = build(Options, {"scale": 2, "table": {"a": 1}}, {})
    assert problems == [] and made == Options(2.0, {"a": 1})
    made, problems = build(Options, {"scale": "x", "table": {"a": "b"}}, {})
    assert made is None
    assert problems == [
        "scale: expected a number or nothing, found 'x' (text)",
        "table.a: expected a whole number, found 'b' (text)",
    ]


def test_arguments_of_a_probe() -> None:
    assert parse_arguments(["quality=5", "mode=no", "box.left=1e-1"]) == {
        "quality": 5,
        "mode": "no",
        "box": {"left": 0.1},
    }


def test_unreadable_and_deep_files_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 1200)
    with pytest.raises(UserError, match="nested too deeply"):
        load(tmp_path / "deep.yaml")
    (tmp_path / "control.yaml").write_text("run_dir: a\x01b\n")
    with pytest.raises(UserError, match="not valid YAML: unacceptable character"):
        load(tmp_path / "control.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 4\r\n")
    assert load(tmp_path / "bom.yaml").seed == 4


def test_recipes_are_listed() -> None:
    assert {"demo", "sd3_fast", "sd3_flow_grpo", "tiny_test"} <= set(recipes())
