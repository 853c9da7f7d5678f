"""The run folder: nothing is replaced, half written or taken on trust, and what is wrong with it is named."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from throughtime.errors import DataError, ThroughtimeError
from throughtime.runs import folder as runs
from throughtime.runs.configuration import Config
from throughtime.runs.fit import fit
from throughtime.runs.folder import UnfinishedRun, load
from throughtime.training.loop import Snapshot


def snapshot(value: float = 1.0) -> Snapshot:
    return Snapshot({"weights.a": torch.full((3,), value), "random.order": torch.arange(4).byte()}, {"epoch": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained: nobody may change it."""
    folder = tmp_path_factory.mktemp("runs")
    draw = np.random.default_rng(1)
    rows = [f"{i},{'ab'[i % 2]},{draw.normal() + i % 2:.3f}" for i in range(24) for _ in range(3 + i % 3)]
    (folder / "data.csv").write_text("\n".join(["id,label,x", *rows]))
    options = {"file": str(folder / "data.csv"), "sequence_id": "id", "target": "label"}
    return fit(Config.resolve({**options, "run": folder / "run", "hidden_size": 4, "epochs": 2})).path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The run again, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def signed_again(run: Path) -> None:
    """As a stranger may who has changed a file: the manifest is right about everything."""
    sums = {}
    for name in runs.FILES:
        content = (run / name).read_bytes()
        sums[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (run / "manifest.json").write_text(json.dumps({"format": runs.FORMAT, "files": sums}))


# ---------------------------------------------------------------------------------------------------------------------
# Making one


def test_a_checkpoint_brings_back_its_bits_and_the_metrics_of_that_moment(tmp_path: Path):
    with UnfinishedRun.create(tmp_path / "run") as run:
        run.record({"loss": 0.1 + 0.2})
        taken = snapshot(0.1)
        run.checkpoint(taken)
        run.record({"loss": 2.0})
    with UnfinishedRun.resume(tmp_path / "run") as run:
        found = run.last_checkpoint()
        assert found is not None
        assert found.record == taken.record
        assert found.tensors.keys() == taken.tensors.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in taken.tensors.items())
        assert run.lines() == ({"loss": 0.1 + 0.2},)


def test_a_checkpoint_is_the_same_file_every_time(tmp_path: Path):
    contents = set()
    for name in "abc":
        with UnfinishedRun.create(tmp_path / name) as run:
            run.checkpoint(snapshot())
            contents.add((run.partial / runs.CHECKPOINT).read_bytes())
    assert len(contents) == 1


def test_what_exists_is_never_replaced(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        for begin in (UnfinishedRun.create, UnfinishedRun.resume):
            with pytest.raises(ThroughtimeError, match="exists already, and a run never replaces anything"):
                begin(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_name_that_is_taken_meanwhile_is_not_replaced_and_nothing_is_lost(copy: Path, tmp_path: Path):
    contents = {name: (copy / name).read_bytes() for name in runs.FILES}
    path = tmp_path / "new"
    with UnfinishedRun.create(path) as run:
        path.mkdir()
        (path / "mine").touch()
        with pytest.raises(ThroughtimeError, match="exists already"):
            run.finish(contents)
    assert [file.name for file in path.iterdir()] == ["mine"]
    (path / "mine").unlink()
    path.rmdir()
    with UnfinishedRun.resume(path) as run:
        assert run.is_complete
        run.put_in_place()
    assert load(path).path == path


@pytest.mark.parametrize("name", ["", "..", "a.partial"])
def test_what_is_no_name_for_a_run_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ThroughtimeError, match=r"no name for a run|exists already"):
        UnfinishedRun.create(Path(name))


def test_an_unfinished_run_is_not_begun_anew(tmp_path: Path):
    with UnfinishedRun.create(tmp_path / "run") as run:
        run.checkpoint(snapshot())
    with pytest.raises(
        ThroughtimeError, match=r"run\.partial: an unfinished run of this name; go on with it \(--resume"
    ):
        UnfinishedRun.create(tmp_path / "run")
    with pytest.raises(ThroughtimeError, match=r"run\.partial: this run is not finished; train it to its end"):
        load(tmp_path / "run")


def test_a_run_without_a_checkpoint_leaves_nothing_behind(tmp_path: Path):
    with UnfinishedRun.create(tmp_path / "run") as run:
        run.write(runs.CONFIG, b"seed = 1")
        (run.partial / ".x.part").touch()
    assert not list(tmp_path.iterdir())


def test_missing_folders_are_made_and_what_is_no_folder_is_refused(tmp_path: Path):
    with UnfinishedRun.create(tmp_path / "runs" / "today" / "run") as run:
        assert run.partial.is_dir()
    assert not list(tmp_path.iterdir()), "what held nothing worth going on from is gone, the folders above it too"
    with UnfinishedRun.create(tmp_path / "runs" / "today" / "run") as run:
        (tmp_path / "runs" / "mine").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ThroughtimeError, match=r"file: cannot be made \(File exists\); choose a place"):
        UnfinishedRun.create(tmp_path / "file" / "run")
    with pytest.raises(ThroughtimeError, match=r"there is no unfinished run; begin it without --resume"):
        UnfinishedRun.resume(tmp_path / "run")


def test_a_read_only_folder_is_refused_before_anything_is_read(tmp_path: Path):
    """Also for root, who may write anywhere: another user tries."""
    tmp_path.chmod(0o555)
    (tmp_path / "old.partial").mkdir(mode=0o555)
    me = os.geteuid()
    open_to_all = [folder for folder in (tmp_path, *tmp_path.parents) if folder.stat().st_mode & 0o005 != 0o005]
    for folder in open_to_all:
        folder.chmod(folder.stat().st_mode | 0o055)
    try:
        if me == 0:
            os.seteuid(65534)
        options = {"file": "there is no such file", "sequence_id": "id", "target": "label", "run": tmp_path / "run"}
        with pytest.raises(
            ThroughtimeError, match=r"run\.partial: cannot be made \(Permission denied\); choose a place"
        ):
            fit(Config.resolve(options))
        with pytest.raises(ThroughtimeError, match=r"old\.partial: cannot be written \(Permission denied\)"):
            fit(Config.resolve({**options, "run": tmp_path / "old"}), resume=True)
    finally:
        os.seteuid(me)
        tmp_path.chmod(0o755)


def test_a_second_process_is_refused_and_a_dead_one_lets_go(tmp_path: Path):
    """The first process is killed: its lock goes with it."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with UnfinishedRun.create(tmp_path / "run") as run:
                run.checkpoint(snapshot())
                os.write(told, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.read(ready, 1)
    try:
        for begin in (UnfinishedRun.resume, UnfinishedRun.create):
            with pytest.raises(ThroughtimeError, match=r"another process is training this run; wait|an unfinished run"):
                begin(tmp_path / "run")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)
    with UnfinishedRun.resume(tmp_path / "run") as run:
        assert run.last_checkpoint() is not None


def test_a_run_finished_between_opening_and_locking_is_not_touched(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "new"
    first = UnfinishedRun.create(path)
    lock = fcntl.flock

    def slow(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        with first:
            first.finish({name: (copy / name).read_bytes() for name in runs.FILES})
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(ThroughtimeError, match="another process has just finished this run"):
        UnfinishedRun.resume(path)
    assert load(path)


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with UnfinishedRun.create(tmp_path / "run") as run:
        run.checkpoint(snapshot(1.0))
        with monkeypatch.context() as patch:
            if at == "write":
                (run.partial / f".{runs.CHECKPOINT}.part").symlink_to("/dev/full")
            else:
                real, calls = getattr(os, at), iter(range(9))
                # The metrics are brought to the disk first.
                patch.setattr(os, at, lambda *given: full() if next(calls) or at == "replace" else real(*given))
            with pytest.raises(
                ThroughtimeError,
                match=r"checkpoint\.safetensors: cannot be written, the disk is full; make room and start again with"
                r" --resume: the checkpoint before is whole",
            ):
                run.checkpoint(snapshot(2.0))
    assert not list((tmp_path / "run.partial").glob(".*"))
    with UnfinishedRun.resume(tmp_path / "run") as run:
        found = run.last_checkpoint()
        assert found is not None
        assert torch.equal(found.tensors["weights.a"], torch.ones(3))


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    with UnfinishedRun.create(tmp_path / "run") as run:
        run.record({"loss": 1.0})
        run.checkpoint(snapshot())
    file = tmp_path / "run.partial" / runs.CHECKPOINT
    whole = file.read_bytes()
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    for content in (whole[:-1], whole[:5], b"", b"\xff" * 40, (tmp_path / "foreign").read_bytes()):
        file.write_bytes(content)
        with (
            UnfinishedRun.resume(tmp_path / "run") as run,
            pytest.raises(ThroughtimeError, match=r"checkpoint\.safetensors: damaged"),
        ):
            run.last_checkpoint()
    file.write_bytes(whole)
    (tmp_path / "run.partial" / runs.METRICS).write_bytes(b"")
    with (
        UnfinishedRun.resume(tmp_path / "run") as run,
        pytest.raises(ThroughtimeError, match=r"metrics\.jsonl: damaged \(shorter"),
    ):
        run.last_checkpoint()


# ---------------------------------------------------------------------------------------------------------------------
# Reading one


def test_a_finished_run_comes_back_as_it_was(finished: Path):
    run = load(finished)
    assert not run.model.training
    assert {file.name for file in finished.iterdir()} == {*runs.FILES, runs.MANIFEST}
    assert [line["number"] for line in run.epochs] == [1, 2]
    assert run.result["count"] == 6
    assert run.recipe.epochs == 2
    stored = load_file(finished / runs.WEIGHTS)
    assert all(torch.equal(stored[name], tensor) for name, tensor in run.model.state_dict().items())
    assert run.model.recurrent.weight_ih_l0.requires_grad
    assert runs.configuration_of(finished).data == run.configuration.data


@pytest.mark.parametrize("name", runs.FILES)
def test_every_file_that_is_missing_truncated_or_changed_is_named(copy: Path, name: str):
    file = copy / name
    content = file.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for problem, spoilt in {
        "truncated": content[:-2],
        "damaged or changed": bytes(changed),
        "damaged": content + b"x",
    }.items():
        file.write_bytes(spoilt)
        with pytest.raises(DataError, match=f"{name}: {problem}") as refusal:
            load(copy)
        assert "\n" not in str(refusal.value)
    file.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        load(copy)
    file.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name}: missing"):
        load(copy)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="there is no run here"):
        load(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"manifest\.json: missing"):
        load(tmp_path)
    with pytest.raises(ThroughtimeError, match="there is no run here, finished or not"):
        runs.configuration_of(tmp_path / "nothing")


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"format": "throughtime-run-2", "files": {}}',
        json.dumps({"format": runs.FORMAT, "files": dict.fromkeys([*runs.FILES, "../../x"], 3)}).encode(),
        json.dumps({"format": runs.FORMAT, "files": dict.fromkeys(runs.FILES, 3)}).encode(),
        b"\xff\xfe",
        b'{"format": "throughti',
    ],
)
def test_a_manifest_that_says_anything_else_is_refused(copy: Path, manifest: bytes):
    (copy / "manifest.json").write_bytes(manifest)
    with pytest.raises(DataError, match="get the run again"):
        load(copy)


STRANGE: dict[str, tuple[str, Any]] = {
    "a cell that is none": (runs.CELL_FILE, b'{"format": 1, "nodes": []}'),
    "a cell that nests": (runs.CELL_FILE, b"[" * 100_000),
    "a cell that is no text": (runs.CELL_FILE, b"\xff"),
    "an encoder that is none": (runs.ENCODER, b'{"format": 1}'),
    "an encoder that nests": (runs.ENCODER, b'{"a":' * 100_000),
    "weights that are none": (runs.WEIGHTS, b"\x80\x04\x95 a pickle"),
    "a header beyond the file": (runs.WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
    "metrics without a result": (runs.METRICS, b'{"kind": "epoch"}\n'),
    "metrics that are none": (runs.METRICS, b"3\n"),
    "a configuration that is none": (runs.CONFIG, b"[[["),
    "a configuration with code": (runs.CONFIG, b'[data]\nfile = "x"\n[network]\ncell = "os:system"'),
    "a size without end": (runs.CONFIG, b'[data]\nfile = "x"\n[network]\nhidden_size = 1000000000000'),
    "layers without end": (runs.CONFIG, b'[data]\nfile = "x"\n[network]\nnum_layers = 1000000000000'),
    "another size": (runs.CONFIG, b'[data]\nfile = "x"\n[network]\nhidden_size = 5'),
}


@pytest.mark.parametrize(("name", "content"), STRANGE.values(), ids=STRANGE)
def test_a_strangers_run_is_refused_for_its_content_even_where_the_sums_are_right(
    copy: Path, name: str, content: bytes
):
    (copy / name).write_bytes(content)
    signed_again(copy)
    with pytest.raises(ThroughtimeError, match=r"run/\S+: |run/config.toml, ") as refusal:
        load(copy)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1200


def test_weights_of_another_type_or_shape_are_refused(copy: Path):
    weights = load_file(copy / runs.WEIGHTS)
    first = next(iter(weights))
    for spoilt in (
        {**weights, first: weights[first].double()},
        {**weights, first: weights[first][..., :1].contiguous()},
        {**weights, "more": torch.ones(1)},
        {name: tensor for name, tensor in weights.items() if name != first},
    ):
        save_file(spoilt, copy / runs.WEIGHTS)
        signed_again(copy)
        with pytest.raises(DataError, match=r"weights\.safetensors: not the weights of this cell and configuration"):
            load(copy)
