"""docs/theory.md: the sections that the code cites are there, the modules it names exist, its table is the code's."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from certify_cli.network.activations import ACTIVATIONS, from_name

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
SECTIONS = {int(number): title for number, title in re.findall(r"^## (\d+)\. (.+)$", PAGE, re.MULTILINE)}
CITED = re.compile(r"theory (?:sections? )?(\d+(?:(?:, | and | to )\d+)*)")


def numbers(text: str) -> set[int]:
    """ "2 to 4" are three sections, "1, 4 and 5" too."""
    found = {int(number) for number in re.findall(r"\d+", text)}
    for first, last in re.findall(r"(\d+) to (\d+)", text):
        found |= set(range(int(first), int(last) + 1))
    return found


def citations() -> list[tuple[str, int]]:
    """(file, section) of every citation in the package and its tests."""
    files = [*(ROOT / "certify_cli").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    texts = {path: re.sub(r"\s+", " ", path.read_text(encoding="utf-8")) for path in files if path != Path(__file__)}
    return [
        (str(path.relative_to(ROOT)), number)
        for path, text in texts.items()
        for cited in CITED.findall(text)
        for number in sorted(numbers(cited))
    ]


def test_every_section_that_is_cited_exists() -> None:
    found = citations()
    assert len(found) > 50
    missing = [(path, number) for path, number in found if number not in SECTIONS]
    assert not missing


def test_nothing_that_the_code_cites_is_marked_as_not_implemented() -> None:
    headings = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    absent = {int(part.split(".")[0]) for part in headings if re.match(r"\d+\. .*\n\n\*Not implemented", part)}
    assert absent
    assert not [cited for cited in citations() if cited[1] in absent]


def test_sections_are_numbered_without_a_gap() -> None:
    assert list(SECTIONS) == list(range(len(SECTIONS)))


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`((?:certify_cli|tests)/[^`]+)`", PAGE)
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists()]


def test_every_section_says_where_it_is_implemented() -> None:
    for part in re.split(r"^## (?=\d)", PAGE, flags=re.MULTILINE)[1:]:
        text = part.partition("\n## ")[0]
        assert re.search(r"^\*(Implemented|Tested|Not implemented)", text, re.MULTILINE), part[:40]


DECIMALS, ROUNDING = 1.1e-8, 1e-14
"""The code's own numbers are moved outward by some units in the last place."""
ROWS = re.findall(r"^\| (`[^|]+`) \| \[([^\]]+)\] \| \[([^\]]+)\][^|]* \| ([\d.]+)", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("names", "slope", "curvature", "third"), ROWS)
def test_the_table_of_activations_is_the_code_s(names: str, slope: str, curvature: str, third: str) -> None:
    """To the decimals shown, which are rounded outward."""
    for name in re.findall("`([^`]+)`", names):
        activation = from_name(name)
        for text, (low, high) in ((slope, activation.slope_range), (curvature, activation.curvature_range or ())):
            least, most = map(float, text.split(", "))
            assert 0 <= low - least + ROUNDING < DECIMALS
            assert 0 <= most - high + ROUNDING < DECIMALS
        assert 0 <= float(third) - (activation.third_sup or math.nan) + ROUNDING < DECIMALS


def test_the_table_has_every_activation_with_curvature() -> None:
    listed = {name.partition(":")[0] for names, *_ in ROWS for name in re.findall("`([^`]+)`", names)}
    spelled = {"clip": "clip:0,6"}
    assert listed == {n for n in ACTIVATIONS if from_name(spelled.get(n, n)).curvature_range is not None}
