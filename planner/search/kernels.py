"""Which kernels a plan takes: decided per micro-batch size from what the machine's profile measured."""

from __future__ import annotations

from typing import Literal

from simulator import layer_launch_ns, layer_ns
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import ComputeKnobs, Kernels

# Of a layer's time over its launch, for launches to be hidden whatever else the host does.
LAUNCH_MARGIN = 3
PREFERENCE: tuple[Kernels, ...] = ("fused", "graphed", "eager")


def faster_kernels(model: ModelSpec, micro_batch: int, seq_len: int, machine: MachineProfile) -> Kernels:
    """The kernels by which a layer's forward and backward take less time, of those measured on the machine.

    Fused ones are captured ("graphed") where they take less than LAUNCH_MARGIN times their launch: what the host
    issues is late as soon as its cores are wanted elsewhere. Where this layer was not measured: kernels that were
    measured on other layers, else "fused", which save work and traffic by construction.
    """
    knobs = {
        kernels: ComputeKnobs(micro_batch, 1, "bf16", kernels, gradient_norms=False, state="exact") for kernels in PREFERENCE
    }
    times = {kernels: layer_ns(model, each, seq_len, machine) for kernels, each in knobs.items()}
    measured = {kernels: time_ns for kernels, time_ns in times.items() if time_ns is not None}
    if {"fused", "graphed"} <= measured.keys():
        hidden = measured["fused"] >= LAUNCH_MARGIN * layer_launch_ns("fused", machine)
        del measured["graphed" if hidden else "fused"]
    if measured:
        return min(measured, key=measured.__getitem__)
    known = measured_kernels(machine)
    return next((kernels for kernels in PREFERENCE if kernels in known), "fused")


def measured_kernels(machine: MachineProfile) -> set[Kernels]:
    """By which any layer was timed on the machine."""
    return {cost.kernels for cost in machine.costs if cost.shape.role is UnitRole.LAYER}


def check_kernels(kernels: Kernels | Literal["auto"], machine: MachineProfile) -> None:
    """Raise ValueError for kernels that the machine cannot run."""
    if kernels == "graphed" and machine.gpu.backend == "cpu":
        raise ValueError(f"--kernels graphed: nothing can be captured on a CPU, and {machine.name} is one; take fused")
