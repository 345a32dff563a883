"""Small models, machines and policies for tests. All figures are round, so that tests can compute with them."""

from __future__ import annotations

from typing import Any

import msgspec

from slideplan.ledger import Ledger
from slideplan.machine.profile import (
    Curve,
    Efficiency,
    GpuProfile,
    HostProfile,
    LinkProfile,
    MachineProfile,
    OptimizerProfile,
    Provenance,
    RatePoint,
    Spread,
    SsdProfile,
)
from slideplan.model import ModelSpec
from slideplan.placement import Placement, Tier
from slideplan.policy import OtherSystem, Policy, Workload
from slideplan.quantities import GIB
from slideplan.saving import SaveCost, checkpoint_bytes, staging_bytes, weights_bytes

GB_PER_S = 10**9


def tiny_model(**changes: Any) -> ModelSpec:
    """Four layers, hidden 64, untied; any field can be given another value."""
    fields: dict[str, Any] = {
        "name": "tiny", "architecture": "llama", "hidden": 64, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "ffn": 128, "vocabulary": 256, "tied_embeddings": False, "max_positions": 512,
    }  # fmt: skip
    return ModelSpec(**fields | changes)


def tiny_workload(seq_len: int = 32, global_batch: int = 4) -> Workload:
    """Matches `tiny_policy` as it is by default."""
    return Workload(seq_len=seq_len, global_batch=global_batch)


def tiny_policy(
    model: ModelSpec,
    *,
    micro_batch: int = 2,
    micro_batches: int = 2,
    window: int = 2,
    gradient_dtype: str = "fp32",
    resident_weights: tuple[int, ...] = (),
    resident_state: tuple[int, ...] = (),
    stream_state: tuple[int, ...] = (),
    keep: tuple[int, ...] = (),
    offload_inner: tuple[int, ...] = (),
    offload_boundaries: bool = False,
    ssd_state: tuple[int, ...] = (),
    ssd_moments: tuple[int, ...] = (),
    ssd_stream: tuple[int, ...] = (),
    ssd_weights: tuple[int, ...] = (),
    ssd_boundaries: tuple[int, ...] = (),
    ssd_inner: tuple[int, ...] = (),
    **changes: Any,
) -> Policy:
    """Everything on the host, weights streamed, updates in backward order; legal as it stands.

    resident_weights, resident_state, keep: units with weights, with weights and state, and with inner
    activations on the GPU. stream_state: with weights there, through which their state passes.
    offload_inner: units with a part of those activations on the host, which eager kernels cannot.
    ssd_state, ssd_moments: units with state, or with moments alone, on the SSD.
    ssd_stream: as stream_state, with that state there.
    ssd_weights: layers with weights there. ssd_boundaries: units whose output waits there. ssd_inner: as offload_inner,
    with that part there.
    offload_boundaries: outputs of all layers but the last wait on the host, where nothing that is kept
    forbids it. `changes` replaces fields of the policy.
    """
    on_gpu = {*resident_weights, *resident_state, *stream_state, *ssd_stream}
    updated_there = {*resident_state, *stream_state, *ssd_stream}
    away = {**dict.fromkeys(offload_inner, Tier.HOST), **dict.fromkeys(ssd_inner, Tier.SSD)}
    kept = {*keep, *away}

    def boundary(unit: int) -> Tier:
        if unit in ssd_boundaries:
            return Tier.SSD
        return Tier.HOST if offload_boundaries and unit < model.layers and unit + 1 not in kept else Tier.GPU

    on_ssd = {*ssd_state, *ssd_moments}
    from_ssd = {*on_ssd, *ssd_stream}
    units = tuple(
        Placement(
            weights=Tier.GPU if unit in on_gpu else Tier.SSD if unit in ssd_weights else Tier.HOST,
            remainder=Tier.GPU if unit in resident_state else Tier.SSD if unit in from_ssd - {*ssd_moments} else Tier.HOST,
            moments=Tier.GPU if unit in resident_state else Tier.SSD if unit in from_ssd else Tier.HOST,
            boundary=boundary(unit),
            inner=Tier.GPU if unit in kept else None,
            feed_forward=away.get(unit, Tier.GPU if unit in keep else None),
            update=Tier.GPU if unit in updated_there else Tier.HOST,
        )
        for unit in range(model.units)
    )
    layers = range(1, model.head_unit)
    streams = any(unit not in on_gpu for unit in layers)
    host_layers = sum(unit not in updated_there for unit in layers)
    order = tuple(unit for unit in reversed(range(model.units)) if unit not in updated_there)
    fields: dict[str, Any] = {
        "micro_batch": micro_batch,
        "micro_batches": micro_batches,
        "window": window if streams else 0,
        "prefetch_depth": window - 1 if streams else 0,
        "gradient_slots": 2,
        # Updates in another than backward order keep gradients waiting: then every layer gets a slot.
        "host_gradient_slots": host_layers if "update_order" in changes else min(2, host_layers),
        "boundary_slots": micro_batches + 2 if any(unit.boundary is not Tier.GPU for unit in units) else 0,
        "inner_slots": 2 if away else 0,
        "state_slots": 2 if stream_state or ssd_stream else 0,
        "state_chunks": 3 if stream_state or ssd_stream else 0,
        "host_state_slots": 2 if ssd_stream else 0,
        "ssd_slots": 2 if on_ssd else 0,
        "ssd_chunks": 3 if on_ssd else 0,
        "host_weight_slots": 3 if ssd_weights else 0,
        "host_boundary_slots": 2 if ssd_boundaries else 0,
        "host_inner_slots": 2 if ssd_inner else 0,
        "gradient_dtype": gradient_dtype,
        "kernels": "eager",
        "state": "exact",
        "gradient_norms": False,
        "update_order": order,
        "units": units,
    }
    # Knobs of other systems are given beside those of a policy.
    other = {knob: changes.pop(knob) for knob in OtherSystem.__struct_fields__ if knob in changes}
    return Policy(**fields | changes, other=OtherSystem(**{"name": "other"} | other) if other else None)


def tiny_save(model: ModelSpec, policy: Policy, memory: Ledger) -> SaveCost:
    """Saves of the size that they have, copied at 10 GB/s and written at 1 GB/s, with nothing to drain."""
    size_bytes = checkpoint_bytes(model, policy)
    return SaveCost(
        checkpoint_bytes=size_bytes,
        weights_bytes=weights_bytes(model),
        staging_bytes=staging_bytes(memory, size_bytes),
        drain_ns=0,
        copy_bytes_per_s=10 * GB_PER_S,
        write_bytes_per_s=GB_PER_S,
        slowed=0.0,
    )


def flat_curve(rate_per_s: int, latency_size: int = 1) -> Curve:
    """The same rate at every size from `latency_size` on; below it, the time of `latency_size`."""
    return Curve(points=(RatePoint(size=latency_size, rate=Spread.exact(rate_per_s)),))


def tiny_machine(**changes: Any) -> MachineProfile:
    """Links of 10 GB/s alone and 16 GB/s together, 40 GB/s of DRAM, an optimizer of 30 GB/s; no measured units."""
    machine = MachineProfile(
        name="tiny",
        gpu=GpuProfile(name="test gpu", backend="cuda", memory_bytes=GIB, context_bytes=0, memory_bytes_per_s=1000 * GB_PER_S),
        host=HostProfile(cpu="test cpu", cores=4, memory_bytes=4 * GIB, process_bytes=0, dram_bytes_per_s=40 * GB_PER_S),
        link=LinkProfile(h2d=flat_curve(10 * GB_PER_S), d2h=flat_curve(10 * GB_PER_S), duplex_bytes_per_s=16 * GB_PER_S),
        optimizer=OptimizerProfile(
            threads=4, host_bytes_per_s=Spread.exact(30 * GB_PER_S), gpu_bytes_per_s=Spread.exact(800 * GB_PER_S)
        ),
        ssd=None,
        efficiency=Efficiency(
            gemm=flat_curve(100 * 10**12), attention_flops_per_s=50 * 10**12, elementwise_bytes_per_s=500 * GB_PER_S
        ),
        costs=(),
        provenance=Provenance(source="measured", date="2026-01-01", command="test", versions={}),
    )
    return msgspec.structs.replace(machine, **changes)


SSD = SsdProfile(
    path=".",
    capacity_bytes=10**12,
    read=flat_curve(2 * GB_PER_S),
    write=flat_curve(2 * GB_PER_S),
    duplex_bytes_per_s=2 * GB_PER_S,
)
