"""Which machine profiles there are, and which one a command takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from planner.catalogue.here import ThisMachine, profiled_memory_bytes, this_machine
from planner.catalogue.near import hint
from slideplan import codec
from slideplan.command import path
from slideplan.machine.profile import MachineProfile
from slideplan.quantities import format_bytes

LOCAL_PROFILES = Path("profiles")  # of the working directory: where `planner profile` writes
DEFAULT_MACHINE = "rtx4090-256gib"
MOST_REASONS = 3  # why files were left out, in one line


@dataclass(frozen=True)
class Known:
    """The profiles that can be read, by the name of their file, and in one line what was left out; "" where nothing was."""

    shipped: dict[str, MachineProfile]
    local: dict[str, MachineProfile]
    left_out: str = ""

    def by_name(self) -> dict[str, MachineProfile]:
        """All of them; local ones win."""
        return self.shipped | self.local


@dataclass(frozen=True)
class Choice:
    """The profile to take where none is named, whether it is this machine's, and what the user should know of the choice."""

    machine: MachineProfile
    is_here: bool
    notes: tuple[str, ...]


def machines() -> dict[str, Path]:
    """Profile files by name: the shipped ones, then `profiles/*.json` of the working directory, which win."""
    return {file.stem: file for file in (*_shipped_files(), *_local_files())}


def _shipped_files() -> list[Path]:
    return sorted(Path(str(resources.files("profiles"))).glob("*.json"))


def _local_files() -> list[Path]:
    """Regular files alone: a pipe that is called so would be waited for."""
    return sorted(filter(_may_be_read, LOCAL_PROFILES.glob("*.json")))


def _may_be_read(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # of a folder that may not be searched: whoever reads the file is told why
        return True


def known_machines() -> Known:
    """All profiles, but for files in `profiles` of the working directory that are no profiles, or broken ones."""
    local: dict[str, MachineProfile] = {}
    reasons = []
    for file in _local_files():
        try:
            local[file.stem] = codec.load(file, MachineProfile)
        except ValueError as error:
            reasons.append(str(error))
    return Known(
        shipped={file.stem: codec.load(file, MachineProfile) for file in _shipped_files()},
        local=local,
        left_out=_left_out(reasons),
    )


def _left_out(reasons: list[str]) -> str:
    """Why files were left out, in one line; "" where none was."""
    more = f" (and {len(reasons) - MOST_REASONS} more)" if len(reasons) > MOST_REASONS else ""
    shown = "; ".join(" ".join(reason.split()) for reason in reasons[:MOST_REASONS])
    # Names of files may hold what moves a terminal's cursor.
    plain = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)
    return f"left out: {plain}{more}" if reasons else ""


def _unsaid(_: str) -> None:
    """Nobody is there to be told."""


def find_machine(name_or_path: str, note: Callable[[str], None] = _unsaid) -> MachineProfile:
    """The profile of this name (any case), or in this file.

    A local one wins over a shipped one of its name, unless it is broken, of which `note` is told in one line.
    Raises ValueError listing the known names for an unknown one, or naming what is wrong with the file.
    """
    broken: list[ValueError] = []
    for file in (*_local_files(), *_shipped_files()):
        if file.stem.casefold() == name_or_path.casefold():
            try:
                machine = codec.load(file, MachineProfile)
            except ValueError as error:
                broken.append(error)
                continue
            if broken:
                note(f"{_left_out([str(error) for error in broken])}; taking {file}")
            return machine
    if broken:
        raise broken[0]
    file = path(name_or_path)
    if not file.exists():
        known = {name.casefold() for name in known_machines().by_name()}
        raise ValueError(
            f"machine {name_or_path!r} is neither a known profile nor a file; {hint(file.stem, known)}known are "
            f"{', '.join(sorted(known))}; `planner profile` measures this machine"
        )
    return codec.load(file, MachineProfile)


def default_machine() -> Choice:
    """The profile to take where none is named.

    That of this machine: the newest measured one whose GPU, processor, cores and memory are this machine's, of those in
    `profiles` of the working directory, else of the shipped ones. Else a shipped datasheet profile.
    """
    known, here = known_machines(), this_machine()
    notes = [known.left_out] if known.left_out else []
    for is_local, profiles in ((True, known.local), (False, known.shipped)):
        alike = {name: machine for name, machine in profiles.items() if _measured(machine) and here.is_of(machine)}
        matching = [name for name, machine in alike.items() if here.has_memory_of(machine)]
        notes += [_differs_in_memory(name, alike[name], here) for name in alike if name not in matching]
        if matching:
            newest = max(matching, key=lambda name: alike[name].provenance.date)
            notes += _of_several(newest, matching, alike[newest]) if len(matching) > 1 else []
            if not is_local:
                notes.append(f"taking the shipped {newest}, measured on a machine like this one; {_WAYS}")
            return Choice(alike[newest], True, tuple(notes))
    machine = known.shipped[DEFAULT_MACHINE]
    notes.append(
        f"no profile of this machine in {LOCAL_PROFILES}/: taking the shipped {machine.name} "
        f"({machine.gpu.name}, datasheet figures); {_WAYS}"
    )
    return Choice(machine, False, tuple(notes))


_WAYS = "`planner profile` measures this machine, --machine names another"


def _measured(machine: MachineProfile) -> bool:
    return machine.provenance.source == "measured"


def _differs_in_memory(name: str, machine: MachineProfile, here: ThisMachine) -> str:
    return (
        f"profile {name} has the GPU, processor and cores of this machine, but {format_bytes(profiled_memory_bytes(machine))} "
        f"of RAM, of which {format_bytes(here.host_memory_bytes)} show here: not taken; --machine {name} takes it"
    )


def _of_several(newest: str, matching: list[str], machine: MachineProfile) -> list[str]:
    date = machine.provenance.date
    return [f"{len(matching)} profiles of this machine: taking the newest, {newest} of {date}; --machine names another"]


def with_budget(
    machine: MachineProfile, gpu_memory_bytes: int | None, host_memory_bytes: int | None, ssd_bytes: int | None = None
) -> MachineProfile:
    """The machine with other capacities in bytes; None keeps what the profile says. Of the drive, 0 leaves it alone.

    Raises ValueError for other capacities below 1, and for a drive that the profile does not have.
    """
    gpu, host, ssd = machine.gpu, machine.host, machine.ssd
    if gpu_memory_bytes is not None:
        gpu = msgspec.structs.replace(gpu, memory_bytes=gpu_memory_bytes)
    if host_memory_bytes is not None:
        host = msgspec.structs.replace(host, memory_bytes=host_memory_bytes)
    if ssd is not None and ssd_bytes is not None:
        ssd = msgspec.structs.replace(ssd, capacity_bytes=ssd_bytes)
    elif ssd_bytes:
        raise ValueError(
            f"--ssd-memory: machine {machine.name} has no drive; measure one with `planner profile`, or take a machine with one"
        )
    return msgspec.structs.replace(machine, gpu=gpu, host=host, ssd=ssd)
