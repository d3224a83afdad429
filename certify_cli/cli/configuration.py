"""Settings from a file: `curvcert.toml`, or `[tool.curvcert]` of a pyproject.toml.

Its keys are the options' names without dashes in front; `[policy]` is for `check`. The command line takes precedence
over the environment (CURVCERT_METHOD for --method), the environment over the file, and the file over the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from certify_cli.cli.reporter import Reporter
from certify_cli.cli.run_options import SETTABLE
from certify_cli.errors import UsageError, quoted, shown
from certify_cli.toml_file import read_toml

OWN_FILE, PROJECT_FILE = "curvcert.toml", "pyproject.toml"
POLICY = "policy"
PREFIX = "CURVCERT_"
OTHER_VARIABLES = ("CURVCERT_DATA", "CURVCERT_DATA_SOURCE", "CURVCERT_DEBUG")
"""Variables that belong to no option by their name."""
PRESENTATION = (
    "config",
    "policy",
    "quiet",
    "output_file",
    "format",
    "all_rows",
    "witnesses",
    "exact",
    "resume",
    "plot",
)
"""Options that change no result: the environment may set them, a file may not."""


@dataclass(frozen=True)
class Configuration:
    """A settings file: its options by key, and the table of its policy where it has one."""

    path: str
    options: Mapping[str, Any]
    policy: Mapping[str, Any] | None


def find(path: str | None) -> Configuration | None:
    """The settings of the file `path`, by default of the one in the working directory; None where there is none.

    Raises UsageError for a file that cannot be read.
    """
    if path is not None:
        table = _table(Path(path))
        if table is None:
            raise UsageError(f"{path}: has no table [tool.curvcert]")
        return _configuration(path, table)
    for name in (OWN_FILE, PROJECT_FILE):
        if Path(name).is_file():
            table = _table(Path(name))
            if table is not None:
                return _configuration(name, table)
    return None


def _table(path: Path) -> Mapping[str, Any] | None:
    whole = read_toml(path, "settings")
    if path.name != PROJECT_FILE:
        return whole
    tool = whole.get("tool", {})
    table = tool.get("curvcert") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UsageError(f"{path}: tool.curvcert is a table: write [tool.curvcert] above what it sets")
    return table


def _configuration(path: str, table: Mapping[str, Any]) -> Configuration:
    policy = table.get(POLICY)
    if policy is not None and not isinstance(policy, dict):
        raise UsageError(f"{path}: policy is a table: write [policy] above what it asks for")
    options = {key: value for key, value in table.items() if key != POLICY}
    return Configuration(path, options, policy)


def defaults(found: Configuration, parameters: Iterable[Any]) -> dict[str, Any]:
    """The file's values by parameter, each as the text that the command line would have. parameters: of the command.

    Raises UsageError, naming the key, for a key that is no option and for a value of the wrong type.
    """
    known = {parameter.name: parameter for parameter in parameters}
    values = {}
    for key, value in found.options.items():
        name = key.replace("-", "_")
        if name not in known:
            listed = ", ".join(sorted(n.replace("_", "-") for n in known))
            where = " in a file, only on the command line or in the environment" if name in PRESENTATION else ""
            raise UsageError(
                f"{found.path}: {shown(key)} is not known{where}; it may set {listed}, and a table [policy]"
            )
        if name in values:
            raise UsageError(f"{found.path}: {shown(key)} is set twice, with dashes and with underscores")
        values[name] = _value(value, known[name], f"{found.path}: {shown(key)}")
    return values


def _value(value: Any, parameter: Any, where: str) -> Any:
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{where} = {quoted(value)} is not true or false")
        return value
    several = parameter.multiple or parameter.nargs != 1
    items = value if isinstance(value, list) and several else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | int | float) or _huge(item):
            kind = "a list of texts or numbers" if several else "a text or number"
            raise UsageError(f"{where} = {quoted(value)} is not {kind}")
    texts = [str(item) for item in items]
    return texts if several else texts[0]


def _huge(item: str | int | float) -> bool:
    """Whether Python refuses to write an integer as digits."""
    return isinstance(item, int) and abs(item) >= 10**18


def from_file(context: typer.Context, path: str | None) -> str | None:
    """The callback of `--config` and `--policy`: the file's values become the defaults of the other options."""
    if not context.resilient_parsing:  # completion
        context.obj = find(path)
        if context.obj is not None:
            context.default_map = defaults(context.obj, (p for p in context.command.params if p.name in SETTABLE))
    return path


def _option(flag: str, help: str) -> Any:
    return typer.Option(
        flag,
        metavar="FILE",
        help=help,
        is_eager=True,
        callback=from_file,
        show_default=f"{OWN_FILE}, or [tool.curvcert] of {PROJECT_FILE}, where there is one",
    )


ConfigFile = Annotated[str | None, _option("--config", "A TOML file that sets options by their names.")]
PolicyFile = Annotated[str | None, _option("--policy", "A TOML file with [policy], which sets options, too.")]


def tell(context: typer.Context, reporter: Reporter) -> None:
    """Note the settings file that was read, and warn of variables that look like settings and are none."""
    if context.obj is not None and (context.obj.options or context.obj.policy):
        reporter.note(f"settings from {context.obj.path}")
    for name in unknown_variables():
        reporter.warning(f"the environment has {shown(name)}, which is no setting of curvcert")


def name_variables(command: Any) -> None:
    """Give every option without an environment variable of its own one by its name: CURVCERT_METHOD for --method."""
    for parameter in command.params:
        if parameter.name in (*SETTABLE, *PRESENTATION) and not parameter.envvar:
            parameter.envvar = PREFIX + parameter.name.upper()


def unknown_variables() -> list[str]:
    """Variables of the environment that look like settings but are none."""
    known = {PREFIX + name.upper() for name in (*SETTABLE, *PRESENTATION)} | set(OTHER_VARIABLES)
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
