"""What the kernel lets this process have, where it is in a control group: a container, a pod, a unit of systemd. Linux.

A group's bound holds for all below it, so those above count too: a unit lies in a slice, a container in a pod.
"""

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def memory_bytes(root: Path = ROOT, own: Path = OWN) -> float:
    """Return how much memory this process and its neighbours may hold; infinite where nothing bounds it."""
    limits = [*_read(root, own, "", "memory.max"), *_read(root, own, "memory", "memory.limit_in_bytes")]
    return min((int(limit) for limit in limits if limit.isdigit()), default=math.inf)


def cores(root: Path = ROOT, own: Path = OWN) -> float:
    """Return how many cores' time they may use together; infinite where nothing bounds it."""
    quotas = [*_read(root, own, "", "cpu.max")]
    old = (_read(root, own, "cpu", name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    quotas += map(" ".join, zip(*old, strict=False))
    parts = (quota.split() for quota in quotas)
    return min((int(time) / int(period) for time, period in parts if time.isdigit()), default=math.inf)


def _read(root: Path, own: Path, controller: str, name: str) -> Iterator[str]:
    """Read a file of each group that this process is in, from its own to the outermost."""
    for group in _groups(own, controller):
        try:
            yield (root / controller / group / name).read_text(encoding="ascii").strip()
        except OSError:
            continue  # the group has no such bound, or lies outside of this container


def _groups(own: Path, controller: str) -> Iterator[PurePosixPath]:
    """Yield the paths of a process's groups; a container sees its own at the root, whatever its path is outside."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = (line.split(":", 2) for line in lines)
    path = next((path for _, names, path in found if controller in names.split(",")), "/")
    group = PurePosixPath(path.lstrip("/"))
    yield from (group, *group.parents) if group.parts else (group,)
