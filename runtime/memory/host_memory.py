"""Host memory as slots have it: private, exact, in huge pages, and spread over all memory controllers."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from slideplan.quantities import format_bytes

STATUS = Path("/proc/self/status")
NODES_WITH_MEMORY = Path("/sys/devices/system/node/has_memory")

# Linux's mbind(2) and get_mempolicy(2), called by number, since libnuma, which wraps them, is on few machines.
MBIND = {"x86_64": 237, "aarch64": 235}
GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
MPOL_DEFAULT, MPOL_INTERLEAVE = 0, 3


def host_buffer(size_bytes: int) -> torch.Tensor:
    """Zeroed anonymous memory of exactly this size, touched once, in huge pages where the system has them.

    On a machine with several NUMA nodes its pages lie on all of them in turn, unless the process was started with a policy
    of its own (numactl). Left alone they would all lie with the thread that touches them first, and updates by threads of
    every node would wait for that node's memory alone.
    """
    try:
        region = _mapping(max(1, size_bytes))
    except OSError as error:
        raise MemoryError(f"{format_bytes(size_bytes)} of host memory could not be mapped: {error.strerror}") from None
    with contextlib.suppress(AttributeError, OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(region, dtype=np.uint8)
    if len(nodes := memory_nodes()) > 1 and not has_policy():
        interleave(array, nodes)
    # The tensor keeps the array alive, and the array the mapping.
    return torch.from_numpy(array).zero_()


def _mapping(size_bytes: int) -> mmap.mmap:
    # Private: anonymous memory that is shared, Python's default, is never in huge pages unless the system says so.
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def memory_nodes() -> tuple[int, ...]:
    """NUMA nodes whose memory this process may take, ascending; () where the system does not say."""
    try:
        lines = STATUS.read_text().splitlines()
        allowed = next(line.split(":")[1] for line in lines if line.startswith("Mems_allowed_list:"))
        return tuple(sorted(_numbers(allowed) & _numbers(NODES_WITH_MEMORY.read_text())))
    except (OSError, StopIteration):
        return ()


def placement() -> str:
    """Where host buffers lie, of machines where that is a question; "" elsewhere."""
    nodes = memory_nodes()
    if len(nodes) < 2:
        return ""
    if has_policy():
        return "host memory lies where the process was told to have it (numactl)"
    named = ", ".join(map(str, nodes))
    if interleave(np.frombuffer(_mapping(mmap.PAGESIZE), dtype=np.uint8), nodes):
        return f"host memory lies on NUMA nodes {named} in turn"
    return f"host memory lies where it is touched first: the system refuses to lay it on NUMA nodes {named} in turn"


def has_policy() -> bool:
    """Whether the process was told where to take memory."""
    mode = ctypes.c_int(MPOL_DEFAULT)
    nothing = ctypes.c_void_p(None)
    asked = _call(GET_MEMPOLICY, ctypes.byref(mode), nothing, ctypes.c_ulong(0), nothing, ctypes.c_ulong(0))
    return asked and mode.value != MPOL_DEFAULT


def _call(numbers: dict[str, int], *arguments: object) -> bool:
    """A system call that returns zero if it does what it is asked."""
    number = numbers.get(platform.machine())
    if number is None:
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return bool(call(ctypes.c_long(number), *arguments) == 0)


def _numbers(ranges: str) -> set[int]:
    """{0, 1, 4} of "0-1,4"."""
    parts = (part.split("-") for part in ranges.strip().split(",") if part)
    return {number for first, *last in parts for number in range(int(first), int(last[0] if last else first) + 1)}


def interleave(array: np.ndarray, nodes: Sequence[int]) -> bool:
    """Lay pages not touched yet of a page-aligned array on these nodes in turn.

    False where the system refuses, as some containers do: they lie where they are touched first then.
    """
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = max(nodes) // bits + 1
    mask = (ctypes.c_ulong * words)()
    for node in nodes:
        mask[node // bits] |= 1 << node % bits
    address, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_ulong(array.nbytes)
    # The kernel reads one bit less than it is told.
    most = ctypes.c_ulong(words * bits + 1)
    return _call(MBIND, address, size, ctypes.c_int(MPOL_INTERLEAVE), mask, most, ctypes.c_uint(0))
