"""Which machine profiles there are, and which one a command takes."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from pathlib import Path

import msgspec

from slideplan import codec
from slideplan.machine.profile import MachineProfile

LOCAL_PROFILES = Path("profiles")  # of the working directory: where `planner profile` writes
DEFAULT_MACHINE = "rtx4090-2tib"


def machines() -> dict[str, Path]:
    """Profile files by name: the shipped ones, then `profiles/*.json` of the working directory, which win."""
    shipped = Path(str(resources.files("profiles")))
    return {file.stem: file for folder in (shipped, LOCAL_PROFILES) for file in sorted(folder.glob("*.json"))}


def find_machine(name_or_path: str) -> MachineProfile:
    """The profile of this name (any case), or in this file.

    Raises ValueError listing the known names for an unknown one, or naming what is wrong with the file.
    """
    known = {name.casefold(): file for name, file in machines().items()}
    file = known.get(name_or_path.casefold())
    if file is None:
        file = Path(name_or_path).expanduser()
        if not file.exists():
            near = get_close_matches(name_or_path.casefold(), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"machine {name_or_path!r} is neither a known profile nor a file; {hint}known are {', '.join(sorted(known))}; "
                "`planner profile` measures this machine"
            )
    return codec.load(file, MachineProfile)


def default_machine() -> tuple[MachineProfile, bool]:
    """The profile to take where none is named, and whether it was measured.

    The newest measured one in `profiles` of the working directory, else a shipped datasheet profile.
    Raises ValueError where a local profile cannot be read.
    """
    local = [codec.load(file, MachineProfile) for file in sorted(LOCAL_PROFILES.glob("*.json"))]
    measured = [profile for profile in local if profile.provenance.source == "measured"]
    if measured:
        return max(measured, key=lambda profile: profile.provenance.date), True
    return find_machine(DEFAULT_MACHINE), False


def with_budget(machine: MachineProfile, gpu_memory_bytes: int | None, host_memory_bytes: int | None) -> MachineProfile:
    """The machine with other capacities in bytes; None keeps what the profile says.

    Raises ValueError for a capacity below 1.
    """
    gpu, host = machine.gpu, machine.host
    if gpu_memory_bytes is not None:
        gpu = msgspec.structs.replace(gpu, memory_bytes=gpu_memory_bytes)
    if host_memory_bytes is not None:
        host = msgspec.structs.replace(host, memory_bytes=host_memory_bytes)
    return msgspec.structs.replace(machine, gpu=gpu, host=host)
