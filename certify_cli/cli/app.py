"""The command line: `main` runs one command, and turns every error into an exit code and one sentence.

Heavy libraries are imported inside the commands, so that `--help`, `--version` and completion answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from certify_cli.cli.allocation import keep_freed_memory
from certify_cli.cli.bounds import bounds
from certify_cli.cli.certify import certify
from certify_cli.cli.check import check
from certify_cli.cli.configuration import name_variables
from certify_cli.cli.convert import convert
from certify_cli.cli.diff import diff
from certify_cli.cli.doctor import doctor
from certify_cli.cli.exit_codes import DONE, INTERNAL, SIGNALLED, USAGE
from certify_cli.cli.inspect import inspect
from certify_cli.cli.report import report
from certify_cli.cli.signals import Stopped, at_once
from certify_cli.cli.threads import wait_asleep
from certify_cli.cli.train import train
from certify_cli.cli.verify import verify
from certify_cli.errors import CurvcertError, shown
from certify_cli.output.console import printable
from certify_cli.version import __version__
from certify_cli.whole_file import refusing

DEBUG_VARIABLE = "CURVCERT_DEBUG"

EXIT_CODES = """
Exit codes: 0 done; 1 check's policy is not met, diff found a regression,
verify a contradiction, or doctor a fault; 2 wrong option or setting;
3 model, data or records missing, unreadable or refused, or method not applicable; 4 internal error; 130 or 143 stopped
by SIGINT or SIGTERM.
"""

# plain help and plain errors: the last line of stderr is a sentence, not the edge of a box
app = typer.Typer(
    name="curvcert",
    help="Certify the robustness of image classifiers: radii with proof, sample by sample.",
    epilog=EXIT_CODES,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for command in (certify, check, diff, verify, report, bounds, inspect, convert, train, doctor):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"curvcert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code.

    Errors meant for the user become one sentence on stderr; anything else that escapes is a bug of ours (exit 4),
    with its traceback only where CURVCERT_DEBUG is set.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _replace_missing_streams()
    wait_asleep()
    keep_freed_memory()
    code = _code_of(words or ["--help"])
    _settle_stdout()
    return code


def _code_of(words: list[str]) -> int:
    try:
        with at_once(), _library_warnings_off():
            code = _run(words)
            with refusing("the output"), suppress(BrokenPipeError):  # a reader that has gone changes no verdict
                sys.stdout.flush()
            return code
    except Stopped as stop:
        _complain(f"curvcert: stopped by {signal.Signals(stop.number).name}{stop.hint}")
        return SIGNALLED + stop.number
    except BrokenPipeError:
        return DONE
    except CurvcertError as error:
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a name too long, a full disk: no bug of ours
            return _fail(f"{shown(str(error.filename))}: {error.strerror or type(error).__name__}", USAGE)
        kind = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _fail(
            f"internal error ({kind}); please report it with the command, and the traceback that {DEBUG_VARIABLE}=1 "
            "shows",
            INTERNAL,
        )


def _run(words: list[str]) -> int:
    """Typer's part: parse and call. Typer returns the code of `typer.Exit`, or what the command returns."""
    usage_error: Any = typer.BadParameter.__base__  # the base of every complaint of Typer's about a command line
    try:
        commands: Any = typer.main.get_command(app)
        for command in (certify, check):
            name_variables(commands.commands[command.__name__])
        code = commands.main(words, prog_name="curvcert", standalone_mode=False)
    except usage_error as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        return _fail(f"{_sentence(error.format_message())}{where}", USAGE)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # Typer makes exit code 1 of a closed pipe
            raise stop.__context__ from None
        raise
    return code if isinstance(code, int) else DONE


def _sentence(text: str) -> str:
    """Typer's message as the rest of a sentence: "Missing option '--data'." becomes "missing option '--data'"."""
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE) and sys.exc_info()[0] is not None:
        _complain(traceback.format_exc().rstrip(), lines=True)
    _complain(f"curvcert: error: {message}")
    return code


def _complain(text: str, lines: bool = False) -> None:
    """Print to stderr. Where nobody reads it any more, the exit code remains."""
    try:
        print(text if lines else printable(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        _redirect_to_null(sys.stderr)


def _replace_missing_streams() -> None:
    """Open the null device for a stdout or stderr that was closed at the start: Python has None there."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (lives as long as the process)


def _settle_stdout() -> None:
    """Flush stdout; where that fails (closed pipe, full disk) discard the rest, which Python would flush again."""
    try:
        sys.stdout.flush()
    except OSError:
        _redirect_to_null(sys.stdout)


def _redirect_to_null(stream: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def _library_warnings_off() -> Iterator[None]:
    """Ignore warnings, which libraries address to developers, unless -W or CURVCERT_DEBUG is given."""
    with warnings.catch_warnings():
        if not sys.warnoptions and not os.environ.get(DEBUG_VARIABLE):
            warnings.simplefilter("ignore")
        yield
