"""`runtime compare` and `runtime export`: what to do with a run's results."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from runtime import report
from runtime.bars import ProgressBars
from runtime.checkpoints.export import export
from runtime.checkpoints.layout import CHECKPOINTS, step_of
from runtime.checkpoints.resuming import candidates
from runtime.commands.output import Json, note, print_comparison
from runtime.folder import kept
from runtime.storage.disk import Disk
from slideplan.command import path


class DtypeChoice(StrEnum):
    """Choices of --dtype."""

    BF16 = "bf16"
    FP32 = "fp32"


def compare_run(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run folder written by `runtime execute`.")],
    as_json: Json = False,
) -> None:
    """Compare a run with its plan again, from the files in its folder. Of a resumed run: the steps since.

    \b
    Example:
      runtime compare runs/first
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    print_comparison(report.write_comparison(folder, note), as_json)


def export_run(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run folder written by `runtime execute`.")],
    out: Annotated[Path, typer.Option("--output", "-o", parser=path, help="New folder for the weights.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint after this many steps; default: the newest.")] = None,
    dtype: Annotated[
        DtypeChoice, typer.Option(help="bf16: the fp32 master weights rounded to nearest even; fp32: themselves.")
    ] = DtypeChoice.BF16,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was exported as JSON to stdout.")] = False,
) -> None:
    """Write the trained weights as a Hugging Face directory, with configuration, tokenizer and whatever else came with them.

    Every file is checked before it is used. transformers, vLLM and llama.cpp's converter read the result. The run may go on
    meanwhile: it keeps its checkpoints until the export has ended.

    \b
    Examples:
      runtime export runs/first -o ./Llama-3.1-8B-tuned
      runtime export runs/first --step 400 --dtype fp32 -o ./tuned-fp32

    \b
    Exit codes: 0 done, 1 the drive failed, 2 bad input, 130 interrupted, 143 terminated.
    """  # noqa: D301 - as above
    if (found_step := step_of(folder.absolute().name)) is not None and folder.absolute().parent.name == CHECKPOINTS:
        run = folder.absolute().parent.parent
        raise ValueError(f"{folder}: is a checkpoint; name its run's folder: `runtime export {run} --step {found_step} -o DIR`")
    with ProgressBars(0) as bars, kept(folder):
        found = candidates(folder, bars.show, step)
        taken = export(found, out, dtype.value, Disk(), bars.show)
    if as_json:
        print(json.dumps({"folder": str(out), "checkpoint": str(taken.folder), "step": taken.manifest.step, "dtype": dtype}))
    note(f"{out}: weights after {taken.manifest.step} steps in {dtype}, from {taken.folder}")
