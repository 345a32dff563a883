"""What the commands that search have in common: the sequence length, the machine, and the search shown at work."""

from __future__ import annotations

from contextlib import ExitStack

from planner.catalogue.machines import default_machine, find_machine
from planner.commands.options import DEFAULT_SEQ_LEN, note
from planner.reports.tables import console
from planner.search.best import search
from planner.search.shortfall import DoesNotFit
from planner.search.space import SearchOptions
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec
from slideplan.plan import Plan
from slideplan.policy import Workload


def seq_len_of(model: ModelSpec, given: int | None) -> int:
    """What the user asked for, or the usual length as far as the model goes."""
    return min(DEFAULT_SEQ_LEN, model.max_positions, model.sliding_window or model.max_positions) if given is None else given


def search_shown(model: ModelSpec, workload: Workload, machine: MachineProfile, options: SearchOptions) -> Plan | DoesNotFit:
    err = console(stderr=True)
    with ExitStack() as stack:
        if not err.is_terminal:
            return search(model, workload, machine, options)
        status = stack.enter_context(err.status("searching"))
        return search(model, workload, machine, options, lambda progress: status.update(progress.phase))


def machine_named(name: str | None) -> MachineProfile:
    if name is not None:
        return find_machine(name, note)
    choice = default_machine()
    for each in choice.notes:
        note(each)
    return choice.machine
