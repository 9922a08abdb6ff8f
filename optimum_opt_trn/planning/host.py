"""What this host has for this process: its memory, control groups included, and its processors."""

from __future__ import annotations

import os
from pathlib import Path

from ..hardware import FAMILIES, INSTANCES, Instance


# Version of control groups -> the files that hold limit and use, and the keys of memory.stat that are page cache.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, available) bytes of memory: those of the system, or fewer where a control group limits this process.

    Page cache counts as available, since the system takes it back when it is needed.

    Raises:
        OSError: on a system without /proc/meminfo.
    """
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    fields = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    total = fields["MemTotal"]
    available = fields.get("MemAvailable", fields.get("MemFree", total))
    for limit, used in _control_groups(proc, cgroups):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def _control_groups(proc: Path, cgroups: Path) -> list[tuple[int, int]]:
    """(limit, use) of each control group that limits the memory of this process; page cache does not count as use."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, files = (cgroups, _VERSION_2) if not controllers else (cgroups / "memory", _VERSION_1)
        # A group's ancestors limit it too. In a container the path may be the host's, and only the root be there.
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory == root or root in directory.parents:
                found += _limit(directory, *files)
    return found


def _limit(directory: Path, limit_file: str, used_file: str, cached: tuple[str, ...]) -> list[tuple[int, int]]:
    try:
        limit = (directory / limit_file).read_text().strip()
        used = int((directory / used_file).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit == "max":
        return []
    return [(int(limit), used - sum(int(stat.get(key, 0)) for key in cached))]


def host_threads() -> int:
    """The processors that this process may use; PyTorch runs at most one thread on each."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def this_host() -> Instance:
    """This host as an instance, with the memory that is available now.

    Raises:
        OSError: if the system does not tell its memory.
    """
    total, available = host_memory()
    return Instance("cpu", FAMILIES["cpu"], 0, 1, available, None, None, total)


def find_instance(name: str) -> Instance:
    """The instance of that name; `cpu` is this host.

    Raises:
        ValueError: for a name that is not in the table, with the names that are.
    """
    if name == "cpu":
        return this_host()
    if name not in INSTANCES:
        raise ValueError(f"instance {name!r} is not known: choose cpu, {', '.join(INSTANCES)}.")
    return INSTANCES[name]


def largest_of_family(family: str) -> Instance:
    """The instance of `family` (a key of FAMILIES) with the most cores; of `cpu`, this host."""
    if family == "cpu":
        return this_host()
    return max((i for i in INSTANCES.values() if i.family.name == family), key=lambda i: i.cores)
