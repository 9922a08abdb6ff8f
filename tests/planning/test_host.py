from pathlib import Path

import pytest

from optimum_opt_trn.planning.host import find_instance, host_memory, largest_of_family


MB = 2**20


@pytest.fixture
def host(tmp_path):
    """Writes /proc and control groups of a host of 1000 MB, 600 of them available."""

    def make(cgroup: str = "", groups: dict[str, dict[str, str]] | None = None) -> tuple[Path, Path]:
        proc, root = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text("MemTotal: 1024000 kB\nMemFree: 1000 kB\nMemAvailable: 614400 kB\n")
        (proc / "self" / "cgroup").write_text(cgroup)
        for group, files in (groups or {}).items():
            (root / group).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (root / group / name).write_text(text)
        return proc, root

    return make


def version_2(limit: str, used: int, cached: int) -> dict[str, str]:
    stat = f"anon 1\ninactive_file {cached}\nactive_file {cached}\n"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def test_without_control_groups_it_is_the_systems(host):
    assert host_memory(*host()) == (1000 * MB, 600 * MB)


def test_a_control_group_limits_it_and_its_page_cache_is_available(host):
    groups = {"a/b": version_2(str(400 * MB), 300 * MB, 50 * MB)}
    assert host_memory(*host("0::/a/b\n", groups)) == (400 * MB, 200 * MB)


def test_the_tightest_of_a_groups_ancestors_counts(host):
    groups = {"a": version_2(str(300 * MB), 100 * MB, 0), "a/b": version_2("max", 10, 0)}
    assert host_memory(*host("0::/a/b\n", groups)) == (300 * MB, 200 * MB)


def test_in_a_container_the_group_is_at_the_root(host):
    groups = {".": version_2(str(300 * MB), 100 * MB, 0)}
    assert host_memory(*host("0::/not/here\n", groups)) == (300 * MB, 200 * MB)


def test_control_groups_of_version_1(host):
    files = {
        "memory.limit_in_bytes": str(500 * MB),
        "memory.usage_in_bytes": str(200 * MB),
        "memory.stat": f"total_inactive_file {20 * MB}\ntotal_active_file 0\n",
    }
    assert host_memory(*host("4:cpu,memory:/a\n3:cpuset:/a\n", {"memory/a": files})) == (500 * MB, 320 * MB)


def test_a_group_that_is_over_its_limit_has_nothing_left(host):
    assert host_memory(*host("0::/a\n", {"a": version_2(str(100 * MB), 200 * MB, 0)})) == (100 * MB, 0)


def test_this_host_has_memory():
    total, available = host_memory()
    assert 0 < available <= total


def test_an_unknown_instance_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'trn3\.big' is not known: choose cpu, inf2\.xlarge"):
        find_instance("trn3.big")


def test_the_largest_of_a_family():
    assert largest_of_family("trn1").name == "trn1.32xlarge"
    assert largest_of_family("cpu").core_bytes <= largest_of_family("cpu").host_bytes
