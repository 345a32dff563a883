"""What the `planner` commands share: options, exit codes, reading and writing."""

from __future__ import annotations

import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from slideplan.quantities import parse_bytes

EXIT_DOES_NOT_FIT, EXIT_DOES_NOT_HOLD = 3, 4
DEFAULT_SEQ_LEN = 1024
DEFAULT_BATCH = 8


class Placement(StrEnum):
    """Choices of --placement."""

    AUTO = "auto"
    HOST = "host"


class Objective(StrEnum):
    """Choices of --objective."""

    THROUGHPUT = "throughput"
    LEAST_HOST_MEMORY = "least-host-memory"


class GradientDtypeChoice(StrEnum):
    """Choices of --gradient-dtype."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class StateChoice(StrEnum):
    """Choices of --state."""

    EXACT = "exact"
    BF16_MOMENTS = "bf16-moments"
    LEAN = "lean"


class KernelsChoice(StrEnum):
    """Choices of --kernels."""

    AUTO = "auto"
    EAGER = "eager"
    FUSED = "fused"
    GRAPHED = "graphed"


class MeasuredKernels(StrEnum):
    """Choices of --kernels where they are measured."""

    EAGER = "eager"
    FUSED = "fused"
    GRAPHED = "graphed"


Json = Annotated[bool, typer.Option("--json", help="Print the machine-readable result, and nothing else, to stdout.")]
ModelName = Annotated[str, typer.Option(help="Name in `planner models`, or a directory with a Hugging Face config.json.")]
MachineName = Annotated[
    str | None, typer.Option(help="Name in `planner machines`, or a profile's file; default: this machine's, if measured.")
]
SeqLen = Annotated[
    int | None, typer.Option(help=f"Tokens per sequence; default {DEFAULT_SEQ_LEN}, or as many as the model takes.")
]
GpuMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for this much GPU memory, like 24GiB.")]
HostMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for this much RAM, like 128GiB.")]

SsdMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Plan for this much of the drive, like 200GiB; 0: nothing lies there.")
]


def budget_of(
    gpu_memory: str | None, host_memory: str | None, ssd_memory: str | None
) -> tuple[int | None, int | None, int | None]:
    """Bytes that the three options say. Raises ValueError."""
    ssd_bytes = 0 if ssd_memory == "0" else size_of("--ssd-memory", ssd_memory)
    return size_of("--gpu-memory", gpu_memory), size_of("--host-memory", host_memory), ssd_bytes


def size_of(option: str, text: str | None) -> int | None:
    """Bytes of an option like 24GiB. Raises ValueError."""
    if text is None:
        return None
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    if size < 1:
        raise ValueError(f"{option} is {text}, must be positive")
    return size


def percent_of(option: str, text: str) -> float:
    """A share in percent, above 0 and at most 100. Raises ValueError."""
    try:
        share = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"{option} is {text!r}, must be a percentage like 95%") from None
    if not 0 < share <= 100:
        raise ValueError(f"{option} is {text}, must be above 0% and at most 100%")
    return share


def check_writable(path: Path) -> None:
    """Better to learn it before minutes of work than after."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written in {folder}: {error.strerror}") from None


def print_json(result: Any) -> None:
    """The machine-readable result to stdout."""
    encoded = msgspec.json.encode(result, order="deterministic")
    sys.stdout.write(msgspec.json.format(encoded, indent=1).decode() + "\n")


def note(text: str) -> None:
    """A line to stderr."""
    print(text, file=sys.stderr)
