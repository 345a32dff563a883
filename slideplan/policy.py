"""The knobs of a schedule, and the workload they serve."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Protocol

from slideplan.codec import Spec
from slideplan.model import ModelSpec, UnitRole

# How compute tasks run: as Hugging Face modules by autograd; by our own products and kernels; or the latter
# captured once and replayed, so that the host issues one launch a task.
Kernels = Literal["eager", "fused", "graphed"]
Moments = Literal["fp32", "8bit"]
# What becomes of a layer's inner activations between forward and backward.
Inner = Literal["recompute", "keep", "offload"]
GradientDtype = Literal["bf16", "fp32"]
GRADIENT_BYTES: dict[GradientDtype, int] = {"bf16": 2, "fp32": 4}  # per element


MOMENT_BLOCK = 256  # elements that share scales where moments have 8 bits
MOST_CHUNKS = 64  # of a layer's state
MOST_SLOTS = 4  # of a kind, per unit and micro-batch


class Tier(StrEnum):
    """Where bytes lie."""

    GPU = "gpu"
    HOST = "host"
    SSD = "ssd"


class Workload(Spec, frozen=True):
    """One optimizer step: `global_batch` sequences of `seq_len` tokens."""

    seq_len: int
    global_batch: int

    def __post_init__(self) -> None:
        for field in ("seq_len", "global_batch"):
            if not 1 <= getattr(self, field) <= 1 << 30:
                raise ValueError(f"{field} is {getattr(self, field)}, must be in 1..{1 << 30}")

    @property
    def tokens(self) -> int:
        return self.seq_len * self.global_batch


class ComputePolicy(Protocol):
    """The knobs of a policy that say what its compute tasks do."""

    @property
    def micro_batch(self) -> int:
        """Sequences that pass a unit at once."""

    @property
    def micro_batches(self) -> int:
        """How many of them make the global batch."""

    @property
    def gradient_dtype(self) -> GradientDtype:
        """Of the gradient slots."""

    @property
    def kernels(self) -> Kernels:
        """How tasks are written."""

    @property
    def gradient_norms(self) -> bool:
        """Whether gradients are measured once they are complete."""


class ComputeWork(Spec, frozen=True):
    """Those knobs by themselves."""

    micro_batch: int
    micro_batches: int
    gradient_dtype: GradientDtype
    kernels: Kernels
    gradient_norms: bool

    @classmethod
    def of(cls, work: ComputePolicy) -> ComputeWork:
        """Those of a policy."""
        return cls(work.micro_batch, work.micro_batches, work.gradient_dtype, work.kernels, work.gradient_norms)


class UnitPolicy(Spec, frozen=True):
    """Placement of one unit's tensors.

    state:    fp32 remainder and moments, and with them where the update runs, but for `streams_state`.
    weights:  GPU keeps the bf16 weights in a slot of the unit's own, HOST streams them through the
              window. State on the GPU implies weights on the GPU. Embedding and head always have
              slots of their own, so for them `weights` equals `state`.
    boundary: where the unit's output waits for backward. The head has none; the last layer's output
              is consumed at once and stays on the GPU.
    inner:    "recompute" the unit's inner activations in backward, "keep" them on the GPU, or "offload": keep
              them, while the feed-forward's two wide products, most of their bytes, wait on the host.
              Embedding and head have none to keep.
    streams_state: the state lies on the host and passes through the GPU, in and out once a step, to be updated
              there. For layers whose weights the GPU keeps: of those the host has no copy.
    """

    weights: Tier = Tier.HOST
    state: Tier = Tier.HOST
    boundary: Tier = Tier.GPU
    inner: Inner = "recompute"
    streams_state: bool = False

    @property
    def updated_on_host(self) -> bool:
        return self.state is Tier.HOST and not self.streams_state


class Policy(Spec, frozen=True, omit_defaults=True):
    """Everything that decides the task graph, given model and workload.

    micro_batch:         sequences that pass a unit at once
    micro_batches:       how many of them make the global batch
    window:              weight slots shared by the layers whose weights stream
    prefetch_depth:      how many units ahead a weight load may be issued, 1..window - 1
    gradient_slots:      GPU gradient slots shared by the layers
    host_gradient_slots: host gradient slots shared by the layers that the host updates
    boundary_slots:      GPU slots shared by the boundary activations that wait on the host
    inner_slots:         GPU slots shared by the inner activations that wait on the host
    state_slots:         GPU slots shared by the chunks of state that pass through
    state_chunks:        chunks of a layer's state, each of which comes, is updated and leaves by itself
    gradient_dtype:      how gradients are summed over micro-batches and handed to the optimizer
    kernels:             "eager": units are Hugging Face modules run by autograd. "fused": our own products and
                         kernels, which keep less and write weight gradients where they belong. "graphed": the
                         same, captured once and replayed, for tasks that are shorter than their launch
    gpu_moments:         how moments are kept that the GPU updates: "fp32", exact; or "8bit", block-wise and lossy
    gradient_norms:      the last micro-batch's task of a unit ends with a pass over its gradient, before that leaves
                         the GPU or is used up, for the global norm of the step
    update_order:        units that the host updates, in the order of their updates on the host_update lane
    units:               placement per unit

    Knobs below have a default that is how the runtime works; other values describe how other systems
    work, so that they can be priced by the same engine. They need all state on the host, and updated there.

    master:              format of the master weights on the host. "split": bf16 high half and int16 remainder.
                         "fp32": one fp32 tensor, from which bf16 weights must be cast. "bf16": no fp32 at all
    staging:             how the bf16 weights that loads read come about. "none": they are (a half of) the master.
                         "per_load": the CPU casts a unit into one staging buffer for each of its loads.
                         "per_update": a copy of all weights, which a pass after each update refreshes
    step_barrier:        no load of the next step before the last update of this one
    clipping:            "serial": once all gradients have arrived, a pass over them for their global norm
                         and their scaling, before the first update
    copy_lanes:          "shared": one FIFO for copies of both directions
    unit_slots:          "uniform": window, gradient and host gradient slots are of the size of the largest unit
                         and serve every unit, embedding and head included, which stream like layers
    pinned_sizes:        "power_of_two": host buffers that copies touch are each rounded up, as torch's
                         caching host allocator does
    checkpoint_interval: every how many layers a boundary activation is kept; those between are computed
                         once more, block by block, before a block's backward: a third pass of weights
    """

    micro_batch: int
    micro_batches: int
    window: int
    prefetch_depth: int
    gradient_slots: int
    host_gradient_slots: int
    boundary_slots: int
    inner_slots: int
    state_slots: int
    state_chunks: int
    gradient_dtype: GradientDtype
    kernels: Kernels
    gpu_moments: Moments
    gradient_norms: bool
    update_order: tuple[int, ...]
    units: tuple[UnitPolicy, ...]
    master: Literal["split", "fp32", "bf16"] = "split"
    staging: Literal["none", "per_load", "per_update"] = "none"
    step_barrier: bool = False
    clipping: Literal["none", "serial"] = "none"
    copy_lanes: Literal["separate", "shared"] = "separate"
    unit_slots: Literal["sized", "uniform"] = "sized"
    pinned_sizes: Literal["exact", "power_of_two"] = "exact"
    checkpoint_interval: int = 1

    @property
    def gradient_element_bytes(self) -> int:
        return GRADIENT_BYTES[self.gradient_dtype]

    def foreign_knobs(self) -> dict[str, str | bool | int]:
        """Knobs set to what other systems do and the runtime does not, by name."""
        names = self.__struct_fields__[-len(self.__struct_defaults__) :]
        defaults = zip(names, self.__struct_defaults__, strict=True)
        return {name: getattr(self, name) for name, default in defaults if getattr(self, name) != default}

    def streams_weights(self, unit: int) -> bool:
        """Whether the unit's weights take a window slot: a layer's, or with uniform slots any unit's."""
        streamable = self.unit_slots == "uniform" or 0 < unit < len(self.units) - 1
        return streamable and self.units[unit].weights is Tier.HOST

    def keeps_boundary(self, unit: int) -> bool:
        """Whether the boundary activation that leaves the unit is kept from forward to backward."""
        return unit % self.checkpoint_interval == 0 or unit == len(self.units) - 2

    def runs_again(self, unit: int) -> bool:
        """Whether the unit runs forward a second time before its block's backward: every layer but a block's last."""
        return 0 < unit < len(self.units) - 2 and unit % self.checkpoint_interval != 0

    def check(self, model: ModelSpec, workload: Workload) -> None:
        """Raise ValueError, naming the knob, where the policy makes no sense for model and workload."""
        if len(self.units) != model.units:
            raise ValueError(f"policy.units has {len(self.units)} entries, {model.name} has {model.units} units")
        if self.micro_batch < 1 or self.micro_batch * self.micro_batches != workload.global_batch:
            raise ValueError(
                f"policy.micro_batch x policy.micro_batches is {self.micro_batch} x {self.micro_batches}, "
                f"the global batch is {workload.global_batch}"
            )
        check_seq_len(model, workload.seq_len)
        self._check_foreign(model)
        self._check_placement(model)
        self._check_slots(model)

    def _check_foreign(self, model: ModelSpec) -> None:
        if self.checkpoint_interval < 1:
            raise ValueError(f"policy.checkpoint_interval is {self.checkpoint_interval}, must be at least 1")
        foreign = self.foreign_knobs()
        on_gpu = [unit for unit, placement in enumerate(self.units) if not placement.updated_on_host]
        if foreign and on_gpu:
            raise ValueError(
                f"policy.{next(iter(foreign))}: needs all state on the host and updated there, that of unit {on_gpu[0]} is not"
            )
        if (self.master, self.staging) not in _WEIGHT_FORMATS:
            known = "; ".join(f"{master} with {staging}" for master, staging in _WEIGHT_FORMATS)
            raise ValueError(f"policy.master {self.master} does not go with staging {self.staging}; these do: {known}")
        if self.unit_slots == "uniform" and model.tied_embeddings and self.streams_weights(model.head_unit):
            raise ValueError(
                "policy.unit_slots is uniform with tied embeddings: the loss reads two units, "
                f"set policy.units[{model.head_unit}].weights to gpu (final norm in a slot of its own)"
            )
        if self.checkpoint_interval > 1 and any(
            placement.boundary is not Tier.GPU or placement.inner != "recompute" for placement in self.units
        ):
            raise ValueError(
                "policy.checkpoint_interval above 1 needs all boundary activations on the gpu, and no inner ones kept"
            )

    def _check_placement(self, model: ModelSpec) -> None:
        for unit, placement in enumerate(self.units):
            where = f"policy.units[{unit}] ({model.unit_name(unit)})"
            if Tier.SSD in (placement.weights, placement.state, placement.boundary):
                raise ValueError(f"{where}: the SSD tier cannot be scheduled yet; use host or gpu")
            if placement.state is Tier.GPU and placement.weights is not Tier.GPU:
                raise ValueError(f"{where}: state on the gpu needs weights on the gpu")
            if placement.streams_state and (placement.state, placement.weights) != (Tier.HOST, Tier.GPU):
                raise ValueError(f"{where}: streams_state is for state on the host of a unit with weights on the gpu")
            if model.role(unit) is not UnitRole.LAYER:
                if placement.weights is not placement.state and self.unit_slots == "sized":
                    raise ValueError(f"{where}: weights must lie where state does")
                if placement.inner != "recompute":
                    raise ValueError(f"{where}: has no inner activations to keep")
            if placement.inner == "offload" and self.kernels == "eager":
                raise ValueError(f"{where}: inner is offload, which autograd's own tensors cannot; set policy.kernels to fused")
            if placement.inner != "recompute" and self.units[unit - 1].boundary is not Tier.GPU:
                raise ValueError(
                    f"{where}: keeping inner activations keeps the unit's input on the gpu too; "
                    f"set policy.units[{unit - 1}].boundary to gpu"
                )
        for unit in (model.layers, model.head_unit):
            if self.units[unit].boundary is not Tier.GPU:
                raise ValueError(f"policy.units[{unit}].boundary must be gpu: the head consumes it at once")

    def _check_slots(self, model: ModelSpec) -> None:
        # More slots than anything could use would only take memory, and lowering lists them all.
        most = MOST_SLOTS * model.units * self.micro_batches
        for knob in _SHARED_SLOTS:
            if getattr(self, knob) > most:
                raise ValueError(f"policy.{knob} is {getattr(self, knob)}, more than could be used; take at most {most}")
        on_host = [unit for unit in range(model.units) if self.units[unit].updated_on_host]
        if sorted(self.update_order) != on_host:
            raise ValueError(
                "policy.update_order must name every unit that the host updates once, and no other; "
                f"those are {on_host}, it names {list(self.update_order)}"
            )
        streaming = sum(self.streams_weights(unit) for unit in range(model.units))
        if streaming:
            if self.window < 2:
                raise ValueError(f"policy.window is {self.window}, streaming weights need at least 2 slots")
            if not 1 <= self.prefetch_depth <= self.window - 1:
                raise ValueError(
                    f"policy.prefetch_depth is {self.prefetch_depth}, must be in 1..{self.window - 1} (window - 1)"
                )
        elif self.window or self.prefetch_depth:
            raise ValueError("policy.window and prefetch_depth must be 0 where no weights stream")
        if self.gradient_slots < 1:
            raise ValueError(f"policy.gradient_slots is {self.gradient_slots}, must be at least 1")
        layers_on_host = sum(0 < unit < model.head_unit for unit in on_host)
        if bool(layers_on_host) != bool(self.host_gradient_slots) or self.host_gradient_slots < 0:
            raise ValueError(
                f"policy.host_gradient_slots is {self.host_gradient_slots} with {layers_on_host} layers updated on the host"
            )
        self._check_passage_slots(model)

    def _check_passage_slots(self, model: ModelSpec) -> None:
        """Slots of what lies on the host and passes through the GPU."""
        offloaded = any(placement.boundary is Tier.HOST for placement in self.units)
        computed_again = not all(self.keeps_boundary(unit) for unit in range(model.head_unit))
        if (offloaded or computed_again) and self.boundary_slots < self.micro_batches + 1:
            raise ValueError(
                f"policy.boundary_slots is {self.boundary_slots}, must be at least micro_batches + 1 = {self.micro_batches + 1}"
            )
        if not offloaded and not computed_again and self.boundary_slots:
            raise ValueError("policy.boundary_slots must be 0 where no boundary activation waits on the host")
        inner = any(placement.inner == "offload" for placement in self.units)
        state = any(placement.streams_state for placement in self.units)
        for knob, count, wanted, what in (
            ("inner_slots", self.inner_slots, inner, "inner activations of a unit are to be offloaded"),
            ("state_slots", self.state_slots, state, "state of a unit is to pass through the GPU"),
            ("state_chunks", self.state_chunks, state, "state of a unit is to pass through the GPU"),
        ):
            if wanted != (count > 0) or count < 0:
                raise ValueError(f"policy.{knob} is {count}; it must be 1 or more where {what}, and 0 otherwise")
        if self.state_chunks > MOST_CHUNKS:
            raise ValueError(
                f"policy.state_chunks is {self.state_chunks}, every chunk is three tasks; take at most {MOST_CHUNKS}"
            )
        elements = model.flat_elements(UnitRole.LAYER)
        if state and -(-elements // chunk_elements(elements, self.state_chunks)) != self.state_chunks:
            raise ValueError(
                f"policy.state_chunks is {self.state_chunks}: {-(-elements // MOMENT_BLOCK)} blocks of a layer cannot be cut "
                "into as many"
            )


_SHARED_SLOTS = ("window", "gradient_slots", "host_gradient_slots", "boundary_slots", "inner_slots", "state_slots")
# Master format and how the bf16 weights come about from it.
_WEIGHT_FORMATS = (
    ("split", "none"), ("bf16", "none"), ("bf16", "per_update"), ("fp32", "per_load"), ("fp32", "per_update"),
)  # fmt: skip


def chunk_elements(elements: int, chunks: int) -> int:
    """Elements of each chunk of a unit but the last, which may have fewer: of whole blocks, so that none is cut."""
    return -(-elements // (chunks * MOMENT_BLOCK)) * MOMENT_BLOCK


def check_seq_len(model: ModelSpec, seq_len: int) -> None:
    """Raise ValueError where the model cannot take sequences of this length."""
    if model.sliding_window is not None and seq_len > model.sliding_window:
        raise ValueError(
            f"seq_len {seq_len} exceeds the sliding attention window {model.sliding_window} of "
            f"{model.name}, which is not supported; use a shorter sequence"
        )
    if seq_len > model.max_positions:
        raise ValueError(
            f"seq_len {seq_len} exceeds the {model.max_positions} positions of {model.name}; use a shorter sequence"
        )
