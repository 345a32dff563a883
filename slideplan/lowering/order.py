"""Lowering, passes 1 and 2: which task runs after which. Compute order first, then transfers into it.

Pass 1 puts the compute actions in vertical order: a unit runs all micro-batches of the step before
the next unit starts. Pass 2 inserts loads, offloads, fetches and updates at the place where they are
issued. Both give plain action lists; slots and edges come later (`slots`, `edges`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from slideplan.graph.operations import (
    BACKWARD,
    BACKWARD_RECOMPUTE,
    CAST_WEIGHTS,
    CLIP_GRADIENT,
    FORWARD,
    FORWARD_KEEP,
    LOAD_WEIGHTS,
    LOSS,
    OFFLOAD_GRADIENT,
    READ_WEIGHTS,
    REFRESH_WEIGHTS,
    WRITE_WEIGHTS,
    Operation,
    TaskKind,
    copy,
    update,
)
from slideplan.model import ModelSpec
from slideplan.placement import TensorClass, Tier, hops
from slideplan.policy import Policy


class Action(NamedTuple):
    """A task before it has slots."""

    operation: Operation
    unit: int
    micro: int | None = None
    chunk: int | None = None


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
        kept = policy.units[unit].keeps
        actions += [Action(FORWARD_KEEP if kept else FORWARD, unit, micro) for micro in micros]
    actions += [Action(LOSS, model.head_unit, micro) for micro in micros]
    for unit in reversed(range(model.head_unit)):
        if unit > 0 and not policy.runs_again(unit):  # the last layer of a block: those before it run forward once more
            block = range(unit - (unit - 1) % policy.system.checkpoint_interval, unit)
            actions += [Action(FORWARD, other, micro) for other in block for micro in micros]
        kept = policy.units[unit].keeps or unit == 0
        kind = BACKWARD if kept else BACKWARD_RECOMPUTE
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


class WindowUse(NamedTuple):
    """What a visit needs of the window: which unit's weights, in which slot, and whether they must be loaded."""

    unit: int
    slot: int
    load: bool


def window_slots(model: ModelSpec, policy: Policy, turns: list[Visit]) -> list[WindowUse | None]:
    """For each visit that reads streamed weights, its slot of the window.

    A visit that finds its unit still in the window loads nothing: this is the turn-around, where the
    last units of forward are the first of backward. Otherwise it takes the slot whose unit is needed
    farthest in the future (Belady's rule), the one left longest ago among equals.
    """
    needs = [_streamed(model, policy, visit, now) for now, visit in enumerate(turns)]
    return _in_slots(needs, policy.window, policy.prefetch_depth)


def _in_slots(needs: Sequence[int | None], slots: int, depth: int) -> list[WindowUse | None]:
    """For each turn that needs a unit's weights, its slot: by Belady's rule, each load issued `depth` turns ahead."""
    assert depth < max(1, slots), "a slot must be free for the load that is issued ahead"
    never = len(needs)
    holds: list[int | None] = [None] * slots
    used_at = [-never - depth] * slots
    found: list[WindowUse | None] = []
    for now, needed in enumerate(needs):
        if needed is None:
            found.append(None)
            continue
        if needed in holds:
            slot, load = holds.index(needed), False
        else:
            next_use = [
                never if unit is None else next((later for later in range(now, never) if needs[later] == unit), never)
                for unit in holds
            ]
            # A load is issued `depth` turns ahead: slots that those turns use are not free yet.
            free = [slot for slot in range(slots) if used_at[slot] < now - depth]
            slot, load = min(free, key=lambda s: (-next_use[s], used_at[s], s)), True
        holds[slot], used_at[slot] = needed, now
        found.append(WindowUse(needed, slot, load))
    return found


def _streamed(model: ModelSpec, policy: Policy, visit: Visit, now: int) -> int | None:
    """The unit whose streamed weights a visit reads. The embedding's backward reads none; a tied head, the embedding's."""
    if visit.unit == 0 and now > 0:
        return None
    unit = 0 if visit.unit == model.head_unit and model.tied_embeddings else visit.unit
    return unit if policy.streams_weights(unit) else None


def with_transfers(
    model: ModelSpec, policy: Policy, actions: list[Action], windows: Sequence[WindowUse | None]
) -> list[Action]:
    """Pass 2: the step's actions on all lanes, in issue order. `windows`: of `window_slots` for these actions.

    Loads stand `prefetch_depth` visits ahead of the visit that needs them, each behind its cast where
    there is one; fetches of activations as far ahead as their GPU slots allow.
    Gradients leave after a unit's last backward. State that passes through the GPU comes as many chunks ahead as
    there are slots for it, from the first loss on, and leaves after its update. So does state on the SSD, in the order of
    updates and from the step's begin on: its first chunks are read as soon as those of the step before have left their
    slots. A host update stands after
    its gradient's arrival and after the updates before it in `update_order`; with clipping, after all
    gradients' clipping.
    """
    before: list[list[Action]] = [[] for _ in actions]
    turns = visits(actions)
    for issue, load in _loads(policy, turns, windows):
        before[issue].append(load)
    first_loss = next(place for place, action in enumerate(actions) if action.operation == LOSS)
    for issue, fetch in _fetches(model, policy, actions, first_loss):
        before[issue].append(fetch)
    passing = policy.passing_units(Tier.GPU)[::-1]  # as gradients are made
    states = iter(_arrivals(model, policy, passing))
    before[first_loss] += chain.from_iterable(islice(states, policy.state_slots))
    reads = iter(_arrivals(model, policy, [unit for unit in policy.update_order if policy.passing(unit)]))
    before[0] += chain.from_iterable(islice(reads, policy.ssd_slots))

    issued: list[Action] = []
    waiting_updates = list(policy.update_order)
    arrived: set[int] = set()
    last_action = {visit.unit: visit.last for visit in turns}
    for place, action in enumerate(actions):
        issued += before[place]
        issued.append(action)
        if place < first_loss:
            issued += _offloads(policy, action)
        elif place == last_action[action.unit]:  # its gradient is complete
            if policy.units[action.unit].update is Tier.GPU:
                issued += _update(model, policy, action.unit, states)
            else:
                issued.append(Action(OFFLOAD_GRADIENT, action.unit))
                arrived.add(action.unit)
                issued += _host_updates(model, policy, arrived, waiting_updates, reads)
    assert not waiting_updates, "every unit's gradient arrives within the step"
    return issued


def with_host_weights(policy: Policy, issued: Sequence[Action]) -> list[Action]:
    """Pass 2, where weights lie on the SSD: the step's actions with their way between there and the host.

    A load or an update that does not find them in a host slot has them read, one such use ahead, into the slot whose unit
    is needed farthest in the future, as in the window. So they stay from a backward's load to an update that follows soon,
    where slots are enough. The update changes them in the host slot, from which they are written back once.
    """
    away = {unit for unit, placement in enumerate(policy.units) if placement.weights is Tier.SSD}
    uses: list[tuple[int, int]] = []  # unit, and where the use begins
    last_update: dict[int, int] = {}
    for place, (operation, unit, _, _) in enumerate(issued):
        if unit in away and (operation == LOAD_WEIGHTS or operation.kind is TaskKind.UPDATE):
            if not uses or uses[-1][0] != unit:
                uses.append((unit, place))
            if operation.kind is TaskKind.UPDATE:
                last_update[unit] = place
    if not uses:
        return list(issued)
    depth = int(policy.host_weight_slots > 1)
    before: dict[int, list[Action]] = {}
    for number, found in enumerate(_in_slots([unit for unit, _ in uses], policy.host_weight_slots, depth)):
        if found is not None and found.load:
            before.setdefault(uses[max(0, number - depth)][1], []).append(Action(READ_WEIGHTS, found.unit))
    actions: list[Action] = []
    for place, action in enumerate(issued):
        actions += before.get(place, ())
        actions.append(action)
        if last_update.get(action.unit) == place:
            actions.append(Action(WRITE_WEIGHTS, action.unit))
    return actions


def _loads(policy: Policy, turns: list[Visit], windows: Sequence[WindowUse | None]) -> Iterator[tuple[int, Action]]:
    """Loads of weights, with the compute action before which each is issued."""
    depth = max(policy.prefetch_depth, 1)
    loaded_once: set[int] = set()
    for now, (visit, window) in enumerate(zip(turns, windows, strict=True)):
        loads = [window.unit] if window is not None and window.load else []
        # Weights with a slot of their own are loaded once a step, if the host updates them.
        own = not policy.streams_weights(visit.unit) and policy.units[visit.unit].update is Tier.HOST
        if own and visit.unit not in loaded_once:
            loads.append(visit.unit)
            loaded_once.add(visit.unit)
        issue = turns[max(0, now - depth)].first
        for unit in loads:
            if policy.system.staging == "per_load":
                yield issue, Action(CAST_WEIGHTS, unit)
            yield issue, Action(LOAD_WEIGHTS, unit)


def _offloads(policy: Policy, action: Action) -> Iterator[Action]:
    """What a forward has made and what waits elsewhere until backward, on its way there."""
    placement = policy.units[action.unit]
    for tensor, tier in ((TensorClass.BOUNDARY, placement.boundary), (TensorClass.FEED_FORWARD, placement.feed_forward)):
        for source, target in hops(Tier.GPU, tier or Tier.GPU):
            yield Action(copy(source, target, tensor), action.unit, action.micro)


def _arrivals(model: ModelSpec, policy: Policy, units: Sequence[int]) -> Iterator[list[Action]]:
    """Chunks of passing state, on their way to where they are updated: the copies of each, in this order.

    What is on its way from the SSD to the GPU is read into the host as far ahead as it has slots, but for one: through that
    one, chunks come back.
    """
    ahead = policy.host_state_slots - 1
    ways: list[list[Action]] = []
    for unit in units:
        placement = policy.units[unit]
        copies = [copy(*hop, *policy.passing(unit)) for hop in hops(placement.moments, placement.update)]
        ways += [[Action(each, unit, chunk=chunk) for each in copies] for chunk in range(policy.chunks(model, unit))]
    reads = iter([way[0] for way in ways if len(way) > 1])
    first = [*islice(reads, max(0, ahead))]
    for way in ways:
        if len(way) == 1:
            yield way
        elif ahead:
            yield [*first, way[-1], *islice(reads, 1)]
            first = []
        else:
            yield way


def _update(model: ModelSpec, policy: Policy, unit: int, arrivals: Iterator[list[Action]]) -> Iterator[Action]:
    """An update. Of state that passes through, each chunk that leaves makes room for one of those still to come."""
    placement = policy.units[unit]
    if not policy.passing(unit):
        yield Action(update(placement.update), unit)
        return
    leaves = [copy(*hop, *policy.passing(unit)) for hop in hops(placement.update, placement.moments)]
    for chunk in range(policy.chunks(model, unit)):
        yield Action(update(placement.update), unit, chunk=chunk)
        for each in leaves:
            yield Action(each, unit, chunk=chunk)
        yield from chain.from_iterable(islice(arrivals, 1))


def _fetches(model: ModelSpec, policy: Policy, actions: list[Action], first_loss: int) -> Iterator[tuple[int, Action]]:
    """Fetches of activations that wait elsewhere, with the compute action before which each is issued.

    Boundary activations, of which compute makes others meanwhile, come as many compute actions ahead as there
    are slots beside the one in use; inner ones as many backwards that need some.
    """
    units = policy.units
    again = [(place, action.unit, action.micro) for place, action in enumerate(actions) if place > first_loss]
    boundaries = [
        _Return(max(first_loss, place - (policy.boundary_slots - 1)), units[unit - 1].boundary, unit - 1, micro)
        for place, unit, micro in again
        if unit not in (0, model.head_unit) and units[unit - 1].boundary is not Tier.GPU
    ]
    yield from _returns(TensorClass.BOUNDARY, boundaries, policy.host_boundary_slots, first_loss)
    places, inner = [], []
    for place, unit, micro in again:
        tier = units[unit].feed_forward
        if tier is not None and tier is not Tier.GPU:
            places.append(place)
            ahead = len(places) - policy.inner_slots
            inner.append(_Return(places[ahead] if ahead >= 0 else first_loss, tier, unit, micro))
    yield from _returns(TensorClass.FEED_FORWARD, inner, policy.host_inner_slots, first_loss)


class _Return(NamedTuple):
    """An activation that comes back to the GPU: from where, and the compute action before which its last copy is issued."""

    issue: int
    tier: Tier
    unit: int
    micro: int | None


def _returns(tensor: TensorClass, wanted: Sequence[_Return], host_slots: int, first_loss: int) -> Iterator[tuple[int, Action]]:
    """Copies to the GPU. What lies on the SSD is read into the host from the first loss on, as far ahead as it has slots."""
    reads = iter([Action(copy(Tier.SSD, Tier.HOST, tensor), each.unit, each.micro) for each in wanted if each.tier is Tier.SSD])
    yield from ((first_loss, read) for read in islice(reads, host_slots))
    for each in wanted:
        yield each.issue, Action(copy(Tier.HOST, Tier.GPU, tensor), each.unit, each.micro)
        if each.tier is Tier.SSD:  # the host slot is free for the next
            yield from ((each.issue, read) for read in islice(reads, 1))


def _host_updates(
    model: ModelSpec, policy: Policy, arrived: set[int], waiting: list[int], reads: Iterator[list[Action]]
) -> list[Action]:
    """What the CPU can be told to do now that these gradients have arrived; units updated leave `waiting`."""
    issued: list[Action] = []
    if policy.system.clipping == "serial":
        if len(arrived) < len(waiting):
            return issued
        issued += [Action(CLIP_GRADIENT, unit) for unit in waiting]
    while waiting and waiting[0] in arrived:
        unit = waiting.pop(0)
        issued += _update(model, policy, unit, reads)
        if policy.system.staging == "per_update":
            issued.append(Action(REFRESH_WEIGHTS, unit))
    return issued
