"""What the process may use: control groups of both versions, nested, seen from inside and outside, under fake /proc."""

import os
from pathlib import Path

import pytest

from labutils.measurement import limits

GB = 10**9
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V1 += "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
OTHER = "22 1 0:20 / /proc rw - proc proc rw\n33 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=cpu\n"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.fixture
def host(tmp_path):
    """Makes a host: where the process is, what is mounted, and the files of its control groups."""

    def made(cgroup, mounts, files):
        content = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHER + mounts}
        for name, text in (content | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n", encoding="utf-8")
        return tmp_path

    return made


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("50000 100000", 1), ("150000 100000", 2), ("200000 100000", 2), ("200001 100000", 3), ("max 100000", 8)]
    + [("1600000 100000", 8), ("1000 100000", 1), ("", 8), ("0 100000", 8)],
)
def test_cores_of_version_2_by_hand(host, quota, cores):
    assert limits.available_cores(host("0::/", V2, {"cpu.max": quota})) == cores


def test_affinity_is_a_limit_too(host, monkeypatch):
    root = host("0::/", V2, {"cpu.max": "300000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert limits.available_cores(root) == 1


def test_the_tightest_group_around_the_process_holds(host):
    root = host(
        "0::/user/job/step",
        V2,
        {
            "user/cpu.max": "400000 100000",
            "user/job/cpu.max": "250000 100000",
            "user/job/step/cpu.max": "max 100000",
            "other/cpu.max": "100000 100000",
            "user/memory.max": str(4 * GB),
            "user/memory.current": str(3 * GB),
            "user/job/memory.max": str(2 * GB),
            "user/job/memory.current": str(GB // 2),
            "user/job/step/memory.max": "max",
            "other/memory.max": "1",
        },
    )
    assert limits.available_cores(root) == 3
    assert limits.memory_limit_bytes(root) == 2 * GB and limits.memory_left_bytes(root) == GB


def test_file_cache_that_can_go_is_left(host):
    files = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 100\ninactive_file 700\nfile 800"}
    root = host("0::/", V2, files)
    assert limits.memory_left_bytes(root) == 800


@pytest.mark.parametrize(
    ("mounted", "inside"),
    [("/", "docker/abc/"), ("/docker/abc", ""), ("/elsewhere", "")],
    ids=["host's view", "container's view", "another name space"],
)
def test_version_1_from_inside_and_outside(host, mounted, inside):
    root = host(
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/\n0::/",
        V1.format(root=mounted) + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        {
            f"cpu,cpuacct/{inside}cpu.cfs_quota_us": "50000",
            f"cpu,cpuacct/{inside}cpu.cfs_period_us": "25000",
            f"memory/{inside}memory.limit_in_bytes": "1500",
            f"memory/{inside}memory.usage_in_bytes": "1000",
            f"memory/{inside}memory.stat": "inactive_file 1\ntotal_inactive_file 200",
        },
    )
    assert limits.available_cores(root) == 2
    assert limits.memory_limit_bytes(root) == 1500 and limits.memory_left_bytes(root) == 700


def test_no_limit_is_none(host, tmp_path):
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    root = host("5:cpu,cpuacct:/\n4:memory:/", V1.format(root="/"), files)
    assert (limits.available_cores(root), limits.memory_limit_bytes(root), limits.memory_left_bytes(root)) == (
        8,
        None,
        None,
    )
    nothing = tmp_path / "nothing"  # no Linux
    assert (limits.available_cores(nothing), limits.memory_left_bytes(nothing)) == (8, None)
    assert limits.available_cores() >= 1  # this machine


def test_memory_of_a_container_reaches_doctor_and_the_fitting(host, monkeypatch):
    from labutils.acceleration import memory
    from labutils.course.cli import doctor

    monkeypatch.setattr(limits, "memory_left_bytes", lambda: 1000)
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 1500)
    assert memory.memory_bytes() == 1500
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 2**63 - 4096)  # version 1 without a limit
    assert memory.memory_bytes() < 2**50
    if Path("/proc/meminfo").exists():
        assert doctor.free_memory_bytes() == 1000


def test_disk_that_may_not_be_written_is_none(tmp_path, monkeypatch):
    assert limits.free_disk_bytes(tmp_path) > 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a read-only mount
    assert limits.free_disk_bytes(tmp_path) == 0
