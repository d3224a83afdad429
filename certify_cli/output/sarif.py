"""SARIF 2.1.0, as code scanning reads findings (tests/schemas/sarif-2.1.0.json)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from certify_cli.output.cases import BROKEN, FAIL, OPEN, PASS, Case, Cases, of_result
from certify_cli.output.console import printable
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.records import Record, collect
from certify_cli.version import __version__

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
HOME = "https://github.com/curvcert/curvcert"
KINDS = {PASS: ("pass", "none"), FAIL: ("fail", "error"), BROKEN: ("fail", "error"), OPEN: ("open", "none")}
"""By outcome: kind and level."""


def document(records: Iterable[Record], view: View) -> Iterator[str]:
    """A result for every sample at every radius, but for those that pass: they are no findings."""
    yield of_cases(of_result(collect(records)), view)


def of_cases(cases: Cases, view: View) -> str:
    """One run, with the rules and a result for every case that does not pass."""
    names = list(cases.rules)
    rules = [
        {"id": identifier(name), "name": _pascal(name), "shortDescription": {"text": printable(cases.rules[name])}}
        for name in names
    ]
    results = [_result(case, names.index(case.rule), cases) for case in cases.cases if case.outcome != PASS]
    driver = {"name": "curvcert", "version": __version__, "informationUri": HOME, "rules": rules}
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
    return pretty({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}) + "\n"


def _result(case: Case, rule: int, cases: Cases) -> dict[str, Any]:
    kind, level = KINDS[case.outcome]
    path = PurePath(cases.model)
    uri = ("file://" if path.is_absolute() else "") + quote(path.as_posix().encode("utf-8", "surrogatepass"))
    return {
        "ruleId": identifier(case.rule),
        "ruleIndex": rule,
        "kind": kind,
        "level": level,
        "message": {"text": printable(case.message)},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}}],
        "partialFingerprints": {"curvcert/case": f"{identifier(case.rule)}/{printable(case.name)}"},
    }


def identifier(rule: str) -> str:
    """A rule's name as an id: "certified at 36/255" becomes certified-at-36-255."""
    return re.sub(r"[^a-z0-9.]+", "-", rule.lower()).strip("-")


def _pascal(rule: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in re.split(r"[^A-Za-z0-9]+", rule) if word)
