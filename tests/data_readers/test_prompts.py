"""Prompt files are read whole and unchanged; what is not a prompt is an error that names file, line and remedy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from flowrl.data.prompts import MAX_LINE, read_prompts
from flowrl.errors import UserError

DATA = Path(__file__).parents[1] / "data"
CIRCLE = {"class": "circle", "count": 1}
GOOD = {"tag": "t", "include": [CIRCLE], "prompt": "a circle"}


def write(folder: Path, content: bytes | str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def row(**changes: object) -> str:
    return json.dumps(GOOD | changes)


def test_the_geneval_file_is_read_whole() -> None:
    rows = read_prompts(DATA / "geneval_test_metadata.jsonl", "geneval")
    assert [r.prompt_id for r in rows] == list(range(2212))
    assert Counter(r.metadata["tag"] for r in rows) == {
        "color_attr": 400, "position": 400, "two_object": 396, "colors": 376, "counting": 320, "single_object": 320,
    }  # fmt: skip
    assert set(Counter(r.prompt for r in rows).values()) == {4} and len({r.prompt for r in rows}) == 553
    original = [json.loads(line) for line in (DATA / "geneval_test_metadata.jsonl").read_text("utf-8").split("\n")]
    assert [{**r.metadata, "prompt": r.prompt} for r in rows] == original


def test_the_ocr_file_is_read_whole() -> None:
    rows = read_prompts(DATA / "ocr_test.txt", "ocr")
    assert len(rows) == 1018
    assert rows[0].metadata == {"target": "Spring Collection 2024"}
    assert all(r.prompt.count('"') == 2 and f'"{r.metadata["target"]}"' in r.prompt for r in rows)
    assert [r.prompt for r in rows] == (DATA / "ocr_test.txt").read_text("utf-8").split("\n")


def test_auto_goes_by_the_suffix() -> None:
    assert read_prompts(DATA / "ocr_test.txt")[0].metadata == {}
    assert read_prompts(DATA / "geneval_test_metadata.jsonl")[0].metadata["tag"] == "counting"


def test_lines_keep_commas_quotes_and_unicode_and_lose_outer_spaces(tmp_path: Path) -> None:
    path = write(tmp_path, '  a, "b"\t\nein Bär\u2028hier\nlast')
    assert [(r.prompt, r.prompt_id) for r in read_prompts(path)] == [
        ('a, "b"', 0),
        ("ein Bär\u2028hier", 1),
        ("last", 2),
    ]


@pytest.mark.parametrize("content", [b"a\nb", b"a\nb\n", b"a\r\nb\r\n", b"\xef\xbb\xbfa\nb\n"])
def test_byte_order_mark_line_ends_and_last_newline_do_not_matter(tmp_path: Path, content: bytes) -> None:
    assert [r.prompt for r in read_prompts(write(tmp_path, content))] == ["a", "b"]


def test_a_line_at_the_limit_is_read(tmp_path: Path) -> None:
    assert len(read_prompts(write(tmp_path, "x" * MAX_LINE))[0].prompt) == MAX_LINE


def test_other_keys_of_a_jsonl_row_become_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": " a cat ", "target": "x", "n": {"k": [1, null]}}\n{"prompt": "b"}\n', "p.jsonl")
    rows = read_prompts(path)
    assert rows[0].prompt == " a cat " and rows[0].metadata == {"target": "x", "n": {"k": [1, None]}}
    assert rows[1].metadata == {}


BAD_TEXT = [
    (b"", "{path}: the prompt file is empty; give it at least one prompt"),
    (b"\xef\xbb\xbf", "{path}: the prompt file is empty; give it at least one prompt"),
    (b"\n", "{path}:1: blank line; remove it (prompt ids are rows, so none is skipped)"),
    (b"a\n\nb\n", "{path}:2: blank line; remove it (prompt ids are rows, so none is skipped)"),
    (b"a\n\n", "{path}:2: blank line; remove it (prompt ids are rows, so none is skipped)"),
    (b"a\r\n \t\r\nb", "{path}:2: blank line; remove it (prompt ids are rows, so none is skipped)"),
    (b"ab\nc\x00d", "{path}:2: NUL character at column 2; prompt files are plain text"),
    (b"ab\rcd\n", "{path}:1: carriage return at column 3; end lines with \\n or \\r\\n"),
    (b"x" * 10_001, "{path}:1: line of 10001 characters; the limit is 10000"),
    (
        b"ok\nb\xe4r\n",
        "{path}:2: not UTF-8: byte 0xe4 at offset 4 of the file (invalid continuation byte); save the file as UTF-8",
    ),
    (
        b"\xef\xbb\xbfok\nb\xff",
        "{path}:2: not UTF-8: byte 0xff at offset 7 of the file (invalid start byte); save the file as UTF-8",
    ),
    (
        "a\n".encode("utf-16"),
        "{path}:1: not UTF-8: byte 0xff at offset 0 of the file (invalid start byte); save the file as UTF-8",
    ),
]
BAD_JSONL = [
    ('{"prompt": "a"}\n{"prompt": ', "{path}:2: broken JSON at column 12: Expecting value"),
    ('{"prompt": "a",}', "{path}:1: broken JSON at column 15: Illegal trailing comma before end of object"),
    ('["a"]', "{path}:1: expected a JSON object, got list"),
    ('{"text": "a"}', '{path}:1: key "prompt" is missing'),
    ('{"prompt": null}', '{path}:1: key "prompt" is missing'),
    ('{"prompt": "  "}', "{path}:1: \"prompt\" must be a non-empty text, got '  '"),
    ('{"prompt": 3}', '{path}:1: "prompt" must be a non-empty text, got 3'),
    ('{"prompt": "a", "prompt": "b"}', '{path}:1: key "prompt" stands twice in one JSON object'),
    ('{"prompt": "a", "m": {"k": 1, "k": 2}}', '{path}:1: key "k" stands twice in one JSON object'),
    ('{"prompt": "a", "m": NaN}', "{path}:1: NaN is not JSON; use a number or null"),
    ('{"prompt": "a\\u0000b"}', '{path}:1: "prompt" holds a NUL character; prompts are plain text'),
    ('{"prompt": "\\ud83d"}', "{path}:1: a \\u escape is half a surrogate pair; write the whole character"),
]
CLAUSE_KEYS = "a clause has class, count, color, position"
BAD_GENEVAL = [
    (row(extra=1), 'unknown key "extra"; a GenEval row has tag, include, exclude, prompt (jsonl takes any key)'),
    (row(tag=""), "\"tag\" must be a non-empty text, got ''"),
    (json.dumps({"tag": "t", "prompt": "a"}), 'key "include" is missing'),
    (row(include=[]), '"include" must be a list of at least one clause, got []'),
    (row(include=[3]), "include[0]: a clause must be an object, got 3"),
    (row(include=[CIRCLE, {**CIRCLE, "colour": "red"}]), f'include[1]: unknown key "colour"; {CLAUSE_KEYS}'),
    (row(include=[{"count": 1}]), 'include[0]: "class" must be a non-empty text, got None'),
    (row(include=[{"class": "circle"}]), 'include[0]: "count" must be an integer of at least 1, got None'),
    (row(include=[{**CIRCLE, "count": 0}]), 'include[0]: "count" must be an integer of at least 1, got 0'),
    (row(include=[{**CIRCLE, "count": True}]), 'include[0]: "count" must be an integer of at least 1, got True'),
    (row(include=[{**CIRCLE, "count": 1.0}]), 'include[0]: "count" must be an integer of at least 1, got 1.0'),
    (row(include=[{**CIRCLE, "color": None}]), 'include[0]: "color" must be a non-empty text, got None'),
    (
        row(include=[CIRCLE, {**CIRCLE, "position": "left of"}]),
        "include[1]: \"position\" must be [relation, index], got 'left of'",
    ),
    (
        row(include=[CIRCLE, {**CIRCLE, "position": ["behind", 0]}]),
        "include[1]: \"position\" has relation 'behind'; use one of left of, right of, above, below",
    ),
    (
        row(include=[CIRCLE, {**CIRCLE, "position": ["above", 1]}]),
        'include[1]: "position" must point at another clause (0 to 1, not 1), got 1',
    ),
    (
        row(include=[CIRCLE, {**CIRCLE, "position": ["above", 2]}]),
        'include[1]: "position" must point at another clause (0 to 1, not 1), got 2',
    ),
    (
        row(include=[CIRCLE, {**CIRCLE, "position": ["above", -1]}]),
        'include[1]: "position" must point at another clause (0 to 1, not 1), got -1',
    ),
    (row(exclude={"class": "x"}), "\"exclude\" must be a list of clauses, got {'class': 'x'}"),
    (row(exclude=[{**CIRCLE, "color": "red"}]), 'exclude[0]: unknown key "color"; a clause has class, count'),
]
TWO = 'expected one target in straight double quotes, found {} quote characters (") instead of 2'
BAD_OCR = [
    ("a sign", TWO.format(0)),
    ('a "b" and "c"', TWO.format(4)),
    ("a \u201csign\u201d", TWO.format(0) + ' (curly quotes do not count; write ")'),
    ('a " " b', "the target between the double quotes is empty; write the text that the picture should show"),
    ('a ""', "the target between the double quotes is empty; write the text that the picture should show"),
]


def failure(path: Path, format: str) -> str:
    with pytest.raises(UserError) as caught:
        read_prompts(path, format)
    return str(caught.value)


@pytest.mark.parametrize(("content", "message"), BAD_TEXT)
@pytest.mark.parametrize("format", ["lines", "jsonl", "ocr"])
def test_what_no_format_allows(tmp_path: Path, content: bytes, message: str, format: str) -> None:
    # jsonl and ocr read line 1 only after the whole file passed these checks.
    path = write(tmp_path, content)
    assert failure(path, format) == message.format(path=path)


@pytest.mark.parametrize(("content", "message"), BAD_JSONL)
def test_bad_jsonl(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content, "p.jsonl")
    found, expected = failure(path, "auto"), message.replace("{path}", str(path))
    # The decoder's own words differ between Python versions; file, line and column may not.
    assert found == expected or ("broken JSON" in expected and found.startswith(f"{path}:1: broken JSON at column 1"))


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "[" * 9_999, "p.jsonl")
    assert failure(path, "jsonl").startswith(f"{path}:1: ")


@pytest.mark.parametrize(("content", "message"), BAD_GENEVAL)
def test_bad_geneval(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, row() + "\n" + content + "\n")
    assert failure(path, "geneval") == f"{path}:2: {message}"


@pytest.mark.parametrize(("content", "message"), BAD_OCR)
def test_bad_ocr(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, 'a "good" one\n' + content)
    assert failure(path, "ocr") == f"{path}:2: {message}"


def test_paths_and_formats_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert failure(missing, "auto") == (
        f"{missing}: no such prompt file; check the path (it is relative to where you run)"
    )
    assert failure(tmp_path, "lines") == f"{tmp_path}: is a folder; give a prompt file"
    csv = write(tmp_path, "a", "p.csv")
    assert failure(csv, "auto") == (
        f"{csv}: cannot tell the format from the suffix '.csv' (.txt is lines, .jsonl is jsonl); "
        "name it with format: lines, jsonl, geneval, ocr"
    )
    assert failure(csv, "tsv") == f"{csv}: unknown prompt format 'tsv'; use auto, lines, jsonl, geneval, ocr"
    assert [r.prompt for r in read_prompts(csv, "lines")] == ["a"]
