"""What a machine can do: capacities, link curves, optimizer rate, layer times, each with its spread."""

from __future__ import annotations

import math
from functools import cached_property
from itertools import chain
from typing import Literal

import msgspec

from slideplan.codec import Document, Spec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import GRADIENT_KINDS, TaskKind
from slideplan.machine.handoffs import IMMEDIATE, Handoffs
from slideplan.machine.sharing import Sharing
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Tier
from slideplan.policy import GradientDtype, Kernels, StateFormat


class Spread(Spec, frozen=True):
    """10th, 50th and 90th percentile of repeated measurements, in the unit that the field names."""

    p10: int
    p50: int
    p90: int

    def __post_init__(self) -> None:
        if not 0 <= self.p10 <= self.p50 <= self.p90:
            raise ValueError(f"percentiles {self.p10}, {self.p50}, {self.p90} must be zero or more and ascend")

    @classmethod
    def exact(cls, value: int) -> Spread:
        """A figure without spread, as datasheets give it."""
        return cls(p10=value, p50=value, p90=value)


class RatePoint(Spec, frozen=True):
    """Rate reached at one transfer or problem size."""

    size: int
    rate: Spread


class Curve(Spec, frozen=True):
    """Size -> rate, sizes ascending. For links: bytes -> bytes/s. For GEMM: FLOPs -> FLOP/s."""

    points: tuple[RatePoint, ...]

    def __post_init__(self) -> None:
        sizes = [point.size for point in self.points]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError("a curve needs points with positive, ascending sizes")
        if any(point.rate.p50 < 1 for point in self.points):
            raise ValueError("a curve needs positive rates")

    def duration_ns(self, size: int) -> int:
        """Time that `size` takes: linear between the measured (size, time) points.

        Below the first point its time is kept (latency), beyond the last its rate is.
        """
        points = self.points
        if size <= points[0].size:
            return _duration_ns(points[0].size, points[0].rate.p50)
        if size >= points[-1].size:
            return _duration_ns(size, points[-1].rate.p50)
        upper = next(index for index, point in enumerate(points) if point.size >= size)
        low, high = points[upper - 1], points[upper]
        low_ns, high_ns = _duration_ns(low.size, low.rate.p50), _duration_ns(high.size, high.rate.p50)
        return low_ns + (high_ns - low_ns) * (size - low.size) // (high.size - low.size)


def _duration_ns(size: int, rate_per_s: int) -> int:
    return -(-size * 1_000_000_000 // rate_per_s)


class GpuProfile(Spec, frozen=True):
    """The compute device. On the "cpu" backend it is the CPU, with a part of RAM as its memory."""

    name: str
    backend: Literal["cuda", "cpu"]
    memory_bytes: int
    context_bytes: int  # taken by the driver and libraries before the first tensor
    memory_bytes_per_s: int  # device memory bandwidth, read + write
    capture_bytes: int = 0  # taken by the driver for each captured task


class HostProfile(Spec, frozen=True):
    """CPU and RAM."""

    cpu: str
    cores: int
    memory_bytes: int
    process_bytes: int  # resident set of the runtime before it reserves anything
    dram_bytes_per_s: int  # capacity shared by optimizer, copies and SSD I/O


class LinkProfile(Spec, frozen=True):
    """One interconnect, both ways. Curves are taken alone; the duplex capacity with both ways at once."""

    h2d: Curve
    d2h: Curve
    duplex_bytes_per_s: int  # sum of both directions at once


class BesideCopies(Spec, frozen=True):
    """Rates of the host's optimizer and of copies both ways while all three run, copies in large pieces."""

    host_bytes_per_s: Spread
    h2d_bytes_per_s: Spread
    d2h_bytes_per_s: Spread


class ThreadPoint(Spec, frozen=True):
    """Rate of the host's optimizer on this many threads: alone, and beside copies where that was measured."""

    threads: int
    host_bytes_per_s: Spread
    beside_copies: BesideCopies | None = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"optimizer.by_threads: threads is {self.threads}, must be at least 1")


class LossyShares(Spec, frozen=True):
    """AdamW on state that is not kept exactly: its memory traffic per second as a share of the exact update's, by processor.

    Each the median of runs of both in turns: what else the machine does slows down both alike.
    """

    host: float
    gpu: float

    def __post_init__(self) -> None:
        for field in ("host", "gpu"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"optimizer.lossy: {field} is {getattr(self, field)}, must be positive")


# Of formats that were not measured on a machine: as measured on an Intel host with an H200 (benchmarks/host_update.py).
LOSSY_SHARES: dict[StateFormat, LossyShares] = {
    "bf16-moments": LossyShares(host=0.9, gpu=1.0),
    "lean": LossyShares(host=0.5, gpu=0.4),
}


class OptimizerProfile(Spec, frozen=True):
    """AdamW on split master with fp32 moments: memory traffic per second when nothing else runs.

    threads: of the host's optimizer, for which all other figures hold and with which plans run
    by_threads: the host's rate over thread counts, ascending; empty where it was not measured
    host_by_bytes: the host's rate over the traffic of one update; None where one size stands for all
    lossy: shares of other formats of state; empty where they were not measured
    """

    threads: int
    host_bytes_per_s: Spread
    gpu_bytes_per_s: Spread
    by_threads: tuple[ThreadPoint, ...] = ()
    host_by_bytes: Curve | None = None
    lossy: dict[StateFormat, LossyShares] = msgspec.field(default_factory=dict)

    def share(self, state: StateFormat, tier: Tier) -> float:
        """Of the rate of exact updates by this tier, in bytes, what those of another format reach."""
        if state == "exact":
            return 1.0
        shares = self.lossy.get(state, LOSSY_SHARES[state])
        return shares.host if tier is Tier.HOST else shares.gpu


class SsdProfile(Spec, frozen=True):
    """Direct I/O on one mount.

    write:                   rate that lasts; plans count on it
    duplex_bytes_per_s:      sum of both directions at once
    burst_write_bytes_per_s: until the drive's write cache is full; None where nobody says
    endurance_bytes:         that may be written to the whole drive by its warranty; None where nobody says
    """

    path: str
    capacity_bytes: int
    read: Curve
    write: Curve
    duplex_bytes_per_s: int
    burst_write_bytes_per_s: int | None = None
    endurance_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in ("burst_write_bytes_per_s", "endurance_bytes"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise ValueError(f"ssd.{field} is {value}, must be positive")


class LayerShape(Spec, frozen=True):
    """What a unit's compute cost depends on, beside tokens: equal shapes share measurements."""

    role: UnitRole
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    architecture: str
    attention_bias: str
    qk_norm: bool
    tied_embeddings: bool

    @classmethod
    def of(cls, model: ModelSpec, role: UnitRole) -> LayerShape:
        """Shape of a unit; fields that do not touch its cost are zero, so that models share it."""
        layer, embedding = role is UnitRole.LAYER, role is UnitRole.EMBEDDING
        return cls(
            role=role,
            hidden=model.hidden,
            heads=model.heads if layer else 0,
            kv_heads=model.kv_heads if layer else 0,
            head_dim=model.head_dim if layer else 0,
            ffn=model.ffn if layer else 0,
            vocabulary=0 if layer else model.vocabulary,
            architecture=model.architecture if layer else "",
            attention_bias=model.attention_bias if layer else "",
            qk_norm=model.qk_norm if layer else False,
            tied_embeddings=False if layer or embedding else model.tied_embeddings,
        )


class ComputeCost(Spec, frozen=True):
    """Measured cost of one task kind on one shape at one micro-batch and sequence length.

    kernels:         how the task was written, as in `Policy`
    gradient_dtype:  of the gradient slot that a backward or the loss writes; of no meaning for others
    accumulate:      whether it added to what the slot held
    saved_bytes:     what the task leaves on the GPU beyond its slots (inner activations, if kept)
    workspace_bytes: peak beyond slots and saved_bytes while it runs
    Both are None where the backend cannot tell; formulas stand in.
    """

    shape: LayerShape
    kind: TaskKind
    micro_batch: int
    seq_len: int
    duration_ns: Spread
    saved_bytes: int | None
    workspace_bytes: int | None
    kernels: Kernels = "eager"
    gradient_dtype: GradientDtype = "bf16"
    accumulate: bool = False

    def __post_init__(self) -> None:
        for field in ("micro_batch", "seq_len"):
            if getattr(self, field) < 1:
                raise ValueError(f"cost of {self.kind}: {field} is {getattr(self, field)}, must be at least 1")
        if self.duration_ns.p50 < 1:
            raise ValueError(f"cost of {self.kind}: duration_ns.p50 is {self.duration_ns.p50}, must be at least 1")
        for field in ("saved_bytes", "workspace_bytes"):
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"cost of {self.kind}: {field} is {getattr(self, field)}, must be zero or more")


CostKey = tuple[LayerShape, TaskKind, Kernels, GradientDtype, bool]


def cost_key(shape: LayerShape, kind: TaskKind, kernels: Kernels, dtype: GradientDtype, accumulate: bool) -> CostKey:
    """What tells measurements apart beside their size. How gradients are written is nothing to tasks that write none."""
    return (shape, kind, kernels, dtype, accumulate) if kind in GRADIENT_KINDS else (shape, kind, kernels, "bf16", False)


class Efficiency(Spec, frozen=True):
    """Rates for units that were not measured: matrix products by size, attention, element-wise passes."""

    gemm: Curve  # FLOPs of one product -> FLOP/s
    attention_flops_per_s: int
    elementwise_bytes_per_s: int


class LaunchCost(Spec, frozen=True):
    """Time that a host thread takes to issue one task on its lane, without waiting for the work.

    `role` is None for copies and updates, whose handlers are the same for every unit and all kernels.
    """

    kind: TaskKind
    lane: LaneKind
    role: UnitRole | None
    duration_ns: Spread
    kernels: Kernels = "eager"


class LaneSpeed(Spec, frozen=True):
    """One lane of a combination.

    rate:      bytes/s (compute: FLOP/s) over parts of the time in which all lanes ran
    speed:     rate relative to the lane alone, measured by the same loop
    predicted: the same by the fitted model
    """

    lane: LaneKind
    rate: Spread
    speed: float
    predicted: float

    @property
    def residual(self) -> float:
        """Predicted less measured relative speed."""
        return self.predicted - self.speed


class Interference(Spec, frozen=True):
    """Lanes alone and together, and the model fitted to them.

    alone:    bytes/s (compute: FLOP/s) of each lane by itself
    together: combinations of lanes that ran at the same time
    fitted:   what `simulator` prices contention with
    """

    alone: dict[LaneKind, Spread]
    together: tuple[tuple[LaneSpeed, ...], ...]
    fitted: Sharing

    @property
    def residuals(self) -> list[float]:
        """Of every measurement, in the order of `together`."""
        return [measured.residual for measured in chain(*self.together)]

    @property
    def max_residual(self) -> float:
        """Largest absolute residual."""
        return max(map(abs, self.residuals), default=0.0)

    @property
    def mean_residual(self) -> float:
        """Mean absolute residual."""
        return sum(map(abs, self.residuals)) / max(1, len(self.residuals))


class Provenance(Spec, frozen=True):
    """Where the figures come from."""

    source: Literal["measured", "datasheet"]
    date: str
    command: str
    versions: dict[str, str]
    notes: str = ""


class MachineProfile(Document, frozen=True, dict=True, tag="machine_profile"):
    """One machine as measured by `planner profile`, or as its datasheets describe it.

    launches:     host time to issue tasks; empty where it was not measured or has no meaning
    handoffs:     from lane to lane; none where they were not measured
    interference: lanes together; None where it was not measured
    spreads:      of figures that stand elsewhere as one number, by their path, like "link.duplex_bytes_per_s"
    """

    name: str
    gpu: GpuProfile
    host: HostProfile
    link: LinkProfile
    optimizer: OptimizerProfile
    ssd: SsdProfile | None
    efficiency: Efficiency
    costs: tuple[ComputeCost, ...]
    provenance: Provenance
    launches: tuple[LaunchCost, ...] = ()
    handoffs: Handoffs = IMMEDIATE
    interference: Interference | None = None
    spreads: dict[str, Spread] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = {
            "gpu.memory_bytes": self.gpu.memory_bytes,
            "gpu.memory_bytes_per_s": self.gpu.memory_bytes_per_s,
            "host.cores": self.host.cores,
            "host.memory_bytes": self.host.memory_bytes,
            "host.dram_bytes_per_s": self.host.dram_bytes_per_s,
            "link.duplex_bytes_per_s": self.link.duplex_bytes_per_s,
            "optimizer.threads": self.optimizer.threads,
            "optimizer.host_bytes_per_s.p50": self.optimizer.host_bytes_per_s.p50,
            "optimizer.gpu_bytes_per_s.p50": self.optimizer.gpu_bytes_per_s.p50,
            "efficiency.attention_flops_per_s": self.efficiency.attention_flops_per_s,
            "efficiency.elementwise_bytes_per_s": self.efficiency.elementwise_bytes_per_s,
        }
        for field, value in positive.items():
            if value < 1:
                raise ValueError(f"machine {self.name}: {field} is {value}, must be positive")
        for field, value in (("gpu.context_bytes", self.gpu.context_bytes), ("host.process_bytes", self.host.process_bytes)):
            if value < 0:
                raise ValueError(f"machine {self.name}: {field} is {value}, must be zero or more")

        if self.optimizer.threads > self.host.cores:
            threads, cores = self.optimizer.threads, self.host.cores
            raise ValueError(f"machine {self.name}: optimizer.threads is {threads}, must be at most host.cores, {cores}")

    @cached_property
    def cost_index(self) -> dict[CostKey, tuple[ComputeCost, ...]]:
        """Measured costs by `cost_key`; sizes are left to the reader."""
        found: dict[CostKey, list[ComputeCost]] = {}
        for cost in self.costs:
            key = cost_key(cost.shape, cost.kind, cost.kernels, cost.gradient_dtype, cost.accumulate)
            found.setdefault(key, []).append(cost)
        return {key: tuple(costs) for key, costs in found.items()}

    def identity(self) -> MachineIdentity:
        """What must agree for a plan made from this profile to run on a machine."""
        return MachineIdentity(gpu=self.gpu.name, backend=self.gpu.backend, cpu=self.host.cpu, cores=self.host.cores)


class MachineIdentity(Spec, frozen=True):
    """Hardware that a plan was made for."""

    gpu: str
    backend: Literal["cuda", "cpu"]
    cpu: str
    cores: int

    def differences(self, other: MachineIdentity) -> list[str]:
        """Fields in which the other machine differs, as "field: this, other"."""
        return [
            f"{field}: {getattr(self, field)}, {getattr(other, field)}"
            for field in self.__struct_fields__
            if getattr(self, field) != getattr(other, field)
        ]
