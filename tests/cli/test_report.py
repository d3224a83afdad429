"""`curvcert report`: a page that needs nothing but itself, true to the records, readable in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from certify_cli.output import plots
from certify_cli.output.numbers import DOWN, number
from certify_cli.output.read import read_document
from certify_cli.records import Sample
from tests.cli.conftest import Outcome
from tests.records import sample, save_records

Curvcert = Callable[..., Outcome]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SAMPLES = [
    sample(k, label=k % 3 if k % 7 else 1, radius=0.1 + 0.01 * k, attack_radius=0.5 + 0.01 * k, attack_kind="search")
    for k in range(20)
]
NOT_WITNESSED = [sample(20, radius=None), sample(21, label=None, radius=0.3)]


@pytest.fixture
def records(tmp_path: Path) -> str:
    return save_records(tmp_path / "old.json", SAMPLES)


def witnesses(path: Path, samples: list[Sample], shape: tuple[int, ...] = (1, 4, 5)) -> str:
    attacked = [s for s in samples if s.attack_radius is not None]
    x = np.full((len(attacked), *shape), 0.5)
    d = np.zeros_like(x)
    d.reshape(len(attacked), -1)[:, 0] = [s.attack_radius for s in attacked]
    np.savez(path, index=np.array([s.index for s in attacked]), x=x, d=d)
    return str(path)


class Links(HTMLParser):
    """Every attribute that names another resource, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]


def test_a_page_needs_nothing_but_itself(curvcert: Curvcert, records: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    other = save_records(tmp_path / "new.json", [*SAMPLES[:15], *NOT_WITNESSED])
    archive = witnesses(tmp_path / "w.npz", SAMPLES)
    done = curvcert("report", records, other, "-o", page, "--witnesses", archive, "--title", "A & B <1>")
    assert (done.code, done.out) == (0, "")
    text = page.read_text(encoding="utf-8")
    found = Links()
    found.feed(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in found.links)
    assert "script" not in found.tags
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert "<title>A &amp; B &lt;1&gt;</title>" in text
    assert found.tags.count("img") == 3 * 12
    assert found.tags.count("svg") == 4
    assert "two.onnx, auto, normal" in text  # what sets two runs of one model apart, or their number
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(set(ids)) == len(ids)
    for reference in re.findall(r'(?:url\(#|href="#)([^")]*)', text):
        assert reference in ids


def test_the_figures_are_those_of_the_summaries(curvcert: Curvcert, records: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert curvcert("report", records, "-o", page).code == 0
    text = re.sub(r"<[^>]*>", " ", page.read_text(encoding="utf-8"))
    summary = json.loads(Path(records).read_text())["summary"]
    assert number(summary["mean_certified_radius"], DOWN) in text
    assert "sha256" in text
    assert "abab" * 16 in text


def test_plots_are_well_formed_and_themed(records: str) -> None:
    results = [read_document(records)] * 2
    for plot in plots.PLOTS:
        assert plot.fits(results)
        text = plots.inline(plot, results)
        ElementTree.fromstring(text.replace("xlink:", ""))
        colours = set(re.findall(r"#[0-9a-f]{6}\b", text))
        assert not colours & set(plots.LIGHT.values())
        assert colours <= {"#ffffff", "#000000"}, colours
        assert "var(--ink)" in text
        assert text == plots.inline(plot, results)
    assert plots.LIGHT.keys() == plots.DARK.keys()


def contrast(first: str, second: str) -> float:
    """By WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK], ids=["light", "dark"])
def test_colours_can_be_told_from_the_paper(theme: dict[str, str]) -> None:
    assert contrast(theme["ink"], theme["paper"]) > 7
    for k in range(plots.MOST_RUNS):
        assert contrast(theme[f"run{k}"], theme["paper"]) > 4.5


def test_plots_as_files(curvcert: Curvcert, records: str, tmp_path: Path) -> None:
    assert curvcert("report", records, "--svg", tmp_path / "a", "--png", tmp_path / "b" / "c").code == 0
    names = {plot.name for plot in plots.PLOTS}
    assert {path.stem for path in (tmp_path / "a").glob("*.svg")} == names
    assert {path.stem for path in (tmp_path / "b" / "c").glob("*.png")} == names
    for path in (tmp_path / "a").iterdir():
        ElementTree.parse(path)


def test_runs_that_have_no_attack_or_labels(curvcert: Curvcert, tmp_path: Path) -> None:
    plain = [sample(k, label=None, radius=0.1, attack_radius=None, attack_kind=None) for k in range(3)]
    page = tmp_path / "report.html"
    assert curvcert("report", save_records(tmp_path / "a.json", plain), "-o", page).code == 0
    assert page.read_text().count("<svg") == 2
    nothing = [sample(k, radius=None, attack_radius=None, attack_kind=None) for k in range(3)]
    assert curvcert("report", save_records(tmp_path / "b.json", nothing), "-o", page).code == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[:-1], "other samples"),
        (lambda s: [*s[:-1], sample(99, attack_radius=0.7)], "other samples"),
        (lambda s: [*s[:-1], sample(19, attack_radius=0.7)], "sample 19 has another witness"),
    ],
)
def test_witnesses_of_another_run_are_refused(
    curvcert: Curvcert, tmp_path: Path, change: Callable[[list[Sample]], list[Sample]], words: str
) -> None:
    nineteen = [*SAMPLES[:-1], sample(19, radius=0.01, attack_radius=0.5)]
    records = save_records(tmp_path / "a.json", nineteen)
    archive = witnesses(tmp_path / "w.npz", change(nineteen))
    done = curvcert("report", records, "--witnesses", archive, "-o", tmp_path / "r.html")
    assert done.code == 3
    assert words in done.last
    assert not (tmp_path / "r.html").exists()


def test_what_is_wrong_is_said(curvcert: Curvcert, records: str, tmp_path: Path) -> None:
    assert "-o report.html" in curvcert("report", records).last
    done = curvcert("report", *[records] * 7, "-o", tmp_path / "r.html")
    assert (done.code, "at most 6 runs" in done.last) == (2, True)
    done = curvcert("report", records, "--witnesses", records, "-o", tmp_path / "r.html")
    assert (done.code, "not an .npz file" in done.last) == (3, True)
    flat = witnesses(tmp_path / "flat.npz", SAMPLES, shape=(20,))
    done = curvcert("report", records, "--witnesses", flat, "-o", tmp_path / "r.html")
    assert (done.code, "no images" in done.err) == (0, True)
    other = save_records(tmp_path / "other.json", SAMPLES, sha256="ef" * 32)
    done = curvcert("report", records, other, "-o", tmp_path / "r.html")
    assert (done.code, "not about the same data" in done.err) == (0, True)
    assert "not about the same data" not in curvcert("report", records, records, "-o", tmp_path / "r.html").err


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    path = save_records(tmp_path / "a.json", SAMPLES)
    text = Path(path).read_text().replace("two.onnx", "_m$_$x.onnx").replace('"dog"', '"a$\\\\frac{$"')
    Path(path).write_text(text)
    for plot in plots.PLOTS:
        assert "_m$_$x.onnx" in plots.inline(plot, [read_document(path)] * 2)


def test_without_matplotlib_it_says_what_to_install(records: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from certify_cli.cli.app import main; "
        f"sys.exit(main(['report', {records!r}, '-o', {str(tmp_path / 'r.html')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "curvcert[report]" in done.stderr) == (2, True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [500, 1280])
def test_in_a_browser_nothing_runs_over(
    curvcert: Curvcert, records: str, tmp_path: Path, width: int, dark: bool
) -> None:
    """Headless Chromium lays the page out: as wide as the window, every drawing and picture with a size, and the ink
    that of the theme."""
    page = tmp_path / "report.html"
    archive = witnesses(tmp_path / "w.npz", SAMPLES)
    assert curvcert("report", records, records, "-o", page, "--witnesses", archive).code == 0
    probe = """<script>
      const sizes = [...document.querySelectorAll("svg, img")].map(e => e.getBoundingClientRect());
      document.title = JSON.stringify({
        over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        smallest: Math.min(...sizes.map(r => Math.min(r.width, r.height))),
        widest: Math.max(...sizes.map(r => r.right)),
        inner: document.documentElement.clientWidth,
        ink: getComputedStyle(document.body).color,
        line: getComputedStyle(document.querySelector("svg [style*='--run0']")).stroke,
      });</script></body>"""
    text = page.read_text(encoding="utf-8").replace("</body>", probe)
    if dark:  # as a browser in dark mode reads it
        text = text.replace("@media (prefers-color-scheme: dark)", "@media all")
    page.write_text(text, encoding="utf-8")
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])  # type: ignore[index]
    assert found["over"] <= 0
    assert found["widest"] <= found["inner"]
    assert found["smallest"] > 40
    theme = plots.DARK if dark else plots.LIGHT
    assert found["ink"] == rgb(theme["ink"])
    assert found["line"] == rgb(theme["run0"])


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[k : k + 2], 16)) for k in (1, 3, 5))})"
