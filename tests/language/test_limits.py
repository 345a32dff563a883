"""Control groups, as folders laid out like those of containers, batch systems and service managers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slideplan.machine.host import available_host_bytes, cpu_name, total_host_bytes, usable_cores
from slideplan.machine.limits import Limits, read_limits
from slideplan.quantities import GIB, MIB

V2_MOUNT = "30 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
NO_LIMIT_V1 = 9223372036854771712


def lay(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def host(root: Path, total: int = 64 * GIB, available: int = 60 * GIB) -> Path:
    text = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\nHugePages_Total: 0"
    return lay(root, {"proc/meminfo": text, "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz"})


def test_without_control_groups_the_machine_is_all_there_is(tmp_path: Path) -> None:
    host(tmp_path)
    assert read_limits(tmp_path) == Limits(None, None, None)
    assert (total_host_bytes(tmp_path), available_host_bytes(tmp_path)) == (64 * GIB, 60 * GIB)
    assert cpu_name(tmp_path) == "Some CPU @ 2 GHz"
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_page_cache_of_a_container_is_not_taken(tmp_path: Path) -> None:
    """A container that has just read a checkpoint: 30 of 32 GiB are cache."""
    lay(
        host(tmp_path),
        {
            "proc/self/cgroup": "0::/",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/memory.max": 32 * GIB,
            "sys/fs/cgroup/memory.current": 31 * GIB,
            "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {30 * GIB}\nshmem 0\nactive_file {10 * GIB}\n"
            f"inactive_file {19 * GIB}\nslab_reclaimable {GIB}\nslab_unreclaimable 5",
        },
    )
    assert total_host_bytes(tmp_path) == 32 * GIB
    assert available_host_bytes(tmp_path) == 31 * GIB


def test_files_in_memory_are_no_page_cache(tmp_path: Path) -> None:
    """tmpfs counts as `file`, but nothing can be dropped of it."""
    files = {"memory.max": 8 * GIB, "memory.current": 6 * GIB, "memory.stat": f"file {5 * GIB}\nshmem {5 * GIB}\nactive_file 0"}
    lay(host(tmp_path), {"proc/self/cgroup": "0::/"} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_host_bytes(tmp_path) == 2 * GIB


@pytest.mark.parametrize("tight", ["", "user.slice", "user.slice/job.scope"])
def test_the_tightest_of_nested_groups_counts(tight: str, tmp_path: Path) -> None:
    """systemd-run, Slurm: the limit may stand at any group above the process's own."""
    lay(host(tmp_path), {"proc/self/cgroup": "0::/user.slice/job.scope", "proc/self/mountinfo": V2_MOUNT})
    for group in ("", "user.slice", "user.slice/job.scope"):
        limit, used, quota = (16 * GIB, 3 * GIB, "100000 100000") if group == tight else ("max", 5 * GIB, "max 100000")
        lay(
            tmp_path / "sys/fs/cgroup" / group,
            {
                "memory.max": limit,
                "memory.high": "max",
                "memory.current": used,
                "cpu.max": quota,
                "memory.stat": "active_file 0",
            },
        )
    assert read_limits(tmp_path) == Limits(16 * GIB, 13 * GIB, 1)
    assert usable_cores(tmp_path) == 1


def test_a_group_above_may_be_fuller_than_ones_own(tmp_path: Path) -> None:
    """Its limit is larger, but others have taken most of it."""
    lay(host(tmp_path), {"proc/self/cgroup": "0::/pod/me", "proc/self/mountinfo": V2_MOUNT})
    lay(tmp_path / "sys/fs/cgroup/pod", {"memory.max": 40 * GIB, "memory.current": 38 * GIB})
    lay(tmp_path / "sys/fs/cgroup/pod/me", {"memory.max": 10 * GIB, "memory.current": 1 * GIB})
    assert read_limits(tmp_path) == Limits(10 * GIB, 2 * GIB, None)


def test_a_group_that_is_slowed_down_beyond_is_limited_as_well(tmp_path: Path) -> None:
    files = {"memory.max": "max", "memory.high": 4 * GIB, "memory.current": GIB}
    lay(host(tmp_path), {"proc/self/cgroup": "0::/"} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_host_bytes(tmp_path) == 3 * GIB


SLURM = "9:name=systemd:/\n5:memory:/slurm/uid_7/job_3/step_0\n4:cpuset:/\n2:cpu,cpuacct:/slurm/uid_7/job_3"
V1_MOUNTS = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
)


@pytest.mark.parametrize("mounts", [V1_MOUNTS, ""])
def test_version_1_as_slurm_has_it(mounts: str, tmp_path: Path) -> None:
    """With a readable list of mounts, and by convention."""
    folder = "cpu,cpuacct" if mounts else "cpu"
    lay(host(tmp_path), {"proc/self/cgroup": SLURM, "proc/self/mountinfo": mounts})
    memory = tmp_path / "sys/fs/cgroup/memory"
    lay(memory, {"memory.limit_in_bytes": NO_LIMIT_V1, "memory.usage_in_bytes": 50 * GIB, "memory.stat": "cache 1"})
    lay(
        memory / "slurm/uid_7/job_3",
        {
            "memory.limit_in_bytes": 20 * GIB,
            "memory.usage_in_bytes": 18 * GIB,
            "memory.stat": f"active_file 1\ninactive_file 1\ntotal_active_file {4 * GIB}\ntotal_inactive_file {8 * GIB}",
        },
    )
    lay(memory / "slurm/uid_7/job_3/step_0", {"memory.limit_in_bytes": NO_LIMIT_V1, "memory.usage_in_bytes": GIB})
    cpu = tmp_path / "sys/fs/cgroup" / folder
    lay(cpu, {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000})
    lay(cpu / "slurm/uid_7/job_3", {"cpu.cfs_quota_us": 50000, "cpu.cfs_period_us": 100000})
    assert read_limits(tmp_path) == Limits(20 * GIB, 14 * GIB, 1)


def test_version_1_tells_of_limits_above_that_cannot_be_seen(tmp_path: Path) -> None:
    lay(host(tmp_path), {"proc/self/cgroup": "5:memory:/docker/0123", "proc/self/mountinfo": V1_MOUNTS})
    lay(
        tmp_path / "sys/fs/cgroup/memory",
        {
            "memory.limit_in_bytes": NO_LIMIT_V1,
            "memory.usage_in_bytes": 2 * GIB,
            "memory.stat": f"hierarchical_memory_limit {12 * GIB}\ntotal_inactive_file {GIB}",
        },
    )
    assert read_limits(tmp_path) == Limits(12 * GIB, 11 * GIB, None)


def test_a_container_that_sees_its_own_part_of_the_tree(tmp_path: Path) -> None:
    """Docker without a control group namespace: the mount shows /docker/0123 as its root."""
    mount = "35 31 0:32 /docker/0123 /sys/fs/cgroup/memory ro,relatime master:15 - cgroup cgroup rw,memory"
    lay(host(tmp_path), {"proc/self/cgroup": "5:memory:/docker/0123/child", "proc/self/mountinfo": mount})
    memory = tmp_path / "sys/fs/cgroup/memory"
    lay(memory, {"memory.limit_in_bytes": 9 * GIB, "memory.usage_in_bytes": GIB})
    lay(memory / "child", {"memory.limit_in_bytes": 5 * GIB, "memory.usage_in_bytes": 2 * GIB})
    assert read_limits(tmp_path) == Limits(5 * GIB, 3 * GIB, None)


def test_quotas_are_rounded_up_and_leave_a_core(tmp_path: Path) -> None:
    for quota, cores in (("250000 100000", 3), ("1000 100000", 1), ("400000 100000", 4), ("max 100000", None), ("", None)):
        lay(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
        assert read_limits(tmp_path).cores == cores


def test_more_taken_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    lay(host(tmp_path), {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB})
    assert available_host_bytes(tmp_path) == 0


@pytest.mark.parametrize("text", ["", "rubbish", "0::", ":::", "5:memory", "0::/../../other", "\0\0", "5:memory:/\n0::/x\ny"])
def test_unreadable_groups_limit_nothing(text: str, tmp_path: Path) -> None:
    lay(host(tmp_path), {"proc/self/cgroup": text, "proc/self/mountinfo": text, "sys/fs/cgroup/memory.max": "much"})
    assert read_limits(tmp_path) == Limits(None, None, None)
    assert available_host_bytes(tmp_path) == 60 * GIB


def test_this_machine_has_memory_and_cores() -> None:
    assert 0 < available_host_bytes() <= total_host_bytes()
    assert total_host_bytes() > 100 * MIB
    assert usable_cores() >= 1
