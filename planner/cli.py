"""The `planner` command: profile a machine, plan for it, list what the catalogues hold."""

from __future__ import annotations

import sys

import typer

from planner.commands.catalogues import list_machines, list_models
from planner.commands.compare import compare
from planner.commands.profile import profile
from planner.commands.show import show
from planner.commands.simulate import simulate
from planner.reports.tables import WIDTH
from simulator import VerificationError
from slideplan.command import CommandGroup, Interrupted
from slideplan.entry import EXIT_BAD_INPUT, EXIT_FAILED, end_interrupted, in_words

app = typer.Typer(
    cls=CommandGroup,
    help="Plan full-parameter fine-tuning on one GPU that is too small for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)

app.command()(simulate)
app.command()(profile)
app.command()(show)
app.command()(compare)
app.command("models")(list_models)
app.command("machines")(list_machines)


def main() -> None:
    """Entry point: what the user got wrong is one line on stderr and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"planner: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        print(f"planner: {in_words(error)}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except (MemoryError, VerificationError) as error:
        print(f"planner: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Interrupted as end:
        end_interrupted("planner", end.stop)
