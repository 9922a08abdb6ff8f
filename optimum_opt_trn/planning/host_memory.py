"""How much memory this host has for this process, control groups included."""

from __future__ import annotations

from pathlib import Path


# Version of control groups -> the files that hold limit and use, and the keys of memory.stat that are page cache.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_VERSION_2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, available) bytes of this process's host: the system's, or less where a control group limits it.

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
    """(limit, use) of each control group that this process is in and that limits memory; page cache is no use."""
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
