"""`planner profile`: measure this machine through the lanes and handlers that execute plans."""

from __future__ import annotations

import datetime
import gc
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import get_args

import msgspec
import numba
import torch
import transformers

from runtime.drives import said_of_drives
from runtime.lanes.backend import Backend, make_backend
from runtime.lanes.threads import set_compute_threads
from runtime.machine import identity, resident_bytes
from runtime.memory.host_memory import placement
from runtime.optimizer.adamw import HostUpdate
from runtime.probes.buffers import MemoryBuffers
from runtime.probes.compute import UnitProbe, efficiency
from runtime.probes.drive import SsdProbe
from runtime.probes.handoffs import handoffs
from runtime.probes.memory import MemoryProbes
from runtime.probes.threads import chosen_threads, thread_points
from runtime.probes.timing import Effort, Work, mean_rate_spread, spread, timed, together
from runtime.probes.together import COMBINATIONS, TogetherProbe
from slideplan import __version__
from slideplan.command import on_one_device
from slideplan.graph.lanes import LaneKind
from slideplan.machine.figures import cost_name, figure_name
from slideplan.machine.handoffs import Handoffs
from slideplan.machine.host import total_host_bytes, usable_cores
from slideplan.machine.profile import (
    ComputeCost,
    GpuProfile,
    HostProfile,
    LaunchCost,
    LayerShape,
    LinkProfile,
    MachineProfile,
    Provenance,
    Spread,
    SsdProfile,
)
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import GradientDtype, Kernels
from slideplan.progress import Progress, Show
from slideplan.quantities import format_bytes

TURNS = 2  # of samples of host memory between units


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure. `shapes`: (micro_batch, seq_len) pairs at which every model's units are timed.

    kernels: those to time; nothing can be captured on a CPU, so there "graphed" is left out.

    ssd: folders on the drives to measure, one on each, as a run stripes state over them; none: the working folder.

    Memory sizes override what the system reports: a part of the GPU, or RAM that a virtual machine
    shows only as it is used.
    """

    name: str
    models: tuple[ModelSpec, ...]
    shapes: tuple[tuple[int, int], ...]
    kernels: tuple[Kernels, ...] = ("fused", "graphed", "eager")
    quick: bool = False
    device: str = "auto"
    gpu_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    command: str = ""
    ssd: Sequence[Path] = ()


def profile_machine(request: ProfileRequest, show: Show) -> MachineProfile:
    """Measure everything that a plan needs. `show` is told before each probe.

    Raises ValueError for a device that is not there. Shapes that do not fit in device memory are left
    out and named in the profile's notes.
    """
    backend = make_backend(request.device)
    effort = Effort.of(request.quick, backend.name)
    kernels = _measurable(request.kernels, backend)
    lane_probes = len(TogetherProbe.runs(set().union(*COMBINATIONS)))
    steps = _Steps(show, 6 + lane_probes + len(request.models) * len(request.shapes) * len(kernels))
    try:
        return _profile(backend, request, kernels, effort, steps)
    finally:
        backend.close()


def _profile(
    backend: Backend, request: ProfileRequest, kernels: Sequence[Kernels], effort: Effort, steps: _Steps
) -> MachineProfile:
    """One probe after the other: each needs the machine to itself, and some what others have found."""
    steps.next("threads and kernels")
    _warm_up(backend, request.models[0])
    process_bytes = resident_bytes()
    capture_bytes = UnitProbe(backend, _small(request.models[0]), 1, 128).capture_bytes()
    steps.next("matrix products and attention")
    rates, spreads = efficiency(backend, effort)
    steps.next("threads of the optimizer")
    buffers = MemoryBuffers(backend, effort)
    by_threads = thread_points(backend, effort, buffers)
    threads = chosen_threads(backend, by_threads)
    probes = MemoryProbes(backend, effort, buffers, threads)
    costs, unit_launches, notes = _unit_costs(backend, request, kernels, effort, steps, probes)
    notes += [placed] if (placed := placement()) else []
    _release(backend)
    # By now libraries have loaded what units of full size call: 150 MiB more than small ones do.
    context_bytes = backend.outside_bytes()
    steps.next("links")
    probes.complete()
    h2d, d2h = probes.link_curves()
    memory_work = buffers.work(threads)
    steps.next("optimizer")
    optimizer = probes.optimizer(threads, by_threads, memory_work[LaneKind.GPU_UPDATE])
    launches = probes.launches(memory_work)
    told = handoffs(backend, threads)
    device_rate = buffers.device_bytes_per_s()
    lanes, ssd = _lanes_together(backend, request, memory_work, effort, steps, notes)
    duplex, disk_duplex = lanes.total(LaneKind.H2D, LaneKind.D2H), lanes.total(LaneKind.SSD_READ, LaneKind.SSD_WRITE)
    dram = _host_dram(backend, lanes)
    assert duplex is not None, "every backend has both copy lanes"
    spreads |= {
        "gpu.memory_bytes_per_s": device_rate,
        "link.duplex_bytes_per_s": duplex,
        "host.dram_bytes_per_s": dram,
        **{f"handoffs.{field}": found for field, found in told.items()},
        **({"ssd.duplex_bytes_per_s": disk_duplex} if disk_duplex else {}),
    }
    steps.finish()
    here = identity(backend)
    gpu_memory = request.gpu_memory_bytes or _device_memory_bytes(backend)
    return MachineProfile(
        name=request.name,
        gpu=GpuProfile(
            name=here.gpu,
            backend=backend.name,
            memory_bytes=gpu_memory,
            context_bytes=context_bytes,
            memory_bytes_per_s=device_rate.p50,
            capture_bytes=capture_bytes,
        ),
        host=HostProfile(
            cpu=here.cpu,
            cores=here.cores,
            memory_bytes=request.host_memory_bytes or _host_memory_bytes(backend, gpu_memory),
            process_bytes=process_bytes,
            dram_bytes_per_s=max(dram.p50, optimizer.host_bytes_per_s.p50),
        ),
        link=LinkProfile(h2d=h2d, d2h=d2h, duplex_bytes_per_s=duplex.p50),
        optimizer=optimizer,
        ssd=ssd,
        efficiency=rates,
        costs=tuple(costs),
        launches=(*launches, *unit_launches),
        handoffs=Handoffs(**{field: spread.p50 for field, spread in told.items()}),
        interference=lanes.interference(device_rate.p50),
        spreads=spreads,
        provenance=_provenance(request.command, notes),
    )


def _lanes_together(
    backend: Backend,
    request: ProfileRequest,
    memory_work: dict[LaneKind, Work],
    effort: Effort,
    steps: _Steps,
    notes: list[str],
) -> tuple[TogetherProbe, SsdProfile | None]:
    """Lanes alone and together, the disk among them; and what the disk does by itself. Several disks are one, with a note."""
    lanes = TogetherProbe()
    folders = request.ssd or (Path.cwd(),)
    with SsdProbe.open(backend, folders, effort) as disk:
        if len(folders) > 1:
            notes += on_one_device(folders)
            notes.append(said_of_drives(folders, disk.speeds) if disk else "the drives cannot be measured together")
        work = _layer_work(backend, request) | memory_work | (disk.work() if disk else {})
        for what in lanes.measure(backend, work, effort.together_ns):
            steps.next(what)
        steps.next("disk")
        duplex = lanes.total(LaneKind.SSD_READ, LaneKind.SSD_WRITE)
        return lanes, disk.profile(duplex.p50) if disk and duplex else None


def _provenance(command: str, notes: Sequence[str]) -> Provenance:
    return Provenance(
        source="measured",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        versions={
            "slideplan": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "numba": numba.__version__,
        },
        notes="; ".join(notes),
    )


def _unit_costs(
    backend: Backend,
    request: ProfileRequest,
    kernels: Sequence[Kernels],
    effort: Effort,
    steps: _Steps,
    probes: MemoryProbes,
) -> tuple[list[ComputeCost], list[LaunchCost], list[str]]:
    """Costs of every model's units at every shape by all kernels, launches of the first, and what did not fit.

    In between, `probes` are sampled.
    """
    costs: list[ComputeCost] = []
    launches: list[LaunchCost] = []
    notes = []
    for model in request.models:
        for (micro_batch, seq_len), written in product(request.shapes, kernels):
            shape = f"{model.name} {micro_batch}x{seq_len} {written}"
            steps.next(shape)
            probes.sample(TURNS)
            for dtype in get_args(GradientDtype):
                _release(backend)
                wants_launches = all(launch.kernels != written for launch in launches)
                try:
                    found = _probe(backend, model, micro_batch, seq_len, written, dtype, effort, wants_launches)
                except torch.OutOfMemoryError:
                    notes.append(f"{shape}, gradients in {dtype}, does not fit in device memory")
                    continue
                costs += found[0]
                launches += found[1]
    return costs, launches, notes


def _probe(
    backend: Backend,
    model: ModelSpec,
    micro_batch: int,
    seq_len: int,
    kernels: Kernels,
    dtype: GradientDtype,
    effort: Effort,
    wants_launches: bool,
) -> tuple[list[ComputeCost], list[LaunchCost]]:
    """Costs and launches of one shape. The probe and its memory are gone when this returns or raises."""
    probe = UnitProbe(backend, model, micro_batch, seq_len, kernels, dtype)
    return probe.costs(effort.repeats), probe.launches(effort.repeats) if wants_launches else []


def measure_again(profile: MachineProfile, show: Show) -> dict[str, Spread]:
    """Measure a few decisive figures again, by the names of `plan.figures`: links, optimizer, both together, a layer.

    Raises ValueError where this is another machine than the profile's.
    """
    backend = make_backend(profile.gpu.backend)
    differences = profile.identity().differences(identity(backend))
    if differences:
        raise ValueError(f"profile {profile.name} is of another machine: {'; '.join(differences)} (profile, here)")
    effort = Effort.of(profile.link.h2d.points[-1].size < Effort.of(False, backend.name).largest_copy_bytes, backend.name)
    combinations = ((LaneKind.H2D, LaneKind.D2H), (LaneKind.HOST_UPDATE, LaneKind.H2D, LaneKind.D2H))
    largest = format_bytes(effort.largest_copy_bytes)
    names = {
        LaneKind.H2D: f"h2d copy, {largest}",
        LaneKind.D2H: f"d2h copy, {largest}",
        LaneKind.HOST_UPDATE: "AdamW on the host",
    }
    steps = _Steps(show, 2 + len(names) + len(combinations))
    found: dict[str, Spread] = {}
    try:
        cost = _largest_layer(profile)
        steps.next("threads and kernels")
        _warm_up(backend, _layer_model(cost.shape) if cost else None)
        work = MemoryBuffers(backend, effort).work(profile.optimizer.threads)
        for lane, name in names.items():
            steps.next(name)
            size, action = work[lane]
            found[name] = mean_rate_spread(size, timed(backend, lane, action, effort.repeats))
        for lanes in combinations:
            steps.next(" with ".join(lanes))
            for lane, rates in together(backend, {lane: work[lane] for lane in lanes}, effort.together_ns).items():
                found[figure_name(lane, lanes)] = spread(rates)
        del work
        _release(backend)
        if cost is not None:
            steps.next("a layer")
            probe = UnitProbe(
                backend, _layer_model(cost.shape), cost.micro_batch, cost.seq_len, cost.kernels, cost.gradient_dtype
            )
            for measured in probe.costs(effort.repeats):
                if measured.shape == cost.shape:
                    found[cost_name(measured)] = measured.duration_ns
        steps.finish()
    finally:
        backend.close()
    return found


class _Steps:
    """Counts probes for the progress display."""

    def __init__(self, show: Show, total: int) -> None:
        self._show = show
        self._total = total
        self._done = 0

    def next(self, what: str) -> None:
        self._show(Progress(what, self._done, self._total))
        self._done = min(self._done + 1, self._total - 1)

    def finish(self) -> None:
        self._show(Progress("done", self._total, self._total))


def _warm_up(backend: Backend, model: ModelSpec | None) -> None:
    """Divide the cores, compile the optimizer, and run one small step: libraries load what they need at first use."""
    set_compute_threads(backend)
    HostUpdate(usable_cores()).compile()
    if model is not None:
        UnitProbe(backend, _small(model), 1, 128).costs(1)


def _layer_work(backend: Backend, request: ProfileRequest) -> dict[LaneKind, Work]:
    """Forward of the first model's layer at the largest shape that fits; nothing where none does."""
    for micro_batch, seq_len in sorted(request.shapes, key=prod, reverse=True):
        try:
            return {LaneKind.COMPUTE: UnitProbe(backend, request.models[0], micro_batch, seq_len).work()}
        except torch.OutOfMemoryError:
            _release(backend)
    return {}


def _measurable(kernels: Sequence[Kernels], backend: Backend) -> list[Kernels]:
    found = [each for each in kernels if each != "graphed" or backend.name == "cuda"]
    if not found:
        raise ValueError("--kernels graphed alone leaves nothing to measure on a CPU, which captures nothing; add fused")
    return found


def _release(backend: Backend) -> None:
    """Give device memory back that nothing uses any more."""
    gc.collect()
    backend.release_unused()


def _host_dram(backend: Backend, lanes: TogetherProbe) -> Spread:
    """Traffic of optimizer and copies both ways, all at once: alone, none of them fills host memory's bandwidth.

    On a CPU backend a copy reads and writes RAM, with a GPU it does one of the two.
    """
    rates = lanes.combined[LaneKind.HOST_UPDATE, LaneKind.H2D, LaneKind.D2H]
    passes = 2 if backend.name == "cpu" else 1
    copies = [rates[LaneKind.H2D], rates[LaneKind.D2H]] * passes
    return Spread(
        *(sum(getattr(rate, field) for rate in (rates[LaneKind.HOST_UPDATE], *copies)) for field in ("p10", "p50", "p90"))
    )


def _largest_layer(profile: MachineProfile) -> ComputeCost | None:
    layers = [cost for cost in profile.costs if cost.shape.role is UnitRole.LAYER]
    return max(layers, key=lambda cost: cost.micro_batch * cost.seq_len, default=None)


def _layer_model(shape: LayerShape) -> ModelSpec:
    """A model of two such layers, with as little else as can be."""
    fields = {field: getattr(shape, field) for field in shape.__struct_fields__ if field not in ("role", "vocabulary")}
    return ModelSpec(**fields, name="check", layers=2, vocabulary=256, max_positions=1 << 20)


def _small(model: ModelSpec) -> ModelSpec:
    """A few megabytes of the same architecture, with the same heads, so that libraries load the same kernels."""
    return msgspec.structs.replace(
        model, hidden=64, heads=2, kv_heads=1, ffn=128, vocabulary=256, max_positions=max(128, model.max_positions)
    )


def _device_memory_bytes(backend: Backend) -> int:
    """All of the GPU; without one, a quarter of RAM stands for it."""
    if backend.name == "cuda":
        return torch.cuda.mem_get_info(backend.device)[1]
    return total_host_bytes() // 4


def _host_memory_bytes(backend: Backend, gpu_memory_bytes: int) -> int:
    total = total_host_bytes()
    return total - gpu_memory_bytes if backend.name == "cpu" else total
