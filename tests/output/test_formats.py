"""Formats are pure functions of records: what they say, and that they say it exactly."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from certify_cli.output.document import View
from certify_cli.output.formats import FORMATS
from certify_cli.records import Run, Sample, Summary, collect, summarise
from tests.records import SETTINGS, records, render, run, sample
from tests.schema import SCHEMA, validator


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("part", "kind"), [("run", Run), ("sample", Sample), ("summary", Summary)])
def test_the_schema_names_every_field(part: str, kind: type) -> None:
    names = list(kind.__dataclass_fields__)
    assert list(SCHEMA["$defs"][part]["properties"]) == names
    assert SCHEMA["$defs"][part]["required"] == names


@pytest.mark.smoke
def test_json_fits_the_schema_and_reads_back() -> None:
    given = records()
    document = json.loads(render("json", given))
    validator().validate(document)
    whole = collect(given)
    assert document["schema"] == "curvcert/1"
    assert Run.from_dict(document["run"]) == whole.run
    assert tuple(Sample.from_dict(row) for row in document["samples"]) == whole.samples
    assert Summary.from_dict(document["summary"]) == whole.summary


def test_json_of_no_samples_is_valid() -> None:
    given = [run({}, SETTINGS, 0, []), summarise([], (), 0.0)]
    document = json.loads(render("json", given))
    validator().validate(document)
    assert document["samples"] == []


def test_the_schema_refuses_what_the_contract_refuses() -> None:
    good = sample(0).to_dict()
    check = validator("sample")
    check.validate(good)
    for change in (
        {"certified_radius": None, "reason": None},
        {"certified_radius": -1.0},
        {"status": "fine"},
        {"attack_kind": "guess"},
        {"index": -1},
    ):
        assert not check.is_valid(good | change), change
    assert not check.is_valid({name: value for name, value in good.items() if name != "margin"})
    assert check.is_valid(good | {"a_later_field": 1})


@pytest.mark.smoke
def test_jsonl_fits_the_schema_line_by_line() -> None:
    given = records()
    lines = [json.loads(line) for line in render("jsonl", given).splitlines()]
    assert [line["type"] for line in lines] == ["run", "sample", "sample", "sample", "summary"]
    for line in lines:
        validator("line").validate(line)
    assert not validator("line").is_valid(lines[1] | {"type": "summary"})


def test_jsonl_yields_each_record_before_it_asks_for_the_next() -> None:
    asked: list[str] = []

    def slowly() -> Any:
        for record in records():
            asked.append(type(record).__name__)
            yield record

    pieces = FORMATS["jsonl"].render(slowly(), View())
    assert json.loads(next(pieces))["type"] == "run"
    assert json.loads(next(pieces))["index"] == 3
    assert asked == ["Run", "Sample"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, math.nextafter(1.0, 2.0)])
def test_floats_survive_exactly(name: str, value: float) -> None:
    text = render(name, records(sample(0, radius=value), eps=()))
    if name == "json":
        read = json.loads(text)["samples"][0]["certified_radius"]
    elif name == "jsonl":
        read = json.loads(text.splitlines()[1])["certified_radius"]
    else:
        read = float(next(csv.DictReader(io.StringIO(text)))["certified_radius"])
    assert read == value


@pytest.mark.parametrize("name", ["json", "jsonl"])
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    given = records()
    given[-1] = replace(given[-1], seconds=math.inf)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="Out of range float"):
        render(name, given)


def test_csv_has_one_row_a_sample() -> None:
    text = render("csv", records(sample(3), sample(4, label=None, radius=None, reason='a "reason", quoted')))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == list(Sample.__dataclass_fields__)
    assert [row["index"] for row in rows] == ["3", "4"]
    assert (rows[0]["correct"], rows[0]["attack_in_range"]) == ("true", "false")
    assert rows[1]["certified_radius"] == rows[1]["label"] == rows[1]["correct"] == ""
    assert rows[1]["reason"] == 'a "reason", quoted'
    assert "\r" not in text


def test_records_out_of_order_are_refused() -> None:
    first, *rest = records()
    with pytest.raises(ValueError, match="begin with its run line"):
        collect([*rest, first])
    with pytest.raises(ValueError, match="only samples"):
        collect([first, first, *rest])


def test_markdown_escapes_what_would_be_markup_and_keeps_one_row_a_sample() -> None:
    given = records(*(sample(k, reason="a | b *c*" if k else None) for k in range(30)))
    text = render("markdown", given)
    tables = [[row for row in part.splitlines() if row.startswith("|")] for part in text.split("\n\n")]
    figures, samples = (table for table in tables if table)
    assert len(samples) == 2 + 20
    assert "10 more samples" in text
    assert "a \\| b \\*c\\*" in samples[3]
    for table in (figures, samples):
        assert len({row.replace("\\|", "").count("|") for row in table}) == 1
        assert set(table[1]) <= set("|-:")
    assert len(render("markdown", given, View(all_rows=True)).splitlines()) == len(text.splitlines()) + 10 - 2
