"""JUnit XML, as CI servers read test results (tests/schemas/junit-10.xsd)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from xml.etree import ElementTree

from certify_cli.output.cases import BROKEN, FAIL, OPEN, Cases, of_result
from certify_cli.output.console import printable
from certify_cli.output.document import View
from certify_cli.records import Record, collect

ELEMENTS = {FAIL: "failure", BROKEN: "error", OPEN: "skipped"}


def document(records: Iterable[Record], view: View) -> Iterator[str]:
    """A test suite for every radius of `--eps`, a case a sample, which fails if misclassified or attacked."""
    yield of_cases(of_result(collect(records)), view)


def of_cases(cases: Cases, view: View) -> str:
    """A test suite for every rule, with its cases."""
    root = ElementTree.Element("testsuites", name=printable(f"curvcert: {cases.model}"))
    for rule in cases.rules:
        mine = [case for case in cases.cases if case.rule == rule]
        counts = {element: sum(case.outcome == outcome for case in mine) for outcome, element in ELEMENTS.items()}
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=printable(rule),
            tests=str(len(mine)),
            failures=str(counts["failure"]),
            errors=str(counts["error"]),
            skipped=str(counts["skipped"]),
        )
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in (("model", cases.model), ("on", cases.title), ("asked", cases.rules[rule])):
            ElementTree.SubElement(properties, "property", name=name, value=printable(value))
        for case in mine:
            element = ElementTree.SubElement(
                suite, "testcase", name=printable(case.name), classname=printable(cases.model)
            )
            if case.outcome in ELEMENTS:
                ElementTree.SubElement(element, ELEMENTS[case.outcome], message=printable(case.message))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'
