"""The command ``flowrl``: words to functions. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from flowrl import __version__
from flowrl.distributed.launch import world_size
from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.config import Config

_OVERRIDES = "key=value words change single settings, as in rollout.steps=10 or rewards.0.weight=2; values are YAML."


class _Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print a usage text and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake (its text is on stderr), 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except UserError as error:
        _write(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        _write("interrupted", sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has gone; a second message would fail the same way
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _write(text: str, stream: TextIO | None = None) -> None:
    """The one place that writes to the terminal."""
    out = stream or sys.stdout
    out.write(text.rstrip("\n") + "\n")
    out.flush()


def _run(words: list[str]) -> int:
    parser = build_parser()
    if not words:
        _write(parser.format_help(), sys.stderr)
        return 2
    if not words[0].startswith("-") and words[0] not in _COMMANDS:
        close = difflib.get_close_matches(words[0], _COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(_COMMANDS)}"
        raise UserError(f"unknown command {words[0]!r}; {hint}")
    args, rest = parser.parse_known_args(words)
    flags = [word for word in rest if word.startswith("-")]
    if flags or (rest and "items" not in args):
        raise UserError(f"flowrl {words[0]}: unknown word {(flags or rest)[0]!r}; see flowrl {words[0]} --help")
    if rest:  # argparse gives up on key=value words that follow an option
        args.items = [*args.items, *rest]
    args.words = words
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line; imports nothing."""
    parser = _Parser(prog="flowrl", description="Align image and video generators with rewards, by online RL.")
    parser.add_argument("--version", action="version", version=f"flowrl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (run, text, add) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EPILOGS.get(name),
            allow_abbrev=False,
        )
        add(sub)
        sub.set_defaults(run=run)
    return parser


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "items",
        nargs="*",
        default=[],
        metavar="CONFIG key=value",
        help="a YAML file or a shipped recipe, then overrides",
    )
    parser.add_argument("--resume", metavar="RUN", help="continue the run of this folder; takes no CONFIG")


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="the folder of a run, of a checkpoint or of an exported LoRA (base against tuned), of a pipeline, or a recipe "
        "(the model as it is)",
    )
    parser.add_argument(
        "--config", metavar="CONFIG", default="", help="recipe with the model, prompts and rewards to use"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where results go; default: in the run, else run_dir"
    )
    parser.add_argument(
        "items", nargs="*", default=[], metavar="key=value", help="overrides, as in evaluation.count=100"
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folders; several are shown side by side")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="where to write it; default: report.html in the first run"
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG", help="a YAML file or a shipped recipe")
    parser.add_argument("items", nargs="*", default=[], metavar="key=value", help="overrides")


def _methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON array, with inputs, options and the config that runs each or why none does",
    )


def _rewards_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="name the reward models")
    probe = actions.add_parser(
        "probe", help="score the embedded world's own pictures with one reward, good ones and bad ones"
    )
    probe.add_argument("name", metavar="NAME", help="a registry key, package.module:name, or path/to/file.py:name")
    probe.add_argument("items", nargs="*", default=[], metavar="key=value", help="arguments of the reward")
    serve = actions.add_parser("serve", help="answer for one reward over HTTP, for executor.kind=http of other runs")
    serve.add_argument("name", metavar="NAME", help="as of probe")
    serve.add_argument("items", nargs="*", default=[], metavar="key=value", help="arguments of the reward")
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    serve.add_argument("--port", type=int, default=8765, help="0: any that is free; default: 8765")
    serve.add_argument("--token-env", default="", metavar="NAME", help="environment variable with the bearer token")
    convert = actions.add_parser("convert", help="rewrite an upstream .pt as safetensors, once; no code in it is run")
    convert.add_argument(
        "kind", metavar="KIND", help="plain, open_clip, or head (a model with a reward head of its own)"
    )
    convert.add_argument("file", metavar="FILE", help="the upstream .pt, .pth or .safetensors")
    convert.add_argument("folder", metavar="FOLDER", help="where to write; nothing there is overwritten")
    convert.add_argument("--base", default="", metavar="FOLDER", help="whose config and tokenizer files go beside them")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG", help="the task: a YAML file or a shipped recipe")
    parser.add_argument("items", nargs="*", default=[], metavar="key=value", help="overrides for all methods")
    parser.add_argument(
        "--methods",
        required=True,
        metavar="A,B,C",
        help="keys of flowrl methods, label:key=value,key=value, or recipes laid over CONFIG; the first is the baseline",
    )
    parser.add_argument("--seeds", default="3", metavar="N", help="how many seeds, or which (0,4,7); default: 3")
    parser.add_argument(
        "--budget",
        default="samples",
        metavar="KIND",
        help="what is equal: samples (pictures trained on, the default) or calls (network samples, a backward twice)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), metavar="FOLDER", help="default: runs/compare"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, one thread each; default: 1"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one run, as a job of --jobs


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Doctor takes none."""


def _load(source: str, overrides: Sequence[str]) -> Config:
    """A config that is right, with its prompt files read once, so that no mistake waits until a model is loaded."""
    from flowrl.config import check, load

    config = check(load(source, overrides), world_size(os.environ))
    from flowrl.data.prompts import read_prompts

    for section in (config.data, config.evaluation):
        if not section.prompts.startswith("world/"):
            read_prompts(section.prompts, section.format)
    return config


def _run_folder(text: str | Path) -> Path:
    """A folder that holds a run, else UserError."""
    folder = Path(text)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; check the path")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: holds no run (config.yaml is missing); give the run_dir of a run")
    return folder


def _train(args: argparse.Namespace) -> int:
    if args.resume is not None:
        wrong = [word for word in args.items if "=" not in word]
        if wrong:
            raise UserError(
                f"flowrl train --resume {args.resume}: takes no CONFIG, found {wrong[0]!r}; the run has its own"
            )
        folder = _run_folder(args.resume)
        _load(str(folder / "config.yaml"), args.items)
        from flowrl import api

        run = api.resume(folder, args.items)
    else:
        if not args.items or "=" in args.items[0]:
            raise UserError(
                "flowrl train: CONFIG is missing; give a YAML file or a shipped recipe first, as in flowrl train demo"
            )
        config = _load(args.items[0], args.items[1:])
        from flowrl import api

        run = api.train(config, command=shlex.join(["flowrl", *args.words]))
    _write(run.text())
    return 0


def _eval(args: argparse.Namespace) -> int:
    from flowrl.evaluation.sources import find

    find(args.source, args.items, args.config, args.out)  # every mistake in it, before torch is loaded
    from flowrl import api

    text = api.evaluate(args.source, args.items, config=args.config, out=args.out)
    if text:  # one process of several speaks
        _write(text)
    return 0


def _report(args: argparse.Namespace) -> int:
    runs = [_run_folder(run) for run in args.runs]
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise UserError(f"{run}: has no metrics.jsonl yet; train or evaluate it first")
    from flowrl.evaluation.report import write_report

    _write(f"report: {write_report(runs, args.out)}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = _load(args.source, args.items)
    from flowrl.fit import check_model, device_bytes
    from flowrl.plan import plan_text

    check_model(config, (), device_bytes())
    _write(plan_text(config))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from flowrl.doctor import doctor_text

    _write(doctor_text())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from flowrl.comparison import Request, compare

    request = Request(args.source, args.methods, args.seeds, args.budget, args.out, tuple(args.items), args.jobs)
    _write(compare(request, shlex.join(["flowrl", *args.words]), _write, only=args.only))
    return 0


def _methods(args: argparse.Namespace) -> int:
    from flowrl.methods import methods_json, methods_text

    _write(methods_json() if args.json else methods_text())
    return 0


def _rewards(args: argparse.Namespace) -> int:
    from flowrl import registry

    if args.action == "list":
        table = registry.targets("reward")
        width = max(len(name) for name in table)
        _write("\n".join(f"{name:{width}}  {table[name]}" for name in sorted(table)))
        return 0
    if args.action == "convert":
        from flowrl.scoring.convert import convert

        _write("\n".join(convert(args.kind, args.file, args.folder, args.base)))
        return 0
    from flowrl.config import ConfigError
    from flowrl.config.load import parse_arguments
    from flowrl.config.rewards import apply_preset, split_preset

    arguments = parse_arguments(args.items)
    key, _ = split_preset(args.name)
    given, _ = apply_preset(args.name, arguments, registry.resolve("reward", key))
    problems = registry.check_arguments("reward", key, given)
    if problems:
        raise ConfigError(problems)
    if args.action == "serve":
        from flowrl.config.schema import RewardEntry
        from flowrl.scoring.service import ServiceSettings, serve

        settings = ServiceSettings(host=args.host, port=args.port, token_env=args.token_env)
        serve(RewardEntry(name=args.name, args=arguments), settings, _write)
        return 0
    from flowrl.scoring.probe import probe

    _write(probe(args.name, arguments))
    return 0


_Command = tuple[Callable[[argparse.Namespace], int], str, Callable[[argparse.ArgumentParser], None]]
_COMMANDS: dict[str, _Command] = {
    "train": (_train, "fine-tune a model; writes a run folder", _train_arguments),
    "eval": (_eval, "metrics and grids, base against tuned", _eval_arguments),
    "report": (_report, "one self-contained HTML page about one or several runs", _report_arguments),
    "plan": (_plan, "dry run: batch geometry, network calls, memory, every config error", _plan_arguments),
    "compare": (_compare, "methods side by side on one task: table, curves, pictures, intervals", _compare_arguments),
    "doctor": (_doctor, "versions, devices, optional packages and what each missing one disables", _no_arguments),
    "methods": (_methods, "every algorithm with its paper, evidence and the config that runs it", _methods_arguments),
    "rewards": (_rewards, "the reward models: list, probe, serve, convert", _rewards_arguments),
}
_EPILOGS = {"train": _OVERRIDES, "eval": _OVERRIDES, "plan": _OVERRIDES, "compare": _OVERRIDES}
