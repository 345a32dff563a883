"""Which runs a campaign makes: configurations spread over the ranges asked for, policies drawn from what fits.

A random policy is no good policy: each knob is drawn for itself, and the draw counts if the whole fits. Only
kernels are as the planner would choose them.
So the predictions are held against schedules that no search would have proposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

from campaign_records import Configuration, Entry
from planner.catalogue.machines import with_budget
from planner.catalogue.models import find_model
from planner.search.best import search
from planner.search.counts import state_chunks
from planner.search.kernels import faster_kernels
from planner.search.shortfall import DoesNotFit
from simulator import footprint, predict
from slideplan import __version__
from slideplan.codec import digest
from slideplan.graph.tasks import TaskGraph, tier_bytes
from slideplan.graph.validate import validate
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.lowering.pools import PoolLayout
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Placement, Tier
from slideplan.plan import MachineReference, Plan, SearchRecord
from slideplan.policy import Policy, Workload

MICRO_BATCHES = 16  # at most: more make graphs of thousands of tasks that show nothing new
TRIES = 1000
STEP_S = 3.0  # longest step worth measuring, by FLOPs at the rate of the machine's largest product
DRIVE_STEP_S = 4.0  # the same, by what the drive moves at its rate of both directions at once

T = TypeVar("T")


# -- configurations ----------------------------------------------------------------------------


def draw_entries(
    machine: MachineProfile,
    models: Sequence[str],
    seq_lens: Sequence[int],
    global_batches: Sequence[int],
    gpu_memories: Sequence[int | None],
    configurations: int,
    runs_per_configuration: int,
    seed: int,
    drive: bool = False,
) -> list[Entry]:
    """Runs of `configurations` configurations, models in turn: one policy of each, then the next of each.

    With two or more runs per configuration the second is the planner's own choice; the others are random. `drive`: they have
    state on the SSD, all of them.
    Raises ValueError where a model has too few configurations that fit.
    """
    taken: list[Configuration] = []
    pending = {name: _spread(find_model(name), machine, seq_lens, global_batches, gpu_memories, seed, taken) for name in models}
    rounds: list[list[Entry]] = [[] for _ in range(runs_per_configuration)]
    for place in range(configurations):
        name = models[place % len(models)]
        for configuration in pending[name]:
            found = _configuration_entries(configuration, machine, runs_per_configuration, seed, drive)
            if found:
                taken.append(configuration)
                break
        else:
            raise ValueError(
                f"{name}: fewer configurations fit on {machine.name} than were asked for; lower --configurations, "
                "or widen --seq-len, --global-batch or --gpu-memory"
            )
        for entries, entry in zip(rounds, found, strict=True):
            entries.append(entry)
    return [entry for entries in rounds for entry in entries]


def _spread(
    model: ModelSpec,
    machine: MachineProfile,
    seq_lens: Sequence[int],
    global_batches: Sequence[int],
    gpu_memories: Sequence[int | None],
    seed: int,
    taken: Sequence[Configuration],
) -> Iterator[Configuration]:
    """Configurations of a model, each with the values that those taken until then, of any model, have least."""
    flops_per_s = machine.efficiency.gemm.points[-1].rate.p50
    left = [
        Configuration(model.name, Workload(seq_len=seq_len, global_batch=batch), memory)
        for seq_len in seq_lens
        for batch in global_batches
        for memory in gpu_memories
        # Forward, backward and recompute: 8 FLOPs a parameter and token.
        if seq_len <= model.max_positions and 8 * model.parameter_count * seq_len * batch <= STEP_S * flops_per_s
    ]
    Random(f"{seed}/{model.name}").shuffle(left)
    while left:
        yield left.pop(min(range(len(left)), key=lambda place: _likeness(left[place], taken)))


def _likeness(configuration: Configuration, others: Sequence[Configuration]) -> int:
    """How often the others have its values; those of its own model count twice."""
    mine = configuration.workload
    return sum(
        (1 + (other.model == configuration.model))
        * (
            (other.workload.seq_len == mine.seq_len)
            + (other.workload.global_batch == mine.global_batch)
            + (other.gpu_memory_bytes == configuration.gpu_memory_bytes)
        )
        for other in others
    )


def _configuration_entries(
    configuration: Configuration, machine: MachineProfile, runs: int, seed: int, drive: bool
) -> list[Entry]:
    """The runs of a configuration; none where the planner says that it does not fit, or draws found nothing that does."""
    model, workload = find_model(configuration.model), configuration.workload
    limited = limited_machine(configuration, machine)
    found = []
    for number in range(runs):
        if number == 1:
            answer = search(model, workload, limited)
            if isinstance(answer, DoesNotFit):
                return []
            plan = fixed_plan(model, answer.policy, workload, limited)
        else:
            policy = draw_policy(model, workload, limited, Random(f"{seed}/{configuration.name}/{number}"), drive)
            if policy is None:
                return []
            plan = fixed_plan(model, policy, workload, limited)
        found.append(
            Entry(
                configuration=configuration,
                choice="planned" if number == 1 else "random",
                number=number,
                policy=plan.policy,
                predicted_ns=plan.prediction.record.step_ns,
                reserved_bytes=sum(tier_bytes(plan.graph.pools, tier) for tier in (Tier.GPU, Tier.HOST)),
            )
        )
    return found


def limited_machine(configuration: Configuration, machine: MachineProfile) -> MachineProfile:
    """The machine with as much GPU memory as the configuration plans for."""
    return with_budget(machine, configuration.gpu_memory_bytes, None)


def entry_plan(entry: Entry, machine: MachineProfile) -> Plan:
    """The plan of a run, with its prediction."""
    configuration = entry.configuration
    limited = limited_machine(configuration, machine)
    return fixed_plan(find_model(configuration.model), entry.policy, configuration.workload, limited)


def fixed_plan(model: ModelSpec, policy: Policy, workload: Workload, machine: MachineProfile) -> Plan:
    """The plan of a given policy. Raises ValueError where it makes no sense or does not fit."""
    taken = footprint(model, policy, workload.seq_len, machine)
    graph = lower(model, policy, workload, taken)
    validate(graph)
    memory = ledger(graph, machine)
    if not memory.fits:
        raise ValueError(f"{model.name}: the policy does not fit on {machine.name}: {'; '.join(memory.lacking())}")
    return Plan(
        version=__version__,
        model=model,
        model_digest=digest(model),
        machine=MachineReference.of(machine),
        workload=workload,
        policy=policy,
        footprint=taken,
        graph=graph,
        ledger=memory,
        prediction=predict(graph, model, policy, workload, machine, memory),
        search=SearchRecord(candidates=1, pruned_by_capacity=0, pruned_by_bound=0, simulated=1),
        offloads=bool(policy.update_order),
    )


# -- policies ----------------------------------------------------------------------------------


def draw_policy(
    model: ModelSpec, workload: Workload, machine: MachineProfile, random: Random, drive: bool = False
) -> Policy | None:
    """A policy that fits on the machine, every knob drawn at random; None where TRIES draws held none."""
    for _ in range(TRIES):
        policy = _any_policy(model, workload, machine, random, drive)
        layout = PoolLayout(model, policy, workload, footprint(model, policy, workload.seq_len, machine))
        pools = tuple(layout.pools.values())
        if drive:
            assert machine.ssd is not None, "state on the SSD is drawn for machines that have one"
            longest = DRIVE_STEP_S * machine.ssd.duplex_bytes_per_s
            if not 0 < 2 * tier_bytes(pools, Tier.SSD) < longest:  # all of it is read and written once a step
                continue
        # Pools alone tell what a policy takes; edges are made for those that fit.
        if ledger(TaskGraph(pools=pools, tasks=()), machine).fits:
            return policy
    return None


def _any_policy(model: ModelSpec, workload: Workload, machine: MachineProfile, random: Random, drive: bool) -> Policy:
    """A policy that makes sense for model and workload, whether it fits or not."""
    layers = range(1, model.head_unit)
    batch = workload.global_batch
    micro_batches = random.choice([count for count in range(1, min(batch, MICRO_BATCHES) + 1) if batch % count == 0])
    state = {unit for unit in (0, model.head_unit) if random.random() < 1 / 3} | set(_some(random, layers))
    weights = state | set(_some(random, [unit for unit in layers if unit not in state]))
    passing = set(_some(random, sorted(weights - state))) if random.random() < 1 / 3 else set()
    offloaded = random.choice([0, model.layers, random.randint(0, model.layers)])
    kernels = faster_kernels(model, batch // micro_batches, workload.seq_len, machine)
    kept = set(_some(random, [unit for unit in layers if unit - 1 >= offloaded]))
    away = set(_some(random, sorted(kept))) if kernels != "eager" and random.random() < 1 / 3 else set()
    host = [unit for unit in range(model.units) if unit not in state and unit not in passing]
    on_drive = set(random.sample(host, random.randint(1, len(host)))) if drive and host else set()
    whole = {unit for unit in on_drive if random.random() < 1 / 3}
    deferred = random.choice([min(1, len(host)), len(host), random.randint(0, len(host))])
    order = (*reversed(host[deferred:]), *host[:deferred])
    streaming = sum(unit not in weights for unit in layers)
    widest = max(2, streaming)
    window = random.randint(2, random.choice([min(4, widest), widest])) if streaming else 0
    host_layers = sum(model.role(unit) is UnitRole.LAYER for unit in host)
    return Policy(
        micro_batch=batch // micro_batches,
        micro_batches=micro_batches,
        window=window,
        prefetch_depth=random.randint(1, window - 1) if streaming else 0,
        gradient_slots=random.randint(1, 3),
        host_gradient_slots=min(host_layers, waiting_gradients(model, order) + random.randint(0, 2)),
        boundary_slots=micro_batches + random.randint(1, 4) if offloaded else 0,
        inner_slots=random.randint(1, 4) if away else 0,
        state_slots=random.randint(1, 6) if passing else 0,
        state_chunks=state_chunks(model) if passing else 0,
        gradient_dtype=random.choice(["bf16", "fp32"]),
        kernels=kernels,
        state="exact",
        gradient_norms=False,
        update_order=order,
        units=tuple(
            Placement(
                weights=Tier.GPU if unit in weights else Tier.HOST,
                remainder=Tier.GPU if unit in state else Tier.SSD if unit in whole else Tier.HOST,
                moments=Tier.GPU if unit in state else Tier.SSD if unit in on_drive else Tier.HOST,
                boundary=Tier.HOST if unit < offloaded else Tier.GPU,
                inner=Tier.GPU if unit in kept else None,
                feed_forward=Tier.HOST if unit in away else Tier.GPU if unit in kept else None,
                update=Tier.GPU if unit in state or unit in passing else Tier.HOST,
            )
            for unit in range(model.units)
        ),
        ssd_slots=random.randint(1, 6) if on_drive else 0,
        ssd_chunks=state_chunks(model, Tier.HOST) if on_drive else 0,
    )


def waiting_gradients(model: ModelSpec, order: Sequence[int]) -> int:
    """Most layer gradients that wait on the host at once, arriving last unit first, updated in this order."""
    updates = list(order)
    waiting: set[int] = set()
    most = 0
    for unit in sorted(order, reverse=True):
        waiting.add(unit)
        most = max(most, sum(model.role(each) is UnitRole.LAYER for each in waiting))
        while updates and updates[0] in waiting:
            waiting.remove(updates.pop(0))
    return most


def _some(random: Random, items: Sequence[T]) -> list[T]:
    """None of them often, all of them at times; else some: the first, the last, or scattered."""
    kind = random.choice(["none", "none", "all", "first", "last", "scattered"])
    count = random.randint(0, len(items))
    match kind:
        case "none":
            return []
        case "all":
            return list(items)
        case "first":
            return list(items[:count])
        case "last":
            return list(items[len(items) - count :])
    return random.sample(list(items), count)


def sketch(model: ModelSpec, policy: Policy) -> str:
    """A policy in one line: `4x2 fp32 fused, window 3/2, ...`; how many layers do what, arrival or deferred updates."""
    layers = [policy.units[unit] for unit in range(1, model.head_unit)]
    state = sum(unit.moments is Tier.GPU for unit in layers)
    weights = sum(unit.weights is Tier.GPU for unit in layers)
    passing = sum(bool(unit.passing) for unit in layers)
    kept, inner = (sum(unit.feed_forward is tier for unit in layers) for tier in (Tier.GPU, Tier.HOST))
    away = sum(unit.boundary is Tier.HOST for unit in policy.units)
    drive = sum(unit.moments is Tier.SSD for unit in policy.units)
    ends = [name for name, unit in (("embedding", 0), ("head", -1)) if policy.units[unit].moments is Tier.GPU]
    parts = [f"{policy.micro_batches}x{policy.micro_batch} {policy.gradient_dtype} {policy.kernels}"]
    if policy.window:
        parts.append(f"window {policy.window}/{policy.prefetch_depth}")
    parts += [
        f"{word} {count}"
        for word, count in (
            ("weights", weights),
            ("state", state),
            ("state passing through", passing),
            ("kept", kept),
            ("kept on the host", inner),
            ("boundaries out", away),
            ("state on the SSD", drive),
        )
        if count
    ]
    parts += ends
    if policy.update_order:
        order = policy.update_order
        turn = next((place for place in range(1, len(order)) if order[place] > order[place - 1]), len(order))
        parts.append("updates on arrival" if turn == len(order) else f"{len(order) - turn + 1} updates deferred")
    return ", ".join(parts)


def describe(entry: Entry) -> str:
    """Name of a run with its policy, for people."""
    return f"{entry.name}: {sketch(find_model(entry.configuration.model), entry.policy)}"
