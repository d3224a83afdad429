"""JUnit, SARIF and GitHub annotations: valid by their schemas, within their limits, and true to the records."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import xmlschema

from certify_cli.output.document import View
from certify_cli.output.formats import FORMATS
from certify_cli.output.github import LONGEST, MOST
from certify_cli.records import Sample, summarise
from tests.records import run, sample
from tests.schema import SCHEMAS

SAMPLES = [
    sample(0, radius=0.6),
    sample(1, radius=0.2, attack_radius=None, attack_kind=None, attack_in_range=None),
    sample(2, label=1, radius=0.9),
    sample(3, radius=0.2, attack_radius=0.4, attack_kind="search"),
    sample(4, radius=None),
    sample(5, radius=None, status="error", reason="a logit is not a <finite> number & more"),
]


class Settings:
    method, effort, attack, seed = "auto", "normal", "certificate", 0


def rendered(form: str, samples: list[Sample], eps: tuple[str, ...] = ("0.5", "36/255"), **changes: Any) -> str:
    made = run({}, Settings, len(samples), [])
    object.__setattr__(made, "model", type(made.model)(**(vars(made.model) | changes)))
    return "".join(FORMATS[form].render(iter([made, *samples, summarise(samples, eps, 1.0)]), View()))


ODD = [{}, {"path": "a b/modèle,1:2%.onnx"}, {"path": "/abs/x.onnx"}, {"path": "line\nbreak\x1b[31m.onnx"}]


@pytest.mark.smoke
@pytest.mark.parametrize("changes", ODD)
@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[:1], [sample(0, label=None)]])
def test_junit_is_valid_and_counts(changes: dict[str, str], samples: list[Sample]) -> None:
    text = rendered("junit", samples, **changes)
    xmlschema.XMLSchema(str(SCHEMAS / "junit-10.xsd")).validate(text)
    suites = list(ElementTree.fromstring(text.partition("\n")[2]))
    assert [suite.get("name") for suite in suites] == ["certified at 0.5", "certified at 36/255"]
    for suite in suites:
        cases = suite.findall("testcase")
        assert int(suite.get("tests", "")) == len(cases) == len(samples)
        for attribute, element in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.get(attribute, "")) == sum(case.find(element) is not None for case in cases)
    if samples is SAMPLES:
        first = [[child.tag for child in case] for case in suites[0].findall("testcase")]
        assert first == [[], ["skipped"], ["failure"], ["failure"], ["skipped"], ["error"]]


@pytest.mark.smoke
@pytest.mark.parametrize("changes", ODD)
def test_sarif_is_valid_and_holds_what_does_not_pass(changes: dict[str, str]) -> None:
    found = json.loads(rendered("sarif", SAMPLES, **changes))
    schema = json.loads((SCHEMAS / "sarif-2.1.0.json").read_text(encoding="utf-8"))
    jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker()).validate(found)
    assert found["$schema"] == schema["id"]
    results = found["runs"][0]["results"]
    rules = [rule["id"] for rule in found["runs"][0]["tool"]["driver"]["rules"]]
    assert rules == ["certified-at-0.5", "certified-at-36-255"]
    assert all(rules[r["ruleIndex"]] == r["ruleId"] for r in results)
    at_half = [(r["kind"], r["level"]) for r in results if r["ruleId"] == "certified-at-0.5"]
    assert at_half == [("open", "none"), ("fail", "error"), ("fail", "error"), ("open", "none"), ("fail", "error")]
    prints = [r["partialFingerprints"]["curvcert/case"] for r in results]
    assert len(set(prints)) == len(prints)


def test_a_run_without_radii_says_what_is_certified_at_all() -> None:
    suites = list(ElementTree.fromstring(rendered("junit", SAMPLES, eps=()).partition("\n")[2]))
    assert [suite.get("name") for suite in suites] == ["certified"]
    tags = [[child.tag for child in case] for case in suites[0].findall("testcase")]
    assert tags == [[], [], ["failure"], [], ["skipped"], ["error"]]


@pytest.mark.parametrize("count", [MOST, MOST + 1, 40])
def test_annotations_keep_to_githubs_limits(count: int) -> None:
    samples = [sample(k, label=1) for k in range(count)]
    lines = rendered("github", samples, eps=("0.05",)).splitlines()
    errors = [line for line in lines if line.startswith("::error ")]
    assert len(errors) == MOST
    assert lines[-1].startswith("::notice ")
    assert (f"{count - MOST + 1} more" in errors[-1]) is (count > MOST)


@pytest.mark.smoke
@pytest.mark.parametrize("changes", ODD)
def test_annotations_are_escaped(changes: dict[str, str]) -> None:
    long = sample(0, radius=None, status="error", reason="100 % wrong\r\n::error::injected " + "x" * 9999)
    lines = rendered("github", [long], eps=("0.1",), **changes).split("\n")
    assert [line.partition(" ")[0] for line in lines] == ["::error", "::notice", ""]
    assert "100 %25 wrong" in lines[0]
    head, _, message = lines[0].removeprefix("::error ").partition("::")
    assert len(message) <= LONGEST + 20
    assert [part.partition("=")[0] for part in head.split(",")] == ["file", "title"]
    assert ":" not in head
