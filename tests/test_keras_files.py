"""Files that a real Keras wrote, read without it; files that are damaged, foreign or hostile, refused in one line."""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from agreement import assert_agree, tensors_in
from keras_peer import FEATURES, inputs, keras, randomised, sequential

import throughtime as tt
from throughtime.interop.keras import Stack, from_keras, load

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's, as it saves
layers = keras.layers


def model() -> Any:
    """Every kind of layer, two of one class, with names that no class gives."""
    return sequential(
        layers.Masking(-1.0),
        layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both"),
        layers.GRU(5, return_sequences=True, name="first"),
        layers.GRU(5, return_sequences=True, reset_after=False, name="second"),
        layers.Bidirectional(layers.GRU(3, return_sequences=True, use_bias=False), merge_mode="sum"),
        layers.SimpleRNN(6, activation="relu"),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and the folder in which it is saved in every way that Keras has."""
    folder, whole = tmp_path_factory.mktemp("keras"), model()
    whole.save(folder / "m.keras")
    whole.save(folder / "m.h5")
    whole.save_weights(folder / "m.weights.h5")
    (folder / "m.json").write_text(whole.to_json())
    return whole, folder


WAYS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "m.keras": lambda folder: {},
    "m.h5": lambda folder: {},
    "m.weights.h5": lambda folder: {"config": folder / "m.json"},
}


@pytest.mark.parametrize("name", WAYS)
def test_a_file_is_the_live_model_without_keras(name: str, saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch):
    whole, folder = saved
    expected = from_keras(whole)
    for module in [module for module in sys.modules if module.partition(".")[0] == "keras"]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises, as where it is not installed
    found = load(folder / name, **WAYS[name](folder))
    assert str(found) == str(expected)
    assert_agree(dict(found.state_dict()), dict(expected.state_dict()))
    x, _ = inputs()
    assert_agree(found(x)[0], expected(x)[0])
    assert found.mask_value == -1.0


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("layer", ["both", "first", "second"])
def test_one_layer_is_taken_out_of_a_file(layer: str, name: str, saved: tuple[Any, Path]):
    whole, folder = saved
    found = load(folder / name, layer=layer, **WAYS[name](folder))
    assert isinstance(found, tt.nn.Recurrent)
    assert_agree(dict(found.state_dict()), dict(from_keras(whole, layer=layer).state_dict()))


def test_a_model_of_other_layers_gives_its_recurrent_ones(tmp_path: Path):
    tokens = keras.Input((None,))
    steps = layers.Embedding(9, FEATURES, mask_zero=True)(tokens)
    ends = layers.LSTM(4, name="inner")(layers.LSTM(4, return_sequences=True)(steps))
    whole = keras.Model(tokens, layers.Dense(2)(ends))
    whole.save(tmp_path / "f.keras")
    found = load(tmp_path / "f.keras", layer="inner")
    assert_agree(dict(found.state_dict()), dict(from_keras(whole, layer="inner").state_dict()))
    with pytest.raises(tt.InteropError, match=r'f\.keras is Functional, .*; take a recurrent layer .*layer="lstm'):
        load(tmp_path / "f.keras")
    with pytest.raises(tt.InteropError, match=r"f\.keras has no layer 'outer'; its recurrent layers: lstm.*, inner"):
        load(tmp_path / "f.keras", layer="outer")


def test_weights_alone_need_their_configuration(saved: tuple[Any, Path]):
    _, folder = saved
    with pytest.raises(tt.InteropError, match=r"m\.weights\.h5 holds weights alone; give config=.*model\.to_json\(\)"):
        load(folder / "m.weights.h5")
    with pytest.raises(tt.InteropError, match=r"m\.keras holds its own configuration; leave config= out"):
        load(folder / "m.keras", config=folder / "m.json")
    config = json.loads((folder / "m.json").read_text())
    assert isinstance(load(folder / "m.weights.h5", config=config), Stack)


def test_what_is_not_carried_is_said_for_files_too(tmp_path: Path):
    sequential(layers.LSTM(4, recurrent_dropout=0.5, name="a")).save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match=r"m\.keras, layer 'a': recurrent_dropout=0\.5 act in training only"):
        load(tmp_path / "m.keras")


# -- older Keras ------------------------------------------------------------------------------------------------------


def keras_2_file(path: Path, constants: dict[str, Any], version: str = "2.15.0") -> list[np.ndarray]:
    """A GRU as Keras 2 wrote whole models: bytes for text, `:0` behind names, and what it did not say left out."""
    generator = np.random.default_rng(0)
    shapes = {"kernel": (FEATURES, 12), "recurrent_kernel": (4, 12), "bias": (12,)}
    arrays = [generator.standard_normal(shape).astype("f4") for shape in shapes.values()]
    names = [f"gru/gru_cell/{name}:0".encode() for name in shapes]
    config = {"name": "gru", "units": 4, "activation": "tanh", "return_sequences": True, **constants}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = version.encode()
        said = {"class_name": "Sequential", "config": {"layers": [{"class_name": "GRU", "config": config}]}}
        file.attrs["model_config"] = json.dumps(said).encode()
        group = file.create_group("model_weights/gru")
        group.attrs["weight_names"] = names
        for name, array in zip(names, arrays, strict=True):
            group[name.decode()] = array
    return arrays


def test_hard_sigmoid_means_what_the_file_s_keras_meant(tmp_path: Path):
    kernel, recurrent, bias = keras_2_file(tmp_path / "old.h5", {"recurrent_activation": "hard_sigmoid"})
    x, _ = inputs()
    found, _ = load(tmp_path / "old.h5")(x)
    h = np.zeros((x.shape[0], 4))
    for t in range(x.shape[1]):  # Keras 1 and 2: 0.2 a + 0.5 between 0 and 1, and a reset gate that acts before
        (wz, wr, wn), (uz, ur, un) = np.split(x.detach().numpy()[:, t] @ kernel + bias, 3, 1), np.split(recurrent, 3, 1)
        z, r = (np.clip(0.2 * a + 0.5, 0, 1) for a in (wz + h @ uz, wr + h @ ur))
        h = z * h + (1 - z) * np.tanh(wn + (r * h) @ un)
        assert np.abs(found.detach().numpy()[:, t] - h).max() < 1e-5
    keras_2_file(tmp_path / "new.h5", {"recurrent_activation": "hard_sigmoid", "reset_after": False}, "3.0.0")
    assert not torch.allclose(load(tmp_path / "new.h5")(x)[0], found)


def test_weights_alone_of_the_older_kind_are_read(tmp_path: Path):
    arrays = keras_2_file(tmp_path / "whole.h5", {})
    with h5py.File(tmp_path / "whole.h5") as whole, h5py.File(tmp_path / "w.h5", "w") as alone:
        alone.attrs["layer_names"], alone.attrs["keras_version"] = [b"gru"], b"2.15.0"
        whole.copy("model_weights/gru", alone)
        config = json.loads(whole.attrs["model_config"])
    found = load(tmp_path / "w.h5", config=config)
    assert_agree(dict(found.state_dict()), dict(load(tmp_path / "whole.h5").state_dict()))
    assert len(arrays) == 3


# -- nothing is run ---------------------------------------------------------------------------------------------------


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def loud(a: Any) -> Any:
        print("run")
        return a

    whole = sequential(layers.Lambda(loud, name="code"), layers.LSTM(4, name="inner"))
    whole.save(tmp_path / "m.keras")
    whole.save(tmp_path / "m.h5")
    capsys.readouterr()
    for name in ("m.keras", "m.h5"):
        with pytest.raises(tt.InteropError, match=rf"{name}, layer 'code' is Lambda, .*layer=\"inner\""):
            load(tmp_path / name)
        assert isinstance(load(tmp_path / name, layer="inner"), tt.nn.Recurrent)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`:UserWarning")
def test_an_activation_that_is_code_is_refused(tmp_path: Path):
    sequential(layers.LSTM(4, activation=lambda a: a, name="inner")).save(tmp_path / "m.keras")
    with pytest.raises(tt.InteropError, match=r"m\.keras, layer 'inner': activation is .*, which is code"):
        load(tmp_path / "m.keras")


@keras.saving.register_keras_serializable(package="own", name="LSTM")
class OwnLSTM(layers.LSTM):  # type: ignore[name-defined]
    """Named as Keras's, and another class."""


def test_a_class_of_ones_own_is_not_taken_for_keras_s(tmp_path: Path):
    sequential(OwnLSTM(4, name="inner")).save(tmp_path / "m.keras")
    with pytest.raises(tt.InteropError, match=r"m\.keras, layer 'inner' is .*LSTM, and SimpleRNN, GRU, LSTM"):
        load(tmp_path / "m.keras")


def test_weights_that_could_be_pickles_are_not_opened(tmp_path: Path, saved: tuple[Any, Path]):
    rewritten(saved[1] / "m.keras", tmp_path / "m.keras", add={"model.weights.npz": b"anything"})
    with pytest.raises(tt.InteropError, match=r"\.npz, which can hold pickled objects"):
        load(tmp_path / "m.keras")


# -- damage -----------------------------------------------------------------------------------------------------------


def rewritten(
    source: Path, target: Path, *, without: str = "", add: dict[str, bytes] | None = None, **said: Any
) -> Path:
    """A `.keras` archive with a member left out, others put in place, or something else said of the layer 'inner'."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != without}
    if said:
        config = json.loads(members["config.json"])
        next(e for e in config["config"]["layers"] if e["config"].get("name") == "inner")["config"].update(said)
        members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in (members | (add or {})).items():
            archive.writestr(name, content)
    return target


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one LSTM, named inner."""
    path = tmp_path_factory.mktemp("small") / "m.keras"
    sequential(layers.LSTM(4, name="inner")).save(path)
    return path


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "units": ({"units": 5}, r"layer 'inner': kernel has shape \[3, 16\], and a LSTM with units=5 has \[inputs, 20\]"),
    "no units": ({"units": None}, r"layer 'inner': units is None"),
    "units that are no number": ({"units": True}, r"layer 'inner': units is True"),
    "bias": ({"use_bias": False}, r"layer 'inner': it holds 3 weights, and the configuration asks for 2"),
    "no truth value": ({"use_bias": "yes"}, r"layer 'inner': use_bias is 'yes'; it must be true or false"),
    "activation": ({"activation": "wobble"}, r"layer 'inner': activation='wobble' is not known; known are tanh"),
    "object": ({"activation": {"class_name": "LeakyReLU"}}, r"layer 'inner': activation is LeakyReLU, which is code"),
    "backwards": ({"go_backwards": True}, r"layer 'inner': go_backwards=True outside a Bidirectional"),
    "time first": ({"time_major": True}, r"layer 'inner': time_major=True"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_does_not_fit_names_layer_and_attribute(case: str, small: Path, tmp_path: Path):
    said, refusal = CONFIGURATIONS[case]
    with pytest.raises(tt.InteropError, match=r"m\.keras, " + refusal):
        load(rewritten(small, tmp_path / "m.keras", **said))


MEMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "no config": ({"without": "config.json"}, r"has no config\.json; it is a zip, but no Keras model"),
    "no weights": ({"without": "model.weights.h5"}, r"has no model\.weights\.h5"),
    "no JSON": ({"add": {"config.json": b"\x80\x04"}}, r"config\.json is not JSON"),
    "deep JSON": ({"add": {"config.json": b"[" * 100_000}}, r"config\.json is not JSON"),
    "a list": ({"add": {"config.json": b"[1]"}}, r"config\.json holds list"),
    "no class": ({"add": {"config.json": b"{}"}}, r"names no class; is this a Keras configuration"),
    "no layers": ({"add": {"config.json": b'{"class_name": "Sequential"}'}}, r"configuration of Sequential lists no"),
    "odd layers": (
        {"add": {"config.json": b'{"class_name": "Sequential", "config": {"layers": [3]}}'}},
        r"layer 0 is int and names no class",
    ),
    "nameless": (
        {"add": {"config.json": b'{"class_name": "Sequential", "config": {"layers": [{"class_name": "GRU"}]}}'}},
        r"layer 0 \(GRU\) has no configuration with a name of its own",
    ),
    "nothing": ({"add": {"config.json": b'{"class_name": "Sequential", "config": {"layers": []}}'}}, r"holds no recu"),
    "weights of text": ({"add": {"model.weights.h5": b"no"}}, r"model\.weights\.h5 is neither a \.keras archive nor"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_an_archive_without_what_it_needs_is_refused(case: str, small: Path, tmp_path: Path):
    changes, refusal = MEMBERS[case]
    with pytest.raises(tt.InteropError, match=r"m\.keras.*" + refusal) as error:
        load(rewritten(small, tmp_path / "m.keras", **changes))
    assert "\n" not in str(error.value)


def test_a_member_outside_the_archive_is_not_unpacked(small: Path, tmp_path: Path):
    (tmp_path / "inside").mkdir()
    path = rewritten(small, tmp_path / "inside" / "m.keras", add={"../outside": b"x", "/tmp/outside-of-keras": b"x"})
    assert isinstance(load(path), Stack)
    assert [found.name for found in tmp_path.rglob("*")] == ["inside", "m.keras"]


def test_a_member_that_would_swell_is_not_read(small: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b" " * 50_000_000)
    with pytest.raises(tt.InteropError, match=r"config\.json claims 50000000 bytes and stores \d+; it is not read"):
        load(tmp_path / "m.keras")


def changed(small: Path, tmp_path: Path, change: Callable[[h5py.Group], None]) -> Path:
    """The archive with its LSTM's group of weights changed."""
    with zipfile.ZipFile(small) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r+") as file:
        change(file["layers/lstm/cell/vars"])
    return rewritten(small, tmp_path / "m.keras", add={"model.weights.h5": content.getvalue()})


def replaced(name: str, value: Any, **constants: Any) -> Callable[[h5py.Group], None]:
    def change(group: h5py.Group) -> None:
        del group[name]
        if isinstance(value, h5py.ExternalLink | h5py.SoftLink):
            group[name] = value
        else:
            group.create_dataset(name, data=value, **constants)

    return change


def external(group: h5py.Group) -> None:
    del group["0"]
    group.create_dataset("0", (3, 16), "f4", external=[("/etc/hostname", 0, 192)])


def endless(group: h5py.Group) -> None:
    del group["0"]
    group.create_dataset("0", (100_000_000, 16), "f4", chunks=(1000, 16))


WEIGHTS: dict[str, tuple[Callable[[h5py.Group], None], str]] = {
    "other shape": (replaced("1", np.zeros((4, 12), "f4")), r"recurrent_kernel has shape \[4, 12\], and a LSTM"),
    "no inputs": (replaced("0", np.zeros((0, 16), "f4")), r"kernel has shape \[0, 16\]"),
    "whole numbers": (replaced("0", np.zeros((3, 16), "i4")), "kernel is not an array of numbers"),
    "half": (replaced("0", np.zeros((3, 16), "f2")), "kernel holds float16"),
    "two types": (replaced("0", np.zeros((3, 16), "f8")), "its weights are of different types"),
    "text": (replaced("0", [b"cos\nsystem"] * 3), "kernel is not an array of numbers"),
    "a filter": (replaced("0", np.zeros((3, 16), "f4"), compression="gzip"), "kernel is filtered or stored elsewhere"),
    "a file elsewhere": (external, "kernel is filtered or stored elsewhere"),
    "a link out": (replaced("0", h5py.ExternalLink("/etc/hostname", "/")), "0 is a link to elsewhere"),
    "a link": (replaced("0", h5py.SoftLink("/layers")), "0 is a link to elsewhere"),
    "more than is there": (endless, r"kernel has shape \[100000000, 16\], but only 0 bytes are there"),
    "a weight too many": (lambda group: group.create_dataset("3", data=[1.0]), "it holds 4 weights"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_the_layer_s_are_refused(case: str, small: Path, tmp_path: Path):
    change, refusal = WEIGHTS[case]
    with pytest.raises(tt.InteropError, match=r"m\.keras.*" + refusal):
        load(changed(small, tmp_path, change))


def test_weights_of_another_model_are_noticed(saved: tuple[Any, Path], tmp_path: Path):
    _, folder = saved
    renamed = json.loads((folder / "m.json").read_text())
    renamed["config"]["layers"][3]["config"]["name"] = "other"
    with pytest.raises(tt.InteropError, match=r"layer 'other': layers/gru in .* is of the layer 'first'"):
        load(folder / "m.weights.h5", config=renamed)
    sequential(layers.LSTM(4)).save_weights(tmp_path / "l.weights.h5")
    with pytest.raises(tt.InteropError, match=r"l\.weights\.h5 has no layers/bidirectional"):
        load(tmp_path / "l.weights.h5", config=folder / "m.json")
    twice = json.loads((folder / "m.json").read_text())
    twice["config"]["layers"][3]["config"]["return_sequences"] = False
    with pytest.raises(tt.InteropError, match=r"reads sequences"):
        load(folder / "m.weights.h5", config=twice)


def test_a_text_that_became_a_list_is_not_read(tmp_path: Path):
    """HDF5 itself crashes on such a file."""
    keras_2_file(tmp_path / "m.h5", {})
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        listed = np.empty(1, dtype=object)
        listed[0] = np.array([1, 2], dtype=np.int8)
        file.attrs.create("keras_version", listed, dtype=h5py.vlen_dtype(np.int8))
    with pytest.raises(tt.InteropError, match=r"m\.h5: the attribute keras_version is not text"):
        load(tmp_path / "m.h5")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04 no", b"\x89HDF\r\n\x1a\n no", b"{}"])
def test_what_is_no_keras_file_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "m.keras").write_bytes(content)
    with pytest.raises(tt.InteropError, match=r"m\.keras "):
        load(tmp_path / "m.keras")


def test_a_path_that_leads_nowhere_is_refused(saved: tuple[Any, Path], tmp_path: Path):
    with pytest.raises(tt.InteropError, match=r"m\.keras cannot be read: No such file"):
        load(tmp_path / "m.keras")
    with pytest.raises(tt.InteropError, match="cannot be read: Is a directory"):
        load(tmp_path)
    with pytest.raises(tt.InteropError, match=r"no\.json cannot be read: No such file"):
        load(saved[1] / "m.weights.h5", config=tmp_path / "no.json")


@pytest.mark.parametrize("name", WAYS)
def test_a_file_with_a_wrong_byte_or_cut_short_is_read_or_refused(
    name: str, saved: tuple[Any, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    _, folder = saved
    content = (folder / name).read_bytes()
    draw, refused = random.Random(0), 0
    for k in range(80):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(damaged if k % 2 else content[: draw.randrange(len(content))])
        try:
            found = load(tmp_path / name, **WAYS[name](folder))
        except tt.InteropError as error:
            refused += 1
            assert "\n" not in str(error), error  # noqa: PT017 - it need not be refused
        else:
            assert tensors_in([*found.parameters()])
    assert refused > 30


def test_reading_needs_h5py_and_says_so(small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(tt.InteropError, match=r"needs h5py to be read; pip install 'throughtime\[interop\]'"):
        load(small)


def test_writing_needs_keras_and_says_so(monkeypatch: pytest.MonkeyPatch):
    from throughtime.interop.keras import to_keras

    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(tt.InteropError, match="to_keras needs Keras 3 with a back end; pip install keras"):
        to_keras(tt.nn.GRU(3, 4))


def test_a_built_layer_outlives_its_file(small: Path, tmp_path: Path):
    path = tmp_path / "m.keras"
    path.write_bytes(small.read_bytes())
    found = load(path)
    path.unlink()
    x, _ = inputs()
    randomised(layers.LSTM(2))  # another model in between
    assert found(x)[0].shape == (x.shape[0], 4)
