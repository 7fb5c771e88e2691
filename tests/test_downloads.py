"""What happens on the way from a hub: cuts, refusals, mirrors, and two processes that want the same model."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hub_machine import MEMBER, NAME, STRANGER, Machine, beside_a_hub, spec
from hub_server import PATIENCE_SECONDS, TENSORS, Fault, Hub, tiny
from quiver.config import Secret
from quiver.errors import LoadError
from quiver.models.hub import resolve
from quiver.models.weights import Weights
from server_process import clean_environment

WEIGHTS = "model.safetensors"
LARGE = tiny() | {WEIGHTS: save({"x": np.zeros(6 << 20, np.float32)})}
"""A model whose weights come in pieces, of which the client keeps those of 10 MB that are whole."""

FIND = """
import sys
from pathlib import Path
from quiver.config import ModelsConfig
from quiver.models.hub import resolve
url, folder, name = sys.argv[1:]
config = ModelsConfig(data_dir=Path(folder, "data"), hub_cache=Path(folder, "cache"), hub_endpoint=url)
print(resolve(name, None, config, lambda *_: None).spec.revision)
"""
"""What a server does when it starts, as a program."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Return a machine beside a hub that has one model."""
    with beside_a_hub(tmp_path, monkeypatch) as machine:
        yield machine


def another_process(machine: Machine) -> subprocess.Popen[str]:
    """Let another process of this machine find the model."""
    return subprocess.Popen(  # noqa: S603  our own command
        [sys.executable, "-c", FIND, machine.hub.url, str(machine.config.hub_cache.parent), NAME],
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment(NO_PROXY="*"),
    )


# Cuts


def test_a_broken_connection_is_taken_up_where_it_broke(machine: Machine) -> None:
    """The rest is asked for from the first byte that is missing, and the progress goes on to the file's whole size."""
    machine.publish(LARGE)
    machine.repository.faults[WEIGHTS] = Fault.CUT
    machine.find()
    size = len(LARGE[WEIGHTS])
    ranges = [headers["range"] for headers in machine.hub.headers if "range" in headers]
    assert len(ranges) == 1
    assert 0 < int(ranges[0].removeprefix("bytes=").removesuffix("-")) <= size // 2
    steps = machine.steps_of(WEIGHTS)
    assert steps[-1] == (size, size)
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {size}
    assert (machine.snapshot / WEIGHTS).read_bytes() == LARGE[WEIGHTS]


def test_what_a_killed_process_has_left_is_no_file(machine: Machine) -> None:
    """A start after one that was killed on the way fetches what is missing, and nothing else."""
    machine.publish(LARGE)
    machine.repository.faults[WEIGHTS] = Fault.HELD
    with another_process(machine) as process:
        machine.hub.wait_for("GET", WEIGHTS)
        process.kill()
    machine.hub.gate.set()
    machine.repository.faults.clear()
    machine.hub.requests.clear()
    assert Weights(machine.find().files)["x"].shape == (6 << 20,)
    assert machine.hub.fetched() == [WEIGHTS]


def test_a_download_that_is_given_up_leaves_no_file(machine: Machine) -> None:
    """Where the transfer ends in an error, the file is not there, and the next start fetches it."""

    def give_up(file: str, done_bytes: int, _: int) -> None:
        if file == WEIGHTS and done_bytes:
            raise ConnectionAbortedError("the server is stopping")

    machine.publish(LARGE)
    with pytest.raises(LoadError, match="cannot download acme/tiny"):
        resolve(NAME, None, machine.config, give_up)
    assert not (machine.snapshot / WEIGHTS).exists()
    assert (machine.find().files.path(WEIGHTS)).read_bytes() == LARGE[WEIGHTS]


# Refusals


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"answered 401 \(Unauthorized\): check hub_token \(HF_TOKEN\) and its rights"),
        (403, r"answered 403 \(Forbidden\): check hub_token \(HF_TOKEN\) and its rights"),
        (404, r"answered 404 \(Not Found\)"),
        (500, r"answered 500 \(Internal Server Error\): try again later"),
    ],
)
def test_a_refusal_is_told_by_its_status(machine: Machine, status: int, message: str) -> None:
    """What to do follows from what the hub said, in one line without the token."""
    machine.hub.failing = status
    with pytest.raises(LoadError, match=rf"cannot download {NAME}: .*{message}") as caught:
        machine.find()
    assert "\n" not in caught.value.message
    assert STRANGER not in caught.value.message


@pytest.mark.parametrize("token", ["", STRANGER])
def test_a_gated_model_says_where_its_terms_are(machine: Machine, token: str) -> None:
    """Without a token (401) as with one that has not accepted them (403)."""
    machine.repository.token = MEMBER
    with pytest.raises(LoadError, match=f"it is gated: accept its terms at {machine.hub.url}/{NAME} and set hub_token"):
        machine.find(hub_token=Secret(token))


# Mirrors


def test_a_mirror_is_asked_instead_of_the_hub(machine: Machine) -> None:
    """What the mirror has is taken from it, below its own path, and the hub hears nothing."""
    with Hub({NAME: machine.repository}, prefix="/api/huggingface/remote") as mirror:
        found = machine.find(hub_endpoint=mirror.url)
        assert WEIGHTS in mirror.fetched()
    assert np.array_equal(Weights(found.files)["words"], TENSORS["words"])
    assert machine.hub.requests == []


def test_what_a_mirror_lacks_is_missing_there(machine: Machine) -> None:
    """The error names the mirror, not the hub that it mirrors."""
    with Hub({}) as mirror, pytest.raises(LoadError, match=f"{mirror.url} has no such model"):
        machine.find(hub_endpoint=mirror.url)


def test_large_files_may_lie_elsewhere(machine: Machine) -> None:
    """A redirection to the hub's storage is followed, and the token stays with the hub."""
    with Hub({NAME: machine.repository}) as storage:
        machine.hub.storage = storage.url
        found = machine.find()
        assert storage.fetched() == [WEIGHTS]
        assert all("authorization" not in headers for headers in storage.headers)
    assert all(headers["authorization"] == f"Bearer {STRANGER}" for headers in machine.hub.headers)
    assert np.array_equal(Weights(found.files)["words"], TENSORS["words"])


def test_wrong_bytes_of_a_storage_are_refused(machine: Machine) -> None:
    """The hub's hash holds wherever the bytes come from."""
    with Hub({NAME: machine.repository}) as storage:
        machine.hub.storage = storage.url
        machine.repository.faults[WEIGHTS] = Fault.CORRUPT
        with pytest.raises(LoadError, match="sent wrong bytes"):
            machine.find()
    assert not (machine.snapshot / WEIGHTS).exists()


# Together


def test_two_processes_download_a_model_once(machine: Machine) -> None:
    """The second waits for the first, and takes what it has fetched."""
    machine.repository.faults[WEIGHTS] = Fault.HELD
    with another_process(machine) as first:
        machine.hub.wait_for("GET", WEIGHTS)
        with another_process(machine) as second:
            machine.hub.wait_for("HEAD", WEIGHTS, times=2)
            machine.hub.gate.set()
            said = [process.communicate(timeout=PATIENCE_SECONDS)[0] for process in (first, second)]
    assert said == [f"{machine.repository.commit}\n"] * 2
    assert Counter(machine.hub.fetched()) == Counter(set(machine.hub.fetched()))


def test_other_models_do_not_wait(machine: Machine) -> None:
    """While one process downloads a model, another one gets on with the next."""
    machine.publish(tiny(value=1), "acme/other")
    machine.repository.faults[WEIGHTS] = Fault.HELD
    with another_process(machine) as process:
        machine.hub.wait_for("GET", WEIGHTS)
        assert machine.find("acme/other").spec.id == "acme/other"
        assert process.poll() is None
        machine.hub.gate.set()


def test_a_pinned_commit_is_asked_for(machine: Machine) -> None:
    """A revision of the catalogue goes to the hub as it stands, for the list as for each file."""
    commit = machine.repository.commit
    machine.find(spec=spec(revision=commit))
    assert all(commit in request for request in machine.hub.requests)
