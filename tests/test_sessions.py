"""Two sessions for a model: who gets which, and which cores their threads compute on."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from quiver.backends.sessions import MAX_BYTES_FOR_TWO, Sessions, own_cores


def started(options: ort.SessionOptions) -> int:
    """Stand in for a session: the number of its threads."""
    return options.intra_op_num_threads


def test_who_gets_the_wide_session() -> None:
    """A forward pass alone gets the session of all cores, any other that of one; then it is free again."""
    sessions = Sessions(lambda options: (started(options), object()), num_bytes=MAX_BYTES_FOR_TWO)
    with sessions.free() as first, sessions.free() as second, sessions.free() as third:
        assert second is third
        assert first is not second
        assert second[0] == 1
    with sessions.free() as again:
        assert again is first


def spins(options: ort.SessionOptions) -> bool:
    """Tell whether a session's threads wait awake."""
    return bool(int(options.get_session_config_entry("session.intra_op.allow_spinning")))


@pytest.mark.parametrize(("num_bytes", "awake"), [(MAX_BYTES_FOR_TWO, [True, False]), (MAX_BYTES_FOR_TWO + 1, [False])])
def test_threads_wait_awake_where_they_are_in_nobodys_way(num_bytes: int, awake: list[bool]) -> None:
    """Only those of a session that computes nothing but single passes, and only while one runs."""
    options: list[ort.SessionOptions] = []
    Sessions(options.append, num_bytes=num_bytes)
    assert [spins(each) for each in options] == awake
    assert all(each.get_session_config_entry("session.force_spinning_stop") == "1" for each in options)


def cores_of(threads: set[int]) -> list[set[int]]:
    """Return where threads of this process may run, as far as they still do."""
    return sorted((cores for thread in threads for cores in cores_of_one(thread)), key=min)


def cores_of_one(thread: int) -> list[set[int]]:
    """Return where a thread may run; nothing if it has ended, which the system may tell a moment after Python does."""
    try:
        return [os.sched_getaffinity(thread)]
    except ProcessLookupError:
        return []


def threads_of_this_process() -> set[int]:
    """List them as the system numbers them."""
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


@pytest.mark.skipif(not own_cores(), reason="the cores are not this process's alone")
def test_each_thread_of_a_lone_pass_has_a_core_of_its_own() -> None:
    """Two on one core would take turns instead of computing at once; whoever called goes where it likes afterwards."""
    before, cores = threads_of_this_process(), own_cores()
    sessions = Sessions(session_of_zeros, num_bytes=0)
    began, own = threads_of_this_process() - before, [{core} for core in cores[1:]]
    end = time.monotonic() + 10
    while cores_of(began) != own and time.monotonic() < end:
        time.sleep(0.01)  # a thread goes to its core itself, when it first runs
    assert cores_of(began) == own
    anywhere = os.sched_getaffinity(0)
    with sessions.free():
        assert os.sched_getaffinity(0) == {cores[0]}
    assert os.sched_getaffinity(0) == anywhere
    with ThreadPoolExecutor(1) as other:
        other.submit(
            threads_of_this_process
        ).result()  # it begins here: a thread may run where the one may that began it
        with sessions.free():
            beside = other.submit(where_a_pass_runs, sessions).result()
    assert beside == anywhere


def where_a_pass_runs(sessions: Sessions) -> set[int]:
    """Return the cores that a pass may run on."""
    with sessions.free():
        return os.sched_getaffinity(0)


def test_a_large_model_has_one_session() -> None:
    """A model that is too large to be in memory twice has the wide session alone."""
    sessions = Sessions(lambda options: (started(options), object()), num_bytes=MAX_BYTES_FOR_TWO + 1)
    with sessions.free() as first, sessions.free() as second:
        assert second is first


def session_of_zeros(options: Any) -> Any:
    """Return a session that makes as many zeros as it is told."""
    given, result = helper.make_tensor_value_info("n", 7, [1]), helper.make_tensor_value_info("result", 1, [None])
    graph = helper.make_graph([helper.make_node("ConstantOfShape", ["n"], ["result"])], "zeros", [given], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_onnx_runtime_without_memory_is_a_memory_error() -> None:
    """A batch for which ONNX Runtime finds no memory is told from one that the model cannot compute; then it goes on."""

    def compute(n: int) -> NDArray[np.float32]:
        with sessions.free() as session:
            return session.run(None, {"n": np.array([n])})[0]

    sessions = Sessions(session_of_zeros, num_bytes=0)
    with pytest.raises(MemoryError):
        compute(1 << 44)
    with pytest.raises(Exception, match="must be >= 0") as other:
        compute(-1)
    assert not isinstance(other.value, MemoryError)
    assert len(compute(3)) == 3
