"""The `runtime` command: execute a plan, compare a run with its plan."""

from __future__ import annotations

import contextlib
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import msgspec
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from runtime import report, run
from runtime.folder import claimed
from runtime.lanes.clock import LaneError, RunError
from runtime.optimizer.adamw import AdamW
from slideplan.codec import load
from slideplan.command import CommandGroup, Interrupted, path
from slideplan.entry import EXIT_BAD_INPUT, EXIT_FAILED, end_interrupted, give_up, in_words
from slideplan.measurement import Comparison
from slideplan.plan import Plan
from slideplan.progress import Progress

app = typer.Typer(
    cls=CommandGroup,
    help="Run plans made by `planner simulate`, and check what was predicted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": report.WIDTH},
)


class Device(StrEnum):
    """Choices of --device."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


Json = Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, and nothing else, to stdout.")]
DEFAULTS = AdamW()


def main() -> None:
    """Entry point: bad input is one line and exit code 2, a failed run exit code 1."""
    try:
        app()
    except ValueError as error:
        print(f"runtime: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
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


@app.command()
def execute(
    plan: Annotated[Path, typer.Argument(parser=path, help="A plan written by `planner simulate -o`.")],
    data: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Text, JSON lines with a field `text`, or a folder of them; default: sources of Python's standard library.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Hugging Face directory (safetensors, tokenizer.json); default: random weights and bytes as tokens.",
        ),
    ] = None,
    byte_tokens: Annotated[
        bool, typer.Option("--byte-tokens", help="Bytes are tokens even with --weights that have no tokenizer.json.")
    ] = False,
    document_end: Annotated[
        str,
        typer.Option(
            metavar="TOKEN",
            help="What ends each document: a token of the tokenizer; auto: its end-of-text token, else two line feeds; none.",
        ),
    ] = "auto",
    token_cache: Annotated[
        Path | None, typer.Option(parser=path, help="Folder that keeps prepared tokens; default: ~/.cache/slideplan/tokens.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 10,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.AUTO,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", parser=path, help="Run folder; default: runs/MODEL-DATE.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate, constant.")] = DEFAULTS.lr,
    beta1: float = DEFAULTS.beta1,
    beta2: float = DEFAULTS.beta2,
    eps: float = DEFAULTS.eps,
    weight_decay: Annotated[float, typer.Option(help="Decoupled, on every parameter.")] = DEFAULTS.weight_decay,
    seed: Annotated[int, typer.Option(help="Of random weights and of the order of sequences.")] = 0,
    warmup: Annotated[int, typer.Option(help="First steps that are not judged.")] = 2,
    as_json: Json = False,
) -> None:
    """Train for some steps exactly as planned, then compare with the prediction.

    The run folder receives plan.json, metrics.jsonl, measurement.json, comparison.json, comparison.txt, trace.json
    (for Perfetto or chrome://tracing) and lanes.png. The trained weights are not kept yet.

    \b
    Examples:
      runtime execute plan.json
      runtime execute plan.json --data ./texts --weights ./Llama-3.1-8B --steps 100 --lr 1e-5 -o runs/first

    \b
    Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted, 143 terminated.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    document = load(plan, Plan)
    settings = AdamW(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    with claimed(out, document) as folder:
        request = run.RunRequest(
            plan=document,
            plan_path=str(plan),
            out=folder,
            steps=steps,
            device=device,
            data=data,
            weights=weights,
            byte_tokens=byte_tokens,
            document_end=document_end,
            token_cache=token_cache,
            settings=settings,
            seed=seed,
            warmup_steps=warmup,
            command=shlex.join(["runtime", *sys.argv[1:]]),
        )
        with ProgressBars(document.workload.tokens) as bars:
            measurement = run.execute(request, bars.show)
        _compare_finished(folder, as_json)
    losses = measurement.losses
    _note(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps; run folder: {folder}; "
        "the trained weights are not kept yet"
    )


def _compare_finished(folder: Path, as_json: bool) -> None:
    """Compare a run whose measurement is safe. It has not failed, whatever happens here."""
    try:
        comparison = report.write_comparison(folder, _note)
    except Exception as error:
        _note(f"{folder}: the run is finished, but was not compared with its plan: {type(error).__name__}: {error}")
        return
    try:
        _print(comparison, as_json)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            _note(f"warning: stdout: {error.strerror}; the comparison is in {folder}")


class _Heedless:
    """A stream that drops what cannot be written: a run goes on though nobody can be told how far it is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _stderr(width: int | None = None) -> Console:
    stream: Any = None if sys.stderr is None else _Heedless(sys.stderr)
    return Console(stderr=True, file=stream, width=width)


def _note(text: str) -> None:
    _stderr(report.WIDTH).print(text, soft_wrap=True, markup=False)


@app.command("compare")
def compare_run(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run folder written by `runtime execute`.")],
    as_json: Json = False,
) -> None:
    """Compare a run with its plan again, from the files in its folder.

    \b
    Example:
      runtime compare runs/first
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    _print(report.write_comparison(folder, _note), as_json)


def _print(comparison: Comparison, as_json: bool) -> None:
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


class ProgressBars:
    """Bars on stderr: one per phase, and for training loss, tokens/s and time left."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens = tokens_per_step
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_stderr(),
        )
        self._ids: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ids:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar of the phase."""
        if progress.phase not in self._ids:
            self._bars.start()  # not before there is something to show: refused input gets its one line alone
            self._ids[progress.phase] = self._bars.add_task(progress.phase, total=progress.total, detail="")
        bar = self._ids[progress.phase]
        detail = f"{100 * progress.done // max(1, progress.total)}%"
        if progress.loss is not None:
            speed = self._bars.tasks[bar].speed
            rate = f"  {speed * self._tokens:,.0f} tokens/s" if speed else ""
            norm = "" if progress.norm is None else f"  norm {progress.norm:.3g}"
            detail = f"{progress.done}/{progress.total}  loss {progress.loss:.3f}{norm}{rate}"
        self._bars.update(bar, completed=progress.done, detail=detail)
        if progress.note:
            self._bars.console.print(progress.note, soft_wrap=True, highlight=False, markup=False)
