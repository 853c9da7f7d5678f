"""JSON lines, lines of text and CoNLL columns: what is read is what the file says; the rest is refused where it is."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from as_typed import read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from throughtime.data.sequences import PER_SEQUENCE, PER_STEP, Sequences
from throughtime.errors import DataError

JSONL = '{"x": [[1.5, -2], [2.5, 0]], "label": "u"}\n{"x": [[3, 1e-3]], "label": "v"}\n'
TEXT = "good\ta fine film\nbad\ta dull film, badly made\n"
CONLL = "The DT O\ndog NN B-X\n\nIt PRP O\nbarks VBZ O\n. . O\n"


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read_text(folder: Path, name: str, content: str | bytes, **options: Any) -> Sequences:
    return read(written(folder, name, content), **options)


# JSON lines


def test_json_lines_hold_numbers_labels_and_lengths(tmp_path: Path) -> None:
    sequences = read_text(tmp_path, "a.jsonl", JSONL)
    assert (sequences.ids, sequences.labels, sequences.features) == (("1", "2"), ("u", "v"), ("x1", "x2"))
    np.testing.assert_array_equal(sequences.steps[0], [[1.5, -2], [2.5, 0]])
    np.testing.assert_array_equal(sequences.steps[1], [[3, 1e-3]])
    assert (sequences.symbols, sequences.symbol_columns, sequences.role) == ((), (), PER_SEQUENCE)


def test_json_lines_hold_symbols_beside_numbers_with_names_of_their_own(tmp_path: Path) -> None:
    lines = [
        {
            "id": "b",
            "x": [1, 2],
            "symbols": [["to", "P"], ["go", "V"]],
            "labels": ["O", "B"],
            "group": 7,
            "part": "test",
        },
        {"id": "a", "x": [3], "symbols": [["go", "V"]], "labels": ["O"], "group": 8, "part": "train"},
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    sequences = read_text(tmp_path, "a.jsonl", content, task="tag")
    assert sequences.ids == ("b", "a")  # the file's order
    assert sequences.labels == (("O", "B"), ("O",))
    assert sequences.symbols == ((("to", "P"), ("go", "V")), (("go", "V"),))
    assert (sequences.groups, sequences.parts) == (("7", "8"), ("test", "train"))
    assert (sequences.features, sequences.symbol_columns) == (("x1",), ("symbol1", "symbol2"))
    np.testing.assert_array_equal(sequences.steps[0], [[1], [2]])


def test_keys_of_json_lines_can_be_named_and_columns_chosen(tmp_path: Path) -> None:
    content = '{"x": [[1, 2, 3]], "symbols": [["a", "b"]], "speaker": 1, "n": "p"}\n'
    content += '{"x": [[4, 5, 6]], "symbols": [["c", "d"]], "speaker": 2, "n": "q"}\n'
    sequences = read_text(
        tmp_path, "a.jsonl", content, target="speaker", sequence_id="n", features=["x3", "x1"], symbols=["symbol2"]
    )
    assert (sequences.ids, sequences.labels) == (("p", "q"), ("1", "2"))
    assert (sequences.features, sequences.symbol_columns) == (("x3", "x1"), ("symbol2",))
    np.testing.assert_array_equal(sequences.steps[1], [[6, 4]])
    assert sequences.symbols == ((("b",),), (("d",),))


def test_json_lines_to_predict_on_need_no_labels_and_none_are_read(tmp_path: Path) -> None:
    bare = read_text(tmp_path, "a.jsonl", '{"x": [1, 2]}\n{"x": [3]}\n', labelled=False)
    assert (bare.labels, bare.columns.target) == ((), None)
    full = read_text(tmp_path, "b.jsonl", JSONL, labelled=False)
    assert full.labels == ()
    in_use = read_text(tmp_path, "c.jsonl", '{"x": [1], "label": 1, "group": 1}\n', splitting=False)
    assert (in_use.groups, in_use.labels) == (None, ("1",))


JSONL_REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty; one JSON object a line"),
    "not JSON": (JSONL + '{"x": [1], "label": \n', "line 3: is not JSON ("),
    "not an object": (JSONL + "[1, 2]\n", "line 3: is [1, 2], not a JSON object"),
    "deep nesting": ("[" * 100_000 + "\n", "line 1: is not JSON"),
    "a key twice": ('{"x": [1], "x": [2], "label": "u"}\n', "line 1: has the key 'x' twice; keep one"),
    "an unknown key": (JSONL + '{"x": [[1, 2]], "lable": "u"}\n', "line 3: the key 'lable' has no meaning here"),
    "no numbers": ('{"label": "u"}\n', "line 1: has neither 'x' nor 'symbols'"),
    "no label": ('{"x": [1]}\n', "line 1: lacks the target 'label'; add it to every line"),
    "labels to classify": ('{"x": [1], "labels": ["u"]}\n', "it has 'labels' (--task tag)"),
    "a label missing once": (JSONL + '{"x": [[1, 2]]}\n', "line 3: lacks the key 'label', and line 1 has it"),
    "a list for a label": (
        '{"x": [1], "label": ["u"]}\n',
        "line 1: 'label' is a list; give one label, or ask",
    ),
    "an empty label": ('{"x": [1], "label": ""}\n', "line 1: 'label' holds an empty text"),
    "a label of null": ('{"x": [1], "label": null}\n', "line 1: 'label' holds null; give text or a whole number"),
    "a label of another kind": (JSONL + '{"x": [[1, 2]], "label": 3}\n', "line 3: 'label' holds 3, and \"u\" before"),
    "text among numbers": (
        '{"x": [[1, "2"]], "label": "u"}\n',
        "line 1: step 1 of 'x' holds the text '2'; give numbers",
    ),
    "null": ('{"x": [[1], [null]], "label": "u"}\n', "line 1: step 2 of 'x' holds null, not a number"),
    "NaN": ('{"x": [[1], [NaN]], "label": "u"}\n', "line 1: step 2 of 'x' holds NaN; replace it"),
    "infinity": ('{"x": [[1], [-Infinity]], "label": "u"}\n', "line 1: step 2 of 'x' holds -Infinity"),
    "overflow": ('{"x": [1, 1e999], "label": "u"}\n', "line 1: step 2 of 'x' holds Infinity"),
    "ragged steps": ('{"x": [[1, 2], [3]], "label": "u"}\n', "line 1: step 2 of 'x' has 1 values where step 1 has 2"),
    "lists and numbers": ('{"x": [[1], 3], "label": "u"}\n', "line 1: step 2 of 'x' has one number without a list"),
    "too deep": ('{"x": [[[1]]], "label": "u"}\n', "line 1: step 1 of 'x' holds [1], not a number"),
    "ragged lines": (
        JSONL + '{"x": [[1, 2, 3]], "label": "u"}\n',
        "line 3: a step of 'x' has 3 values where line 1 has 2",
    ),
    "no steps": ('{"x": [], "label": "u"}\n', "line 1: 'x' is []; give a list with a step or more"),
    "an empty step": ('{"x": [[]], "label": "u"}\n', "line 1: step 1 of 'x' is empty"),
    "an object for x": ('{"x": {"a": 1}, "label": "u"}\n', "line 1: 'x' is {\"a\": 1}; give a list"),
    "a huge number": ('{"x": [1' + "0" * 400 + '], "label": "u"}\n', "line 1: 'x' holds a whole number beyond 64 bits"),
    "a number for a symbol": (
        '{"symbols": ["a", 1], "label": "u"}\n',
        "line 1: step 2 of 'symbols' holds 1; give text",
    ),
    "null for a symbol": ('{"symbols": ["a", null], "label": "u"}\n', "line 1: step 2 of 'symbols' holds null"),
    "a step without symbols": ('{"symbols": [[]], "label": "u"}\n', "line 1: step 1 of 'symbols' holds []"),
    "a group in one line": (
        '{"x": [1], "label": "u"}\n{"x": [1], "label": "v", "group": 1}\n',
        "line 2: has the key 'group', and line 1 lacks it",
    ),
    "an empty symbol": ('{"symbols": ["a", ""], "label": "u"}\n', "line 1: step 2 of 'symbols' holds \"\""),
    "ragged symbols": ('{"symbols": [["a", "b"], ["a"]], "label": "u"}\n', "line 1: step 2 of 'symbols' has 1 texts"),
    "half a surrogate pair": ('{"symbols": ["\\ud800"], "label": "u"}\n', "line 1: holds half a surrogate pair"),
    "other counts": ('{"x": [1, 2], "symbols": ["a"], "label": "u"}\n', "line 1: 'x' has 2 steps and 'symbols' 1"),
    "symbols in one line": (
        JSONL + '{"x": [[1, 2]], "symbols": ["a"], "label": "u"}\n',
        "line 3: has the key 'symbols'",
    ),
    "an id twice": ('{"id": 1, "x": [1], "label": "u"}\n' * 2, "line 2: the id '1' again, after line 1"),
    "another encoding": ('{"x": [1], "label": "ü"}\n'.encode("latin-1"), "line 1: not UTF-8 text"),
}


@pytest.mark.parametrize("case", JSONL_REFUSED)
def test_json_lines_are_refused_in_one_line_with_the_place(tmp_path: Path, case: str) -> None:
    content, expected = JSONL_REFUSED[case]
    assert_refused(tmp_path, "a.jsonl", content, expected)


@pytest.mark.parametrize("role", ["sequence_id", "target", "group", "part"])
def test_a_key_that_was_named_has_to_be_there(tmp_path: Path, role: str) -> None:
    named: dict[str, Any] = {role: "n"}
    assert_refused(tmp_path, "a.jsonl", JSONL, "'n'; add it to every line, or name the key that holds it", **named)


def test_labels_that_do_not_fit_the_steps_are_refused(tmp_path: Path) -> None:
    few = '{"x": [1, 2], "labels": ["u"]}\n'
    assert_refused(tmp_path, "a.jsonl", few, "line 1: 'labels' has 1 labels, and the sequence 2 steps", task="tag")
    text = '{"x": [1, 2], "labels": "uv"}\n'
    assert_refused(tmp_path, "a.jsonl", text, "line 1: 'labels' is \"uv\", and the sequence 2 steps", task="tag")
    single = '{"x": [1, 2], "label": "u"}\n'
    assert_refused(tmp_path, "a.jsonl", single, "it has 'label' (--task classify)", task="tag")


# Lines of text


def test_lines_of_text_are_sequences_of_words(tmp_path: Path) -> None:
    sequences = read_text(tmp_path, "a.txt", "\n" + TEXT)
    assert sequences.ids == ("2", "3")  # the numbers of the lines
    assert sequences.labels == ("good", "bad")
    assert sequences.symbols[0] == (("a",), ("fine",), ("film",))
    assert (sequences.symbol_columns, sequences.features) == (("word",), ())
    assert [steps.shape for steps in sequences.steps] == [(3, 0), (5, 0)]


def test_lines_of_text_are_sequences_of_letters_if_asked_spaces_too(tmp_path: Path) -> None:
    sequences = read_text(tmp_path, "a.tsv", "x\tab a\r\ny\té\r\n", text="letters")
    assert sequences.symbols == ((("a",), ("b",), (" ",), ("a",)), (("é",),))
    assert sequences.symbol_columns == ("letter",)


def test_lines_of_text_to_predict_on_may_lack_labels_all_or_none(tmp_path: Path) -> None:
    with_labels = read_text(tmp_path, "a.txt", TEXT, labelled=False)
    without = read_text(tmp_path, "b.txt", TEXT.replace("good\t", "").replace("bad\t", ""), labelled=False)
    assert with_labels.symbols == without.symbols
    assert with_labels.labels == without.labels == ()
    assert_refused(tmp_path, "c.txt", "no label\nx\tlabel\n", "line 2: has a tab, and the lines before", labelled=False)
    assert_refused(tmp_path, "c.txt", "x\tlabel\nno label\n", "line 2: has no tab", labelled=False)


TEXT_REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("\n\n", "is empty; one line for each sequence"),
    "no tab": (TEXT + "good a film\n", "line 3: has no tab; write the label, one tab and the text"),
    "commas": ("label,text\n", "line 1: has no tab"),
    "two tabs": ("id\tt\ty\n", "line 1: has 2 tabs; write the label, one tab and the text (a long table"),
    "no label": (TEXT + "\ta film\n", "line 3: has no label before the tab"),
    "no text": (TEXT + "good\t \n", "line 3: has no text after the tab"),
    "another encoding": (TEXT.encode() + "good\tü\n".encode("latin-1"), "line 3: not UTF-8 text"),
    "bytes": (b"PK\x03\x04" + bytes(range(256)), "line 1: not text"),
    "zeros": ("a\tb\n\0", "line 2: not text"),
}


@pytest.mark.parametrize("case", TEXT_REFUSED)
def test_lines_of_text_are_refused_in_one_line_with_the_place(tmp_path: Path, case: str) -> None:
    content, expected = TEXT_REFUSED[case]
    assert_refused(tmp_path, "a.txt", content, expected)


def test_another_kind_of_step_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "a.txt", TEXT, "text is 'syllables'", text="syllables")


# CoNLL columns


def test_conll_columns_are_symbols_but_for_the_last_which_is_the_label(tmp_path: Path) -> None:
    sequences = read_text(tmp_path, "a.conll", CONLL, task="tag")
    assert sequences.ids == ("1", "4")  # the lines where sentences begin
    assert sequences.symbols[0] == (("The", "DT"), ("dog", "NN"))
    assert sequences.labels == (("O", "B-X"), ("O", "O", "O"))
    assert (sequences.symbol_columns, sequences.features, sequences.role) == (("1", "2"), (), PER_STEP)
    assert [steps.shape for steps in sequences.steps] == [(2, 0), (3, 0)]


@pytest.mark.parametrize("change", [("\n", "\r\n"), (" ", "   "), (" ", "\t"), ("\n\n", "\n\n \n\n")])
def test_conll_spacing_does_not_matter(tmp_path: Path, change: tuple[str, str]) -> None:
    plain = read_text(tmp_path, "a.conll", CONLL, task="tag")
    other = read_text(tmp_path, "b.conll", CONLL.replace(*change), task="tag")
    assert (other.symbols, other.labels) == (plain.symbols, plain.labels)


def test_between_tabs_a_cell_may_hold_spaces(tmp_path: Path) -> None:
    sequences = read_text(tmp_path, "a.conll", "New York\tB\nis\tO\n", task="tag")
    assert sequences.symbols == ((("New York",), ("is",)),)


def test_conll_columns_can_be_chosen_and_be_numbers(tmp_path: Path) -> None:
    content = "dog 1.5 B NN\nNA 2 O VB\n"
    sequences = read_text(tmp_path, "a.conll", content, task="tag", target="3", features=["2"], symbols=["1"])
    assert (sequences.symbols, sequences.labels) == (((("dog",), ("NA",)),), (("B", "O"),))
    np.testing.assert_array_equal(sequences.steps[0], [[1.5], [2]])


def test_conll_columns_to_predict_on_need_no_labels(tmp_path: Path) -> None:
    bare = read_text(tmp_path, "a.conll", "The DT\ndog NN\n", task="tag", labelled=False)
    assert (bare.symbols, bare.labels) == (((("The", "DT"), ("dog", "NN")),), ())
    named = read_text(tmp_path, "b.conll", CONLL, task="tag", labelled=False, symbols=["1", "2"])
    assert (named.symbols[0], named.labels) == (bare.symbols[0], ())


CONLL_REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("\n \n", "is empty; one token a line"),
    "ragged columns": (CONLL + "\nIt O\n", "line 8: 2 columns where line 1 has 3, separated by spaces; mend it"),
    "another separator": (CONLL + "\nIt\tPRP\tO\n", "line 8: 1 column where line 1 has 3, separated by spaces"),
    "a comment": (CONLL + "\n# text = It barks\nIt PRP O\n", "line 8: 5 columns where line 1 has 3"),
    "commas": ("The,DT,O\n", "has a single column; a token and its label stand side by side"),
    "an empty cell": ("The\tDT\tO\ndog\t\tO\n", "line 2, column '2': the cell is empty; fill it"),
    "another encoding": ("\n\nü B\n".encode("latin-1"), "line 3: not UTF-8 text"),
}


@pytest.mark.parametrize("case", CONLL_REFUSED)
def test_conll_columns_are_refused_in_one_line_with_the_place(tmp_path: Path, case: str) -> None:
    content, expected = CONLL_REFUSED[case]
    assert_refused(tmp_path, "a.conll", content, expected, task="tag")


def test_conll_columns_that_are_not_there_or_no_numbers_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "a.conll", CONLL, "no column '4'; The columns are '1', '2', '3'", task="tag", target="4")
    assert_refused(tmp_path, "a.conll", CONLL, "no column '9'", task="tag", symbols=["9"])
    assert_refused(tmp_path, "a.conll", CONLL, "line 1, column '2': 'DT' is not a number", task="tag", features=["2"])


# All of them


@pytest.mark.parametrize(
    ("name", "content", "task"),
    [("a.jsonl", JSONL, "classify"), ("a.txt", TEXT, "classify"), ("a.conll", CONLL, "tag")],
)
def test_packed_files_and_byte_order_marks_change_nothing(tmp_path: Path, name: str, content: str, task: Any) -> None:
    plain = read_text(tmp_path, name, content, task=task)
    packed = read_text(tmp_path, name + ".gz", gzip.compress(b"\xef\xbb\xbf" + content.encode()), task=task)
    assert (packed.ids, packed.labels, packed.symbols) == (plain.ids, plain.labels, plain.symbols)
    for left, right in zip(packed.steps, plain.steps, strict=True):
        np.testing.assert_array_equal(left, right)


def test_what_does_not_fit_the_format_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "a.txt", TEXT, "lines of text have one label each", task="tag")
    assert_refused(tmp_path, "a.conll", CONLL, "have a label for each token; ask for one at every step (--task tag)")
    assert_refused(tmp_path, "a.jsonl", JSONL, "--time means nothing for JSON lines; leave it out", time="t")
    assert_refused(tmp_path, "a.txt", TEXT, "--sequence-id means nothing for lines of text", sequence_id="t")
    assert_refused(tmp_path, "a.conll", CONLL, "--text means nothing for CoNLL columns", task="tag", text="words")
    assert_refused(tmp_path, "a.xlsx", TEXT, "its name does not say how to read it; end it in .csv")
    assert_refused(tmp_path, "a.txt", TEXT, "the task is 'guess'", task="guess", starts=False)


def assert_refused(
    folder: Path, name: str, content: str | bytes, expected: str, *, starts: bool = True, **options: Any
) -> None:
    with pytest.raises(DataError) as refusal:
        read_text(folder, name, content, **options)
    message = str(refusal.value)
    assert expected in message
    assert not starts or message.startswith(str(folder / name))
    assert "\n" not in message


MENDABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "a.jsonl": ('{"id": 1, "x": [[1, 2.5]], "symbols": ["é"], "label": "u"}\n' * 2, {}),
    "a.txt": (TEXT, {}),
    "a.conll": (CONLL, {"task": "tag"}),
    "a.csv": ("id,t,y,a\n1,0,u,2\n2,0,v,3\n", {"sequence_id": "id", "time": "t", "target": "y"}),
    "a.csv.gz": ("id,t,y,w\n1,0,u,2\n2,0,v,é\n", {"sequence_id": "id", "target": "y", "symbols": ["w", "t"]}),
}


DAMAGE = [
    b'"',
    b",",
    b"\n",
    b"\t",
    b"\r",
    b"\0",
    b" ",
    b"[",
    b"{",
    b"nan",
    b"1e999",
    b"null",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\ud800",
]


@pytest.mark.parametrize("name", MENDABLE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content, options = MENDABLE[name]
    damaged = bytearray(content.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged)))
        length = data.draw(st.integers(0, 3))
        damaged[place : place + length] = data.draw(st.sampled_from(DAMAGE) | st.binary(max_size=3))
    try:
        sequences = read_text(
            tmp_path, name, gzip.compress(damaged) if name.endswith(".gz") else bytes(damaged), **options
        )
    except DataError as refusal:
        message = str(refusal)
    else:
        message = "read"
        assert all(np.isfinite(steps).all() for steps in sequences.steps)
        assert len({len(each) for each in (sequences.ids, sequences.steps, sequences.labels)}) == 1
        assert all(symbol for steps in sequences.symbols for step in steps for symbol in step)
    assert message == "read" or message.startswith(str(tmp_path / name))
    assert "\n" not in message
