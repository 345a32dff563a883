"""What this machine is, told from files laid out as drivers have them, and whose profile it is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from builders import tiny_machine
from planner.catalogue import here as module
from planner.catalogue.here import ThisMachine, this_machine
from slideplan.quantities import GIB

PLAIN = {"PATH": "/nowhere"}
H100 = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 24\nGPU UUID: \t GPU-0\nVideo BIOS: \t 96.00"


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return lay(tmp_path, {"proc/meminfo": f"MemTotal: {64 << 20} kB", "proc/cpuinfo": "model name : Some CPU"})


def test_processor_and_memory_are_the_hosts(machine: Path) -> None:
    found = this_machine(machine, PLAIN)
    assert (found.gpus, found.cpu, found.host_memory_bytes) == ((), "Some CPU", 64 * GIB)


def test_nvidia_gpus_are_named_by_the_driver(machine: Path) -> None:
    names = {f"proc/driver/nvidia/gpus/0000:0{n}:00.0/information": H100 for n in (1, 2)}
    assert this_machine(lay(machine, names), PLAIN).gpus == ("NVIDIA H100 80GB HBM3",) * 2


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_gpus_that_this_process_may_not_use_are_none(machine: Path, hidden: str) -> None:
    lay(machine, {"proc/driver/nvidia/gpus/0000:01:00.0/information": H100})
    assert this_machine(machine, PLAIN | {"CUDA_VISIBLE_DEVICES": hidden}).gpus == ()
    assert this_machine(machine, PLAIN | {"CUDA_VISIBLE_DEVICES": "0"}).gpus != ()


def nvidia_smi(folder: Path, script: str) -> dict[str, str]:
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:/bin:/usr/bin"}


@pytest.mark.parametrize(
    "script, gpus",
    [
        ("echo 'NVIDIA GeForce RTX 4090'", ("NVIDIA GeForce RTX 4090",)),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", ()),
        ("sleep 60", ()),
    ],
)
def test_nvidia_smi_is_asked_where_the_driver_shows_no_files(
    machine: Path, script: str, gpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NVIDIA_SMI_SECONDS", 1)
    assert this_machine(machine, nvidia_smi(machine, script)).gpus == gpus


def test_amd_gpus_are_named_by_sysfs_or_by_libdrms_table(machine: Path) -> None:
    lay(
        machine,
        {
            "sys/class/drm/card0/device/vendor": "0x1a03",  # a server's own display
            "sys/class/drm/card1/device/vendor": "0x1002",
            "sys/class/drm/card1/device/product_name": "AMD Instinct MI300X",
            "sys/class/drm/card1-DP-1/device/vendor": "0x1002",
            "sys/class/drm/card2/device/vendor": "0x1002",
            "sys/class/drm/card2/device/device": "0x744c",
            "sys/class/drm/card2/device/revision": "0xc8",
            "usr/share/libdrm/amdgpu.ids": "# List of AMDGPU IDs\n1.0.0\n744C,\tC4,\tAMD Radeon PRO W7900\n"
            "744C,\tC8,\tAMD Radeon RX 7900 XTX",
        },
    )
    assert this_machine(machine, PLAIN).gpus == ("AMD Instinct MI300X", "AMD Radeon RX 7900 XTX")


HERE = ThisMachine(gpus=("test gpu",), cpu="test cpu", cores=4, host_memory_bytes=4 * GIB)


def of(**changes: object) -> ThisMachine:
    return ThisMachine(**{field: getattr(HERE, field) for field in HERE.__dataclass_fields__} | changes)  # type: ignore[arg-type]


def test_a_profile_is_of_this_machine_where_gpu_processor_and_cores_agree() -> None:
    profile = tiny_machine()
    assert HERE.is_of(profile)
    assert HERE.has_memory_of(profile)
    assert of(gpus=("another gpu", "NVIDIA test gpu")).is_of(profile)
    for other in (of(gpus=()), of(gpus=("test gpu 2",)), of(cpu="other"), of(cores=8)):
        assert not other.is_of(profile)


@pytest.mark.parametrize("share, agrees", [(1.0, True), (0.95, True), (1.05, True), (0.85, False), (1.15, False), (0.2, False)])
def test_memory_agrees_within_a_tenth(share: float, agrees: bool) -> None:
    assert of(host_memory_bytes=round(4 * GIB * share)).has_memory_of(tiny_machine()) == agrees


def test_where_the_cpu_computes_it_is_the_gpu_and_its_memory_a_part_of_ram() -> None:
    gpu = msgspec.structs.replace(tiny_machine().gpu, name="test cpu", backend="cpu", memory_bytes=GIB)
    profile = tiny_machine(gpu=gpu)
    assert of(gpus=()).is_of(profile)
    assert not of(gpus=()).has_memory_of(profile)
    assert of(gpus=(), host_memory_bytes=5 * GIB).has_memory_of(profile)
