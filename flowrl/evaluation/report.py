"""One self-contained HTML report of one or several runs: no script, no address outside the file.

What a run directory lacks is stated in the report; text from prompts, configs and files is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import statistics as plain
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.evaluation import charts
from flowrl.evaluation.charts import Series
from flowrl.evaluation.run_files import GRIDS, RunFiles, labels, number, read_run
from flowrl.evaluation.statistics import cell, table_lines

WINDOW = 9  # iterations in a moving mean
MAX_POINTS = 400  # values a line keeps
MAX_PNG = 1_000_000  # bytes; larger pictures are embedded as WebP


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of ``runs`` to ``out`` (by default report.html in the first run directory); return its path.

    Reads config.yaml, metrics.jsonl, evaluation.json (else samples.jsonl) and grids/*.png of each directory.
    Raises UserError where there is no run, or a directory holds none of these.
    """
    if not runs:
        raise UserError("report: no run directory given; name at least one, as in: flowrl report runs/demo")
    read = [
        read_run(Path(path), label, index) for index, (path, label) in enumerate(zip(runs, labels(runs), strict=True))
    ]
    target = Path(runs[0]) / "report.html" if out is None else Path(out)
    save(target, _page(read))
    return target


def save(target: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, target)


# ---------------------------------------------------------------------------------------------------------------- page


def _page(runs: Sequence[RunFiles]) -> str:
    title = "flowrl: " + ", ".join(run.label for run in runs)
    sections: list[tuple[str, Callable[[Sequence[RunFiles]], str]]] = [
        ("Before and after", _headline),
        ("Warnings", _warnings),
        ("Rewards while training", _reward_curves),
        ("Held-out evaluation while training", _eval_curves),
        ("Policy", _policy_curves),
        ("Ratio and clip fraction by step", _by_step),
        ("Time and calls", _cost),
        ("Pictures", _pictures),
        ("Configuration", _configs),
    ]
    return page(title, _facts(runs), [(name, make(runs)) for name, make in sections])


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """Build a whole page from HTML: what stands below the title, then sections of heading and content."""
    body = "".join(f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{charts.STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{lead}{body}</main></body></html>\n"
    )


def escape(value: object) -> str:
    """Make text safe inside elements and attributes."""
    return html.escape(str(value), quote=True)


def note(text: str) -> str:
    """Set a remark in small grey type."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Lay out cells that are HTML already; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{text}</td>" for text in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _swatch(run: RunFiles) -> str:
    return f'<span class="swatch" style="background:{run.color}"></span>{escape(run.label)}'


def _facts(runs: Sequence[RunFiles]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    head = ["", *(_swatch(run) for run in runs)] if len(runs) > 1 else []
    rows = [[escape(name), *(escape(_flat(run.facts.get(name, "-"))) for run in runs)] for name in names]
    done = [f"{len(run.metrics)}" for run in runs]
    return table(head, [*rows, ["iterations recorded", *done]], "facts")


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _headline(runs: Sequence[RunFiles]) -> str:
    judged = [(run, run.evaluation) for run in runs if run.evaluation and any(run.evaluation.get(s) for s in _SIDES)]
    if not judged:
        return note("No evaluation yet: run `flowrl eval` on this run, then `flowrl report` again.")
    lines: dict[tuple[str, ...], str] = {}  # by path, so that runs share their rows
    head = [""]
    for run, summary in judged:
        side = next(name for name in reversed(_SIDES) if summary.get(name))
        lines |= {path: label for label, path in table_lines({"dense_reward": "score"} | summary, side)}
        first = f"{_swatch(run)}<br>base" if len(runs) > 1 else "base"
        head += [first, "tuned", "change"]
    rows = []
    for path, label in lines.items():
        row = [
            escape(label.strip()) if path[:1] != ("by_tag",) else f'<span class="tag">{escape(label.strip())}</span>'
        ]
        for _, summary in judged:
            row += [_interval(summary.get(side), path, signed=side == "difference") for side in _SIDES]
        rows.append(row)
    level = 100 * float(judged[0][1].get("level", 0.95))
    counts = [f"{summary['difference']['pictures']:,}" for _, summary in judged if summary.get("difference")]
    pairs = f"{', '.join(counts)} paired pictures, same prompts and noise on both sides; " if counts else ""
    legend = f"{pairs}brackets: {level:g}% bootstrap intervals over prompts; strict changes in percentage points."
    return table(head, rows, "result" if len(judged) == 1 else "result many") + note(legend)


_SIDES = ("base", "tuned", "difference")


def _interval(block: Mapping[str, Any] | None, path: Sequence[str], *, signed: bool) -> str:
    if not block:
        return "-" if path else ""
    text = cell(block, path, signed=signed)
    mean, _, rest = text.partition(" ")
    kind = ""
    if signed and rest.startswith("["):
        low, high = (float(part) for part in rest.strip("[]").split(", "))
        kind = ' class="better"' if low > 0 else ' class="worse"' if high < 0 else ""
    return f'<b{kind}>{escape(mean)}</b> <span class="quiet">{escape(rest)}</span>'


def _warnings(runs: Sequence[RunFiles]) -> str:
    items = [
        f"<li>{escape(f'{run.label}: ' if len(runs) > 1 else '')}{escape(text)}</li>"
        for run in runs
        for text in run.warnings
    ]
    return f'<ul class="warnings">{"".join(items)}</ul>' if items else note("None.")


# -------------------------------------------------------------------------------------------------------------- curves


def _series(run: RunFiles, key: str, *, smooth: bool) -> Series:
    """One line of a run: with its own interval where the rows have one, else smoothed on request."""
    x = [number(row.get("iteration")) or 0.0 for row in run.metrics]
    y = run.column(key)
    low, high, points = run.column(f"{key}_low"), run.column(f"{key}_high"), None
    kept = [index for index, value in enumerate(y) if value is not None and math.isfinite(value)]
    if any(value is not None for value in low):
        smooth = False
    elif smooth and len(kept) >= 2 * WINDOW:
        points, (y, low, high) = y, moving(y)
    kept = [index for index in kept if y[index] is not None]
    kept = [kept[index] for index in range(0, len(kept), math.ceil(len(kept) / MAX_POINTS))] if kept else []

    def take(column: Sequence[float | None] | None) -> list[float | None] | None:
        return None if column is None else [column[index] for index in kept]

    return Series(
        run.label, [x[index] for index in kept], take(y) or [], take(low), take(high), take(points),
        dots=len(kept) <= 30 and points is None, color=run.color,
    )  # fmt: skip


def moving(values: Sequence[float | None]) -> tuple[list[float | None], list[float | None], list[float | None]]:
    """Return the centred mean over WINDOW iterations, and that mean less and plus two standard errors."""
    mean: list[float | None] = []
    error: list[float] = []
    for index in range(len(values)):
        near = [
            v
            for v in values[max(0, index - WINDOW // 2) : index + WINDOW // 2 + 1]
            if v is not None and math.isfinite(v)
        ]
        mean.append(plain.fmean(near) if near else None)
        error.append(2 * plain.stdev(near) / math.sqrt(len(near)) if len(near) > 1 else 0.0)
    low = [None if m is None else m - e for m, e in zip(mean, error, strict=True)]
    high = [None if m is None else m + e for m, e in zip(mean, error, strict=True)]
    return mean, low, high


_FRACTIONS = ("strict", "clip_fraction", "live_fraction")


def _chart(
    runs: Sequence[RunFiles], key: str, title: str, *, smooth: bool = False, reference: float | None = None
) -> str:
    series = [_series(run, key, smooth=smooth) for run in runs if key in run.keys]
    return charts.line_chart(series, title=title, percent=key.split("/")[-1] in _FRACTIONS, reference=reference)


def _all_keys(runs: Sequence[RunFiles]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.keys))


def _is_bound(key: str) -> bool:
    return key.endswith(("_low", "_high"))


def figure(drawn: Sequence[str], missing: str, legend: str = "") -> str:
    """Set charts side by side over their legend, or say what is missing."""
    return f'<div class="charts">{"".join(drawn)}</div>{note(legend) if legend else ""}' if drawn else note(missing)


def _reward_curves(runs: Sequence[RunFiles]) -> str:
    keys = [key for key in _all_keys(runs) if key.startswith("reward/") and key.split("/")[-1] in ("mean", "strict")]
    keys = [key for key in ("score/mean",) if key in _all_keys(runs)] + keys
    drawn = [_chart(runs, key, key, smooth=True) for key in keys]
    legend = (
        f"Dots: one iteration each. Line: mean over {WINDOW} iterations; band: two standard errors of that mean, "
        "from the spread between iterations. A run too short for this shows its values."
    )
    return figure(drawn, "No reward in metrics.jsonl yet.", legend)


def _eval_curves(runs: Sequence[RunFiles]) -> str:
    keys = [key for key in _all_keys(runs) if key.startswith(("eval/", "gold/")) and not _is_bound(key)]
    drawn = [_chart(runs, key, key) for key in keys]
    missing = "No evaluation during training (evaluation.every is 0, or none was due yet)."
    return figure(drawn, missing, "Bands: the intervals recorded with each evaluation.")


def _policy_curves(runs: Sequence[RunFiles]) -> str:
    levels = {"policy/ratio_mean": 1.0}
    wanted = ("policy/kl", "policy/ratio_mean", "policy/clip_fraction", "group/live_fraction", "grad_norm", "lr")
    names = {
        "policy/kl": "KL to the reference", "policy/ratio_mean": "mean ratio", "policy/clip_fraction": "clip fraction",
        "group/live_fraction": "groups with a signal", "grad_norm": "gradient norm", "lr": "learning rate",
    }  # fmt: skip
    have = _all_keys(runs)
    drawn = [_chart(runs, key, names[key], reference=levels.get(key)) for key in wanted if key in have]
    return figure(drawn, "No policy figures in metrics.jsonl yet.")


def _by_step(runs: Sequence[RunFiles]) -> str:
    parts = []
    for key, name, level in (("policy/ratio_mean", "ratio", 1.0), ("policy/clip_fraction", "clipped", None)):
        steps = sorted({int(k.rpartition("_")[2]) for k in _all_keys(runs) if _step_of(k, key)})
        panels = [
            (f"{name}, step {step}",
             [_series(run, f"{key}/step_{step}", smooth=False) for run in runs if f"{key}/step_{step}" in run.keys])
            for step in steps
        ]  # fmt: skip
        if panels:
            drawn = charts.small_multiples(panels, percent=name == "clipped", reference=level)
            parts.append(f'<div class="charts">{drawn}</div>')
    return "".join(parts) or note("No figures by step in metrics.jsonl yet.")


def _step_of(key: str, prefix: str) -> bool:
    return key.startswith(f"{prefix}/step_") and key.rpartition("_")[2].isdigit()


# ----------------------------------------------------------------------------------------------- cost, pictures, config


def _cost(runs: Sequence[RunFiles]) -> str:
    parts = []
    for run in runs:
        times = {key: _mean(run.column(key)) for key in run.keys if key.startswith("time/")}
        whole = times.pop("time/iteration_s", None)
        shares = [(key.removeprefix("time/").removesuffix("_s"), value) for key, value in times.items()]
        if shares:
            title = f"{run.label}: seconds an iteration" + (f", {whole:.3g} in all" if whole else "")
            parts.append(charts.stacked_bar(shares, title=title))
    keys = [key for key in _all_keys(runs) if key.startswith(("calls/", "memory/"))]
    if keys:
        head = ["mean an iteration", *(_swatch(run) for run in runs)]
        rows = [[escape(key), *(_amount(run, key) for run in runs)] for key in keys]
        parts.append(table(head, rows))
    return "".join(parts) or note("No times in metrics.jsonl yet.")


def _mean(values: Sequence[float | None]) -> float:
    there = [value for value in values if value is not None and math.isfinite(value)]
    return plain.fmean(there) if there else 0.0


def _amount(run: RunFiles, key: str) -> str:
    return f"{_mean(run.column(key)):,.1f}" if key in run.keys else "-"


def _pictures(runs: Sequence[RunFiles]) -> str:
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{_swatch(run)}</h3>")
        if not run.grids:
            parts.append(note("No grids yet: `flowrl eval` writes them."))
        for index, file in enumerate(run.grids):
            title = escape(GRIDS.get(file.name, file.stem))
            picture = f'<img src="{embed(file)}" alt="{title}">'
            state = " open" if index == 0 else ""
            parts.append(f"<details{state}><summary>{title}</summary>{picture}</details>")
    return "".join(parts)


def embed(file: Path) -> str:
    """Write a PNG as a data address; a large one becomes WebP."""
    data, kind = file.read_bytes(), "png"
    if len(data) > MAX_PNG:
        from PIL import Image

        with Image.open(file) as image, io.BytesIO() as buffer:
            image.convert("RGB").save(buffer, "WEBP", quality=88)
            data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _configs(runs: Sequence[RunFiles]) -> str:
    parts = []
    for run in runs:
        text = f"<pre>{escape(run.config)}</pre>" if run.config is not None else note("config.yaml is missing.")
        settings = (run.evaluation or {}).get("settings")
        if settings is not None:
            text += (
                f"<h3>Evaluation settings</h3><pre>{escape(json.dumps(settings, indent=2, ensure_ascii=False))}</pre>"
            )
        parts.append(f"<details><summary>{_swatch(run)}</summary>{text}</details>")
    return "".join(parts)


_STYLE = """
body { margin: 0; background: #fff; color: #1f2328; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-top: 12px; border-top: 1px solid #d0d7de; }
h3 { font-size: 15px; margin: 16px 0 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; vertical-align: top; }
thead th { vertical-align: bottom; color: #656d76; font-weight: 500; border-bottom: 1px solid #d0d7de; }
tbody th { font-weight: 500; white-space: nowrap; }
.result td { white-space: nowrap; }
.result tbody tr:nth-child(-n + 2) { font-size: 17px; }
.many tbody tr:nth-child(-n + 2) { font-size: 15px; }
.many td .quiet { display: block; font-size: 12px; }
.facts td { overflow-wrap: anywhere; }
.facts { font-size: 13px; }
.tag { padding-left: 14px; font-weight: 400; }
.note, .quiet { color: #656d76; }
.note { font-size: 13px; margin: 6px 0; }
.better { color: #1a7f37; }
.worse { color: #cf222e; }
.warnings { margin: 0; padding-left: 20px; }
.swatch { display: inline-block; width: 10px; height: 10px; margin-right: 6px; }
.charts { display: flex; flex-wrap: wrap; gap: 12px 24px; }
details { margin: 8px 0; }
summary { cursor: pointer; }
img { display: block; max-width: 100%; margin: 10px 0; border: 1px solid #d0d7de; }
pre { background: #f6f8fa; padding: 12px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; }
"""
