"""Machine profiles from datasheets, derated by stated factors: `python -m planner.catalogue.datasheets` writes them.

They serve to plan for a machine at which nobody has run `planner profile` yet. Peak figures are the
vendors'; the derating factors below are assumptions, the same for all machines.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

import msgspec

from slideplan import codec
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
from slideplan.quantities import GIB, KIB, MIB

DATE = "2026-11-21"
GIGA, TERA = 10**9, 10**12

# Derating, in percent of the datasheet's peak.
GEMM_PERCENT = 78  # large matrix products; 81 measured on an H100
ATTENTION_PERCENT = 45  # of dense bf16, fused causal attention forward and backward
GPU_MEMORY_PERCENT = 75  # of device memory bandwidth, element-wise kernels and the optimizer on the GPU
DRAM_PERCENT = 80  # of channels x transfer rate, all users together
OPTIMIZER_PERCENT = 90  # of usable DRAM bandwidth, AdamW alone; 158 of about 175 GB/s measured beside an H100
OPTIMIZER_BYTES_PER_S_PER_CORE = 10 * GIGA  # 158 GB/s on 16 cores measured: few cores bind before DRAM does
DUPLEX_PERCENT = 82  # of the sum of both directions; 88 of 108 GB/s measured on PCIe 5
LAUNCH_NS = 5_000  # fixed cost of one matrix product
TRANSFER_LATENCY_NS = 4_000  # fixed cost of one copy; 1 MiB pieces reach 45 of 54 GB/s measured
PCIE_BYTES_PER_S = {4: (25 * GIGA, 26 * GIGA), 5: (54 * GIGA, 54 * GIGA)}  # x16, pinned: h2d, d2h
CONTEXT_BYTES = GIB  # driver's share and CUDA context with its libraries
PROCESS_BYTES = 3 * GIB  # interpreter, torch and CUDA on the host
DRIVE_LATENCY_NS = 100_000  # fixed cost of one read or write of a drive

GEMM_SIZES = tuple(10**power for power in range(9, 14))  # FLOPs
TRANSFER_SIZES = (64 * KIB, MIB, 16 * MIB, 256 * MIB)
DRIVE_SIZES = (MIB, 16 * MIB, 256 * MIB)


class Card(NamedTuple):
    """A GPU's datasheet: dense bf16 with fp32 accumulation, memory, bandwidth, PCIe generation of an x16 slot."""

    name: str
    memory_gib: int
    tflops: int
    memory_gb_per_s: int
    pcie: int


class Server(NamedTuple):
    """What stands around the card. `dram_gb_per_s` is channels x transfer rate x 8 bytes."""

    cpu: str
    cores: int
    memory_gib: int
    dram_gb_per_s: int


class Drive(NamedTuple):
    """An NVMe drive. Units are powers of ten, as on the box. `burst_write` fills its cache, if it has one; `write` lasts."""

    capacity_tb: float
    read_gb_per_s: float
    burst_write_gb_per_s: float | None
    write_gb_per_s: float
    endurance_tb: int


RTX_3090 = Card("NVIDIA GeForce RTX 3090", 24, 71, 936, 4)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", 24, 165, 1008, 4)
RTX_A6000 = Card("NVIDIA RTX A6000", 48, 155, 768, 4)
A100 = Card("NVIDIA A100-SXM4-80GB", 80, 312, 2039, 4)
H200 = Card("NVIDIA H200", 140, 989, 4800, 5)  # sold as 141 GB; the driver reports 140.4 GiB

# A 4 TB drive with TLC cells for desktops, PCIe 4. Samsung's datasheet of the 990 PRO says 7.45 GB/s read, 6.9 GB/s write and
# 2400 TB written; others are a little slower. No datasheet says what such a drive writes once its cache is full. Reviews say
# 0.5 to 3.6 GB/s (techpowerup.com: ADATA Atom 50, Sabrent Rocket 4 Plus). 1.8 GB/s is assumed, not measured.
DESKTOP_DRIVE = Drive(4, 7.0, 6.0, 1.8, 2400)
# A 3.84 TB drive for servers, PCIe 4 (Samsung PM9A3): no such cache, so its rates last. One drive write a day for five years.
SERVER_DRIVE = Drive(3.84, 6.8, None, 4.0, 7008)

DDR5 = "desktop, 2 channels DDR5-4800"
MACHINES: dict[str, tuple[Card, Server, Drive | None]] = {
    "rtx3090-128gib": (RTX_3090, Server("desktop, 2 channels DDR4-3200", 16, 128, 51), DESKTOP_DRIVE),
    "rtx4090-64gib": (RTX_4090, Server(DDR5, 16, 64, 77), DESKTOP_DRIVE),
    "rtx4090-128gib": (RTX_4090, Server(DDR5, 16, 128, 77), DESKTOP_DRIVE),
    "rtx4090-256gib": (RTX_4090, Server(DDR5, 16, 256, 77), DESKTOP_DRIVE),
    "rtx4090-2tib": (RTX_4090, Server("server, 12 channels DDR5-4800", 64, 2048, 461), None),
    "a6000-48gib-512gib": (RTX_A6000, Server("server, 8 channels DDR4-3200", 32, 512, 205), SERVER_DRIVE),
    "a100-80gib-1tib": (A100, Server("server, 8 channels DDR4-3200", 64, 1024, 205), SERVER_DRIVE),
}

ASSUMED = (
    f"From datasheets: dense bf16 rate, device memory and its bandwidth, PCIe generation. Assumed: the server (cores, RAM, "
    f"DRAM channels); matrix products reach {GEMM_PERCENT} % of the dense rate, attention {ATTENTION_PERCENT} %; element-wise "
    f"kernels and the optimizer on the GPU {GPU_MEMORY_PERCENT} % of device memory bandwidth; DRAM {DRAM_PERCENT} % of "
    f"channels x transfer rate, the CPU optimizer {OPTIMIZER_PERCENT} % of that and at most "
    f"{OPTIMIZER_BYTES_PER_S_PER_CORE // GIGA} GB/s a core; copies in both directions at once {DUPLEX_PERCENT} % of the sum."
)
ASSUMED_DRIVE = (
    "Of the drive, from datasheets: read, write, endurance. Assumed, not measured: what a desktop's drive writes once its "
    "cache is full; and that a drive either reads or writes at a time, which limits both together to the harmonic mean of the "
    "two rates."
)
MEASURED_H200 = (
    "Measured on one such host: copies 55 GB/s each way alone and 47.6 + 47.6 together, CPU AdamW 248 GB/s with 64 threads, "
    "disk 2.0 GB/s read and 2.5 GB/s write (both at once assumed 2.5). DRAM bandwidth follows from the optimizer's."
)


def datasheet_machine(name: str, card: Card, server: Server, drive: Drive | None = None) -> MachineProfile:
    """The profile of a card in a server with a drive, every rate derated from its peak."""
    memory_bytes_per_s = card.memory_gb_per_s * GIGA
    dram = server.dram_gb_per_s * GIGA * DRAM_PERCENT // 100
    h2d, d2h = PCIE_BYTES_PER_S[card.pcie]
    on_gpu = memory_bytes_per_s * GPU_MEMORY_PERCENT // 100
    on_host = min(dram * OPTIMIZER_PERCENT // 100, server.cores * OPTIMIZER_BYTES_PER_S_PER_CORE)
    return MachineProfile(
        name=name,
        gpu=GpuProfile(
            name=card.name,
            backend="cuda",
            memory_bytes=card.memory_gib * GIB,
            context_bytes=CONTEXT_BYTES,
            memory_bytes_per_s=memory_bytes_per_s,
        ),
        host=HostProfile(
            cpu=server.cpu,
            cores=server.cores,
            memory_bytes=server.memory_gib * GIB,
            process_bytes=PROCESS_BYTES,
            dram_bytes_per_s=dram,
        ),
        link=_link(h2d, d2h, (h2d + d2h) * DUPLEX_PERCENT // 100),
        optimizer=OptimizerProfile(
            threads=server.cores, host_bytes_per_s=Spread.exact(on_host), gpu_bytes_per_s=Spread.exact(on_gpu)
        ),
        ssd=None if drive is None else _ssd(drive),
        efficiency=Efficiency(
            gemm=_curve(GEMM_SIZES, card.tflops * TERA * GEMM_PERCENT // 100, LAUNCH_NS),
            attention_flops_per_s=card.tflops * TERA * ATTENTION_PERCENT // 100,
            elementwise_bytes_per_s=on_gpu,
        ),
        costs=(),
        provenance=_provenance(ASSUMED if drive is None else f"{ASSUMED} {ASSUMED_DRIVE}"),
    )


def h200_machine() -> MachineProfile:
    """An H200 host of which links, CPU optimizer and disk were measured, and the rest is from datasheets."""
    # 345 GB/s of DRAM: what the 248 GB/s measured of the CPU optimizer imply by the two factors.
    sheet = datasheet_machine("h200-503gib", H200, Server("server with one of its 4 H200", 64, 503, 345))
    return msgspec.structs.replace(
        sheet,
        link=_link(55 * GIGA, 55 * GIGA, 95_200_000_000),
        ssd=SsdProfile(
            path=".",
            capacity_bytes=235 * GIGA,
            read=_curve((16 * MIB,), 2_000_000_000, 0),
            write=_curve((16 * MIB,), 2_500_000_000, 0),
            duplex_bytes_per_s=2_500_000_000,
        ),
        provenance=_provenance(f"{MEASURED_H200} {ASSUMED}"),
    )


def datasheet_machines() -> tuple[MachineProfile, ...]:
    """All shipped datasheet profiles."""
    return (*(datasheet_machine(name, *parts) for name, parts in MACHINES.items()), h200_machine())


def _curve(sizes: tuple[int, ...], rate_per_s: int, latency_ns: int) -> Curve:
    """Rates that a fixed latency before a constant peak rate gives."""
    points = []
    for size in sizes:
        duration_ns = latency_ns + size * GIGA // rate_per_s
        points.append(RatePoint(size=size, rate=Spread.exact(size * GIGA // duration_ns)))
    return Curve(points=tuple(points))


def _link(h2d: int, d2h: int, duplex: int) -> LinkProfile:
    return LinkProfile(
        h2d=_curve(TRANSFER_SIZES, h2d, TRANSFER_LATENCY_NS),
        d2h=_curve(TRANSFER_SIZES, d2h, TRANSFER_LATENCY_NS),
        duplex_bytes_per_s=duplex,
    )


def _ssd(drive: Drive) -> SsdProfile:
    read, write, burst = round(drive.read_gb_per_s * GIGA), round(drive.write_gb_per_s * GIGA), drive.burst_write_gb_per_s
    return SsdProfile(
        path=".",
        capacity_bytes=round(drive.capacity_tb * TERA),
        read=_curve(DRIVE_SIZES, read, DRIVE_LATENCY_NS),
        write=_curve(DRIVE_SIZES, write, DRIVE_LATENCY_NS),
        duplex_bytes_per_s=2 * read * write // (read + write),
        burst_write_bytes_per_s=None if burst is None else round(burst * GIGA),
        endurance_bytes=drive.endurance_tb * TERA,
    )


def _provenance(notes: str) -> Provenance:
    return Provenance(source="datasheet", date=DATE, command="python -m planner.catalogue.datasheets", versions={}, notes=notes)


def main() -> None:
    """Rewrite the shipped JSON files."""
    folder = Path(str(resources.files("profiles")))
    for machine in datasheet_machines():
        codec.save(folder / f"{machine.name}.json", machine)


if __name__ == "__main__":
    main()
