"""Memory that may still be taken: the machine's, and what each control group above this process allows."""

from pathlib import Path

import pytest

from tokenllm.host_memory import available_bytes


@pytest.fixture
def host(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal: 4000 kB\nMemAvailable: 1000 kB\nHugePages_Total: 0\n")
    write(tmp_path / "proc/self/cgroup", "0::/user/me\n")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def write_group(folder: Path, limit: str, used: int, files: int) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 7\nactive_file {files}\ninactive_file 0\n")


def test_this_machine_has_memory():
    assert available_bytes() > 0


def test_without_limits_it_is_what_the_machine_has(host: Path):
    write_group(host / "sys/fs/cgroup/user/me", "max\n", 500, 0)
    assert available_bytes(host) == 1000 * 1024


def test_the_tightest_group_decides_and_cached_files_give_way(host: Path):
    write_group(host / "sys/fs/cgroup/user/me", "900000\n", 100_000, 0)
    write_group(host / "sys/fs/cgroup/user", "500000\n", 450_000, 30_000)
    assert available_bytes(host) == 80_000


def test_a_group_over_its_limit_has_nothing_left(host: Path):
    write_group(host / "sys/fs/cgroup/user/me", "100\n", 200, 0)
    assert available_bytes(host) == 0


def test_groups_of_the_first_version_count_too(host: Path):
    write(host / "proc/self/cgroup", "5:devices:/\n4:memory:/docker/abc\n0::/\n")
    group = host / "sys/fs/cgroup/memory"  # a container sees its own group here, under its host's path
    write(group / "memory.limit_in_bytes", "300000\n")
    write(group / "memory.usage_in_bytes", "250000\n")
    write(group / "memory.stat", "cache 9\ntotal_inactive_file 1000\ntotal_active_file 2000\n")
    assert available_bytes(host) == 53_000
