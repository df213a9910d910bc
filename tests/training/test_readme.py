"""README's own loop runs as printed and raises its reward; its other Python blocks at least parse."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def loop() -> str:
    return README.split("<!-- loop: this block is a test -->")[1].split("```python\n")[1].split("```")[0]


def test_the_loop_learns() -> None:
    namespace: dict = {}
    exec(compile(loop(), "README.md", "exec"), namespace)
    scores = namespace["scores"]
    assert len(scores) == 6
    assert max(scores[-2:]) > scores[0] + 0.002


def test_the_loop_fits_a_screen() -> None:
    assert len(loop().strip().splitlines()) <= 40


def test_other_blocks_parse() -> None:
    assert len(BLOCKS) >= 3
    for block in BLOCKS:
        compile(block, "README.md", "exec")


def test_the_reward_of_readme_is_a_reward(tmp_path: Path) -> None:
    from flowrl.scoring.probe import probe

    source = next(block for block in BLOCKS if "def redness" in block)
    (tmp_path / "my_reward.py").write_text(source)
    assert "redness" in probe(f"{tmp_path / 'my_reward.py'}:redness", {})
