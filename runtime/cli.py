"""The `runtime` command: execute a plan, go on with a run, take its weights, compare it with its plan."""

from __future__ import annotations

import sys

import torch
import typer

from runtime.commands.results import compare_run, export_run
from runtime.commands.training import execute, resume
from runtime.lanes.clock import Hung, LaneError, RunError
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


app.command()(execute)
app.command()(resume)
app.command("export")(export_run)
app.command("compare")(compare_run)


def main() -> None:
    """Entry point: bad input is one line and exit code 2, a failed run exit code 1."""
    try:
        app()
    except ValueError as error:
        print(f"runtime: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except Hung as error:
        print(f"runtime: {error}", file=sys.stderr)
        leave(EXIT_FAILED)
    except RunError as error:
        stopped = "all lanes stopped: " if isinstance(error, LaneError) else ""
        print(f"runtime: {stopped}{error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except OSError as error:
        print(f"runtime: {in_words(error)}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"runtime: out of memory: {error}; plan with a smaller --gpu-memory or --host-memory", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except RuntimeError as error:  # of torch, outside of any task: while kernels are captured, say
        print(f"runtime: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Interrupted as end:
        end_interrupted("runtime", end.stop)
