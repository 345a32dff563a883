"""The `runtime` command: execute a plan, go on with a run, take its weights, compare it with its plan."""

from __future__ import annotations

import sys

import torch
import typer

from runtime.commands.results import compare_run, export_run
from runtime.commands.training import execute, resume
from runtime.lanes.clock import Hung, LaneError, RunError
from runtime.lanes.helpers import held_up
from runtime.report import WIDTH
from slideplan.command import CommandGroup, Interrupted
from slideplan.entry import EXIT_BAD_INPUT, EXIT_FAILED, end_interrupted, in_words, leave

app = typer.Typer(
    cls=CommandGroup,
    help="Run plans made by `planner simulate`, keep what was trained, and check what was predicted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)


OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
SMALLER = "plan with a smaller --gpu-memory or --host-memory"

app.command()(execute)
app.command()(resume)
app.command("export")(export_run)
app.command("compare")(compare_run)


def main() -> None:
    """Entry point: bad input is one line and exit code 2, a failed run exit code 1."""
    try:
        app()
    except ValueError as error:
        _say(error, str(error))
        sys.exit(EXIT_BAD_INPUT)
    except Hung as error:
        _say(error, str(error))
        leave(EXIT_FAILED)
    except RunError as error:
        stopped = "all lanes stopped: " if isinstance(error, LaneError) else ""
        full = f"; {SMALLER}" if isinstance(error.__cause__, OUT_OF_MEMORY) else ""
        _say(error, f"{stopped}{error}{full}")
        sys.exit(EXIT_FAILED)
    except OSError as error:
        _say(error, in_words(error))
        sys.exit(EXIT_FAILED)
    except OUT_OF_MEMORY as error:
        _say(error, f"out of memory: {error}; {SMALLER}")
        sys.exit(EXIT_FAILED)
    except RuntimeError as error:  # of torch, outside of any task: while kernels are captured, say
        _say(error, f"{type(error).__name__}: {error}")
        sys.exit(EXIT_FAILED)
    except Interrupted as end:
        if held_up():
            end_interrupted("runtime", end.stop, leave)
        end_interrupted("runtime", end.stop)


def _say(error: Exception, words: str) -> None:
    """One line, with what the error's notes add: how a run goes on."""
    print(f"runtime: {'; '.join([words, *getattr(error, '__notes__', [])])}", file=sys.stderr)
