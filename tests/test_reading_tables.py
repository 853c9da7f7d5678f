"""Long tables with symbols, with a label for every row, and for a model in use; and files larger than memory."""

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from as_typed import read

from throughtime.data import files
from throughtime.data.formats.format import Asked
from throughtime.data.formats.long_tables import read_long_table
from throughtime.data.sequences import PER_STEP, Columns, Sequences
from throughtime.errors import DataError

TABLE = "id,t,y,a,word,pos,g\ns,1,B,2.5,dog,NN,p\nr,0,O,3,NA,01,p\ns,0,O,1.5,the,DT,p\n"


def read_table(folder: Path, content: str = TABLE, name: str = "a.csv", **options: Any) -> Sequences:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return read(str(path), **{"sequence_id": "id", "time": "t", **options})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_long_table_can_have_a_label_and_symbols_in_every_row(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"task": "tag", "target": "y", "symbols": ["word", "pos"], "features": ["a"]}
    sequences = read_table(tmp_path, **options)
    if kind == "parquet":
        frame = pd.read_csv(tmp_path / "a.csv", dtype={"pos": "str", "word": "category"}, keep_default_na=False)
        frame.to_parquet(tmp_path / "a.parquet")
        sequences = read(str(tmp_path / "a.parquet"), sequence_id="id", time="t", **options)
    assert sequences.ids == ("r", "s")
    assert sequences.labels == (("O",), ("O", "B"))
    assert sequences.symbols == ((("NA", "01"),), (("the", "DT"), ("dog", "NN")))
    np.testing.assert_array_equal(sequences.steps[1], [[1.5], [2.5]])
    assert (sequences.symbol_columns, sequences.features, sequences.role) == (("word", "pos"), ("a",), PER_STEP)


def test_symbols_alone_are_enough(tmp_path: Path) -> None:
    sequences = read_table(tmp_path, "id,t,y,w\n1,0,u,a\n2,0,v,b\n", target="y", symbols=["w"])
    assert (sequences.features, sequences.symbols) == ((), ((("a",),), (("b",),)))
    assert [steps.shape for steps in sequences.steps] == [(1, 0), (1, 0)]


def test_a_file_to_predict_on_may_lack_the_target_and_never_has_it_for_a_feature(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "y", "group": "g", "part": "p", "labelled": False, "splitting": False}
    lacking = read_table(tmp_path, "id,t,a\n1,0,2\n", **options)
    having = read_table(tmp_path, "id,t,a,y,g,p\n1,0,2,,,\n", **options)
    for sequences in (lacking, having):
        assert (sequences.features, sequences.labels, sequences.groups, sequences.parts) == (("a",), (), None, None)
    assert read_table(tmp_path, "id,t,a\n1,0,2\n", labelled=False).features == ("a",)


def test_a_model_in_use_reads_labels_without_groups_and_parts(tmp_path: Path) -> None:
    sequences = read_table(tmp_path, "id,t,y,a,g\n1,0,u,2,p\n", target="y", group="g", part="p", splitting=False)
    assert (sequences.features, sequences.labels, sequences.groups) == (("a",), ("u",), None)


TAGGED = "id,t,y,w\n1,0,O,a\n1,1,B,b\n"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a label missing in a row": (TAGGED + "2,0,,c\n", {"task": "tag"}, "line 4, column 'y': the cell is empty"),
    "a symbol missing in a row": (TAGGED + "2,0,O,\n", {"task": "tag"}, "line 4, column 'w': the cell is empty"),
    "a label for each row to classify": (TAGGED, {}, "line 3, column 'y': 'B', but 'O' at line 2 of the same"),
    "a step twice": (
        TAGGED + "1,1,B,b\n",
        {"task": "tag"},
        "line 4, column 't': '1' again in sequence '1', after line 3",
    ),
    "no such symbol column": (TAGGED, {"symbols": ["v"]}, "no column 'v'; The columns are"),
    "a column with two roles": (TAGGED, {"features": ["w"]}, "'w' is the symbol and cannot be a feature too"),
    "a symbol column named twice": (TAGGED, {"symbols": ["w", "w"]}, "'w' is named both as symbol and as symbol"),
    "words where numbers belong": (TAGGED, {"symbols": []}, "'a' is not a number; mend it, leave the column out"),
    "no target": (TAGGED, {"target": None}, "--sequence-id and --target"),
    "no id": (TAGGED, {"sequence_id": None}, "--sequence-id and --target"),
    "text": (TAGGED, {"text": "words"}, "--text means nothing for a long table"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tables_are_refused_in_one_line_with_the_place(tmp_path: Path, case: str) -> None:
    content, options, expected = REFUSED[case]
    if case == "words where numbers belong":
        options = {**options, "task": "tag"}
    with pytest.raises(DataError) as refusal:
        read_table(tmp_path, content, **{"target": "y", "symbols": ["w"], **options})
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("cell", [["a"], b"a", {"a": 1}])
def test_parquet_cells_that_are_no_text_are_not_made_into_some(tmp_path: Path, cell: object) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"id": [1, 2], "y": ["u", "v"], "w": [cell, cell]}).to_parquet(path)
    with pytest.raises(DataError, match=r"row 1, column 'w': holds \w+, not text"):
        read(str(path), sequence_id="id", target="y", symbols=["w"])


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + TABLE.encode())
    columns = Columns("id", "y", "t", ("a",))
    assert read_long_table(path, Asked(columns, PER_STEP)).ids == ("r", "s")


def test_data_that_ships_is_to_classify_and_its_columns_are_known() -> None:
    with pytest.raises(DataError, match="vowels has one label for each sequence"):
        read("vowels", task="tag")
    with pytest.raises(DataError, match="its columns are known"):
        read("vowels", symbols=["frame"])
    in_use = read("vowels", labelled=False, splitting=False)
    assert (in_use.labels, in_use.parts, len(in_use.features)) == ((), None, 12)


def test_a_file_that_is_not_there_is_refused_with_what_ships_here(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; give a data file, or a data set that ships here \(vowels\)"):
        read(str(tmp_path / "vowel"))
    with pytest.raises(DataError, match="is a directory; name the data file in it"):
        read(str(tmp_path))


# Memory

SMALL = {
    "a.csv": b"id,y,a\n1,u,2\n2,v,3\n",
    "a.csv.gz": gzip.compress(b"id,y,a\n1,u,2\n2,v,3\n"),
    "a.jsonl": b'{"x": [1], "label": "u"}\n',
    "a.txt": b"u\tsome words\n",
    "a.conll": b"word O\n",
}


@pytest.mark.parametrize("name", [*SMALL, "a.parquet"])
def test_a_file_larger_than_memory_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pd.DataFrame({"id": [1, 2], "y": ["u", "v"], "a": [2, 3]}).to_parquet(path)
    else:
        path.write_bytes(SMALL[name])
    options: dict[str, Any] = {"task": "tag"} if name == "a.conll" else {}
    if "csv" in name or "parquet" in name:
        options |= {"sequence_id": "id", "target": "y"}
    assert len(read(str(path), **options))
    monkeypatch.setattr(files, "available_memory", lambda: 40)
    with pytest.raises(DataError, match=r"holds .* bytes, which would take about .* of memory, and 40 bytes is free"):
        read(str(path), **options)
    monkeypatch.setattr(files, "available_memory", lambda: None)  # a system that cannot tell
    assert len(read(str(path), **options))


def test_a_file_larger_than_memory_is_not_read_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.write(b"id,y,a\n1,u,2\n2,v,3\n")
        file.truncate(1 << 42)  # holes, of which the disk keeps nothing
    with pytest.raises(DataError, match=r"holds 4398.0 GB, which would take about \d+.\d GB of memory"):
        read(str(path), sequence_id="id", target="y")


def test_a_packed_file_that_swells_is_refused_before_it_is_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"id,y,a\n1,u,2\n" + b"\n" * 4_000_000))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(files, "PIECE", 1 << 16)
    monkeypatch.setattr(files, "available_memory", lambda: 60_000_000)
    with pytest.raises(DataError, match=r"holds 1\.\d MB, which would take about 6\d\.\d MB of memory"):
        read(str(path), sequence_id="id", target="y")


def test_the_memory_that_is_free_is_known_and_no_more_than_the_machine_has() -> None:
    free = files.available_memory()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_control_group_bounds_the_memory(tmp_path: Path) -> None:
    for name, content in {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 1\ninactive_file 50\n",
    }.items():
        (tmp_path / name).write_text(content)
    assert files._group_memory(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert files._group_memory(tmp_path) is None
    assert files._group_memory(tmp_path / "none") is None
