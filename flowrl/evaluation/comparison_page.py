"""What a comparison shows: its table as Markdown, one self-contained page, curves with bands over seeds, one grid."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.evaluation import charts, drawing
from flowrl.evaluation import page as html
from flowrl.evaluation.comparison import MethodRuns
from flowrl.evaluation.report_curves import MAX_POINTS, WINDOW, moving

Images = npt.NDArray[np.uint8]
Text = list[list[str]]

INTERVALS = (
    "Brackets are 95% intervals. Held-out, gold and diversity columns: crossed bootstrap, each draw takes as many prompts "
    "as there are and S - 1 of the S seeds, both with replacement; with one seed it covers prompts only and says nothing "
    "of other seeds. Train score and KL: Student's t over seeds, means of the last tenth of the iterations. Changes are "
    "paired by picture (tuned less base, same prompt and noise); the verdict goes by the paired difference of {measure} "
    "from {first} over the same seeds and pictures, one comparison at a time. Diversity: root mean square deviation of a "
    "prompt's pictures from one another, on at most 12 x 12 block means in [0, 1]. Network samples and seconds: mean a "
    "run, training only; counted and planned take a backward twice, and counted is less where groups without signal were "
    "left out of the update."
)


# --------------------------------------------------------------------------------------------------------------- table


def show(interval: Mapping[str, Any] | None, *, percent: bool = False, signed: bool = False) -> str:
    """Write ``{mean, low, high}`` as ``+3.1 [1.2, 5.0]``, in percent or percentage points on request; "-" for None."""
    if interval is None:
        return "-"
    scale, digits, sign = 100.0 if percent else 1.0, 1 if percent else 3, "+" if signed else ""

    def one(value: float) -> str:
        return f"{scale * value:{sign}.{digits}f}"

    mean = one(interval["mean"]) + ("%" if percent and not signed else "")
    return mean if interval["low"] is None else f"{mean} [{one(interval['low'])}, {one(interval['high'])}]"


def columns(result: Mapping[str, Any]) -> tuple[list[str], Text]:
    """Lay the result out as a head and rows of text: the base first, then each method; columns without a value are left out."""
    rows = [_base_row(result), *(_method_row(result, label) for label in result["methods"])]
    head = [name for name in dict.fromkeys(name for row in rows for name in row) if _filled(rows, name)]
    return head, [[row.get(name, "-") for name in head] for row in rows]


def _filled(rows: Sequence[Mapping[str, str]], name: str) -> bool:
    return any(row.get(name, "-") != "-" for row in rows)


def _base_row(result: Mapping[str, Any]) -> dict[str, str]:
    base = result["base"]
    levels = {name: show(value, percent=name == "strict") for name, value in base.items() if name != "diversity"}
    gold = _gold(result)
    named = {f"gold: {name}" if name in gold else f"held-out {name}": text for name, text in levels.items()}
    return {"method": "base", "train score": "-"} | named | {"KL": "-", "diversity": show(base["diversity"])}


def _gold(result: Mapping[str, Any]) -> Sequence[str]:
    return list(next(iter(result["methods"].values()))["gold"])


def _method_row(result: Mapping[str, Any], label: str) -> dict[str, str]:
    found = result["methods"][label]
    row = {"method": label, "train score": show(found["train_score"])}
    for name, value in found["held_out"].items():
        row[f"held-out {name}"] = show(value["change"], percent=name == "strict", signed=True)
    for name, value in found["gold"].items():
        row[f"gold: {name}"] = show(value["change"], signed=True)
    row["KL"] = show(found["kl"])
    row["diversity"] = show(found["diversity"]["change"], signed=True)
    planned, counted = found.get("planned", {}), found["calls"]
    row["iterations"] = _whole(found.get("iterations"))
    row["forwards"] = _whole(counted["forward_samples"])
    row["backwards"] = _whole(counted["backward_samples"])
    row["counted / planned"] = f"{_whole(_units(counted))} / {_whole(_units(planned))}"
    row["seconds"] = "-" if found["seconds"] is None else f"{found['seconds']:,.1f}"
    first = next(iter(result["methods"]))
    against = found["against"]
    if against is not None:
        measure = result["measure"]
        difference = show(against.get(measure), percent=measure == "strict", signed=True)
        row[f"against {first}"] = f"{against['verdict']}: {difference}"
    return row


def _units(work: Mapping[str, float | None]) -> float | None:
    """Network samples, a backward counted twice."""
    forward, backward = work.get("forward_samples"), work.get("backward_samples")
    return None if forward is None or backward is None else forward + 2 * backward


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """State the budget, how often clipping acted, and how to read the intervals, in sentences."""
    first = next(iter(result["methods"]))
    clip = str(result["clip_text"])
    reading = INTERVALS.format(measure=result["measure"], first=first)
    return [str(result["budget_text"]), f"{clip[:1].upper()}{clip[1:]}.", reading]


def markdown(result: Mapping[str, Any]) -> str:
    """Write comparison.md: what was run, warnings, the table, notes, and the settings of each method."""
    head, rows = columns(result)
    table = [head, ["---"] * len(head), *rows]
    lines = ["# Comparison", "", f"`{result['command']}`", ""]
    lines += [f"flowrl {result['version']}, seeds {', '.join(map(str, result['seeds']))}.", ""]
    lines += [f"**Warning:** {text}" + "\n" for text in result["warnings"]]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines += ["", *(text + "\n" for text in notes(result))]
    lines += [f"- {label}: `{found['settings']}`" for label, found in result["methods"].items()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------- page


def page(result: Mapping[str, Any], methods: Sequence[MethodRuns], grid: Path, configs: Mapping[str, str]) -> str:
    """Build compare.html, without script or any address outside the file.

    methods: the runs behind the curves. grid: a PNG. configs: YAML of one run a method.
    """
    title = "flowrl: " + ", ".join(result["methods"])
    facts = {
        "command": result["command"], "version": result["version"], "machine": _flat(result["machine"]),
        "seeds": ", ".join(map(str, result["seeds"])),
    }  # fmt: skip
    facts |= {label: found["settings"] for label, found in result["methods"].items()}
    lead = html.table([], [[html.escape(name), html.escape(text)] for name, text in facts.items()], "facts")
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in result["warnings"])
    name = "The same prompts and noise: base, then each method (first seed)"
    sections = [
        ("Methods", _html_table(result) + "".join(html.note(text) for text in notes(result))),
        ("Warnings", f'<ul class="warnings">{warnings}</ul>' if warnings else html.note("None.")),
        ("While training", _curves(result, methods)),
        ("Pictures", html.picture(grid, name) + html.note(name)),
        ("Configuration", "".join(_config(label, text) for label, text in configs.items())),
    ]
    return html.page(title, lead, sections)


def _flat(machine: Any) -> str:
    machines = machine if isinstance(machine, list) else [machine]
    return "; ".join(", ".join(f"{name} {value}" for name, value in item.items()) for item in machines)


def _config(label: str, text: str) -> str:
    return f"<details><summary>{html.escape(label)}</summary><pre>{html.escape(text)}</pre></details>"


def _color(index: int) -> str:
    return charts.COLORS[index % len(charts.COLORS)]


def _html_table(result: Mapping[str, Any]) -> str:
    head, rows = columns(result)
    cells = []
    for index, row in enumerate(rows):
        swatch = f'<span class="swatch" style="background:{_color(index - 1)}"></span>' if index else ""
        cells.append([swatch + html.escape(row[0]), *(_cell(text) for text in row[1:])])
    return html.table([html.escape(name) for name in head], cells, "result many")


def _cell(text: str) -> str:
    """The number in bold with its interval below; a verdict in its colour."""
    word, colon, rest = text.partition(": ")
    kind = f' class="{word}"' if colon and word in ("better", "worse") else ""
    mean, bracket, interval = (rest if colon else text).partition(" [")
    below = f"{mean}{bracket}{interval}" if colon else f"{bracket}{interval}".strip()
    main = word if colon else mean
    return f"<b{kind}>{html.escape(main)}</b>" + (f' <span class="quiet">{html.escape(below)}</span>' if below else "")


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(result: Mapping[str, Any], methods: Sequence[MethodRuns]) -> str:
    keys = {
        "score/mean": ("train score", True), "eval/strict": ("held-out strict", False),
        "eval/score": ("held-out score", False), "policy/kl": ("KL to the base", True),
        "policy/clip_fraction": ("clip fraction", True),
    }  # fmt: skip
    by_calls = result["budget"] == "calls"
    x_label = "thousand network samples, a backward counted twice (planned)" if by_calls else "iteration"
    drawn = []
    for key, (title, smooth) in keys.items():
        series = []
        for index, method in enumerate(methods):
            found = result["methods"][method.label]
            scale = (_units(found["planned"]) or 0.0) / found["iterations"] / 1000 if by_calls else 1.0
            line = band(method, key, smooth=smooth, color=_color(index), scale=scale)
            if line is not None and (key != "policy/kl" or method.kl):
                series.append(line)
        if series:
            percent = key.rpartition("/")[2] in ("strict", "clip_fraction")
            drawn.append(charts.line_chart(series, title=title, x_label=x_label, percent=percent))
    legend = (
        f"Line: mean over seeds; band: two standard errors of it, from the spread between seeds (none for one seed). "
        f"Training figures are smoothed over {WINDOW} iterations where a run has twice as many."
    )
    return html.figure(drawn, "No metrics yet.", legend)


def band(method: MethodRuns, key: str, *, smooth: bool, color: str, scale: float = 1.0) -> charts.Series | None:
    """Average one metric over seeds, iteration by iteration, with two standard errors where there are several seeds.

    smooth: a centred moving mean within each run first. scale: units of x an iteration. None where no run has the metric.
    """
    runs = [_smoothed(rows, key) if smooth else _by_iteration(rows, key) for rows in method.metrics]
    shared = sorted(set.intersection(*(set(run) for run in runs)))
    if not shared:
        return None
    shared = shared[:: math.ceil(len(shared) / MAX_POINTS)]
    at = [[run[x] for run in runs] for x in shared]
    mean: list[float | None] = [plain.fmean(values) for values in at]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    if len(runs) > 1:
        error = [2 * plain.stdev(values) / math.sqrt(len(values)) for values in at]
        low = [plain.fmean(values) - e for values, e in zip(at, error, strict=True)]
        high = [plain.fmean(values) + e for values, e in zip(at, error, strict=True)]
    x = [scale * value for value in shared]
    return charts.Series(method.label, x, mean, low, high, dots=len(shared) <= 30, color=color)


def _by_iteration(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {int(row["iteration"]): float(row[key]) for row in rows if row.get(key) is not None}


def _smoothed(rows: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    found = _by_iteration(rows, key)
    if len(found) < 2 * WINDOW:
        return found
    mean = moving(list(found.values()))[0]
    return {x: value for x, value in zip(found, mean, strict=True) if value is not None}


# ---------------------------------------------------------------------------------------------------------------- grid


def picture_grid(rows: Sequence[tuple[str, Images, Sequence[float | None]]], prompts: Sequence[str]) -> Any:
    """Draw one row of pictures a method below their prompts, each with its score, green or red against the first row.

    rows: (label, uint8 [N, H, W, 3], N scores), the base first; column i of all rows is the same prompt and noise. Raises
    ValueError where a row has another shape or number.
    """
    from PIL import Image, ImageDraw, ImageFont

    shape = rows[0][1].shape
    for label, images, scores in rows:
        if images.shape != shape or len(scores) != len(prompts) or len(images) != len(prompts):
            raise ValueError(f"picture_grid: row {label} holds {list(images.shape)}, the first {list(shape)}")
    zoom = max(1, math.ceil(112 / shape[2]))
    width, height = (shape[2] * zoom, shape[1] * zoom) if shape[2] <= 256 else (256, round(256 * shape[1] / shape[2]))
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    left = drawing.MARGIN + 12 + max(int(font.getlength(label)) for label, _, _ in rows)
    heads = [drawing.wrap(prompt, width, 13) for prompt in prompts]
    top = drawing.MARGIN + 17 * max(len(lines) for lines in heads) + 6
    step = height + 30
    size = (left + len(prompts) * (width + 10) - 10 + drawing.MARGIN, top + len(rows) * step - 6 + drawing.MARGIN)
    sheet = Image.new("RGB", size, drawing.PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        for line, text in enumerate(lines):
            draw.text((left + column * (width + 10), drawing.MARGIN + 17 * line), text, drawing.INK, small)
    for index, (label, images, scores) in enumerate(rows):
        above = top + index * step
        draw.text((drawing.MARGIN, above + height // 2 - 8), label, drawing.INK, font)
        for column, (image, score) in enumerate(zip(images, scores, strict=True)):
            filter_ = Image.Resampling.NEAREST if shape[2] <= 256 else Image.Resampling.LANCZOS
            corner = (left + column * (width + 10), above)
            sheet.paste(Image.fromarray(image).resize((width, height), filter_), corner)
            text, ink = _verdict_of(score, rows[0][2][column], first=index == 0)
            draw.text((corner[0], above + height + 4), text, ink, small)
    return sheet


def _verdict_of(score: float | None, before: float | None, *, first: bool) -> tuple[str, str]:
    if score is None:
        return "no score", drawing.QUIET
    if first or before is None or score == before:
        return f"{score:.2f}", drawing.QUIET
    return f"{score:.2f}", drawing.BETTER if score > before else drawing.WORSE
