"""Nothing hangs: a lane that never comes back ends the run, by name."""

import _thread
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import msgspec
import pytest

from runtime.lanes import executor as executor_module
from runtime.lanes import watchdog
from runtime.lanes.ahead import Ahead
from runtime.lanes.backend import CpuBackend, Marker
from runtime.lanes.clock import Hung, LaneClock, LaneError, StopSignal, Walk
from runtime.lanes.executor import Executor
from runtime.lanes.helpers import Helper
from runtime.lanes.watchdog import Watchdog, patience_ns
from runtime.probes.handoffs import cycle_graph
from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.operations import FORWARD, LOAD_WEIGHTS, OFFLOAD_GRADIENT, UPDATE_HOST
from slideplan.graph.tasks import Access, Dependency, Role, Task, TaskGraph
from slideplan.placement import Tier

GRAPH = cycle_graph()  # load, forward, offload, update, each after the one before; "other", on the lane of updates, alone
LANES = {"load": "h2d", "forward": "compute", "offload": "d2h", "update": "host_update", "other": "host_update"}
NAMES = dict(zip(LANES, (*map(str, (LOAD_WEIGHTS, FORWARD, OFFLOAD_GRADIENT, UPDATE_HOST)), "other"), strict=True))
PLANNED_NS = [1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000]
STEPS, FIRST = 6, 40
MS = 1_000_000
HUNG_NS = 200 * MS


pytestmark = pytest.mark.timeout(100)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are counted, not time: ten of them at least must find nothing that moves, however busy the machine is."""
    monkeypatch.setattr(watchdog, "LOOK_NS", 10 * MS)
    monkeypatch.setattr(executor_module, "GRACE_NS", 100 * MS)


class Stuck:
    """A handler that never comes back from one task of one step, until it is freed."""

    def __init__(self, name: str, step: int) -> None:
        self.reached, self.freed = threading.Event(), threading.Event()
        self._name, self._step = NAMES[name], FIRST + step

    def __call__(self, task: Task, step: int) -> None:
        if task.name == self._name and step == self._step:
            self.reached.set()
            self.freed.wait()


def lanes_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")]


@contextmanager
def freed(*stuck: Stuck) -> Iterator[None]:
    try:
        yield
    finally:
        for each in stuck:
            each.freed.set()
        for thread in threading.enumerate():
            if thread.name.startswith("lane-"):
                thread.join()


def executor(handler: Callable[[Task, int], None], graph: TaskGraph = GRAPH, backend: CpuBackend | None = None) -> Executor:
    planned_ns = PLANNED_NS[: len(graph.tasks)]
    return Executor(graph, backend or CpuBackend(), handler, STEPS, FIRST, HUNG_NS, planned_ns)


def message(name: str, step: int) -> str:
    unit = 2 if name == "other" else 1
    where = f"lane {LANES[name]}, step {FIRST + step}, task {NAMES[name]}, unit {unit}"
    return rf"^{where}: has not moved for [\d,.]+ m?s \(planned: {list(NAMES).index(name) + 1},000.0 us\)"


@pytest.mark.parametrize("step", [0, STEPS - 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_lane_that_never_comes_back_is_named(name: str, step: int) -> None:
    stuck = Stuck(name, step)
    with freed(stuck):
        with pytest.raises(Hung, match=message(name, step) + "$"):
            list(executor(stuck))
        assert lanes_alive() == [f"lane-{LANES[name]}"]


def test_a_lane_that_never_comes_back_while_spans_are_read_is_named() -> None:
    stuck = Stuck("offload", 1)
    running = executor(stuck)
    with freed(stuck), pytest.raises(Hung, match=message("offload", 1) + "$"), closing(iter(running)) as steps:
        next(steps)
        running.spans(0)


def test_all_that_never_come_back_are_named() -> None:
    first, second = Stuck("forward", 1), Stuck("other", 0)

    def both(task: Task, step: int) -> None:
        first(task, step)
        second(task, step)

    # The update of step 0 comes first on its lane, so the forward of step 1 is reached while `other` hangs.
    with freed(first, second), pytest.raises(Hung) as hung:
        list(executor(both))
    said = str(hung.value).split("; ")
    assert [part.split(",")[0] for part in said] == ["lane compute", "lane host_update"]


def test_what_is_stuck_when_another_lane_fails_is_named_and_what_failed_too() -> None:
    stuck = Stuck("other", 0)

    def failing(task: Task, step: int) -> None:
        stuck(task, step)
        if task.operation == FORWARD and step == FIRST + 1:
            stuck.reached.wait()
            raise RuntimeError("device is on fire")

    failed = rf"; what failed first: lane compute, step {FIRST + 1}, task {FORWARD}, unit 1: RuntimeError: device is on fire$"
    with freed(stuck):
        with pytest.raises(Hung, match=message("other", 0) + failed) as hung:
            list(executor(failing))
        assert type(hung.value.__cause__) is LaneError
        assert lanes_alive() == ["lane-host_update"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stuck_when_the_caller_gives_up_is_named(name: str) -> None:
    stuck = Stuck(name, 1)
    with freed(stuck), pytest.raises(Hung, match=message(name, 1) + "$"), closing(iter(executor(stuck))) as steps:
        next(steps)
        stuck.reached.wait()


def test_what_is_stuck_when_the_user_interrupts_is_named() -> None:
    stuck = Stuck("forward", 1)

    def interrupt() -> None:
        stuck.reached.wait()
        for _ in range(3):
            _thread.interrupt_main()
            time.sleep(0.02)

    threading.Thread(target=interrupt).start()
    with freed(stuck), pytest.raises(Hung, match=message("forward", 1) + "$") as hung:
        list(executor(stuck))
    assert isinstance(hung.value.__cause__, KeyboardInterrupt)


class HungDevice(CpuBackend):
    """Lanes issue all that they have; what compute issues from some mark on never ends."""

    def __init__(self, marks: int) -> None:
        super().__init__()
        self._marks, self._hung = marks, set[int]()

    def mark(self, lane: LaneKind) -> Marker:
        marker = super().mark(lane)
        if lane is LaneKind.COMPUTE:
            self._marks -= 1
            if self._marks < 0:
                self._hung.add(id(marker))
        return marker

    def passed(self, marker: Marker) -> bool:
        return id(marker) not in self._hung


@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_a_device_that_never_ends_what_was_issued_is_named(step: int) -> None:
    with pytest.raises(Hung, match=message("forward", step) + "$"):
        list(executor(lambda task, step: None, backend=HungDevice(2 * step + 1)))
    assert not lanes_alive()


def test_a_device_that_never_ends_what_was_issued_before_a_lane_failed_is_named() -> None:
    """Whoever closes the backend next would wait for it."""

    def failing(task: Task, step: int) -> None:
        if task.operation == UPDATE_HOST and step == FIRST + 4:
            raise RuntimeError("device is on fire")

    with pytest.raises(Hung, match=message("forward", 2) + "; what failed first: lane host_update"):
        list(executor(failing, backend=HungDevice(5)))


def test_lanes_that_all_wait_say_for_what() -> None:
    """In a graph that nobody has checked."""
    load, forward = GRAPH.tasks[:2]
    tasks = (
        msgspec.structs.replace(load, dependencies=(Dependency(task=1, distance=0),)),
        msgspec.structs.replace(forward, dependencies=(Dependency(task=0, distance=0),)),
    )
    said = (
        f"lane compute, step {FIRST}, task {FORWARD}, unit 1: waits for {LOAD_WEIGHTS} on lane h2d; "
        f"lane h2d, step {FIRST}, task {LOAD_WEIGHTS}, unit 1: waits for {FORWARD} on lane compute"
    )
    with pytest.raises(Hung) as hung:
        list(executor(lambda task, step: None, TaskGraph(pools=(), tasks=tasks)))
    assert str(hung.value) == said
    assert not lanes_alive()


def test_lanes_that_are_slow_but_move_are_left_alone() -> None:
    def slow(task: Task, step: int) -> None:
        time.sleep(0.03)  # in all far longer than the patience

    running = executor(slow)
    for step in running:
        if step:
            running.spans(step - 1)


class Answering:
    """A drive that answers so often, then no more."""

    def __init__(self, times: int) -> None:
        self._left = times
        self.unanswered = ["/mnt/slots"]

    @property
    def answers(self) -> int:
        self._left = max(0, self._left - 1)
        return self._left


def test_a_drive_that_answers_moves_its_lane() -> None:
    """A slot has many pieces."""
    stuck = Stuck("load", 1)
    threading.Timer(3 * HUNG_NS / 1e9, stuck.freed.set).start()
    running = Executor(GRAPH, CpuBackend(), stuck, STEPS, FIRST, HUNG_NS, drive=Answering(1 << 30))
    assert list(running) == list(range(STEPS))


def test_a_drive_that_stops_answering_is_named() -> None:
    load, *others = GRAPH.tasks
    graph = TaskGraph(pools=(), tasks=(msgspec.structs.replace(load, fifo=LaneKind.SSD_READ), *others))
    stuck = Stuck("load", 1)
    running = Executor(graph, CpuBackend(), stuck, STEPS, FIRST, HUNG_NS, drive=Answering(20))
    with freed(stuck), pytest.raises(Hung, match=r"^lane ssd_read, .* ms; the drive does not answer, asked for /mnt/slots$"):
        list(running)


class GoesOn:
    """Work that ends when the test says so."""

    def __init__(self) -> None:
        self.begun, self.tell = threading.Event(), None

    def then(self, told: Callable[[BaseException | None], None]) -> None:
        self.tell = told
        self.begun.set()


@pytest.mark.parametrize("error", [None, OSError("broken")])
def test_tasks_that_go_on_end_in_their_order(error: OSError | None) -> None:
    """One is issued before the one before ends; what fails is named."""
    one, other = GRAPH.tasks[3], GRAPH.tasks[4]  # of one lane
    tasks = tuple(msgspec.structs.replace(task, dependencies=(), fifo=LaneKind.SSD_READ) for task in (one, other))
    compute = msgspec.structs.replace(GRAPH.tasks[1], dependencies=(Dependency(task=0, distance=0),))
    graph = TaskGraph(pools=(), tasks=(*tasks, compute))
    works = {one.name: GoesOn(), other.name: GoesOn()}
    computed, early = threading.Event(), []

    def handler(task: Task, step: int) -> GoesOn | None:
        if task.lane.kind is LaneKind.COMPUTE:
            computed.set()
        return works.get(task.name)

    def device() -> None:
        for work in works.values():
            assert work.begun.wait(60)
        works[other.name].tell(None)
        early.append(computed.wait(0.2))
        works[one.name].tell(error)

    thread = threading.Thread(target=device)
    thread.start()
    running = Executor(graph, CpuBackend(), handler, 1, FIRST)
    if error is None:
        with closing(iter(running)) as run:
            assert list(run) == [0]
        _, spans = running.spans(0)
        assert spans[0].end_ns <= spans[1].start_ns
    else:
        with pytest.raises(LaneError, match=rf"^lane ssd_read, step {FIRST}, task {NAMES['update']}, unit 1: OSError: broken$"):
            list(running)
    thread.join()
    assert early == [False], "nothing has come after the second one before the first was over"
    assert not lanes_alive()


def test_a_task_that_shares_a_slot_with_one_that_goes_on_waits_for_it() -> None:
    access = Access(Role.MOMENTS, Tier.HOST, "pool", 0, "w")
    signal = StopSignal()
    clock = LaneClock(signal)
    ahead = Ahead(CpuBackend(), LaneKind.SSD_READ, clock)
    task, same = (msgspec.structs.replace(GRAPH.tasks[0], accesses=(access,)) for _ in range(2))
    other = msgspec.structs.replace(task, accesses=(msgspec.structs.replace(access, slot=1),))
    work = GoesOn()
    ahead.wait_for_room(task)
    ahead.issued(task, Marker(None, 1), work, signal.stop)
    ahead.wait_for_room(other)
    waiting = threading.Thread(target=ahead.wait_for_room, args=(same,))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    assert clock.issued == 0
    work.tell(None)
    waiting.join(60)
    assert not waiting.is_alive()
    assert clock.issued == 1


def test_without_patience_lanes_may_take_for_ever() -> None:
    stuck = Stuck("forward", 1)
    threading.Timer(3 * HUNG_NS / 1e9, stuck.freed.set).start()
    assert list(Executor(GRAPH, CpuBackend(), stuck, STEPS, FIRST)) == list(range(STEPS))


def test_time_counts_while_somebody_looks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A process that was stopped for an hour, or that wrote something between two steps, finds its lanes where it left them."""
    monkeypatch.setattr(watchdog, "LOOK_NS", 1000 * MS)
    now_ns = 0
    monkeypatch.setattr(watchdog.time, "perf_counter_ns", lambda: now_ns)
    compute = Lane(LaneKind.COMPUTE)
    graph = TaskGraph(pools=(), tasks=(msgspec.structs.replace(GRAPH.tasks[1], dependencies=()),))
    free = threading.Event()
    lane = Helper("lane", free.wait)
    lane.start()
    request.addfinalizer(free.set)
    clocks, threads = {compute: LaneClock(StopSignal())}, {compute: lane}
    dog = Watchdog(Walk(graph, FIRST), CpuBackend(), clocks, threads, 10_000 * MS, None)

    def after(seconds: float) -> None:
        nonlocal now_ns
        now_ns += round(seconds * 1e9)
        dog.look()

    after(3600)
    for _ in range(8):
        after(1)
    clocks[compute].advance(Marker(None, 0), Marker(None, 0))
    for _ in range(2):
        after(3600)
    for _ in range(7):
        after(1)
    for _ in range(10):
        after(0.1)  # one look in all
    expected = rf"^lane compute, step {FIRST + 1}, task {FORWARD}, unit 1: has not moved for 11.00 s$"
    with pytest.raises(Hung, match=expected):
        after(1)


def test_patience_is_minutes_and_some_steps() -> None:
    assert patience_ns(1) == patience_ns(10 * 10**9) == 600 * 10**9
    assert patience_ns(200 * 10**9) == 2000 * 10**9


COMMAND = """
import sys, threading
from runtime.lanes import watchdog
from runtime.lanes.backend import CpuBackend
from runtime.lanes.clock import Hung
from runtime.lanes.executor import Executor
from runtime.probes.handoffs import cycle_graph
from slideplan.entry import leave
watchdog.LOOK_NS = 10_000_000
def stuck(task, step):
    if step == 2:
        threading.Event().wait()
try:
    for step in Executor(cycle_graph(), CpuBackend(), stuck, 4, patience_ns=100_000_000):
        print(step)
except Hung as hung:
    print(hung, file=sys.stderr)
    leave(1)
"""


def test_a_command_whose_lane_is_stuck_leaves() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "0\n1\n")
    assert f"lane h2d, step 2, task {LOAD_WEIGHTS}, unit 1: has not moved for" in done.stderr
