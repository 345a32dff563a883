"""`planner models` and `planner machines`."""

from __future__ import annotations

import msgspec

from planner.catalogue.machines import known_machines
from planner.catalogue.models import MODELS
from planner.commands.options import (
    Json,
    note,
    print_json,
)
from planner.reports import machines as report_machines
from planner.reports.tables import console


def list_models(as_json: Json = False) -> None:
    """List the models of the catalogue.

    Training state is 12 bytes per parameter: fp32 weights and two moments.

    \b
    Examples:
      planner models
      planner models --json
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    if as_json:
        print_json([{"parameters": model.parameter_count, **msgspec.to_builtins(model)} for model in MODELS.values()])
    else:
        console().print(report_machines.models_table(MODELS.values()))


def list_machines(as_json: Json = False) -> None:
    """List the machine profiles.

    The shipped ones and those in ./profiles, where `planner profile` writes.

    \b
    Examples:
      planner machines
      planner machines --json
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    known = known_machines()
    profiles = known.by_name()
    if known.left_out:
        note(known.left_out)
    if as_json:
        print_json([{"name": name, "profile": profile} for name, profile in profiles.items()])
    else:
        console().print(report_machines.machines_table(profiles))
