"""What this machine is, as far as it shows without torch: its GPUs, processor, cores and memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slideplan.machine.host import cpu_name, total_host_bytes, usable_cores
from slideplan.machine.limits import ROOT
from slideplan.machine.profile import MachineProfile

# Of the memory that a profile names: kernels and firmware take a part of it that changes with their versions.
MEMORY_TOLERANCE = 0.1
NVIDIA_SMI_SECONDS = 10
AMD_VENDOR = "0x1002"


@dataclass(frozen=True)
class ThisMachine:
    """gpus: names as their drivers have them, those that this process may use; cpu, cores, host_memory_bytes: as profiles."""

    gpus: tuple[str, ...]
    cpu: str
    cores: int
    host_memory_bytes: int

    def is_of(self, machine: MachineProfile) -> bool:
        """Whether a profile names the same GPU, processor and cores. Where the CPU computes, it stands for the GPU."""
        names = {_short(name) for name in self.gpus} if machine.gpu.backend == "cuda" else {_short(self.cpu)}
        return (machine.host.cpu, machine.host.cores) == (self.cpu, self.cores) and _short(machine.gpu.name) in names

    def has_memory_of(self, machine: MachineProfile) -> bool:
        """Whether the RAM agrees as well. Where the CPU computes, a part of it is the profile's GPU memory."""
        memory_bytes = profiled_memory_bytes(machine)
        return abs(self.host_memory_bytes - memory_bytes) <= MEMORY_TOLERANCE * memory_bytes


def profiled_memory_bytes(machine: MachineProfile) -> int:
    """RAM of the machine that a profile describes."""
    return machine.host.memory_bytes + (machine.gpu.memory_bytes if machine.gpu.backend == "cpu" else 0)


def this_machine(root: Path = ROOT, environment: Mapping[str, str] = os.environ) -> ThisMachine:
    """The machine that this process runs on. `root`: where proc/, sys/ and usr/ lie; another one in tests."""
    return ThisMachine(
        gpus=_gpus(root, environment), cpu=cpu_name(root), cores=usable_cores(root), host_memory_bytes=total_host_bytes(root)
    )


def _gpus(root: Path, environment: Mapping[str, str]) -> tuple[str, ...]:
    if any(environment.get(hidden, "0").strip() in ("", "-1") for hidden in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")):
        return ()
    return _nvidia(root) or _nvidia_smi(environment) or _amd(root)


def _nvidia(root: Path) -> tuple[str, ...]:
    """Names by the driver's own files: "Model: <tab> NVIDIA H100 80GB HBM3"."""
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    lines = (line.partition(":") for file in files for line in _text(file).splitlines())
    return tuple(name.strip() for field, _, name in lines if field.strip() == "Model" and name.strip())


def _nvidia_smi(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names by nvidia-smi, where the driver shows no files, as in the Windows Subsystem for Linux."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NVIDIA_SMI_SECONDS,
            env=dict(environment),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(name.strip() for name in done.stdout.splitlines() if name.strip()) if done.returncode == 0 else ()


def _amd(root: Path) -> tuple[str, ...]:
    """Names by sysfs, or by libdrm's table of devices, from which ROCm has them."""
    found = []
    for device in sorted((root / "sys/class/drm").glob("card[0-9]*/device")):
        if _text(device / "vendor").strip() == AMD_VENDOR and device.parent.name.removeprefix("card").isdecimal():
            name = _text(device / "product_name").strip() or _amd_marketed(root, device)
            found += [name] if name else []
    return tuple(found)


def _amd_marketed(root: Path, device: Path) -> str:
    numbers = [_text(device / part).strip().removeprefix("0x").upper() for part in ("device", "revision")]
    for line in _text(root / "usr/share/libdrm/amdgpu.ids").splitlines():
        fields = [field.strip() for field in line.split(",", 2)]
        if [field.upper().zfill(2) for field in fields[:2]] == [number.zfill(2) for number in numbers] and len(fields) == 3:
            return fields[2]
    return ""


def _short(name: str) -> str:
    """Older drivers leave the maker out."""
    return name.casefold().removeprefix("nvidia ").strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
