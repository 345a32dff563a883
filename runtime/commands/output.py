"""What commands print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from runtime import report
from runtime.stderr import stderr_console
from slideplan.entry import give_up
from slideplan.measurement import Comparison

Json = Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, and nothing else, to stdout.")]


def note(text: str) -> None:
    """A line to stderr."""
    stderr_console(report.WIDTH).print(text, soft_wrap=True, markup=False, highlight=False)


def print_comparison(comparison: Comparison, as_json: bool) -> None:
    """The comparison to stdout, as a table or as JSON."""
    if as_json:
        print(msgspec.json.encode(comparison).decode())
        return
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=report.WIDTH)
    with console.capture() as text:  # rich would end the whole command where nobody reads on
        report.print_comparison(console, comparison)
    try:
        print(text.get(), end="")
    except BrokenPipeError:
        give_up(sys.stdout)


def compare_finished(folder: Path, as_json: bool) -> None:
    """Compare a run whose measurement is safe. It has not failed, whatever happens here."""
    try:
        comparison = report.write_comparison(folder, note)
    except Exception as error:
        note(f"{folder}: the run is finished, but was not compared with its plan: {type(error).__name__}: {error}")
        return
    try:
        print_comparison(comparison, as_json)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            note(f"warning: stdout: {error.strerror}; the comparison is in {folder}")
