"""The table: what stands in it, how it is rounded, and that it never cuts a number."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certify_cli.output.console import Column, grid, pairs, printable
from certify_cli.output.document import View
from certify_cli.output.numbers import DOWN, UP, number, seconds, share
from tests.records import records, render, sample

POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@given(POSITIVE)
@settings(max_examples=300, deadline=None)
def test_shown_radii_lie_on_the_safe_side(value: float) -> None:
    down, up = Fraction(number(value, DOWN)), Fraction(number(value, UP))
    assert down <= Fraction(value) <= up
    assert down > 0
    assert up - down <= max(Fraction(1, 10**4), Fraction(value) / 10**3) * Fraction(1001, 1000)


@pytest.mark.parametrize(
    ("value", "down", "up"),
    [
        (0.12349999, "0.1234", "0.1235"),
        (0.5, "0.5000", "0.5000"),
        (1.99999, "1.9999", "2.0000"),
        (0.0009999999, "9.999e-4", "1.000e-3"),
        (1e-7, "9.999e-8", "1.000e-7"),  # the float64 1e-7 lies just below the decimal one
        (12345678.9, "1.234e+7", "1.235e+7"),
        (0.0, "0.0000", "0.0000"),
    ],
)
def test_digits(value: float, down: str, up: str) -> None:
    assert (number(value, DOWN), number(value, UP)) == (down, up)


def test_null_is_a_dash() -> None:
    assert number(None) == share(None, 10) == "-"


@pytest.mark.parametrize("count", [0, 1, 2871, 4312, 9202, 9999, 10_000])
def test_shares_of_ten_thousand_are_exact(count: int) -> None:
    assert share(count / 10_000, 10_000) == f"{count / 100:.2f} %  ({count} of 10000)"


def test_shares_are_exact_fractions_shown_to_nearest() -> None:
    assert share(2 / 3, 3) == "66.67 %  (2 of 3)"
    assert share(1 / 3, 3) == "33.33 %  (1 of 3)"


def test_durations() -> None:
    assert [seconds(t) for t in (0.844, 12.34, 245.2)] == ["0.84 s", "12.3 s", "4 min 05 s"]


@pytest.mark.smoke
def test_rows_say_what_the_records_say() -> None:
    text = render("table", records())
    header, _, first, second, third = text.splitlines()[:5]
    for title in ("index", "label", "prediction", "margin", "certified radius", "attack radius", "method", "note"):
        assert title in header
    assert first.split() == ["3", "cat", "cat", "1.5000", "0.1234", "1.0001", "curvature"]
    assert second.split() == ["4", "dog", "cat", "1.5000", "0.1234", "1.0001", "curvature", "misclassified"]
    assert third.split()[:7] == ["5", "cat", "cat", "1.5000", "-", "-", "-"]
    assert third.endswith("the two largest logits cannot be told apart")


def summary_of(text: str) -> dict[str, str]:
    block = text.split("\n\n")[2]
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in block.splitlines())  # type: ignore[misc]


def test_the_summary_says_what_the_record_says() -> None:
    assert summary_of(render("table", records())) == {
        "samples": "3",
        "not certified": "1",
        "accuracy": "66.67 %  (2 of 3)",
        "mean certified radius, misclassified as 0": "0.0411",  # 0.123456789 / 3 = 0.041152..., rounded down
        "median certified radius, misclassified as 0": "0.0000",
        "mean certified radius, correct samples": "0.0617",
        "certified accuracy at 0.1": "33.33 %  (1 of 3)",
        "certified accuracy at 36/255": "0.00 %  (0 of 3)",
        "accuracy under attack at 0.1": "66.67 %  (2 of 3)",
        "accuracy under attack at 36/255": "66.67 %  (2 of 3)",
        "time": "1.25 s",
    }


def test_errors_are_counted() -> None:
    broken = sample(1, radius=None, status="error", reason="the model's output is not finite")
    assert summary_of(render("table", records(sample(0), broken)))["errors"] == "1"


def test_without_labels_there_is_a_share_and_no_accuracy() -> None:
    text = render("table", records(sample(0, label=None), sample(1, label=None), eps=("0.1",)))
    assert "certified share at 0.1" in text
    assert "accuracy" not in text


def test_long_runs_show_twenty_rows_unless_all_are_asked_for() -> None:
    many = records(*(sample(index) for index in range(100, 150)))
    short, full = render("table", many), render("table", many, View(all_rows=True))
    assert [line.split()[0] for line in short.splitlines()[2:22]] == [str(index) for index in range(100, 120)]
    assert "120" not in short
    assert "30 more samples (--all shows every row)" in short
    assert "149" in full
    assert "--all" not in full


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200])
def test_narrow_terminals_never_cut_a_number(width: int) -> None:
    text = render("table", records(), View(width=width))
    for figure in ("1.5000", "0.1234", "1.0001"):
        assert text.count(figure) >= 2
    assert "…" not in text


def test_narrow_terminals_break_notes_and_wide_views_do_not() -> None:
    reason = "the two largest logits cannot be told apart"
    assert reason in render("table", records())
    narrow = render("table", records(), View(width=90))
    assert reason not in narrow
    assert all(len(line) <= 90 for line in narrow.splitlines())


def test_a_usual_run_fits_eighty_columns() -> None:
    text = render("table", records(sample(1234), sample(1235, label=1)), View(width=80))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("  misclassified") == 1


def test_colour_only_where_asked_for() -> None:
    assert "\x1b[" in render("table", records(), View(color=True))
    assert "\x1b" not in render("table", records(), View(color=False))


def test_environment_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = render("table", records())
    for name, value in {"COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "dumb", "TTY_COMPATIBLE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert render("table", records()) == before


def test_ascii_where_the_reader_has_no_more() -> None:
    assert render("table", records(), View(unicode=False)).isascii()
    assert not render("table", records(), View(unicode=True)).isascii()


def test_names_from_files_cannot_steer_the_terminal() -> None:
    hostile = "\x1b[31mred\x07\r\n[bold]x[/bold]\u202e"
    assert printable(hostile) == " [31mred   [bold]x[/bold] "
    drawn = grid([Column("a")], [[hostile]], View())
    assert "\x1b" not in drawn
    assert "[bold]x[/bold]" in drawn
    assert "\x1b" not in pairs([("name", hostile)])


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [None, 40, 300])
def test_the_curve_fits_its_view(unicode: bool, width: int | None) -> None:
    """It falls from all samples to none, and is made of what the reader can show."""
    samples = [sample(k, radius=0.1 * (k + 1), attack_radius=None, attack_kind=None) for k in range(9)]
    text = render("table", records(*samples), view=View(width=width, unicode=unicode, plot=True))
    drawn = text[text.index("1.00") :].splitlines()
    assert max(map(len, drawn)) <= min(width or 90, 90)
    assert unicode or "\n".join(drawn).isascii()
    bodies = [line[5:-1] for line in drawn if re.match(r"\s*(\d\.\d\d)?[┤│|+][^─-]*$", line)]
    marks = [[k for k, letter in enumerate(body) if letter not in " │|"] for body in bodies[1:]]
    first = [row[0] for row in marks if row]
    assert first == sorted(first)
    assert "certified" in text
    assert "plot" not in render("table", records(*samples), view=View())
