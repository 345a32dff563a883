"""Where tasks run: CUDA (or ROCm) streams, or plain threads on the CPU. The executor knows no other difference."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from runtime import keep_cores
from runtime.kernels.cache import need_no_home
from runtime.memory.host_memory import host_buffer
from slideplan.graph.lanes import LaneKind
from slideplan.placement import Tier
from slideplan.quantities import format_bytes

keep_cores()  # now that torch is imported

STREAM_LANES = (LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H, LaneKind.GPU_UPDATE)


@dataclass(frozen=True, slots=True)
class Marker:
    """A point in a lane's work: an event on its stream, or a host time that has passed."""

    event: torch.cuda.Event | None
    host_ns: int


class Fetched(NamedTuple):
    """Numbers on their way to the host: there once the marker has passed. `source` must live until then."""

    marker: Marker
    values: torch.Tensor
    source: torch.Tensor


class Backend(Protocol):
    """What the executor and the handlers need of a device."""

    device: torch.device

    @property
    def name(self) -> Literal["cuda", "cpu"]:
        """As in machine profiles."""

    def lane(self, lane: LaneKind) -> contextlib.AbstractContextManager[None]:
        """Everything a thread issues inside belongs to the lane."""

    def mark(self, lane: LaneKind) -> Marker:
        """The point that the lane has reached with what was issued so far."""

    def join(self, marker: Marker, lane: LaneKind) -> None:
        """What the lane issues from now on runs after the marker."""

    def wait(self, marker: Marker) -> None:
        """Block the calling thread until the marker has passed."""

    def passed(self, marker: Marker) -> bool:
        """Whether the marker has passed. Never blocks, also while another thread waits for room in a stream's full queue."""

    def anchor(self) -> Marker:
        """A marker whose event and host time name the same instant. Blocks the calling thread, as whatever issues does."""

    def fetch(self, values: torch.Tensor, lane: LaneKind) -> Fetched:
        """Begin to bring a few numbers to the host, after what the lane has issued. No lane waits for them.

        For a lane's own thread: whoever reads a number of the device elsewhere blocks while a stream's queue is full.
        """

    def elapsed_ns(self, anchor: Marker, marker: Marker) -> int:
        """From the anchor to the marker. Both must have passed."""

    def allocate(self, tier: Tier, size_bytes: int, copied: bool) -> torch.Tensor:
        """A zeroed uint8 buffer of exactly this size; `copied` host buffers are page-locked."""

    def outside_bytes(self) -> int:
        """Device memory outside torch's allocator: driver, kernels, libraries; what other programs hold there, too."""

    def limit_gpu_bytes(self, capacity_bytes: int, outside_bytes: int) -> None:
        """Fail rather than take more device memory than this; of it, `outside_bytes` stay with driver and libraries.

        They take some of it only as kernels first run, and fail where tensors lie there.
        """

    def synchronize(self) -> None:
        """Wait for everything that was issued, on any stream."""

    def release_unused(self) -> None:
        """Wait for all that was issued, give back what torch's allocator keeps, and count peaks from here."""

    def peak_gpu_bytes(self) -> int | None:
        """Most device memory taken so far, driver and libraries included; None where nobody counts it."""

    def capture(self, lane: LaneKind, actions: Iterable[Callable[[], None]]) -> list[Callable[[], None]]:
        """What each action issues, as one launch each; nothing is run now. Empty where there is no such thing.

        While no other thread uses the device, and to be replayed in this order: they share what they allocate.
        """

    def close(self) -> None:
        """Release page locks. Everything issued must be over."""


class CpuBackend:
    """Threads for lanes, memcpy for copies: everything has happened when it is issued."""

    name: Literal["cpu"] = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @contextlib.contextmanager
    def lane(self, lane: LaneKind) -> Iterator[None]:
        yield

    def mark(self, lane: LaneKind) -> Marker:
        return Marker(None, time.perf_counter_ns())

    def join(self, marker: Marker, lane: LaneKind) -> None:
        pass

    def wait(self, marker: Marker) -> None:
        pass

    def passed(self, marker: Marker) -> bool:
        return True

    def anchor(self) -> Marker:
        return Marker(None, time.perf_counter_ns())

    def fetch(self, values: torch.Tensor, lane: LaneKind) -> Fetched:
        return Fetched(self.mark(lane), values.clone(), values)

    def elapsed_ns(self, anchor: Marker, marker: Marker) -> int:
        return marker.host_ns - anchor.host_ns

    def allocate(self, tier: Tier, size_bytes: int, copied: bool) -> torch.Tensor:
        return host_buffer(size_bytes)

    def outside_bytes(self) -> int:
        return 0

    def limit_gpu_bytes(self, capacity_bytes: int, outside_bytes: int) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def release_unused(self) -> None:
        pass

    def peak_gpu_bytes(self) -> int | None:
        return None

    def capture(self, lane: LaneKind, actions: Iterable[Callable[[], None]]) -> list[Callable[[], None]]:
        return []

    def close(self) -> None:
        pass


class CudaBackend:
    """One stream per GPU lane, events between them; vendor-neutral torch calls only."""

    name: Literal["cuda"] = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, but torch finds no GPU; use --device cpu")
        need_no_home()
        # A run that goes on from a checkpoint must train as one that never stopped: sums have one order, whatever it costs.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._streams = {lane: torch.cuda.Stream(self.device) for lane in STREAM_LANES}
        self._clock = torch.cuda.Stream(self.device)
        self._fetches = torch.cuda.Stream(self.device)
        self._registered: list[torch.Tensor] = []

    @contextlib.contextmanager
    def lane(self, lane: LaneKind) -> Iterator[None]:
        torch.cuda.set_device(self.device)
        if lane not in self._streams:
            yield
            return
        with torch.cuda.stream(self._streams[lane]):
            yield

    def mark(self, lane: LaneKind) -> Marker:
        if lane not in self._streams:
            return Marker(None, time.perf_counter_ns())
        # Blocking events let a waiting thread sleep: spinning would take cores from the optimizer.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self._streams[lane])
        return Marker(event, 0)

    def join(self, marker: Marker, lane: LaneKind) -> None:
        if marker.event is None:
            return  # work of a host lane is over when it is marked
        if lane in self._streams:
            self._streams[lane].wait_event(marker.event)
        else:
            marker.event.synchronize()

    def wait(self, marker: Marker) -> None:
        if marker.event is not None:
            marker.event.synchronize()

    def passed(self, marker: Marker) -> bool:
        return marker.event is None or marker.event.query()

    def anchor(self) -> Marker:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._clock)  # an idle stream: the event happens now
        event.synchronize()
        return Marker(event, time.perf_counter_ns())

    def fetch(self, values: torch.Tensor, lane: LaneKind) -> Fetched:
        # On a stream of its own: a copy engine may be busy with a unit's gradients, and compute must not wait for that.
        before = torch.cuda.Event()
        before.record(self._streams[lane])
        self._fetches.wait_event(before)
        with torch.cuda.stream(self._fetches):
            found = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            found.copy_(values, non_blocking=True)
            after = torch.cuda.Event()
            after.record(self._fetches)
        return Fetched(Marker(after, 0), found, values)

    def elapsed_ns(self, anchor: Marker, marker: Marker) -> int:
        if marker.event is None:
            return marker.host_ns - anchor.host_ns
        assert anchor.event is not None
        return round(anchor.event.elapsed_time(marker.event) * 1e6)

    def allocate(self, tier: Tier, size_bytes: int, copied: bool) -> torch.Tensor:
        if tier is Tier.GPU:
            return torch.zeros(size_bytes, dtype=torch.uint8, device=self.device)
        buffer = host_buffer(size_bytes)
        if copied:
            # Registered exactly: torch's pinned allocator would round the size up to a power of two.
            status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size_bytes, 0)
            if int(status) != 0:
                raise MemoryError(f"{format_bytes(size_bytes)} of host memory could not be page-locked: {status}")
            self._registered.append(buffer)
        return buffer

    def outside_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    def limit_gpu_bytes(self, capacity_bytes: int, outside_bytes: int) -> None:
        total = torch.cuda.mem_get_info(self.device)[1]
        fraction = min(1.0, max(0, capacity_bytes - max(outside_bytes, self.outside_bytes())) / total)
        torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release_unused(self) -> None:
        # The allocator keeps blocks per stream: what one stream has freed is lost to the others.
        self.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gpu_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) + self.outside_bytes()

    def capture(self, lane: LaneKind, actions: Iterable[Callable[[], None]]) -> list[Callable[[], None]]:
        replays: list[Callable[[], None]] = []
        with self.lane(lane):
            pool = torch.cuda.graph_pool_handle()
            for action in actions:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    action()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # of a capture that failed; why it did is what matters
                        graph.capture_end()
                    raise
                graph.capture_end()
                replays.append(graph.replay)
        return replays

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop().data_ptr())


def make_backend(device: str) -> Backend:
    """Backend for "cuda", "cpu" or "auto" (a GPU if torch finds one)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown; use auto, cpu or cuda")
    return CudaBackend() if device == "cuda" else CpuBackend()
