"""Prompt files: one prompt a line, jsonl, GenEval metadata, OCR lists. Nothing is skipped and nothing is repaired
silently.

Files are UTF-8. A byte-order mark at the start and a carriage return before a newline are taken off; everything else
that is not a prompt (a blank line, a NUL, an over-long line, a broken row) is an error that names file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowrl.data.geneval import fault
from flowrl.data.pictures import beside
from flowrl.errors import UserError
from flowrl.records import PromptRow

MAX_LINE = 10_000  # characters
SUFFIXES = {".txt": "lines", ".jsonl": "jsonl"}
_BOM = b"\xef\xbb\xbf"


def read_prompts(path: str | Path, format: str = "auto") -> list[PromptRow]:
    """Read a prompt file whole; ``prompt_id`` is the row, counted from 0.

    format: "lines" (one prompt a line, spaces at both ends taken off; commas and quotes are text) | "jsonl" (one JSON
    object a line with "prompt"; its other keys become metadata, "image" and "video" being files beside this one) |
    "geneval" (tag, include, exclude, prompt, nothing else) | "ocr" (lines with exactly one target in straight double
    quotes; metadata {"target": ...}) | "auto" (.txt is lines, .jsonl is jsonl). Raises UserError with file and line.
    """
    name = _format(path, format)
    parse = _PARSERS[name]
    rows: list[PromptRow] = []
    for number, line in enumerate(_lines(Path(path)), start=1):
        try:
            prompt, metadata = parse(line)
            metadata = beside(Path(path), metadata)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        rows.append(PromptRow(prompt, number - 1, metadata))
    return rows


def _format(path: str | Path, format: str) -> str:
    if format in _PARSERS:
        return format
    if format != "auto":
        raise UserError(f"{path}: unknown prompt format {format!r}; use auto, {', '.join(_PARSERS)}")
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"{path}: cannot tell the format from the suffix {suffix!r} (.txt is lines, .jsonl is jsonl); "
            f"name it with format: {', '.join(_PARSERS)}"
        )
    return SUFFIXES[suffix]


def _lines(path: Path) -> list[str]:
    """The lines of a file, checked for what no format allows."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a prompt file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such prompt file; check the path (it is relative to where you run)") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompt file: {error.strerror}") from error
    text = _decode(path, raw)
    if not text:
        raise UserError(f"{path}: the prompt file is empty; give it at least one prompt")
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, start=1):
        problem = _line_fault(line)
        if problem:
            raise UserError(f"{path}:{number}: {problem}")
    return lines


def _decode(path: Path, raw: bytes) -> str:
    body = raw.removeprefix(_BOM)
    skipped = len(raw) - len(body)
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        number = body.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{number}: not UTF-8: byte 0x{body[error.start]:02x} at offset {skipped + error.start} of the file "
            f"({error.reason}); save the file as UTF-8"
        ) from error


def _line_fault(line: str) -> str:
    if "\0" in line:
        return f"NUL character at column {line.index(chr(0)) + 1}; prompt files are plain text"
    if "\r" in line:
        return f"carriage return at column {line.index(chr(13)) + 1}; end lines with \\n or \\r\\n"
    if len(line) > MAX_LINE:
        return f"line of {len(line)} characters; the limit is {MAX_LINE}"
    if not line.strip():
        return "blank line; remove it (prompt ids are rows, so none is skipped)"
    return ""


def _parse_line(line: str) -> tuple[str, dict[str, Any]]:
    return line.strip(), {}


def _parse_ocr(line: str) -> tuple[str, dict[str, Any]]:
    prompt = line.strip()
    quotes = prompt.count('"')
    if quotes != 2:
        curly = ' (curly quotes do not count; write ")' if "\u201c" in prompt or "\u201d" in prompt else ""
        raise ValueError(
            f'expected one target in straight double quotes, found {quotes} quote characters (") instead of 2{curly}'
        )
    target = prompt.split('"')[1]
    if not target.strip():
        raise ValueError("the target between the double quotes is empty; write the text that the picture should show")
    return prompt, {"target": target}


def _parse_jsonl(line: str) -> tuple[str, dict[str, Any]]:
    row = _json_object(line)
    prompt = row.pop("prompt", None)
    if prompt is None:
        raise ValueError('key "prompt" is missing')
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'"prompt" must be a non-empty text, got {prompt!r}')
    if "\0" in prompt:
        raise ValueError('"prompt" holds a NUL character; prompts are plain text')
    return prompt, row


def _parse_geneval(line: str) -> tuple[str, dict[str, Any]]:
    prompt, row = _parse_jsonl(line)
    unknown = [key for key in row if key not in ("tag", "include", "exclude")]
    if unknown:
        raise ValueError(
            f'unknown key "{unknown[0]}"; a GenEval row has tag, include, exclude, prompt (jsonl takes any key)'
        )
    if not isinstance(row.get("tag"), str) or not row["tag"].strip():
        raise ValueError(f'"tag" must be a non-empty text, got {row.get("tag")!r}')
    problem = fault(row)
    if problem:
        raise ValueError(problem)
    return prompt, row


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
        if "\\u" in line:  # an escape can smuggle in half a surrogate pair, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}") from error
    except UnicodeEncodeError as error:
        raise ValueError("a \\u escape is half a surrogate pair; write the whole character") from error
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f'key "{name}" stands twice in one JSON object')
        row[name] = value
    return row


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON; use a number or null")


_PARSERS: dict[str, Callable[[str], tuple[str, dict[str, Any]]]] = {
    "lines": _parse_line,
    "jsonl": _parse_jsonl,
    "geneval": _parse_geneval,
    "ocr": _parse_ocr,
}
