"""Random legal schedules of tiny models."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from builders import tiny_model
from slideplan.footprint import Footprint
from slideplan.graph.tasks import TaskGraph
from slideplan.lowering.lower import lower
from slideplan.model import ModelSpec
from slideplan.placement import Placement, Tier
from slideplan.policy import OtherSystem, Policy, Workload

INNER = {
    "recompute": (None, None),
    "keep": (Tier.GPU, Tier.GPU),
    "offload": (Tier.GPU, Tier.HOST),
    "drive": (Tier.GPU, Tier.SSD),
}
FOOTPRINT = Footprint(inner_bytes=4096, workspace_bytes=8192)


# Remainder and moments, of units with state on the SSD.
SSD = ((Tier.SSD, Tier.SSD), (Tier.HOST, Tier.SSD))


class Case(NamedTuple):
    model: ModelSpec
    policy: Policy
    workload: Workload

    def graph(self) -> TaskGraph:
        return lower(self.model, self.policy, self.workload, FOOTPRINT)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any policy that `Policy.check` accepts and whose host gradients have room for its update order."""
    model = tiny_model(layers=draw(st.integers(1, 6)), tied_embeddings=draw(st.booleans()))
    micro_batch, micro_batches = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    units: list[Placement] = []
    kernels = draw(st.sampled_from(["eager", "fused"]))
    inners = ["recompute", "keep"] if kernels == "eager" else [*INNER]
    for unit in range(model.units):
        is_layer = 0 < unit < model.head_unit
        state = draw(st.sampled_from([Tier.HOST, Tier.HOST, Tier.GPU]))
        weights = state if not is_layer or state is Tier.GPU else draw(st.sampled_from(Tier))
        boundary = draw(st.sampled_from([Tier.HOST, Tier.GPU, Tier.SSD])) if unit < model.layers else Tier.GPU
        may_keep = is_layer and units[unit - 1].boundary is Tier.GPU
        inner, feed_forward = INNER[draw(st.sampled_from(inners)) if may_keep else "recompute"]
        passes = is_layer and (weights, state) == (Tier.GPU, Tier.HOST) and draw(st.booleans())
        may_leave = state is Tier.HOST
        remainder, moments = (
            draw(st.sampled_from(SSD[:1] if passes else SSD)) if may_leave and draw(st.booleans()) else (state, state)
        )
        units.append(
            Placement(
                weights=weights,
                remainder=remainder,
                moments=moments,
                boundary=boundary,
                inner=inner,
                feed_forward=feed_forward,
                update=Tier.GPU if passes else state,
            )
        )
    streams = any(units[unit].weights is not Tier.GPU for unit in range(1, model.head_unit))
    window = draw(st.integers(2, model.layers + 2)) if streams else 0
    arrival = [unit for unit in reversed(range(model.units)) if units[unit].update is Tier.HOST]
    order = draw(st.permutations(arrival))
    host_layers = sum(0 < unit < model.head_unit for unit in arrival)
    in_order = list(order) == arrival and host_layers > 0
    boundaries, inner = ({getattr(unit, field) for unit in units} for field in ("boundary", "feed_forward"))
    passes_on = {unit.update for unit in units if unit.passing}
    far = any(unit.update is Tier.GPU and unit.moments is Tier.SSD for unit in units)
    policy = Policy(
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        window=window,
        prefetch_depth=draw(st.integers(1, window - 1)) if streams else 0,
        gradient_slots=draw(st.integers(1, 3)),
        host_gradient_slots=draw(st.integers(1, host_layers)) if in_order else host_layers,
        boundary_slots=micro_batches + draw(st.integers(1, 4)) if boundaries - {Tier.GPU} else 0,
        inner_slots=draw(st.integers(1, 3)) if inner - {Tier.GPU, None} else 0,
        state_slots=draw(st.integers(1, 3)) if Tier.GPU in passes_on else 0,
        state_chunks=draw(st.integers(1, 4)) if Tier.GPU in passes_on else 0,
        gradient_dtype=draw(st.sampled_from(["bf16", "fp32"])),
        kernels=kernels,
        state=draw(st.sampled_from(["exact", "bf16-moments", "lean"])),
        gradient_norms=draw(st.booleans()),
        update_order=tuple(order),
        units=tuple(units),
        ssd_slots=draw(st.integers(1, 4)) if Tier.HOST in passes_on else 0,
        ssd_chunks=draw(st.integers(1, 4)) if Tier.HOST in passes_on else 0,
        host_state_slots=draw(st.integers(1, 3)) if far else 0,
        host_weight_slots=draw(st.integers(1, 5)) if any(unit.weights is Tier.SSD for unit in units) else 0,
        host_boundary_slots=draw(st.integers(1, 3)) if Tier.SSD in boundaries else 0,
        host_inner_slots=draw(st.integers(1, 3)) if Tier.SSD in inner else 0,
    )
    return Case(model, policy, Workload(seq_len=32, global_batch=micro_batch * micro_batches))


@st.composite
def foreign_cases(draw: st.DrawFn) -> Case:
    """Policies that describe how other systems work: any mix of those knobs, all state on the host."""
    tied = draw(st.booleans())
    model = tiny_model(layers=draw(st.integers(1, 6)), tied_embeddings=tied)
    micro_batch, micro_batches = 1, draw(st.integers(1, 2))
    master, staging = draw(
        st.sampled_from(
            [("split", "none"), ("bf16", "none"), ("bf16", "per_update"), ("fp32", "per_load"), ("fp32", "per_update")]
        )
    )
    uniform, clips = draw(st.booleans()), draw(st.booleans())
    interval = draw(st.integers(1, 3))
    offloads = interval == 1 and draw(st.booleans())
    passing = any(unit % interval for unit in range(model.layers))
    window = draw(st.integers(2, model.layers + 2))
    arrival = [*reversed(range(model.units))]
    order = arrival if draw(st.booleans()) else draw(st.permutations(arrival))
    all_waiting = clips or order != arrival
    policy = Policy(
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        window=window,
        prefetch_depth=draw(st.integers(1, window - 1)),
        gradient_slots=draw(st.integers(2, 4)),
        host_gradient_slots=model.units if all_waiting else draw(st.integers(1, 3)),
        boundary_slots=micro_batches * (interval + 1) + 1 if offloads or passing else 0,
        inner_slots=0,
        state_slots=0,
        state_chunks=0,
        gradient_dtype=draw(st.sampled_from(["bf16", "fp32"])),
        kernels=draw(st.sampled_from(["eager", "fused"])),
        state="exact",
        gradient_norms=False,
        update_order=tuple(order),
        units=tuple(
            Placement(
                weights=Tier.GPU if tied and uniform and unit == model.head_unit else Tier.HOST,
                boundary=Tier.HOST if offloads and unit < model.layers else Tier.GPU,
            )
            for unit in range(model.units)
        ),
        other=OtherSystem(
            name="other",
            master=master,
            staging=staging,
            step_barrier=draw(st.booleans()),
            clipping="serial" if clips else "none",
            copy_lanes=draw(st.sampled_from(["separate", "shared"])),
            unit_slots="uniform" if uniform else "sized",
            pinned_sizes=draw(st.sampled_from(["exact", "power_of_two"])),
            checkpoint_interval=interval,
        ),
    )
    return Case(model, policy, Workload(seq_len=32, global_batch=micro_batch * micro_batches))
