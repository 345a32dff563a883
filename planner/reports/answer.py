"""What the planner prints: verdicts, policies in words, tables. Reads in 100 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from planner.peers.compare import Contender, PeerComparison
from planner.reports.drive import drive_wear, format_drive_bytes
from planner.reports.tables import facts, new_table, parameter_count, section
from planner.search.shortfall import DoesNotFit
from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.waits import longest_wait
from slideplan.ledger import Ledger
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import TensorClass, Tier
from slideplan.plan import MachineReference, Plan, SearchRecord
from slideplan.policy import Kernels, Policy, StateFormat, Workload, passage
from slideplan.quantities import format_bytes, format_ns
from slideplan.saving import SaveCost

# -- a plan, or why there is none --------------------------------------------------------------


def verdict(answer: Plan | DoesNotFit) -> str:
    """The answer in one line."""
    if isinstance(answer, DoesNotFit):
        return f"does not fit: {'; '.join(answer.ledger.lacking())}"
    where = "fits" if answer.offloads else "fits on the GPU without offloading"
    return f"{where}, {answer.prediction.record.tokens_per_s:,.0f} tokens/s predicted, bound by {binding_lane(answer)}"


def binding_lane(plan: Plan) -> str:
    """What holds the critical path for longest."""
    critical = plan.prediction.critical_ns
    return max(critical, key=lambda name: critical[name])


def print_answer(out: Console, answer: Plan | DoesNotFit, *, pareto: bool = False) -> None:
    """The whole report of `planner simulate`; `pareto`: with the front of speed and memory."""
    out.print(f"[bold]{answer.model.name}: {verdict(answer)}[/bold]", highlight=False, soft_wrap=True)
    out.print(facts(_setting(answer.model, answer.machine, answer.workload)))
    if isinstance(answer, DoesNotFit):
        section(out, "What would make it fit", facts(_advice(answer)))
        section(out, "Least demanding policy", facts(policy_in_words(answer.model, answer.policy)))
        section(out, "Its memory", _ledger_table(answer.ledger))
        return
    section(out, "Policy", facts(policy_in_words(answer.model, answer.policy)))
    section(out, "Memory", _ledger_table(answer.ledger))
    section(out, "Predicted step", _lane_table(answer))
    out.print(_longest_wait(answer), style="dim", highlight=False)
    if answer.prediction.save is not None:
        section(out, "Saves", _saves_table(answer.prediction.save, answer.prediction.record.step_ns))
        out.print(_saves(answer.prediction.save), style="dim", highlight=False, soft_wrap=True)
    if answer.prediction.drive is not None:
        section(out, "Drive", facts(drive_wear(answer.prediction.drive)))
        out.print(
            "saves are not counted; --explain says what RAM in place of the drive would gain", style="dim", highlight=False
        )
    if answer.search.alternatives:
        section(out, "What another value of each knob would cost", _alternatives_table(answer))
        out.print("[dim]all other knobs searched again; ~ the budget ended before a faster one was ruled out[/dim]")
    if pareto:
        section(out, "Speed against memory: the best of what was simulated", _front_table(answer.search))
        out.print(
            "[dim]policy: micro-batches, window/depth, layers with weights/state on the GPU (+ state passing through it,\n"
            "E embedding, H head), layers kept, outputs away on the host, deferred updates, layer gradient slots GPU/host,\n"
            "their type[/dim]"
        )
    searched = [("objective", answer.search.objective), ("search", _search(answer))]
    if answer.search.batches:
        searched.insert(1, ("global batches", ", ".join(map(str, answer.search.batches))))
    section(out, "Where this comes from", facts([*_sources(answer), *searched]))


def _setting(model: ModelSpec, machine: MachineReference, workload: Workload) -> list[tuple[str, str]]:
    figures = "measured" if machine.source == "measured" else "figures from datasheets, not measured"
    return [
        ("model", f"{parameter_count(model.parameter_count)} parameters, {model.layers} layers, hidden {model.hidden}"),
        ("machine", f"{machine.name} ({figures})"),
        ("step", f"{workload.global_batch} sequences of {workload.seq_len} tokens, AdamW, every parameter trained"),
    ]


def _advice(answer: DoesNotFit) -> list[tuple[str, str]]:
    tiers = answer.ledger.tiers
    found: list[tuple[str, str]] = []
    host, ssd, gpu = (answer.bytes_needed[tier] for tier in (Tier.HOST, Tier.SSD, Tier.GPU))
    if host is not None:
        found.append(("host", f"at least {format_bytes(host)} of RAM beside this GPU"))
    if ssd is not None:
        found.append(("SSD", f"at least {format_drive_bytes(ssd)} of a drive beside this GPU and this host"))
    # Where host memory alone would do, a GPU many times as large is no advice.
    if gpu is not None and (tiers[Tier.GPU].headroom_bytes < 0 or gpu <= 2 * tiers[Tier.GPU].capacity_bytes):
        found.append(("GPU", f"at least {format_bytes(gpu)} of memory beside this host"))
    if host is None and ssd is None and gpu is None:
        need = (f"{format_bytes(tier.capacity_bytes - tier.headroom_bytes)} of {name.upper()}" for name, tier in tiers.items())
        found.append(("together", f"about {' and '.join(need)} memory"))
    if answer.states:
        found.append(("state", f"{' or '.join(f'--state {state}' for state in answer.states)}, which is lossy"))
    if answer.global_batch is not None:
        found.append(("workload", f"a global batch of at most {answer.global_batch} at this sequence length"))
    known = ", ".join(answer.machines) or "none of the known machines has the memory"
    found.append(("machines", f"{known}{' would do' if answer.machines else ''}"))
    return found


def policy_in_words(model: ModelSpec, policy: Policy) -> list[tuple[str, str]]:
    """What the policy does, one line per tensor class."""
    layers = range(1, model.head_unit)
    units = policy.units
    streaming = [unit for unit in layers if policy.streams_weights(unit)]
    resident = [unit for unit in layers if unit not in streaming]
    away = {tier: [u for u in range(model.units) if units[u].boundary is tier] for tier in (Tier.HOST, Tier.SSD)}
    weights = []
    if streaming:
        ahead = f"loaded up to {policy.prefetch_depth} ahead"
        weights.append(f"{_named(model, streaming)} stream through {policy.window} slots, {ahead}")
    if on_ssd := [unit for unit in streaming if units[unit].weights is Tier.SSD]:
        slots = f"{policy.host_weight_slots} slots on the host"
        weights.append(f"those of {_named(model, on_ssd)} lie on the SSD, and come through {slots} before")
    if resident:
        weights.append(f"{_named(model, resident)} stay on the GPU")
    boundary = [f"outputs of {_named(model, there)} wait on {_TIERS[tier]}" for tier, there in away.items() if there]
    inner = []
    for (kept, feed_forward), what in _INNER.items():
        if found := [unit for unit in layers if (units[unit].inner, units[unit].feed_forward) == (kept, feed_forward)]:
            inner.append(f"{what} {_named(model, found)}")
    lines = [
        ("micro-batches", f"{policy.micro_batches} of {policy.micro_batch} sequences each"),
        ("weights", "; ".join(weights)),
        ("state", "; ".join(_state(model, policy))),
        ("gradients", _gradients(policy)),
        ("boundaries", "; ".join(boundary or ["all stay on the GPU"])),
        ("activations", "; ".join(inner)),
        ("kernels", _KERNELS[policy.kernels]),
    ]
    return [*lines, ("CPU updates", _update_order(model, policy))] if policy.update_order else lines


MOST_RANGES = 6  # of layers, that a line names
_PROCESSORS = {Tier.GPU: "GPU", Tier.HOST: "CPU"}
_INNER = {
    (Tier.GPU, Tier.GPU): "kept for",
    (Tier.GPU, Tier.HOST): "kept with the feed-forward's part on the host for",
    (Tier.GPU, Tier.SSD): "kept with the feed-forward's part on the SSD for",
    (None, None): "recomputed for",
}


def _state(model: ModelSpec, policy: Policy) -> list[str]:
    """Where remainder and moments lie, and who updates them: one phrase for every pair of tiers."""
    groups: dict[tuple[Tier, Tier, Tier], list[int]] = {}
    for unit, placement in enumerate(policy.units):
        groups.setdefault((placement.moments, placement.remainder, placement.update), []).append(unit)
    found = []
    for (moments, remainder, update), units in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        where = (
            _TIERS[moments]
            if moments is remainder or not policy.split_master
            else f"{_TIERS[remainder]}, moments on {_TIERS[moments]}"
        )
        through = f" through {passage(policy, update).slots} slots" if moments is not update else ""
        through += f" and {policy.host_state_slots} on the host" if (moments, update) == (Tier.SSD, Tier.GPU) else ""
        found.append(f"{_named(model, units)} on {where}, updated by the {_PROCESSORS[update]}{through}{LOSSY[policy.state]}")
    return found


# What is said of state that is not exact.
LOSSY: dict[StateFormat, str] = {
    "exact": "",
    "bf16-moments": ", moments in bf16 (lossy)",
    "lean": ", weights in bf16 and moments in 8 bits (lossy)",
}
_TIERS = {Tier.GPU: "the GPU", Tier.HOST: "the host", Tier.SSD: "the SSD"}


_KERNELS: dict[Kernels, str] = {
    "eager": "eager: Hugging Face modules run by autograd",
    "fused": "fused: our own products and kernels",
    "graphed": "graphed: our own products and kernels, captured and replayed",
}


def _gradients(policy: Policy) -> str:
    summed = f"summed over micro-batches in {policy.gradient_dtype}" if policy.micro_batches > 1 else policy.gradient_dtype
    host = f", {policy.host_gradient_slots} on the host" if policy.host_gradient_slots else ""
    measured = "; their norm is measured" if policy.gradient_norms else ""
    return f"{summed}; layer slots: {policy.gradient_slots} on the GPU{host}{measured}"


def _update_order(model: ModelSpec, policy: Policy) -> str:
    """Descending while gradients arrive, then ascending as the next step needs them."""
    order = policy.update_order
    turn = next((place for place in range(1, len(order)) if order[place] > order[place - 1]), len(order))
    if turn == len(order):
        return "as gradients arrive"
    # The lowest unit ends the descent, but belongs to the ascent just as well.
    first = turn - 1
    deferred = f"{_named(model, sorted(order[first:]))} after backward, in the order in which the next step needs them"
    return f"{_named(model, sorted(order[:first]))} as gradients arrive; {deferred}" if first else deferred


def _named(model: ModelSpec, units: list[int]) -> str:
    """`all units`, or `embedding, layers 0-21, head`."""
    if len(units) == model.units:
        return "all units"
    words = []
    layers = [unit - 1 for unit in units if model.role(unit) is UnitRole.LAYER]
    if 0 in units:
        words.append("embedding")
    if len(layers) == model.layers:
        words.append(f"all {model.layers} layers")
    elif layers:
        words.append(f"layers {_ranges(layers)}" if len(layers) > 1 else f"layer {layers[0]}")
    if model.head_unit in units:
        words.append("head")
    return ", ".join(words)


def _ranges(numbers: list[int]) -> str:
    """``0-4,6,8-9`` of ascending numbers; of many separate ones, how many, and of which range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(runs) > MOST_RANGES:
        return f"{numbers[0]}-{numbers[-1]}, {len(numbers)} of them"
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _ledger_table(ledger: Ledger) -> Table:
    table = new_table("", *(f"{tier.upper()}" for tier in ledger.tiers))
    tiers = ledger.tiers.values()
    for tensor_class in TensorClass:
        if any(tensor_class in tier.items for tier in tiers):
            cells = (format_bytes(tier.items[tensor_class]) if tensor_class in tier.items else "-" for tier in tiers)
            table.add_row(tensor_class.replace("_", " "), *cells)
    table.add_row("fixed (context, process)", *(format_bytes(tier.fixed_bytes) for tier in tiers), end_section=True)
    table.add_row("peak use", *(format_bytes(tier.used_bytes) for tier in tiers))
    table.add_row("reserve", *(format_bytes(tier.reserve_bytes) for tier in tiers))
    left = (f"{'' if tier.headroom_bytes >= 0 else 'LACKS '}{format_bytes(abs(tier.headroom_bytes))}" for tier in tiers)
    table.add_row("headroom", *left, end_section=True)
    table.add_row("capacity", *(format_bytes(tier.capacity_bytes) for tier in tiers))
    return table


def _lane_table(plan: Plan) -> Table:
    record, critical = plan.prediction.record, plan.prediction.critical_ns
    table = new_table("lane", "tasks", "busy", "idle", "busy share", "critical path")
    step = max(1, record.step_ns)
    for lane, use in record.lanes.items():
        table.add_row(
            lane, f"{use.tasks:,}", format_ns(use.busy_ns), format_ns(use.idle_ns), f"{use.busy_ns / step:.1%}",
            f"{critical.get(lane, 0) / step:.1%}",
        )  # fmt: skip
    others = {name: share for name, share in critical.items() if name not in record.lanes}
    for name, share in others.items():
        table.add_row(name, "", "", "", "", f"{share / step:.1%}")
    table.add_section()
    table.add_row(
        "step", f"{len(plan.graph.tasks):,}", format_ns(record.step_ns), "", "", f"{record.tokens_per_s:,.0f} tokens/s"
    )
    return table


def _longest_wait(plan: Plan) -> str:
    """What keeps the compute lane waiting for longest, and because of which slot."""
    record, graph = plan.prediction.record, plan.graph
    wait = longest_wait(graph, record.spans, record.step_ns, Lane(LaneKind.COMPUTE))
    if wait is None:
        return "compute never waits"
    waited = f"compute waits longest, {format_ns(wait.duration_ns)}, before {graph.tasks[wait.task].name}"
    return waited if wait.reason is None else f"{waited}: {graph.reason(wait.reason)}"


_SAVE_EVERY = 500, 100  # steps, for which the report says what saves add


def _saves_table(save: SaveCost, step_ns: int) -> Table:
    every = (f"every {steps}" for steps in _SAVE_EVERY)
    table = new_table("", "size", "drive writes", "training pauses", "copied aside", *every)
    for name, size in (("checkpoint", save.checkpoint_bytes), ("weights alone", save.weights_bytes)):
        durations = save.write_ns(size), save.pause_ns(size)
        added = (save.added(size, steps, step_ns) for steps in _SAVE_EVERY)
        table.add_row(
            name,
            format_bytes(size),
            *("-" if duration is None else format_ns(duration) for duration in durations),
            format_bytes(min(size, save.staging_bytes)),
            *("-" if share is None else f"+{share:.1%}" for share in added),
        )
    return table


def _saves(save: SaveCost) -> str:
    """What the table of saves means, or what it lacks."""
    if save.write_bytes_per_s is None:
        return "no drive was measured, so what a save takes is not known: run `planner profile` on the drive\nand plan again"
    slower = f", {save.slowed:.1%} slower" if save.slowed >= 0.0005 else ""
    drive = f"{format_bytes(save.write_bytes_per_s)}/s"
    return (
        f"a pause begins with {format_ns(save.drain_ns)} in which all lanes empty; the drive takes {drive}\n"
        f"copied aside: into RAM that the plan leaves free, and written while training goes on{slower}\n"
        "every 500: what `--save-every 500`, or `--save-weights-every 500`, adds to the run"
    )


def _sources(plan: Plan) -> list[tuple[str, str]]:
    by_source: dict[str, list[str]] = {}
    for kind, source in plan.prediction.cost_sources.items():
        by_source.setdefault(source, []).append(kind)
    percent = plan.prediction.step_uncertainty_percent
    stated = [] if percent is None else [("step time", f"within {percent:.0f} % by the uncertainty of these costs")]
    return stated + [(f"{source} costs", ", ".join(kinds)) for source, kinds in by_source.items()]


def _search(plan: Plan) -> str:
    search = plan.search
    counts = (
        f"{search.candidates:,} policies: {search.pruned_by_capacity:,} too large, {search.pruned_by_bound:,} ruled out by "
        f"bounds, {search.simulated:,} simulated, {search.unpriced:,} left unpriced"
    )
    return f"{counts}; {_certificate(plan)}"


def _certificate(plan: Plan) -> str:
    """What is proven of the policies considered."""
    search, step_ns = plan.search, plan.prediction.record.step_ns
    if search.slowest_ns:
        less = plan.ledger.tiers[Tier.HOST].used_bytes - plan.ledger.tiers[Tier.HOST].fixed_bytes - search.bound_host_bytes
        within = f"with a step of at most {format_ns(search.slowest_ns)}"
        return f"none {within} takes less host memory" + (f" by more than {format_bytes(less)}" if less else "")
    gap = step_ns / search.bound_ns - 1 if search.bound_ns else 0.0
    return f"none can be faster by more than {gap:.1%}" if gap >= 0.0005 else "none can be faster"


def _front_table(search: SearchRecord) -> Table:
    tiers = list(search.front[0].peak_bytes)
    table = new_table("tokens/s", *(tier.upper() for tier in tiers), "batch", "policy", left=0)
    table.columns[-1].justify = "left"
    for point in search.front:
        memory = (format_bytes(point.peak_bytes[tier]) for tier in tiers)
        table.add_row(f"{point.tokens_per_s:,.0f}", *memory, str(point.global_batch), point.policy)
    return table


def _alternatives_table(plan: Plan) -> Table:
    record = plan.prediction.record
    table = new_table("knob", "plan", "next best", "tokens/s", *(tier.upper() for tier in record.peak_bytes))
    for other in plan.search.alternatives:
        change = other.tokens_per_s / record.tokens_per_s - 1
        table.add_row(
            other.knob, other.value, other.other_value, f"{'' if other.proven else '~'}{change:+.1%}",
            *(_change(other.peak_bytes[tier] - taken) for tier, taken in record.peak_bytes.items()),
        )  # fmt: skip
    return table


def _change(count: int) -> str:
    return f"{'+' if count > 0 else ''}{format_bytes(count)}" if count else "same"


# -- other systems -----------------------------------------------------------------------------


def print_comparison(out: Console, comparison: PeerComparison) -> None:
    """The whole report of `planner compare`."""
    out.print(f"[bold]{comparison.model.name}: {_gain(comparison)}[/bold]", highlight=False, soft_wrap=True)
    out.print(facts(_setting(comparison.model, comparison.machine, comparison.workload)))
    out.print()
    table = new_table("system", "step", "tokens/s", "ours is", "GPU", "host", "GPU busy", "bound by")
    for contender in comparison.contenders:
        table.add_row(contender.name, *_speed(contender, comparison.ours))
    out.print(table)
    for contender in comparison.contenders:
        lacking = [f"does not fit: {lack}" for lack in contender.lacking]
        section(out, f"{contender.name}: {contender.what}", facts([("-", line) for line in (*lacking, *contender.reasons)]))
    out.print(
        "\nOther systems are priced by what they do, at the rates of our kernels and our fused pass over host\n"
        "memory; how well they are written is left out.",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _gain(comparison: PeerComparison) -> str:
    """Our plan against the fastest peer that fits, in one line."""
    ours = comparison.ours
    rivals = [peer for peer in comparison.contenders[1:] if not peer.lacking and peer.prediction is not None]
    if ours.prediction is None:
        fitting = f"; {' and '.join(peer.name for peer in rivals)} would" if rivals else ", nor does any of the others"
        return f"does not fit{fitting}"
    speed = ours.prediction.record.tokens_per_s
    if not rivals:
        return f"{speed:,.0f} tokens/s predicted; none of the other systems fits"
    best = max(rivals, key=lambda peer: peer.prediction.record.tokens_per_s if peer.prediction else 0.0)
    assert best.prediction is not None
    factor = speed / best.prediction.record.tokens_per_s
    return f"{speed:,.0f} tokens/s predicted, {factor:.2f}x the fastest other system that fits, {best.name}"


def _speed(contender: Contender, ours: Contender) -> list[str]:
    memory = [format_bytes(contender.ledger.tiers[tier].used_bytes) for tier in (Tier.GPU, Tier.HOST)]
    prediction = contender.prediction
    if prediction is None or contender.lacking:
        return ["does not fit", "", "", *memory, "", ""]
    record = prediction.record
    gain = ""
    if ours.prediction is not None and contender is not ours:
        gain = f"{record.step_ns / ours.prediction.record.step_ns:.2f}x"
    busy = record.lanes[LaneKind.COMPUTE].busy_ns / max(1, record.step_ns)
    return [
        format_ns(record.step_ns), f"{record.tokens_per_s:,.0f}", gain, *memory, f"{busy:.0%}", contender.binding,
    ]  # fmt: skip
