"""Memory as the backends hand it out."""

import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime.memory import host_memory
from runtime.memory.host_memory import host_buffer, interleave, memory_nodes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_host_memory_is_private() -> None:
    """Shared anonymous memory gets no huge pages: 4.5 times as long to touch, and slower and less even to stream."""
    buffer = host_buffer(5 << 20)
    ranges = (line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines())
    flags = [
        flags for span, flags in ranges for low, high in [span.split("-")] if int(low, 16) <= buffer.data_ptr() < int(high, 16)
    ]
    assert flags == ["rw-p"]
    assert buffer.numel() == 5 << 20
    assert not buffer.any()


@pytest.mark.parametrize(
    ("allowed", "with_memory", "nodes"),
    [("0", "0", (0,)), ("0-1", "0-1", (0, 1)), ("0-127", "0,2-3", (0, 2, 3)), ("1", "0-1", (1,)), ("0-1", None, ())],
)
def test_memory_is_taken_of_nodes_that_have_some_and_are_allowed(
    allowed: str, with_memory: str | None, nodes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, has_memory = tmp_path / "status", tmp_path / "has_memory"
    status.write_text(f"Name:\tpython\nMems_allowed:\tff\nMems_allowed_list:\t{allowed}\n")
    if with_memory is not None:
        has_memory.write_text(with_memory + "\n")
    monkeypatch.setattr(host_memory, "STATUS", status)
    monkeypatch.setattr(host_memory, "NODES_WITH_MEMORY", has_memory)
    assert memory_nodes() == nodes


def test_buffers_lie_on_all_nodes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    def interleaved(array: np.ndarray, nodes: tuple[int, ...]) -> bool:
        done.append(nodes)
        return False

    def made(array: np.ndarray) -> torch.Tensor:
        done.append("touched")
        return torch.from_numpy(array)

    monkeypatch.setattr(host_memory, "torch", SimpleNamespace(from_numpy=made))
    monkeypatch.setattr(host_memory, "interleave", interleaved)
    monkeypatch.setattr(host_memory, "memory_nodes", lambda: (0,))
    host_buffer(4096)
    assert done == ["touched"], "one node has nothing to take turns with"
    monkeypatch.setattr(host_memory, "memory_nodes", lambda: (0, 1))
    buffer = host_buffer(4096)
    assert done[1:] == [(0, 1), "touched"], "pages lie where they do from the first touch"
    assert torch.equal(buffer, torch.zeros(4096, dtype=torch.uint8)), "a refusal leaves memory that works"
    monkeypatch.setattr(host_memory, "has_policy", lambda: True)
    host_buffer(4096)
    assert done[3:] == ["touched"], "who starts the process may know better"


@pytest.mark.parametrize(
    ("nodes", "policy", "granted", "said"),
    [
        ((0,), False, True, ""),
        ((0, 2), False, True, "host memory lies on NUMA nodes 0, 2 in turn"),
        (
            (0, 2),
            False,
            False,
            "host memory lies where it is touched first: the system refuses to lay it on NUMA nodes 0, 2 in turn",
        ),
        ((0, 2), True, True, "host memory lies where the process was told to have it (numactl)"),
    ],
)
def test_profiles_say_where_host_memory_lies(
    nodes: tuple[int, ...], policy: bool, granted: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "memory_nodes", lambda: nodes)
    monkeypatch.setattr(host_memory, "has_policy", lambda: policy)
    monkeypatch.setattr(host_memory, "interleave", lambda array, nodes: granted)
    assert host_memory.placement() == said


@linux
def test_a_policy_of_the_process_is_seen() -> None:
    """Set and asked for in a process of its own, which is then bound to node 0."""
    number = "ctypes.c_long({'x86_64': 238, 'aarch64': 237}[platform.machine()])"
    bind = f"call({number}, 2, (ctypes.c_ulong * 1)(1), ctypes.c_ulong(65))"
    show = (
        "import ctypes, platform; from runtime.memory.host_memory import has_policy; before = has_policy(); "
        f"call = ctypes.CDLL(None).syscall; refused = {bind}; print(before, refused, has_policy())"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout.split()
    if done[1] != "0":
        pytest.skip("this container may not bind memory")
    assert done == ["False", "0", "True"]


@linux
@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="a system without NUMA")
def test_the_system_interleaves_what_it_is_asked_to() -> None:
    def array() -> np.ndarray:
        return np.frombuffer(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)

    def policies(of: np.ndarray) -> list[str]:
        lines = (line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines())
        return [policy for start, policy, *_ in lines if int(start, 16) == of.ctypes.data]

    (node, *_), memory = memory_nodes(), array()
    if not interleave(memory, [node]):
        pytest.skip("this container may not place memory")
    memory.sum()
    assert policies(memory) == [f"interleave:{node}"]
    beyond = array()
    assert not interleave(beyond, [1000]), "a node that is not there is refused"
    assert policies(beyond) in ([], ["default"])
