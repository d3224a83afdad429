"""Any text of a file in every output: each format shows it by its own rules, and none is steered by it."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import xmlschema

from certify_cli.audit.compare import compare
from certify_cli.audit.judge import judge
from certify_cli.audit.policy import Policy
from certify_cli.cli import diff
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import Sink
from certify_cli.output import html, plots, verdict, verified
from certify_cli.output.console import escaped, paragraph
from certify_cli.output.document import View
from certify_cli.output.formats import FORMATS
from certify_cli.records import DataInfo, ModelInfo, Result, summarise
from tests.hostile import TEXTS
from tests.records import SETTINGS, run, sample
from tests.schema import SCHEMAS

HARMLESS = "harmless"
EPS = ("0.1", "0.5")


def result(text: str, factor: float = 1.0) -> Result:
    """A run that says `text` wherever a record holds a text."""
    made = replace(
        run({"data": text, "activation": text}, SETTINGS, 3, [text, f"note: {text}"]),
        tool=text,
        version=text,
        libraries={"torch": text, text: text},
        method=text,
        effort=text,
        attack=text,
        device=text,
        dtype=text,
        started=text,
        model=ModelInfo(text, text, text, 18, 3),
        data=DataInfo(text, 3, "cd" * 32),
        classes=[text, f"{text} of another class", "eel"],
        preprocessing={"mean": None, "std": None, "layout": text, "stored_dtype": text},
    )
    samples = (
        sample(0, radius=0.2 * factor, method=text),
        sample(1, label=1, radius=0.3, attack_kind=text),
        sample(2, radius=None, status="error", reason=text or "-"),
        sample(3, radius=None, reason=f"the layer {text} has no curvature"),
    )
    return Result(made, samples, summarise(samples, EPS, 1.0))


def checked(text: str) -> tuple[Any, Any]:
    found = result(text)
    asked = Policy.of({"accuracy": 0.9, "certified_accuracy": {"0.5": 0.5}, "baseline": text}, text)
    requirements = (*asked.requirements, *asked.against(found))
    return judge(requirements, found.samples, 4, {}), found.run


def looked(text: str) -> Any:
    rows = [verified.Row(0, text, 0.1, "no radius", (text,)), verified.Row(1, None, None, "no radius", ())]
    return verified.Verified(result(text).run, text, text, {"no radius": text}, (text, f"x {text}"), rows, (text,))


GROUPS = [list(TEXTS.values())[k : k + plots.MOST_RUNS] for k in range(0, len(TEXTS), plots.MOST_RUNS)]
"""As many at once as a page shows."""


def page(texts: list[str]) -> str:
    layers = [html.Layers(text, ((f"{text} dense", "1", "2", 50.0),)) for text in texts]
    shown = [html.Witnessed(sample(0), text, text, ("data:image/png;base64,AA",) * 3) for text in texts]
    return html.page([result(text) for text in texts], " ".join(texts), layers, shown)


def listed(form: str) -> Callable[[str, View], str]:
    def render(text: str, view: View) -> str:
        found = result(text)
        return "".join(FORMATS[form].render(iter([found.run, *found.samples, found.summary]), view))

    return render


OUTPUTS: dict[str, Callable[[str, View], str]] = {
    **{form: listed(form) for form in FORMATS},
    **{
        f"check {form}": lambda text, view, r=render: r(*checked(text), view)
        for form, render in verdict.RENDERED.items()
    },
    **{
        f"verify {form}": lambda text, view, r=render: r(looked(text), view)
        for form, render in verified.RENDERED.items()
    },
    **{
        f"diff {form}": lambda text, view, r=render: r(compare(result(text), result(text, 0.5), 0.01), view)
        for form, render in diff.RENDERED.items()
    },
}
VIEWS = (View(), View(width=40, unicode=False))


@pytest.mark.parametrize("form", OUTPUTS)
@pytest.mark.parametrize("name", TEXTS)
def test_every_format(form: str, name: str) -> None:
    text = TEXTS[name]
    for view in VIEWS:
        out = OUTPUTS[form](text, view)
        out.encode("utf-8")
        assert all(line.isprintable() for line in out.split("\n")), form
        if not form.endswith(("json", "jsonl", "csv", "github")):
            assert not re.search(r"^\s*::", out, re.MULTILINE), form
            assert "##[" not in out.replace("##[\\", ""), form
            assert "##vso[" not in out
        RULES[form.rpartition(" ")[2]](out, harmless(form, view))


@lru_cache
def harmless(form: str, view: View) -> str:
    return OUTPUTS[form](HARMLESS, view)


# what the formats' readers make of it


def _csv(out: str, plain: str) -> None:
    rows = list(csv.reader(io.StringIO(out)))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == len(list(csv.reader(io.StringIO(plain))))
    for row in rows[1:]:
        for cell in row:
            assert not cell.lstrip().startswith(("=", "+", "@", "-")) or re.fullmatch(r"-?[0-9.e-]+", cell)


def _github(out: str, plain: str) -> None:
    lines, expected = out.split("\n"), plain.split("\n")
    assert [line.partition(" ")[0] for line in lines] == [line.partition(" ")[0] for line in expected]
    for line in lines[:-1]:
        head, _, message = line[2:].partition("::")
        assert [part.partition("=")[0] for part in head.partition(" ")[2].split(",")] == ["file", "title"]
        assert not re.search(r"%(?!25|0D|0A|3A|2C)", message + head)
        assert len(line) < 10000


def _junit(out: str, plain: str) -> None:
    found, expected = (ElementTree.fromstring(text.partition("\n")[2]) for text in (out, plain))
    assert [e.tag for e in found.iter()] == [e.tag for e in expected.iter()]
    JUNIT.validate(out)


JUNIT = xmlschema.XMLSchema(str(SCHEMAS / "junit-10.xsd"))
SARIF = jsonschema.Draft4Validator(
    json.loads((SCHEMAS / "sarif-2.1.0.json").read_text(encoding="utf-8")), format_checker=jsonschema.FormatChecker()
)


def _sarif(out: str, plain: str) -> None:
    SARIF.validate(json.loads(out))
    found, expected = (json.loads(text)["runs"][0] for text in (out, plain))
    assert len(found["results"]) == len(expected["results"])


def _markdown(out: str, plain: str) -> None:
    """As many lines, of as many cells, and nothing of the text is markup."""
    lines, expected = out.split("\n"), plain.split("\n")
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        cells = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", text)) for text in (line, other)]
        assert cells[0] == cells[1], line
        bare = re.sub(r"\\[\\`*_|<>\[\]#~]|@<!-- -->", "", line.replace(" -> ", ""))
        assert not re.search(r"[`*_<>\[\]~$]|(?<!^)(?<!#)#(?![#0-9])|://|www\.|@", bare), line
        assert bool(re.match(r"\s*([-+=]|[0-9]+[.)])", line)) == bool(re.match(r"\s*([-+=]|[0-9]+[.)])", other)), line
        assert re.match(r"#*", line)[0] == re.match(r"#*", other)[0]  # type: ignore[index]


def _json(out: str, plain: str) -> None:
    assert json.loads(out).keys() == json.loads(plain).keys()
    assert out.isascii()


def _jsonl(out: str, plain: str) -> None:
    assert [json.loads(line)["type"] for line in out.splitlines()] == [
        json.loads(line)["type"] for line in plain.splitlines()
    ]


def _table(out: str, plain: str) -> None:
    assert "\x1b" not in out
    assert max(map(len, out.split("\n"))) < 20_000


RULES: dict[str, Callable[[str, str], None]] = {
    "csv": _csv,
    "github": _github,
    "junit": _junit,
    "sarif": _sarif,
    "markdown": _markdown,
    "json": _json,
    "jsonl": _jsonl,
    "table": _table,
}


class Structure(HTMLParser):
    """Tags with the names of their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"

    def handle_comment(self, data: str) -> None:
        assert "mathdefault" in data  # of our own numbers on the axes, not of names


@pytest.fixture(scope="module")
def plain_page() -> list[Any]:
    return Structure(page([HARMLESS])).tags


@pytest.mark.parametrize("texts", GROUPS, ids=range(len(GROUPS)))
def test_the_page(texts: list[str], plain_page: list[Any]) -> None:
    out = page(texts)
    out.encode("utf-8")
    assert all(line.isprintable() for line in out.split("\n"))
    tags = Structure(out).tags
    assert {tag for tag in tags if tag[0] not in ("path", "use")} == {
        tag for tag in plain_page if tag[0] not in ("path", "use")
    }
    assert sum(tag[0] == "img" for tag in tags) == 3 * len(texts)
    assert not any(attribute.startswith("on") for _, attributes in tags for attribute in attributes)
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", re.sub(r">[^<]*<", "><", out))
    assert all(source.startswith(("data:image/png", "#")) for source in sources), sources


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.name)
@pytest.mark.parametrize("texts", GROUPS, ids=range(len(GROUPS)))
def test_drawings(plot: plots.Plot, texts: list[str]) -> None:
    results = [result(text) for text in (*texts, texts[0])[: plots.MOST_RUNS]]
    out = plots.drawn(plot, results, "svg").decode()
    tree = ElementTree.fromstring(out[out.index("<svg") :])
    kinds = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert not kinds & {"script", "a", "image", "foreignObject"}
    texts = ["".join(element.itertext()) for element in tree.iter() if element.tag.endswith("}text")]
    assert all(len(text.strip()) < 250 for text in texts)
    inside = plots.inline(plot, results)
    again = ElementTree.fromstring(inside.replace("xlink:href", "href"))
    assert ["".join(e.itertext()) for e in again.iter() if e.tag.rpartition("}")[2] == "text"] == texts


# text that Markdown would change


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a_b*c", "a\\_b\\*c"),
        ("@user", "@<!-- -->user"),
        ("$x$", "&#36;x&#36;"),
        ("&lt;", "&amp;lt;"),
        ("https://a.b www.c.d", "https&#58;//a.b www&#46;c.d"),
        ("#12", "\\#12"),
    ],
)
def test_markdown_escapes(text: str, markdown: str) -> None:
    assert escaped(text) == markdown


@pytest.mark.parametrize("text", ["- a", "+ a", "1. a", "12) a", "    code", "\ta", "=== a"])
def test_a_paragraph_is_no_block_of_another_kind(text: str) -> None:
    assert re.match(r"&#[0-9]+;", paragraph(text))


# what is not a format


@pytest.mark.parametrize("name", TEXTS)
def test_notes_and_warnings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXTS[name]
    with Reporter(quiet=False) as reporter:
        reporter.note(text)
        reporter.warning(text)
    lines = capsys.readouterr().err.split("\n")
    assert [line.partition(":")[0] for line in lines] == ["note", "warning", ""]
    assert all(line.isprintable() and len(line) < 2100 for line in lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_notes_above_a_bar_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "dumb")  # no codes around what is said
    with Reporter(quiet=False) as reporter:
        reporter.stage("working")
        for text in TEXTS.values():
            reporter.note(text)
    said = stream.getvalue()
    assert "[red]x[/red]" in said
    assert ":smile:" in said
    assert all(line.isprintable() for line in said.split("\n"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_reader_without_the_letters(encoding: str) -> None:
    for text in TEXTS.values():
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        Sink(stream, View(), terminal=False).write(f"{text}漢é\n")
        assert raw.getvalue().decode(encoding)


def test_witnesses_of_another_shape_are_refused(tmp_path: Any) -> None:
    from certify_cli.data.npz import read_rows
    from certify_cli.errors import DataError

    good = {"index": np.arange(2), "x": np.zeros((2, 1, 2)), "d": np.zeros((2, 1, 2))}
    for changes in (
        {"index": np.zeros((2, 1), int)},
        {"index": np.array(["a", "b"])},
        {"index": np.zeros(2)},
        {"index": np.zeros(3, int)},
        {"x": np.zeros((2, 2))},
        {"d": np.zeros((1, 1, 2))},
        {"d": np.zeros((2, 1, 2), complex)},
        {"d": np.float64(1)},
        {"x": np.zeros((2, 1, 2), "S3")},
    ):
        np.savez(tmp_path / "w.npz", **(good | changes))
        with pytest.raises(DataError, match=r"w\.npz: .*advice"):
            read_rows(tmp_path / "w.npz", ("index", "x", "d"), "advice")
    np.savez(tmp_path / "w.npz", **good)
    assert set(read_rows(tmp_path / "w.npz", ("index", "x", "d"), "advice")) == set(good)
