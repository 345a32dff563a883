"""Lowering, passes 1 and 2: which task runs after which. Compute order first, then transfers into it.

Pass 1 puts the compute actions in vertical order: a unit runs all micro-batches of the step before
the next unit starts. Pass 2 inserts loads, offloads, fetches and updates at the place where they are
issued. Both give plain action lists; slots and edges come later (`slots`, `edges`).
"""

from __future__ import annotations

from typing import NamedTuple

from slideplan.plan.graph import TaskKind
from slideplan.plan.model import ModelSpec
from slideplan.plan.policy import Policy, Tier


class Action(NamedTuple):
    """A task before it has slots. `slot` is set for weight loads: the window slot they fill."""

    kind: TaskKind
    unit: int
    micro: int | None = None


class Visit(NamedTuple):
    """A unit's turn in the window: compute actions first..last, both included."""

    unit: int
    first: int
    last: int


def compute_order(model: ModelSpec, policy: Policy) -> list[Action]:
    """Pass 1: compute actions of one step in vertical order."""
    micros = range(policy.micro_batches)
    actions = []
    for unit in range(model.head_unit):
        kept = policy.units[unit].inner == "keep"
        actions += [Action(TaskKind.FORWARD_KEEP if kept else TaskKind.FORWARD, unit, micro) for micro in micros]
    actions += [Action(TaskKind.LOSS, model.head_unit, micro) for micro in micros]
    for unit in reversed(range(model.head_unit)):
        kept = policy.units[unit].inner == "keep" or unit == 0
        kind = TaskKind.BACKWARD if kept else TaskKind.BACKWARD_RECOMPUTE
        actions += [Action(kind, unit, micro) for micro in micros]
    return actions


def visits(actions: list[Action]) -> list[Visit]:
    """Runs of consecutive compute actions on the same unit, in order."""
    found: list[Visit] = []
    for place, action in enumerate(actions):
        if found and found[-1].unit == action.unit:
            found[-1] = found[-1]._replace(last=place)
        else:
            found.append(Visit(action.unit, place, place))
    return found


def window_slots(model: ModelSpec, policy: Policy, turns: list[Visit]) -> list[tuple[int, bool] | None]:
    """For each visit of a streaming layer, its window slot and whether its weights must be loaded.

    A visit that finds its unit still in the window loads nothing: this is the turn-around, where the
    last units of forward are the first of backward. Otherwise it takes the slot whose unit is needed
    farthest in the future (Belady's rule), the one left longest ago among equals.
    """
    never = len(turns)
    holds: list[int | None] = [None] * policy.window
    used_at = [-1] * policy.window
    found: list[tuple[int, bool] | None] = []
    for now, visit in enumerate(turns):
        if not policy.streams_weights(visit.unit):
            found.append(None)
            continue
        if visit.unit in holds:
            slot, load = holds.index(visit.unit), False
        else:
            next_use = [next((later for later in range(now, never) if turns[later].unit == unit), never) for unit in holds]
            slot, load = min(range(policy.window), key=lambda s: (-next_use[s], used_at[s], s)), True
        holds[slot], used_at[slot] = visit.unit, now
        found.append((slot, load))
    return found


def with_transfers(model: ModelSpec, policy: Policy, actions: list[Action]) -> list[Action]:
    """Pass 2: the step's actions on all lanes, in issue order.

    Loads stand `prefetch_depth` visits ahead of the visit that needs them; fetches of boundary
    activations as many compute actions ahead as their GPU slots allow. Gradients leave after a
    unit's last backward. A host update stands after its gradient's arrival and after the updates
    before it in `update_order`.
    """
    before: list[list[Action]] = [[] for _ in actions]
    turns = visits(actions)
    windows = window_slots(model, policy, turns)
    depth = max(policy.prefetch_depth, 1)
    loaded_once: set[int] = set()
    for now, (visit, window) in enumerate(zip(turns, windows, strict=True)):
        if window is not None:
            needs_load = window[1]
        else:  # a slot of its own: one load a step, if the host updates the weights
            needs_load = policy.units[visit.unit].state is Tier.HOST and visit.unit not in loaded_once
            loaded_once.add(visit.unit)
        if needs_load:
            before[turns[max(0, now - depth)].first].append(Action(TaskKind.LOAD_WEIGHTS, visit.unit))

    first_loss = next(place for place, action in enumerate(actions) if action.kind is TaskKind.LOSS)
    for place, action in enumerate(actions):
        if place > first_loss and action.unit not in (0, model.head_unit):
            source = action.unit - 1
            if policy.units[source].boundary is Tier.HOST:
                issue = max(first_loss, place - (policy.boundary_slots - 1))
                before[issue].append(Action(TaskKind.FETCH_BOUNDARY, source, action.micro))

    issued: list[Action] = []
    waiting_updates = list(policy.update_order)
    arrived: set[int] = set()
    last_action = {visit.unit: visit.last for visit in turns}
    for place, action in enumerate(actions):
        issued += before[place]
        issued.append(action)
        if place < first_loss and policy.units[action.unit].boundary is Tier.HOST:
            issued.append(Action(TaskKind.OFFLOAD_BOUNDARY, action.unit, action.micro))
        if place < first_loss or place != last_action[action.unit]:
            continue
        if policy.units[action.unit].state is Tier.GPU:
            issued.append(Action(TaskKind.UPDATE_GPU, action.unit))
            continue
        issued.append(Action(TaskKind.OFFLOAD_GRADIENT, action.unit))
        arrived.add(action.unit)
        while waiting_updates and waiting_updates[0] in arrived:
            issued.append(Action(TaskKind.UPDATE_HOST, waiting_updates.pop(0)))
    assert not waiting_updates, "every unit's gradient arrives within the step"
    return issued
