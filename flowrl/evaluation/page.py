"""The parts of a self-contained page: no script, no address outside the file, readable on a phone. Text is escaped."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from flowrl.evaluation import charts
from flowrl.evaluation.run_files import RunFiles

MAX_PNG = 1_000_000  # bytes; larger pictures are embedded as WebP
_MAX_WEBP = 16383  # pixels a side that the format holds


def save(target: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, target)


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
    """Lay out cells that are HTML already; the first cell of a row is its heading. A wide table scrolls in its own box."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{text}</td>" for text in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def swatch(run: RunFiles) -> str:
    """A run's name beside its colour."""
    return f'<span class="swatch" style="background:{run.color}"></span>{escape(run.label)}'


def named(runs: Sequence[RunFiles], run: RunFiles) -> str:
    """A heading for one run's part of a section; nothing where it is the only run."""
    return f"<h3>{swatch(run)}</h3>" if len(runs) > 1 else ""


def figure(drawn: Sequence[str], missing: str, legend: str = "") -> str:
    """Set charts side by side over their legend, or say what is missing."""
    return f'<div class="charts">{"".join(drawn)}</div>{note(legend) if legend else ""}' if drawn else note(missing)


def picture(file: Path, title: str) -> str:
    """A picture of a file; on a phone a wide one scrolls in its own box."""
    return f'<div class="picture"><img src="{embed(file)}" alt="{escape(title)}"></div>'


def embed(file: Path) -> str:
    """Write a PNG or WebP as a data address; a large PNG becomes WebP."""
    data, kind = file.read_bytes(), "webp" if file.suffix == ".webp" else "png"
    if kind == "png" and len(data) > MAX_PNG:
        from PIL import Image

        with Image.open(file) as image, io.BytesIO() as buffer:
            if max(image.size) <= _MAX_WEBP:
                image.convert("RGB").save(buffer, "WEBP", quality=88)
                data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


_STYLE = """
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: #1f2328; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-top: 12px; border-top: 1px solid #d0d7de; }
h3 { font-size: 15px; margin: 16px 0 6px; overflow-wrap: anywhere; }
p, li, summary { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 18px 4px 0; vertical-align: top; }
thead th { vertical-align: bottom; color: #656d76; font-weight: 500; border-bottom: 1px solid #d0d7de; }
tbody th { font-weight: 500; white-space: nowrap; }
.result td, .numbers td { white-space: nowrap; }
.result tbody tr:nth-child(-n + 2) { font-size: 17px; }
.many tbody tr:nth-child(-n + 2) { font-size: 15px; }
.many td .quiet { display: block; font-size: 12px; }
.facts td { overflow-wrap: anywhere; }
.facts { font-size: 13px; }
.text { font-size: 13px; }
.text th, .text td { white-space: normal; overflow-wrap: anywhere; min-width: 70px; max-width: 420px; }
.tag { padding-left: 14px; font-weight: 400; }
.note, .quiet { color: #656d76; }
.note { font-size: 13px; margin: 6px 0; }
.better { color: #1a7f37; }
.worse { color: #cf222e; }
.warnings { margin: 0; padding-left: 20px; }
.swatch { display: inline-block; width: 10px; height: 10px; margin-right: 6px; }
.charts { display: flex; flex-wrap: wrap; gap: 12px 24px; }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 4px 0; }
.picture { overflow-x: auto; margin: 10px 0; }
img { display: block; max-width: 100%; height: auto; border: 1px solid #d0d7de; box-sizing: border-box; }
pre { background: #f6f8fa; padding: 12px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; }
@media (max-width: 600px) {
main { padding: 16px 12px 40px; }
h1 { font-size: 20px; }
.facts tbody th { white-space: normal; }
.facts th, .facts td { padding-right: 10px; }
.picture img { max-width: 240%; }
.bar svg { max-width: none; width: 640px; }
.small { gap: 8px; }
.small svg { max-width: calc(50% - 4px); }
}
"""
