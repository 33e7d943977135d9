"""Cores, memory and disk that this *process* may use: affinity and containers allow less than the host has.

The standard library alone, so that the command line can ask before the environment stands. A container is a Linux
control group (docs.kernel.org: admin-guide/cgroup-v2, cgroup-v1); the limits of the groups around it hold as well.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # tests put another /proc and other control groups here
PROC_SELF = Path("/proc/self")


def available_cores(root: Path = ROOT) -> int:
    """Cores that this process can keep busy: min(affinity, ⌈quota ÷ period⌉) over all groups, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([affinity, *(-(-quota // period) for quota, period in _cpu_quotas(root))]), 1)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The tightest limit on the memory of this process and its neighbours in a group; None without one."""
    return min((limit for limit, _ in _memory_limits(root)), default=None)


def memory_left_bytes(root: Path = ROOT) -> int | None:
    """What the fullest group has left, file cache that was not read lately included; None without a limit."""
    return min((max(limit - used, 0) for limit, used in _memory_limits(root)), default=None)


def status_bytes(name: str, proc: Path = PROC_SELF) -> int | None:
    """An entry of Linux's `/proc/self/status`: VmRSS is the memory in use, VmHWM the most there was; None elsewhere."""
    entry = re.search(rf"^{name}:\s*(\d+)", _read(proc / "status"), re.MULTILINE)
    return 1024 * int(entry[1]) if entry else None


def free_disk_bytes(folder: Path) -> int:
    """Space that this process may fill below a folder: 0 where it may not write."""
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0


def _cpu_quotas(root: Path) -> Iterator[tuple[int, int]]:
    """Quota and period in microseconds of every group that has a quota."""
    for group in _groups(root, "cpu"):
        both = _read(group / "cpu.max").split() or [
            _read(group / "cpu.cfs_quota_us").strip(),
            _read(group / "cpu.cfs_period_us").strip(),
        ]
        if all(number.isdecimal() and int(number) > 0 for number in both):  # "max" and -1 mean none
            yield int(both[0]), int(both[1])


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit, and bytes in use without such file cache, of every group that has a limit."""
    for group in _groups(root, "memory"):
        statistics = dict(line.split() for line in _read(group / "memory.stat").splitlines())
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            bound = _read(group / limit).strip()
            if bound.isdecimal():
                yield int(bound), int(_read(group / used) or 0) - int(statistics.get(cache, 0))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups this process is in, from its own outwards, of both versions."""
    paths = {}
    for _, controllers, path in re.findall(r"^(\d+):(.*?):(/.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE):
        paths |= dict.fromkeys(controllers.split(","), path)  # version 2 names no controllers: ""
    mounts = re.findall(
        r"^\S+ \S+ \S+ (\S+) (\S+) .*- (\S+) \S+ (\S+)$", _read(root / "proc/self/mountinfo"), re.MULTILINE
    )
    for mounted, top, kind, options in mounts:
        name = "" if kind == "cgroup2" else controller if controller in options.split(",") else None
        if not kind.startswith("cgroup") or name not in paths:
            continue
        outermost = group = root / top.lstrip("/")
        if Path(paths[name]).is_relative_to(mounted) and ".." not in Path(paths[name]).parts:
            group = outermost / Path(paths[name]).relative_to(mounted)
        yield from (g for g in (group, *group.parents) if g.is_relative_to(outermost))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
