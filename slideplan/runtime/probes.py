"""`planner profile`: measure this machine through the lanes and handlers that execute plans."""

from __future__ import annotations

import datetime
import gc
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numba
import torch
import transformers

from slideplan import __version__
from slideplan.plan.machine import ComputeCost, GpuProfile, HostProfile, MachineProfile, Provenance
from slideplan.plan.model import ModelSpec
from slideplan.runtime.backend import Backend, make_backend
from slideplan.runtime.machine import identity, resident_bytes, total_host_bytes
from slideplan.runtime.optimizer import HostUpdate
from slideplan.runtime.probe_compute import UnitProbe, efficiency
from slideplan.runtime.probe_memory import MemoryProbes, ssd
from slideplan.runtime.probing import Effort
from slideplan.runtime.threads import ThreadBudget

ProgressCallback = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure. `shapes`: (micro_batch, seq_len) pairs at which every model's units are timed.

    Memory sizes override what the system reports: a part of the GPU, or RAM that a virtual machine
    shows only as it is used.
    """

    name: str
    models: tuple[ModelSpec, ...]
    shapes: tuple[tuple[int, int], ...]
    quick: bool = False
    device: str = "auto"
    gpu_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    command: str = ""


def profile_machine(request: ProfileRequest, progress: ProgressCallback) -> MachineProfile:
    """Measure everything that a plan needs. `progress(what, done, total)` is called before each probe.

    Raises ValueError for a device that is not there. Shapes that do not fit in device memory are left
    out and named in the profile's notes.
    """
    backend = make_backend(request.device)
    effort = Effort.of(request.quick, backend.name)
    total = 6 + len(request.models) * len(request.shapes)
    done = 0

    def report(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    try:
        report("threads and kernels")
        threads = ThreadBudget.of(backend)
        threads.apply()
        HostUpdate(threads.optimizer).compile()
        # One small step of a model first: libraries load what they need when it is first used.
        UnitProbe(backend, _small(request.models[0]), 1, 16).costs(1)
        context_bytes = _context_bytes(backend)
        process_bytes = resident_bytes()
        probes = MemoryProbes(backend, effort, threads.optimizer)
        report("links")
        link = probes.link()
        report("optimizer")
        optimizer = probes.optimizer()
        report("memory shared by copies and optimizer")
        dram = probes.host_dram_bytes_per_s()
        device_rate = probes.device_bytes_per_s()
        del probes
        report("matrix products and attention")
        rates = efficiency(backend, effort)
        report("disk")
        disk = ssd(Path.cwd(), effort)
        costs: list[ComputeCost] = []
        notes = []
        for model in request.models:
            for micro_batch, seq_len in request.shapes:
                shape = f"{model.name} {micro_batch}x{seq_len}"
                report(shape)
                gc.collect()
                backend.release_unused()
                try:
                    costs += UnitProbe(backend, model, micro_batch, seq_len).costs(effort.repeats)
                except torch.OutOfMemoryError:
                    notes.append(f"{shape} does not fit in device memory")
        progress("done", total, total)
    finally:
        backend.close()
    found = identity(backend)
    gpu_memory = request.gpu_memory_bytes or _device_memory_bytes(backend)
    return MachineProfile(
        name=request.name,
        gpu=GpuProfile(
            name=found.gpu,
            backend=backend.name,
            memory_bytes=gpu_memory,
            context_bytes=context_bytes,
            memory_bytes_per_s=device_rate,
        ),
        host=HostProfile(
            cpu=found.cpu,
            cores=found.cores,
            memory_bytes=request.host_memory_bytes or _host_memory_bytes(backend, gpu_memory),
            process_bytes=process_bytes,
            dram_bytes_per_s=max(dram, optimizer.host_bytes_per_s.p50),
        ),
        link=link,
        optimizer=optimizer,
        ssd=disk,
        efficiency=rates,
        costs=tuple(costs),
        provenance=Provenance(
            source="measured",
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=request.command,
            versions={
                "slideplan": __version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "numba": numba.__version__,
            },
            notes="; ".join(notes),
        ),
    )


def _small(model: ModelSpec) -> ModelSpec:
    """A few megabytes of the same architecture."""
    return msgspec.structs.replace(
        model, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocabulary=256, max_positions=max(16, model.max_positions)
    )


def _context_bytes(backend: Backend) -> int:
    """Device memory outside torch's allocator: driver, kernels, libraries.

    What other programs hold on the device counts too, for a plan cannot have it either.
    """
    if backend.name == "cpu":
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(backend.device)
    return total - free - torch.cuda.memory_reserved(backend.device)


def _device_memory_bytes(backend: Backend) -> int:
    """All of the GPU; without one, a quarter of RAM stands for it."""
    if backend.name == "cuda":
        return torch.cuda.mem_get_info(backend.device)[1]
    return total_host_bytes() // 4


def _host_memory_bytes(backend: Backend, gpu_memory_bytes: int) -> int:
    total = total_host_bytes()
    return total - gpu_memory_bytes if backend.name == "cpu" else total
