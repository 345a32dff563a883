"""How many threads the host's optimizer gets."""

import os
import subprocess
import sys

import pytest
import torch

from runtime.lanes import threads
from runtime.lanes.backend import CpuBackend
from runtime.lanes.threads import set_compute_threads
from runtime.probes.threads import chosen_threads, streamed_parameter_s
from slideplan.machine.profile import BesideCopies, Spread, ThreadPoint


class Gpu(CpuBackend):
    name = "cuda"  # type: ignore[assignment]


def point(count: int, host: float, h2d: float = 50, d2h: float = 50) -> ThreadPoint:
    """GB/s beside copies; alone it would be faster."""
    rates = (Spread.exact(round(rate * 1e9)) for rate in (host, h2d, d2h))
    return ThreadPoint(threads=count, host_bytes_per_s=Spread.exact(round(2e9 * host)), beside_copies=BesideCopies(*rates))


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ((point(8, 100), point(12, 120), point(15, 140), point(16, 150)), 16),
        ((point(8, 100), point(12, 149), point(15, 149), point(16, 150)), 12),  # more add nothing that counts
        ((point(8, 140), point(12, 150), point(15, 120), point(16, 90)), 12),
        # Here more threads are faster, but slow the loads down so that these take longer than updates.
        ((point(8, 130, 50), point(12, 140, 30), point(16, 150, 10)), 12),
        ((point(8, 130, 50, 50), point(12, 140, 50, 50), point(16, 150, 50, 5)), 12),
    ],
)
def test_the_fewest_threads_that_take_no_longer_over_a_parameter(points: tuple[ThreadPoint, ...], chosen: int) -> None:
    assert chosen_threads(Gpu(), points) == chosen
    assert chosen_threads(Gpu(), points[::-1]) == chosen


def test_a_streamed_parameter_takes_as_long_as_its_slowest_lane() -> None:
    assert streamed_parameter_s(point(1, 26, 4, 2).beside_copies) == pytest.approx(1e-9)  # type: ignore[arg-type]
    assert streamed_parameter_s(point(1, 13, 4, 2).beside_copies) == pytest.approx(2e-9)  # type: ignore[arg-type]
    assert streamed_parameter_s(point(1, 26, 1, 2).beside_copies) == pytest.approx(4e-9)  # type: ignore[arg-type]
    assert streamed_parameter_s(point(1, 26, 4, 0.4).beside_copies) == pytest.approx(5e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cores", "optimizer", "compute"), [(1, 1, 1), (2, 1, 1), (5, 2, 3), (16, 8, 8)])
def test_on_a_cpu_backend_cores_are_shared_with_compute(
    cores: int, optimizer: int, compute: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        assert chosen_threads(CpuBackend(), (point(cores, 100),)) == optimizer
        set_compute_threads(CpuBackend())
        assert torch.get_num_threads() == compute
        set_compute_threads(Gpu())
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="asks for the cores as Linux has it")
def test_openmp_does_not_bind_the_lanes_to_one_core() -> None:
    """What binds its threads by the environment leaves the importing thread, and whatever it starts, a single core."""
    show = "import runtime.machine, os; print(len(os.sched_getaffinity(0)))"
    told = os.environ | {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
    done = subprocess.run([sys.executable, "-c", show], env=told, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(os.sched_getaffinity(0))
