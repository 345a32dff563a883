"""The knobs of a schedule, and the workload they serve."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, get_args

from slideplan.codec import Spec
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import STATE, Placement, TensorClass, Tier

# How compute tasks run: as Hugging Face modules by autograd; by our own products and kernels; or the latter
# captured once and replayed, so that the host issues one launch a task.
Kernels = Literal["eager", "fused", "graphed"]
# How state is kept, on every tier: exactly, or by choice in fewer bytes and rounded at random.
StateFormat = Literal["exact", "bf16-moments", "lean"]
# From what takes most to what takes least.
STATE_FORMATS: tuple[StateFormat, ...] = get_args(StateFormat)
Moments = Literal["fp32", "bf16", "8bit"]
MOMENTS_OF: dict[StateFormat, Moments] = {"exact": "fp32", "bf16-moments": "bf16", "lean": "8bit"}
GradientDtype = Literal["bf16", "fp32"]
GRADIENT_BYTES: dict[GradientDtype, int] = {"bf16": 2, "fp32": 4}  # per element


MOMENT_BLOCK = 256  # elements that share scales where moments have 8 bits
PAGE_BLOCK = 2048  # elements that have a whole number of pages of 4 KiB in every class of exact state
# Chunks of passing state are made of whole blocks, by the tier that updates it: what comes from a drive, of whole pages.
BLOCKS = {Tier.GPU: MOMENT_BLOCK, Tier.HOST: PAGE_BLOCK}
MOST_CHUNKS = 64  # of a layer's state
MOST_SLOTS = 4  # of a kind, per unit and micro-batch


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
    """The knobs of a policy that say what its compute tasks and updates do."""

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

    @property
    def state(self) -> StateFormat:
        """How the state is kept that updates read and write."""


class ComputeKnobs(Spec, frozen=True):
    """Those knobs by themselves."""

    micro_batch: int
    micro_batches: int
    gradient_dtype: GradientDtype
    kernels: Kernels
    gradient_norms: bool
    state: StateFormat

    @classmethod
    def of(cls, policy: ComputePolicy) -> ComputeKnobs:
        """Those of a policy."""
        return cls(*(getattr(policy, field) for field in cls.__struct_fields__))


class OtherSystem(Spec, frozen=True):
    """How another system schedules, so that the same engine prices it. Defaults are how the runtime works.

    Such policies need all state on the host, and updated there. The runtime executes none of them.

    name:                of the system
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

    name: str
    master: Literal["split", "fp32", "bf16"] = "split"
    staging: Literal["none", "per_load", "per_update"] = "none"
    step_barrier: bool = False
    clipping: Literal["none", "serial"] = "none"
    copy_lanes: Literal["separate", "shared"] = "separate"
    unit_slots: Literal["sized", "uniform"] = "sized"
    pinned_sizes: Literal["exact", "power_of_two"] = "exact"
    checkpoint_interval: int = 1


OURS = OtherSystem(name="slideplan")


class Policy(Spec, frozen=True, omit_defaults=True):
    """Everything that decides the task graph, given model and workload.

    micro_batch:         sequences that pass a unit at once
    micro_batches:       how many of them make the global batch
    window:              weight slots shared by the layers whose weights stream
    prefetch_depth:      how many units ahead a weight load may be issued, 1..window - 1
    gradient_slots:      GPU gradient slots shared by the layers
    host_gradient_slots: host gradient slots shared by the layers that the host updates
    boundary_slots:      GPU slots shared by the boundary activations that pass through
    inner_slots:         GPU slots shared by the inner activations that pass through
    state_slots:         GPU slots shared by the chunks of state that pass through the GPU
    state_chunks:        chunks of a layer's state that passes there, each of which comes, is updated and leaves by itself
    gradient_dtype:      how gradients are summed over micro-batches and handed to the optimizer
    kernels:             "eager": units are Hugging Face modules run by autograd. "fused": our own products and
                         kernels, which keep less and write weight gradients where they belong. "graphed": the
                         same, captured once and replayed, for tasks that are shorter than their launch
    state:               how state is kept. "exact": fp32 master weights and moments. "bf16-moments": moments in bf16. "lean":
                         weights in bf16 alone, without a remainder, and block-wise moments of 8 bits. The last two are lossy
    gradient_norms:      the last micro-batch's task of a unit ends with a pass over its gradient, before that leaves
                         the GPU or is used up, for the global norm of the step
    update_order:        units that the host updates, in the order of their updates on its lane
    units:               placement of each unit
    other:               how another system works, where the policy describes one
    ssd_slots, ssd_chunks: the same of state that lies on the SSD and passes through the host. Embedding and head have
                         chunks of the size of a layer's
    host_state_slots:    host slots shared by the chunks of state on their way from the SSD to the GPU and back
    host_weight_slots:   host slots shared by the layers whose weights lie on the SSD
    host_boundary_slots: host slots shared by the boundary activations on their way to the SSD and back
    host_inner_slots:    host slots shared by the inner activations on their way to the SSD and back
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
    state: StateFormat
    gradient_norms: bool
    update_order: tuple[int, ...]
    units: tuple[Placement, ...]
    other: OtherSystem | None = None
    ssd_slots: int = 0
    ssd_chunks: int = 0
    host_state_slots: int = 0
    host_weight_slots: int = 0
    host_boundary_slots: int = 0
    host_inner_slots: int = 0

    @property
    def system(self) -> OtherSystem:
        """How the system works that this policy is for."""
        return self.other or OURS

    @property
    def gradient_element_bytes(self) -> int:
        return GRADIENT_BYTES[self.gradient_dtype]

    def streams_weights(self, unit: int) -> bool:
        """Whether the unit's weights take a window slot: a layer's, or with uniform slots any unit's."""
        streamable = self.system.unit_slots == "uniform" or 0 < unit < len(self.units) - 1
        return streamable and self.units[unit].weights is not Tier.GPU

    def keeps_boundary(self, unit: int) -> bool:
        """Whether the boundary activation that leaves the unit is kept from forward to backward."""
        return unit % self.system.checkpoint_interval == 0 or unit == len(self.units) - 2

    def runs_again(self, unit: int) -> bool:
        """Whether the unit runs forward a second time before its block's backward: every layer but a block's last."""
        return 0 < unit < len(self.units) - 2 and unit % self.system.checkpoint_interval != 0

    @property
    def split_master(self) -> bool:
        """Whether the fp32 master weight is a bf16 weight and a remainder."""
        return self.system.master == "split" and TensorClass.REMAINDER in state_classes(self.state)

    def passing(self, unit: int) -> tuple[TensorClass, ...]:
        """Classes of the unit's state that pass through slots of the tier that updates it."""
        return tuple(tensor for tensor in self.units[unit].passing if tensor in state_classes(self.state))

    def passing_units(self, tier: Tier) -> list[int]:
        """Units whose state passes through slots of this tier, where it is updated."""
        return [unit for unit, placement in enumerate(self.units) if placement.update is tier and self.passing(unit)]

    def chunks(self, model: ModelSpec, unit: int) -> int:
        """Into how many chunks the unit's passing state is cut."""
        return passage(self, self.units[unit].update).chunks_of(model, model.role(unit))

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
        if self.other is not None:
            self._check_other(self.other, model)
        for unit, placement in enumerate(self.units):
            self._check_placement(model, unit, placement)
        for unit in (model.layers, model.head_unit):
            if self.units[unit].boundary is not Tier.GPU:
                raise ValueError(f"policy.units[{unit}].boundary must be gpu: the head consumes it at once")
        self._check_slots(model)
        self._check_passage_slots(model)

    def _check_other(self, other: OtherSystem, model: ModelSpec) -> None:
        if other.checkpoint_interval < 1:
            raise ValueError(f"policy.other.checkpoint_interval is {other.checkpoint_interval}, must be at least 1")
        for unit, placement in enumerate(self.units):
            if placement.update is not Tier.HOST or placement.passing or placement.weights is Tier.SSD:
                raise ValueError(
                    f"policy.other ({other.name}) needs all state on the host and updated there, that of unit {unit} is not"
                )
        if (other.master, other.staging) not in _WEIGHT_FORMATS:
            known = "; ".join(f"{master} with {staging}" for master, staging in _WEIGHT_FORMATS)
            raise ValueError(f"policy.other.master {other.master} does not go with staging {other.staging}; these do: {known}")
        if other.unit_slots == "uniform" and model.tied_embeddings and self.streams_weights(model.head_unit):
            raise ValueError(
                "policy.other.unit_slots is uniform with tied embeddings: the loss reads two units, "
                f"set policy.units[{model.head_unit}].weights to gpu (final norm in a slot of its own)"
            )
        if other.checkpoint_interval > 1 and any(
            placement.boundary is not Tier.GPU or placement.keeps for placement in self.units
        ):
            raise ValueError(
                "policy.other.checkpoint_interval above 1 needs all boundary activations on the gpu, and no inner ones kept"
            )

    def _check_placement(self, model: ModelSpec, unit: int, placement: Placement) -> None:
        where = f"policy.units[{unit}] ({model.unit_name(unit)})"
        for field in placement.__struct_fields__:
            if getattr(placement, field) not in _PLACES[field]:
                allowed = " or ".join("none" if tier is None else tier for tier in _PLACES[field])
                raise ValueError(f"{where}.{field} is {getattr(placement, field)}; the runtime can have it on {allowed}")
        _check_state(where, placement)
        if model.role(unit) is not UnitRole.LAYER:
            if placement.passing and placement.update is Tier.GPU:
                raise ValueError(f"{where}: only layers' state can pass through the gpu")
            if placement.weights is not placement.update and self.system.unit_slots == "sized":
                raise ValueError(f"{where}: weights must lie where they are updated")
            if placement.keeps:
                raise ValueError(f"{where}: has no inner activations to keep")
        if (placement.inner is None) != (placement.feed_forward is None):
            raise ValueError(f"{where}: inner and feed_forward activations are kept together, or computed again together")
        if placement.feed_forward not in (None, Tier.GPU) and self.kernels == "eager":
            raise ValueError(
                f"{where}: feed_forward is on the {placement.feed_forward}, but autograd's own tensors cannot leave; "
                "set policy.kernels to fused"
            )
        if placement.keeps and self.units[unit - 1].boundary is not Tier.GPU:
            raise ValueError(
                f"{where}: keeping inner activations keeps the unit's input on the gpu too; "
                f"set policy.units[{unit - 1}].boundary to gpu"
            )

    def _check_slots(self, model: ModelSpec) -> None:
        # More slots than anything could use would only take memory, and lowering lists them all.
        most = MOST_SLOTS * model.units * self.micro_batches
        for knob in SHARED_SLOTS:
            if getattr(self, knob) > most:
                raise ValueError(f"policy.{knob} is {getattr(self, knob)}, more than could be used; take at most {most}")
        on_host = [unit for unit in range(model.units) if self.units[unit].update is Tier.HOST]
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

    def _check_passage_slots(self, model: ModelSpec) -> None:
        """Slots of what lies elsewhere and passes through the tier that uses it."""
        offloaded = any(placement.boundary is not Tier.GPU for placement in self.units)
        computed_again = not all(self.keeps_boundary(unit) for unit in range(model.head_unit))
        if (offloaded or computed_again) and self.boundary_slots < self.micro_batches + 1:
            raise ValueError(
                f"policy.boundary_slots is {self.boundary_slots}, must be at least micro_batches + 1 = {self.micro_batches + 1}"
            )
        if not offloaded and not computed_again and self.boundary_slots:
            raise ValueError("policy.boundary_slots must be 0 where no boundary activation waits on another tier")
        inner = any(placement.feed_forward not in (None, Tier.GPU) for placement in self.units)
        boundary_away, inner_away = (
            any(getattr(placement, field) is Tier.SSD for placement in self.units) for field in ("boundary", "feed_forward")
        )
        state_far = any(self.units[unit].moments is Tier.SSD for unit in self.passing_units(Tier.GPU))
        weights_away = any(placement.weights is Tier.SSD for placement in self.units)
        state, drive = (bool(self.passing_units(tier)) for tier in (Tier.GPU, Tier.HOST))
        for knob, wanted, what in (
            ("inner_slots", inner, "inner activations of a unit wait on another tier"),
            ("state_slots", state, "state of a unit passes through the gpu"),
            ("state_chunks", state, "state of a unit passes through the gpu"),
            ("ssd_slots", drive, "state of a unit lies on the ssd, updated by the host"),
            ("ssd_chunks", drive, "state of a unit lies on the ssd, updated by the host"),
            ("host_state_slots", state_far, "state of a unit passes from the ssd through the gpu"),
            ("host_weight_slots", weights_away, "weights of a unit lie on the ssd"),
            ("host_boundary_slots", boundary_away, "boundary activations of a unit wait on the ssd"),
            ("host_inner_slots", inner_away, "inner activations of a unit wait on the ssd"),
        ):
            count = getattr(self, knob)
            if wanted != (count > 0) or count < 0:
                raise ValueError(f"policy.{knob} is {count}; it must be 1 or more where {what}, and 0 otherwise")
        elements = model.flat_elements(UnitRole.LAYER)
        for tier, knob, wanted in ((Tier.GPU, "state_chunks", state), (Tier.HOST, "ssd_chunks", drive)):
            chunks = getattr(self, knob)
            if chunks > MOST_CHUNKS:
                raise ValueError(f"policy.{knob} is {chunks}, every chunk is three tasks; take at most {MOST_CHUNKS}")
            if wanted and passage(self, tier).chunks_of(model, UnitRole.LAYER) != chunks:
                blocks = -(-elements // BLOCKS[tier])
                raise ValueError(f"policy.{knob} is {chunks}: {blocks} blocks of a layer cannot be cut into as many")


def _check_state(where: str, placement: Placement) -> None:
    if placement.remainder is not placement.moments and (placement.remainder, placement.moments) != (Tier.HOST, Tier.SSD):
        raise ValueError(f"{where}: remainder and moments must lie on one tier, or moments alone on the ssd")
    if placement.update is Tier.HOST and placement.moments is Tier.GPU:
        raise ValueError(f"{where}: state on the gpu is updated there; set update to gpu")
    if placement.update is Tier.GPU and placement.remainder is not placement.moments:
        raise ValueError(f"{where}: an update on the gpu needs remainder and moments on one tier")
    if placement.update is Tier.GPU and placement.weights is not Tier.GPU:
        raise ValueError(f"{where}: an update on the gpu needs weights on the gpu")


# Where a unit's tensors may lie so far, and where it may be updated.
_PLACES: dict[str, tuple[Tier | None, ...]] = {
    "weights": (Tier.GPU, Tier.HOST, Tier.SSD),
    "remainder": (Tier.GPU, Tier.HOST, Tier.SSD),
    "moments": (Tier.GPU, Tier.HOST, Tier.SSD),
    "boundary": (Tier.GPU, Tier.HOST, Tier.SSD),
    "inner": (Tier.GPU, None),
    "feed_forward": (Tier.GPU, Tier.HOST, Tier.SSD, None),
    "update": (Tier.GPU, Tier.HOST),
}
# Knobs that count the slots of a pool that several units share.
SHARED_SLOTS = (
    "window", "gradient_slots", "host_gradient_slots", "boundary_slots", "inner_slots", "state_slots", "ssd_slots",
    "host_state_slots", "host_weight_slots", "host_boundary_slots", "host_inner_slots",
)  # fmt: skip
# Master format and how the bf16 weights come about from it.
_WEIGHT_FORMATS = (
    ("split", "none"), ("bf16", "none"), ("bf16", "per_update"), ("fp32", "per_load"), ("fp32", "per_update"),
)  # fmt: skip


def state_classes(state: StateFormat) -> tuple[TensorClass, ...]:
    """What a unit has beside its weights: of lean state, no remainder."""
    return (TensorClass.MOMENTS,) if state == "lean" else STATE


class PassageKnobs(Protocol):
    """The knobs of a policy that say how state passes through the tier that updates it."""

    @property
    def state_slots(self) -> int: ...
    @property
    def state_chunks(self) -> int: ...
    @property
    def ssd_slots(self) -> int: ...
    @property
    def ssd_chunks(self) -> int: ...


class Passage(NamedTuple):
    """How state passes through the tier that updates it: in how many slots, and in how many chunks that of a layer."""

    slots: int
    chunks: int
    block: int

    def chunk_elements(self, model: ModelSpec) -> int:
        """Elements of each chunk but a unit's last, which may have fewer: whole blocks. 0 where nothing passes."""
        return chunk_elements(model.flat_elements(UnitRole.LAYER), self.chunks, self.block) if self.chunks else 0

    def chunks_of(self, model: ModelSpec, role: UnitRole) -> int:
        """Into how many chunks the state of a unit of this role is cut. 0 where nothing passes."""
        return -(-model.flat_elements(role) // self.chunk_elements(model)) if self.chunks else 0


def passage(knobs: PassageKnobs, update: Tier) -> Passage:
    """Of state that this tier updates."""
    if update is Tier.GPU:
        return Passage(knobs.state_slots, knobs.state_chunks, BLOCKS[update])
    return Passage(knobs.ssd_slots, knobs.ssd_chunks, BLOCKS[update])


def chunk_elements(elements: int, chunks: int, block: int = MOMENT_BLOCK) -> int:
    """Elements of each chunk of a unit but the last, which may have fewer: of whole blocks, so that none is cut."""
    return -(-elements // (chunks * block)) * block


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
