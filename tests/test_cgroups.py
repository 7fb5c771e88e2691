"""What a container, a pod or a unit may have, read from trees of files as kernels lay them out."""

import math
import os

import pytest

from quiver import cgroups, memory
from quiver.backends import sessions


def tree(root, own, files):
    """Write what a process sees of its groups; return where it looks."""
    for name, text in files.items():
        path = root / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    (root / "own").write_text(own, encoding="ascii")
    return root / "fs", root / "own"


OLD_CPU = "7:memory:/pod/one\n3:cpu,cpuacct:/pod/one\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "cores", "memory_bytes"),
    [
        pytest.param("0::/\n", {"cpu.max": "150000 100000", "memory.max": "1048576"}, 1.5, 1 << 20, id="container"),
        pytest.param("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, math.inf, math.inf, id="no bound"),
        pytest.param(
            "0::/system.slice/quiver.service\n",
            {
                "system.slice/quiver.service/cpu.max": "400000 100000",
                "system.slice/quiver.service/memory.max": "2097152",
                "system.slice/cpu.max": "200000 100000",
                "system.slice/memory.max": "4194304",
            },
            2.0,
            2 << 20,
            id="unit in a slice",
        ),
        pytest.param("0::/kubepods/pod/one\n", {"cpu.max": "50000 100000"}, 0.5, math.inf, id="path of the host"),
        pytest.param(
            OLD_CPU,
            {
                "cpu/pod/one/cpu.cfs_quota_us": "-1",
                "cpu/pod/one/cpu.cfs_period_us": "100000",
                "cpu/pod/cpu.cfs_quota_us": "300000",
                "cpu/pod/cpu.cfs_period_us": "100000",
                "memory/pod/one/memory.limit_in_bytes": "1048576",
            },
            3.0,
            1 << 20,
            id="first version",
        ),
        pytest.param("", {}, math.inf, math.inf, id="none"),
    ],
)
def test_the_least_bound_of_all_groups_holds(tmp_path, own, files, cores, memory_bytes):
    """That of a process's own group, and those of the groups around it."""
    places = tree(tmp_path, own, files)
    assert cgroups.cores(*places) == cores
    assert cgroups.memory_bytes(*places) == memory_bytes


def test_a_system_without_groups_has_no_bound(tmp_path):
    """Neither file is there on other systems."""
    assert cgroups.cores(tmp_path / "a", tmp_path / "b") == math.inf
    assert cgroups.memory_bytes(tmp_path / "a", tmp_path / "b") == math.inf


@pytest.mark.parametrize(("seen", "allowed", "cores"), [(64, 1.5, 2), (64, 2.0, 2), (4, math.inf, 4), (4, 0.25, 1)])
def test_there_are_as_many_lanes_as_time(seen, allowed, cores):
    """A container of a large machine has no lanes that it could not keep running, and always one."""
    assert sessions.within(seen, allowed) == cores


@pytest.mark.parametrize(("seen", "number", "own"), [({6, 2}, 2, [2, 6]), (set(range(64)), 2, ()), ({5}, 1, [5])])
def test_cores_are_ours_where_we_have_all_of_their_time(seen, number, own):
    """Servers that have some time each on a large machine would otherwise all compute on its first cores."""
    assert sessions.all_of(seen, number) == own


def test_this_process_stays_within_its_own():
    """Neither cores nor memory are more than there are."""
    assert 1 <= sessions.cores() <= (os.cpu_count() or 1)
    assert 0 < memory.limit_bytes() <= memory.SHARE * min(memory.total_bytes(), cgroups.memory_bytes())
