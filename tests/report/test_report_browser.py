"""The report in a real browser: every section, nothing cut off, legible, and no complaint in the console."""

import html
import json
import re
import shutil
import subprocess

import pytest

from sapo_peft.report import write_report
from tests.report.report_runs import make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
POLICY = "default-src 'none'"
SECTIONS = ["comparison", "scores", "tasks", "cost", "notes"]

# A window has a smallest width, a frame has none. The frame tells this page what it found.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><style>body {{ margin: 0 }}</style>
<script>addEventListener("message", e => document.body.dataset.measured = e.data)</script>
<body><iframe src="{name}" style="width: {width}px; height: 1400px; border: 0; display: block"></iframe></body>"""
# Runs in a copy of the page whose policy allows scripts.
MEASURE = """
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const shown = [...document.querySelectorAll("body *")].filter(e => e.getClientRects().length &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) && !["title", "STYLE"].includes(e.tagName));
  // A mixed colour is written as color(srgb 0.5 0.5 0.5).
  const rgb = text => text.match(/[\\d.]+/g).map((v, i) => text.startsWith("color") && i < 3 ? v * 255 : Number(v));
  const light = colour => {
    const parts = rgb(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2];
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (rgb(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = e => {
    const style = getComputedStyle(e), ink = e.ownerSVGElement ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  };
  const size = e => parseFloat(getComputedStyle(e).fontSize) * (e.ownerSVGElement ? e.getScreenCTM().a : 1);
  const outside = [], touching = [];
  for (const svg of document.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [text, b] of texts) if (b.left < box.left - 1 || b.right > box.right + 1) outside.push(text);
    texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 4) touching.push(one + " | " + other);
    }));
  }
  const least = (list, of) =>
    list.reduce((low, e) => of(e) < low[0] ? [of(e), e.outerHTML.slice(0, 90)] : low, [99, ""]);
  parent.postMessage(JSON.stringify({
    window: innerWidth, page: document.documentElement.scrollWidth, outside, touching,
    sections: [...document.querySelectorAll("main > section[id]")].map(s => s.id), texts: shown.length,
    size: least(shown, size), contrast: least(shown, contrast),
    unnamed: [...document.querySelectorAll("svg, [role=region]")].filter(e => !e.getAttribute("aria-label")).length,
  }), "*");
});
"""


def chromium(page, *arguments):
    """(what Chromium writes, its messages about the console) for a page."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
         "--disable-dev-shm-usage", f"--user-data-dir={page.parent / 'profile'}", "--window-size=1280,1400",
         "--dump-dom", *arguments, page.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / "sapo", scorings=16), make_run(folder / "worst", "worst")]
    runs += [make_run(folder / f"original-{seed}", "original", seed) for seed in range(2)]
    return write_report([*runs, make_run(folder / "sapo-1", seed=1)], folder / "report.html")


@pytest.mark.parametrize(("width", "dark", "paper"), [(1280, 1, 0), (400, 0, 0), (680, 1, 1)])
def test_page_as_it_is_shown(page, width, dark, paper):
    """Wide, narrow and dark; and with the rules for paper on A4 less its margins, where nothing can be scrolled."""
    text = page.read_text(encoding="utf-8")
    assert text.count(POLICY) == 1 and text.count("@media print") == 1 and text.count("@media screen") == 1
    if paper:
        text = text.replace("@media screen", "@media not all").replace("@media print", "@media all")
    text = text.replace(POLICY, f"{POLICY}; script-src 'unsafe-inline'")
    copy, frame = page.with_name("measured.html"), page.with_name("frame.html")
    copy.write_text(text.replace("</body>", f"<script>{MEASURE}</script></body>"), encoding="utf-8")
    frame.write_text(FRAME.format(name=copy.name, width=width), encoding="utf-8")
    dom, console = chromium(frame, f"--blink-settings=preferredColorScheme={1 - dark}", "--virtual-time-budget=5000")
    found = json.loads(html.unescape(re.search(r'data-measured="([^"]*)"', dom)[1]))
    assert console == [] and found["sections"] == SECTIONS and found["texts"] > 300
    assert found["window"] == width and found["page"] <= width
    # Paper has small print in tables; charts shrink with their columns.
    assert found["size"][0] >= (10 if paper else 12) - 0.01, found["size"]
    assert found["contrast"][0] >= 4.5, found["contrast"]
    assert found["outside"] == [] and found["touching"] == [] and found["unnamed"] == 0


def test_page_itself_runs_and_loads_nothing(page):
    """The real page under its own policy: silent. The same with a script and a picture: both refused, and seen here."""
    assert chromium(page)[1] == []
    copy = page.with_name("hostile.html")
    added = "<script>document.title='run'</script><img src='file:///etc/hostname' alt=''></body>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", added), encoding="utf-8")
    dom, console = chromium(copy)
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert "<title>run</title>" not in dom
