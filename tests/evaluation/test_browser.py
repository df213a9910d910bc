"""The report in a real browser: it opens without complaint, and nothing sticks out of the page, on a desk or a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowrl.evaluation.group_view import group_view
from flowrl.evaluation.previews import preview_strip
from flowrl.evaluation.report import write_report
from tests.evaluation.test_report import make_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
PHONE, DESK = 390, 1280
MEASURE = """
<script>
addEventListener("load", () => {
  const page = frame.contentDocument, root = page.documentElement;
  for (const folded of page.querySelectorAll("details")) folded.open = true;
  const scrolls = node => node && (["auto", "scroll"].includes(getComputedStyle(node).overflowX) || scrolls(node.parentElement));
  const out = [...page.querySelectorAll("body *")].filter(
    node => node.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(node));
  document.title = JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight, images: page.images.length,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
    out: out.slice(0, 5).map(node => node.tagName + "." + node.className + ": " + node.textContent.slice(0, 60)),
    policy: page.querySelectorAll("script").length,
  });
});
</script>
"""

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH (Debian: apt-get install chromium)"
)


def browse(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the browser without a window, with a profile of its own."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--hide-scrollbars", "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def complaints(finished: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page's console says; the browser's own remarks on its surroundings are not the page's."""
    return [line for line in finished.stderr.splitlines() if ":CONSOLE:" in line or "Refused to" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs side by side, with every kind of picture."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [
        make_run(folder / name, config="key: " + "a long value " * 30) for name in ("one", "a_run_with_a_longer_name")
    ]
    images = np.random.default_rng(0).integers(0, 255, (8, 36, 36, 3), np.uint8)
    pictures = runs[0] / "pictures"
    pictures.mkdir()
    group_view(images, np.linspace(0, 1, 8).tolist(), np.linspace(-1, 1, 8).tolist(), "p").save(
        pictures / "group-000001.png"
    )
    times, credit = np.linspace(1, 0.1, 8).tolist(), [None, 0.5, -0.5, *[None] * 5]
    preview_strip(images, times, credit, "p").save(pictures / "steps-000001.png")
    return write_report(runs, folder / "report.html")


def measured(report: Path, width: int) -> dict[str, object]:
    """Sizes of the page in a frame of ``width`` pixels (a window has a least width of its own), read from a copy.

    The copy allows the measuring page to look into it: it is that page's own frame, not another address.
    """
    wrapper = report.parent / f"frame-{width}.html"
    frame = (
        f'<iframe id="frame" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(report.read_text())}">'
    )
    wrapper.write_text(f"<!DOCTYPE html><title></title><body style='margin:0'>{frame}</iframe>{MEASURE}")
    finished = browse(report.parent, "--virtual-time-budget=10000", "--dump-dom", wrapper.as_uri())
    found = re.search(r"<title>(\{.*?\})</title>", finished.stdout)
    assert found is not None, finished.stderr[-2000:]
    result: dict[str, object] = json.loads(html.unescape(found[1]))
    return result


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_sticks_out(report: Path, width: int) -> None:
    found = measured(report, width)
    assert found["width"] == width
    assert found["out"] == [] and found["scroll"] == width
    assert found["broken"] == 0 and found["images"] == 8 and found["policy"] == 0


def test_the_measure_sees_what_sticks_out(report: Path) -> None:
    """The test above can fail: a line that is too wide is found."""
    bad = report.parent / "bad" / "report.html"
    bad.parent.mkdir()
    bad.write_text(report.read_text().replace("<main>", '<main><div style="width:700px">wide</div>'))
    found = measured(bad, PHONE)
    assert found["out"] == ["DIV.: wide"] and found["scroll"] == 712


def test_the_console_is_silent_and_the_page_is_drawn(report: Path) -> None:
    picture = report.parent / "page.png"
    finished = browse(report.parent, f"--window-size={DESK},2000", f"--screenshot={picture}", report.as_uri())
    assert complaints(finished) == []
    with Image.open(picture) as shown:
        assert shown.size == (DESK, 2000)
        pixels = np.asarray(shown.convert("RGB"))
    assert (pixels < 128).any(-1).mean() > 0.01 and (pixels == 255).all(-1).mean() > 0.3  # ink on paper


def test_complaints_are_heard(tmp_path: Path) -> None:
    """The test above can fail: a script that the page's own policy refuses is reported."""
    page = tmp_path / "bad.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    page.write_text(f"<!DOCTYPE html>{policy}<script>1</script><p>x</p>")
    assert complaints(browse(tmp_path, f"--screenshot={tmp_path / 'a.png'}", page.as_uri()))
