"""docs/advantage.md runs, and its tables are those of the registry."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from flowrl.methods import methods_markdown

PAGE = Path(__file__).parents[2] / "docs" / "advantage.md"
_TABLE = re.compile(r"<!-- table: ([a-z_ ]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def rewritten(text: str) -> str:
    """The page with its tables made anew."""
    return _TABLE.sub(lambda m: f"<!-- table: {m[1]} -->\n{methods_markdown(m[1].split())}\n<!-- end -->", text)


def test_the_tables_are_those_of_the_registry() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(_TABLE.findall(text)) == 4
    assert rewritten(text) == text, "run: python -m tests.advantage.test_documentation"


def test_the_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    scope: dict[str, object] = {}
    exec(compile(code[1], str(PAGE), "exec"), scope)
    gradient = scope["log_prob"].grad  # type: ignore[attr-defined]
    # 20 of 24 steps count: the row without a value is left out. The one row left in its group has no signal.
    expected = [[-a / 20] * 4 for a in (0.9998, -0.9998, -0.9998, 0.9998, 0.0, 0.0)]
    assert torch.allclose(gradient, torch.tensor(expected), atol=1e-6)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
