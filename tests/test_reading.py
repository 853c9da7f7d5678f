"""Reading long tables: what is read is what the file says, and what cannot be read is refused where it is."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from as_typed import read as read_any

from throughtime.data.formats.format import Asked
from throughtime.data.formats.long_tables import read_long_table
from throughtime.data.sequences import Columns, Sequences
from throughtime.errors import DataError

COLUMNS = Columns(sequence_id="id", time="t", target="y")
HEADER = "id,t,y,a,b\n"
GOOD = HEADER + "1,0,u,1.5,-2\n1,1,u,2.5,0\n2,0,v,3,1e-3\n"


def read(folder: Path, content: str | bytes, columns: Columns = COLUMNS, name: str = "table.csv") -> Sequences:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_sequences(path, columns)


def read_sequences(path: Path, columns: Columns) -> Sequences:
    return read_long_table(path, Asked(columns))


def assert_same(left: Sequences, right: Sequences) -> None:
    assert (left.ids, left.labels, left.features) == (right.ids, right.labels, right.features)
    for a, b in zip(left.steps, right.steps, strict=True):
        np.testing.assert_array_equal(a, b)


def test_values_labels_and_lengths_are_those_of_the_file(tmp_path: Path) -> None:
    sequences = read(tmp_path, GOOD)
    assert sequences.ids == ("1", "2")
    assert sequences.labels == ("u", "v")
    assert sequences.features == ("a", "b")
    np.testing.assert_array_equal(sequences.steps[0], [[1.5, -2], [2.5, 0]])
    np.testing.assert_array_equal(sequences.steps[1], [[3, 1e-3]])
    np.testing.assert_array_equal(sequences.lengths, [2, 1])


def test_the_order_of_rows_is_immaterial(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [f"{i},{t},{'uv'[i % 2]},{rng.normal()}" for i in range(12) for t in range(i % 4 + 1)]
    in_order = read(tmp_path, "\n".join(["id,t,y,a", *rows]))
    shuffled = read(tmp_path, "\n".join(["id,t,y,a", *rng.permutation(rows)]))
    assert_same(in_order, shuffled)


@pytest.mark.parametrize("name", ["table.parquet", "table.csv.gz"])
def test_parquet_and_compressed_csv_read_as_csv_does(tmp_path: Path, name: str) -> None:
    plain = read(tmp_path, GOOD)
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(GOOD.encode()))
    else:
        pd.read_csv(tmp_path / "table.csv").set_index(["id", "t"]).to_parquet(path)
    assert_same(read_sequences(path, COLUMNS), plain)


def test_ids_and_labels_stay_the_text_they_are(tmp_path: Path) -> None:
    sequences = read(tmp_path, HEADER + "1,0,NA,1,2\n01,0,null,3,4\n1.0,0,NA,5,6\n")
    assert dict(zip(sequences.ids, sequences.labels, strict=True)) == {"1": "NA", "01": "null", "1.0": "NA"}


def test_times_sort_as_numbers_and_as_dates_not_as_text(tmp_path: Path) -> None:
    numbers = read(tmp_path, HEADER + "1,10,u,2,0\n1,9,u,1,0\n1,11.5,u,3,0\n2,0,v,0,0\n")
    np.testing.assert_array_equal(numbers.steps[0][:, 0], [1, 2, 3])
    dates = HEADER + "1,2024-02-01T00:00,u,2,0\n1,2024-01-31 23:59:59.5,u,1,0\n2,2024-01-01,v,0,0\n"
    np.testing.assert_array_equal(read(tmp_path, dates).steps[0][:, 0], [1, 2])


def test_neighbouring_nanoseconds_are_two_steps(tmp_path: Path) -> None:
    start = 1_700_000_000_000_000_000
    sequences = read(tmp_path, HEADER + f"1,{start + 1},u,2,0\n1,{start},u,1,0\n2,0,v,0,0\n")
    np.testing.assert_array_equal(sequences.steps[0][:, 0], [1, 2])


def test_without_a_time_column_rows_keep_their_order_and_that_is_said(tmp_path: Path) -> None:
    columns = Columns(sequence_id="id", target="y", features=("a",))
    sequences = read(tmp_path, HEADER + "2,0,v,9,0\n1,1,u,5,0\n1,0,u,4,0\n", columns)
    np.testing.assert_array_equal(sequences.steps[0][:, 0], [5, 4])
    assert "order of the file" in sequences.notices[0]


def test_groups_and_parts_are_read_one_per_sequence_and_are_no_features(tmp_path: Path) -> None:
    columns = Columns(sequence_id="id", time="t", target="y", group="g", part="p")
    sequences = read(tmp_path, "id,t,y,g,p,a\n1,0,u,x,train,1\n1,1,u,x,train,1\n2,0,v,z,test,1\n", columns)
    assert sequences.groups == ("x", "z")
    assert sequences.parts == ("train", "test")
    assert sequences.features == ("a",)


def test_booleans_are_nought_and_one(tmp_path: Path) -> None:
    sequences = read(tmp_path, "id,t,y,a\n1,0,u,True\n2,0,v,False\n")
    assert [float(steps[0, 0]) for steps in sequences.steps] == [1.0, 0.0]


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "blank lines alone": ("\n \n", "is empty"),
    "a header alone": (HEADER, "has a header and no rows"),
    "a missing column": (
        GOOD.replace("y", "yy", 1),
        "no column 'y'; did you mean 'yy'? The columns are 'id', 't'",
    ),
    "a name twice": ("id,t,y,a,a\n1,0,u,1,2\n", "column 'a': two columns have this name"),
    "an empty feature": (HEADER + "1,0,u,1,2\n2,0,v,,2\n", "line 3, column 'a': the cell is empty; fill it"),
    "a short row": (HEADER + "1,0,u,1,2\n2,0,v,1\n", "line 3, column 'b': the cell is empty"),
    "NaN": (HEADER + "1,0,u,1,2\n2,0,v,3,nan\n", "line 3, column 'b': a missing value (nan)"),
    "infinity": (HEADER + "1,0,u,1,2\n2,0,v,-inf,2\n", "line 3, column 'a': an infinite value (-inf)"),
    "overflow": (HEADER + "1,0,u,1,2\n2,0,v,1e999,2\n", "line 3, column 'a': an infinite value"),
    "text": (HEADER + "1,0,u,1,2\n2,0,v,high,2\n", "line 3, column 'a': 'high' is not a number; mend it"),
    "a decimal comma": (HEADER + '1,0,u,1,2\n2,0,v,"1,5",2\n', "line 3, column 'a': '1,5' is not a number"),
    "no id": (HEADER + "1,0,u,1,2\n,0,v,3,2\n", "line 3, column 'id': the cell is empty"),
    "no label": (HEADER + "1,0,u,1,2\n2,0,,3,2\n", "line 3, column 'y': the cell is empty"),
    "no time": (HEADER + "1,0,u,1,2\n2,,v,3,2\n", "line 3, column 't': the cell is empty"),
    "half a date": (
        HEADER + "1,2024-01-01,u,1,2\n2,soon,v,3,2\n",
        "line 3, column 't': 'soon' is not a date",
    ),
    "a step twice": (
        HEADER + "1,0,u,1,2\n2,0,v,1,2\n1,0,u,5,2\n",
        "line 4, column 't': '0' again in sequence '1', after line 2",
    ),
    "two targets": (
        HEADER + "1,0,u,1,2\n2,0,v,1,2\n1,1,v,5,2\n",
        "line 4, column 'y': 'v', but 'u' at line 2 of the same sequence '1'",
    ),
    "a line number after blank and quoted lines": (
        HEADER + '1,0,"u\nu",1,2\n\n   \n2,0,v,x,2\n',
        "line 6, column 'a': 'x' is not a number",
    ),
    "a long row": (HEADER + "1,0,u,1,2\n2,0,v,1,2,3\n", "cannot be read as CSV"),
    "long rows throughout": (HEADER + "1,0,u,1,2,\n2,0,v,1,2,\n", "line 2: 6 fields under a header of 5"),
    "an open quote": (HEADER + '1,0,u,1,2\n2,0,"v,1,2\n', "cannot be read as CSV"),
    "semicolons": (GOOD.replace(",", ";"), "is separated by ';', which makes it a single column here"),
    "tabs": (GOOD.replace(",", "\t"), "is separated by tabs"),
    "a single column": ("id\n1\n2\n", "has a single column, 'id'"),
    "no features": ("id,t,y\n1,0,u\n2,0,v\n", "no column is left for the features"),
    "a row number without a name": (",id,t,y,a\n0,1,0,u,1\n1,2,0,v,1\n", "a column without a name"),
    "another encoding": (HEADER.encode() + "1,0,ü,1,2\n".encode("latin-1"), "line 2: not UTF-8 text"),
    "bytes": (b"PK\x03\x04" + bytes(range(256)), "line 1: not text"),
    "a letter cut in half": ((HEADER + "1,0,ü").encode()[:-1], "line 2: not UTF-8 text"),
    "zeros": (GOOD.encode() + b"\0\0", "line 5: not text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_that_names_the_file_the_place_and_the_way_out(tmp_path: Path, case: str) -> None:
    content, expected = REFUSED[case]
    with pytest.raises(DataError) as refusal:
        read(tmp_path, content)
    message = str(refusal.value)
    assert expected in message
    assert message.startswith(str(tmp_path / "table.csv"))
    assert "\n" not in message


@pytest.mark.parametrize("suffix", ["csv", "parquet", "csv.gz"])
def test_a_directory_a_missing_file_and_a_damaged_file_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_sequences(tmp_path / f"absent.{suffix}", COLUMNS)
    with pytest.raises(DataError, match="is a directory"):
        read_sequences(tmp_path, COLUMNS)
    with pytest.raises(DataError, match=r"cannot be read|not UTF-8 text"):
        read(tmp_path, b"\x1f\x8b\x08\x00PAR1", name=f"damaged.{suffix}")


def test_parquet_refusals_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    frame = pd.DataFrame({"id": [1, 2], "t": [0, 0], "y": ["u", "v"], "a": [1.0, None]})
    frame.to_parquet(path)
    with pytest.raises(DataError, match="row 2, column 'a': a missing value"):
        read_sequences(path, COLUMNS)
    frame.assign(a=pd.Timestamp("2024-01-01")).to_parquet(path)
    with pytest.raises(DataError, match="column 'a': holds datetime64"):
        read_sequences(path, COLUMNS)
    frame.assign(a=1.0).iloc[:0].to_parquet(path)
    with pytest.raises(DataError, match="has no rows"):
        read_sequences(path, COLUMNS)


def test_a_column_with_two_roles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'y' is the target and cannot be a feature"):
        read(tmp_path, GOOD, Columns(sequence_id="id", time="t", target="y", features=("a", "y")))
    with pytest.raises(DataError, match="'id' is named both as sequence id and as target"):
        read(tmp_path, GOOD, Columns(sequence_id="id", target="id"))


def test_japanese_vowels_is_as_published() -> None:
    vowels = read_any("vowels")
    parts = np.array(vowels.parts)
    labels = np.array(vowels.labels, dtype=int)
    assert np.bincount(labels[parts == "train"])[1:].tolist() == [30] * 9
    assert np.bincount(labels[parts == "test"])[1:].tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert (vowels.lengths.min(), vowels.lengths.max(), vowels.lengths.sum()) == (7, 29, 9961)
    assert vowels.features == tuple(f"cepstrum_{i}" for i in range(1, 13))
    first = vowels.steps[vowels.ids.index("1")][0]
    assert first[:3].tolist() == [1.860936, -0.207383, 0.261557]
