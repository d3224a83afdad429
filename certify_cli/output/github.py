"""GitHub Actions: workflow commands that annotate a run, within GitHub's limits.

GitHub shows ten errors and ten warnings a step and drops the others silently. The last of each kind therefore says how
many more there are; the job summary has all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from certify_cli.output.cases import BROKEN, FAIL, OPEN, Case, Cases, of_result
from certify_cli.output.console import printable
from certify_cli.output.document import View
from certify_cli.records import Record, collect

MOST = 10
"""Annotations of one kind a step at most."""
LONGEST = 4000
"""Characters of one message at most, below GitHub's limit of 4096."""
COMMANDS = {FAIL: "error", BROKEN: "error", OPEN: "warning"}


def document(records: Iterable[Record], view: View) -> Iterator[str]:
    """An error for every sample that is misclassified or attacked, a warning for every one that is undecided."""
    yield of_cases(of_result(collect(records)), view)


def of_cases(cases: Cases, view: View) -> str:
    """Annotations of the cases, errors first, and how many hold."""
    lines = []
    for command in dict.fromkeys(COMMANDS.values()):
        mine = [case for case in cases.cases if COMMANDS.get(case.outcome) == command]
        shown = mine if len(mine) <= MOST else mine[: MOST - 1]
        lines += [_command(command, case.rule, case.message, cases.model) for case in shown]
        if len(shown) < len(mine):
            text = f"{len(mine) - len(shown)} more, from {_first(mine[len(shown)])} on; the job summary has all"
            lines.append(_command(command, "curvcert", text, cases.model))
    passed = f"{len(cases.cases) - len([c for c in cases.cases if c.outcome in COMMANDS])} of {len(cases.cases)}"
    lines.append(_command("notice", "curvcert", f"{cases.model}, {cases.title}: {passed} hold", cases.model))
    return "".join(lines)


def _first(case: Case) -> str:
    return f"{case.name} ({case.rule})"


def _command(command: str, title: str, message: str, file: str) -> str:
    text = printable(message)[:LONGEST]
    return f"::{command} file={_property(file)},title={_property(title)}::{_data(text)}\n"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text)).replace(":", "%3A").replace(",", "%2C")
