"""The knobs of a schedule, and the workload they serve."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from slideplan.plan.codec import Spec
from slideplan.plan.model import ModelSpec, UnitRole


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
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, must be at least 1")

    @property
    def tokens(self) -> int:
        return self.seq_len * self.global_batch


class UnitPolicy(Spec, frozen=True):
    """Placement of one unit's tensors.

    state:    fp32 remainder and moments, and with them where the update runs.
    weights:  GPU keeps the bf16 weights in a slot of the unit's own, HOST streams them through the
              window. State on the GPU implies weights on the GPU. Embedding and head always have
              slots of their own, so for them `weights` equals `state`.
    boundary: where the unit's output waits for backward. The head has none; the last layer's output
              is consumed at once and stays on the GPU.
    inner:    "recompute" the unit's inner activations in backward, or "keep" them on the GPU.
              Embedding and head have none to keep.
    """

    weights: Tier = Tier.HOST
    state: Tier = Tier.HOST
    boundary: Tier = Tier.GPU
    inner: Literal["recompute", "keep"] = "recompute"


class Policy(Spec, frozen=True):
    """Everything that decides the task graph, given model and workload.

    micro_batch:         sequences that pass a unit at once
    micro_batches:       how many of them make the global batch
    window:              weight slots shared by the layers whose weights stream
    prefetch_depth:      how many units ahead a weight load may be issued, 1..window - 1
    gradient_slots:      GPU gradient slots shared by the layers
    host_gradient_slots: host gradient slots shared by the layers whose state is on the host
    boundary_slots:      GPU slots shared by the boundary activations that wait on the host
    gradient_dtype:      how gradients are summed over micro-batches and handed to the optimizer
    update_order:        host-state units in the order of their updates on the host_update lane
    units:               placement per unit
    """

    micro_batch: int
    micro_batches: int
    window: int
    prefetch_depth: int
    gradient_slots: int
    host_gradient_slots: int
    boundary_slots: int
    gradient_dtype: Literal["bf16", "fp32"]
    update_order: tuple[int, ...]
    units: tuple[UnitPolicy, ...]

    @property
    def gradient_element_bytes(self) -> int:
        return 4 if self.gradient_dtype == "fp32" else 2

    def streams_weights(self, unit: int) -> bool:
        """Whether the unit is a layer that takes a window slot."""
        return 0 < unit < len(self.units) - 1 and self.units[unit].weights is Tier.HOST

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
        self._check_placement(model)
        self._check_slots(model)

    def _check_placement(self, model: ModelSpec) -> None:
        for unit, placement in enumerate(self.units):
            where = f"policy.units[{unit}] ({model.unit_name(unit)})"
            if Tier.SSD in (placement.weights, placement.state, placement.boundary):
                raise ValueError(f"{where}: the SSD tier cannot be scheduled yet; use host or gpu")
            if placement.state is Tier.GPU and placement.weights is not Tier.GPU:
                raise ValueError(f"{where}: state on the gpu needs weights on the gpu")
            if model.role(unit) is not UnitRole.LAYER:
                if placement.weights is not placement.state:
                    raise ValueError(f"{where}: weights must lie where state does")
                if placement.inner != "recompute":
                    raise ValueError(f"{where}: has no inner activations to keep")
            if placement.inner == "keep" and self.units[unit - 1].boundary is not Tier.GPU:
                raise ValueError(
                    f"{where}: keeping inner activations keeps the unit's input on the gpu too; "
                    f"set policy.units[{unit - 1}].boundary to gpu"
                )
        for unit in (model.layers, model.head_unit):
            if self.units[unit].boundary is not Tier.GPU:
                raise ValueError(f"policy.units[{unit}].boundary must be gpu: the head consumes it at once")

    def _check_slots(self, model: ModelSpec) -> None:
        host_state = [unit for unit in range(model.units) if self.units[unit].state is Tier.HOST]
        if sorted(self.update_order) != host_state:
            raise ValueError(
                "policy.update_order must name every unit whose state is on the host once, and no other; "
                f"those are {host_state}, it names {list(self.update_order)}"
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
        layers_on_host = sum(0 < unit < model.head_unit for unit in host_state)
        if bool(layers_on_host) != bool(self.host_gradient_slots) or self.host_gradient_slots < 0:
            raise ValueError(
                f"policy.host_gradient_slots is {self.host_gradient_slots} with {layers_on_host} layers updated on the host"
            )
        offloaded = any(placement.boundary is Tier.HOST for placement in self.units)
        if offloaded and self.boundary_slots < self.micro_batches + 1:
            raise ValueError(
                f"policy.boundary_slots is {self.boundary_slots}, must be at least micro_batches + 1 = {self.micro_batches + 1}"
            )
        if not offloaded and self.boundary_slots:
            raise ValueError("policy.boundary_slots must be 0 where no boundary activation waits on the host")


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
