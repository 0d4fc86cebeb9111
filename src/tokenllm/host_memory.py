"""How much memory may still be taken, by the machine and by the control groups (a container's limit) of this process.

Linux promises memory it does not have and kills somebody later; whoever is about to take much asks here first.
"""

from collections.abc import Iterator
from pathlib import Path

CGROUP_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be taken before the machine or a control group runs out."""
    machine = _numbers(root / "proc/meminfo")["MemAvailable:"] * 1024
    return max(0, min([machine, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        folder = mount / path.lstrip("/")
        # a container may see its host's path but its own files: then they lie at the mount itself
        for group in (folder, *folder.parents):
            yield from _left_in(group, *(CGROUP_V1 if controllers else CGROUP_V2))
            if group == mount:
                break


def _left_in(group: Path, limit_file: str, usage_file: str, cache_keys: tuple[str, ...]) -> Iterator[int]:
    try:
        limit = (group / limit_file).read_text().strip()
        usage = int((group / usage_file).read_text())
        stat = _numbers(group / "memory.stat")
    except FileNotFoundError:  # a group of another mount, or the root of all groups, which has no limit
        return
    if limit != "max":
        # files that were read count as used, but give way; shared memory is not among them
        yield int(limit) - usage + sum(stat.get(key, 0) for key in cache_keys)


def _numbers(file: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}
