"""A finished run in use: its answers are the model's, files are whole or not there, a bad line does no harm."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

from throughtime.errors import DataError, ThroughtimeError
from throughtime.runs import serve as serving
from throughtime.runs.configuration import Config
from throughtime.runs.fit import fit
from throughtime.runs.folder import FinishedRun
from throughtime.runs.streaming import LONGEST_LINE, Streams, serve
from throughtime.tasks.classes import ClassAnswer, ClassScore

SMALL: dict[str, Any] = {"hidden_size": 8, "epochs": 12, "batch_size": 8, "learning_rate": 0.03}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`signs.csv`: is the first pitch of 2 to 6 above 0? `words.conll`: tags decided by the word before."""
    folder = tmp_path_factory.mktemp("serving")
    draw = np.random.default_rng(2)
    rows = ["id,t,label,pitch,gain"]
    for number in range(60):
        values = draw.normal(size=(2 + number % 5, 2)).round(4)
        label = "up" if values[0, 0] > 0 else "down"
        rows += [f"s{number:02},{t},{label},{x},{y}" for t, (x, y) in enumerate(values)]
    (folder / "signs.csv").write_text("\n".join(rows) + "\n")
    sentences = []
    for _ in range(40):
        words = ["the", *draw.choice(["dog", "saw", "runs"], size=draw.integers(2, 6))]
        tags = ["D", *("N" if before == "the" else "V" for before in words[:-1])]
        sentences.append("\n".join(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)))
    (folder / "words.conll").write_text("\n\n".join(sentences) + "\n")
    return folder


@pytest.fixture(scope="module")
def classifier(folder: Path) -> FinishedRun:
    columns = {"sequence_id": "id", "target": "label", "time": "t"}
    return fit(Config.resolve({"file": str(folder / "signs.csv"), "run": folder / "signs", **columns, **SMALL}))


@pytest.fixture(scope="module")
def tagger(folder: Path) -> FinishedRun:
    options = {"file": str(folder / "words.conll"), "task": "tag", "run": folder / "words", "num_layers": 2, **SMALL}
    return fit(Config.resolve(options))


def predicted(run: FinishedRun, file: Path) -> serving.Predictions:
    return serving.predict(run, serving.read_for(run, str(file), labelled=False))


def shares_of(answers: serving.Predictions) -> Any:
    """The probabilities of sequences that are answered once: [sequences, classes]."""
    return np.stack([answer.shares for answer in answers.answers if isinstance(answer, ClassAnswer)])


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_file_gets_the_answers_of_the_model_wherever_they_are_written(
    classifier: FinishedRun, folder: Path, tmp_path: Path
) -> None:
    answers = predicted(classifier, folder / "signs.csv")
    part = classifier.encoder.part(serving.read_for(classifier, str(folder / "signs.csv"), labelled=True))
    logits = torch.cat([classifier.model(part.batch([i])) for i in range(len(part))])
    assert np.allclose(shares_of(answers), logits.softmax(-1).detach().numpy(), atol=1e-6)
    for suffix in serving.WRITTEN:
        serving.write(answers, tmp_path / f"answers{suffix}")
    as_csv = pd.read_csv(tmp_path / "answers.csv")
    as_parquet = pd.read_parquet(tmp_path / "answers.parquet")
    as_lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert list(as_csv) == list(as_parquet) == ["id", "label", "p(down)", "p(up)"]
    assert as_csv["id"].tolist() == as_parquet["id"].tolist() == [line["id"] for line in as_lines] == list(answers.ids)
    assert as_csv["label"].tolist() == as_parquet["label"].tolist() == [line["label"] for line in as_lines]
    for table in (as_csv, as_parquet):
        assert np.array_equal(table[["p(down)", "p(up)"]].to_numpy(np.float32), shares_of(answers))
    assert [line["probabilities"]["up"] for line in as_lines] == as_csv["p(up)"].tolist()
    assert (as_csv["label"] == np.where(as_csv["p(up)"] > 0.5, "up", "down")).all()


def test_tags_are_written_a_row_a_step_or_a_line_a_sequence(tagger: FinishedRun, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.conll"
    file.write_text("the\ndog\n\nthe\nzebra\nruns\n")
    answers = predicted(tagger, file)
    serving.write(answers, tmp_path / "tags.csv")
    with (tmp_path / "tags.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["1", "2", "1", "2", "3"]
    assert [row["label"] for row in rows] == ["D", "N", "D", "N", "V"]
    lines = [json.loads(line) for line in serving.as_jsonl(answers).splitlines()]
    assert [line["labels"] for line in lines] == [["D", "N"], ["D", "N", "V"]]
    assert [len(line["probabilities"]["D"]) for line in lines] == [2, 3]
    assert any("1 of 5 symbols" in notice and "read as unknown" in notice for notice in answers.notices)


def test_the_labels_of_a_file_to_predict_are_not_looked_at(
    classifier: FinishedRun, folder: Path, tmp_path: Path
) -> None:
    text = (folder / "signs.csv").read_text()
    (tmp_path / "wrong.csv").write_text(text.replace(",up,", ",?,"))
    without = pd.read_csv(folder / "signs.csv").drop(columns="label")
    without.to_csv(tmp_path / "without.csv", index=False)
    files = (folder / "signs.csv", tmp_path / "wrong.csv", tmp_path / "without.csv")
    shares = [shares_of(predicted(classifier, file)) for file in files]
    assert np.array_equal(shares[0], shares[1])
    assert np.array_equal(shares[0], shares[2])


def test_json_lines_are_read_in_the_order_of_the_training_and_that_is_said(
    classifier: FinishedRun, folder: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(folder / "signs.csv")
    lines = [
        json.dumps({"id": name, "x": rows[["pitch", "gain"]].to_numpy().tolist()}) for name, rows in table.groupby("id")
    ]
    (tmp_path / "signs.jsonl").write_text("\n".join(lines))
    found, expected = predicted(classifier, tmp_path / "signs.jsonl"), predicted(classifier, folder / "signs.csv")
    assert found.ids == expected.ids
    assert np.array_equal(shares_of(found), shares_of(expected))
    assert any("in the order of the training: 'pitch', 'gain'" in notice for notice in found.notices)


def test_columns_may_be_called_otherwise_if_they_are_named(
    classifier: FinishedRun, folder: Path, tmp_path: Path
) -> None:
    pd.read_csv(folder / "signs.csv").rename(columns={"id": "name"}).to_csv(tmp_path / "renamed.csv", index=False)
    file = str(tmp_path / "renamed.csv")
    with pytest.raises(DataError, match="no column 'id'"):
        serving.read_for(classifier, file, labelled=False)
    found = serving.read_for(classifier, file, labelled=False, columns={"sequence_id": "name"})
    assert len(found) == 60


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("new.csv", {"hue": 1}, "column 'hue': was not in training; remove it"),
        ("new.csv", {"gain": None}, "no feature column 'gain', which was in training"),
        ("new.csv", {"gain": "loud"}, "'loud' is not a number"),
        ("new.csv", {"gain": 1e300}, "too wide for float32"),
    ],
)
def test_a_file_of_other_columns_is_refused(
    name: str, columns: dict[str, Any], expected: str, classifier: FinishedRun, folder: Path, tmp_path: Path
) -> None:
    table = pd.read_csv(folder / "signs.csv").assign(**columns).dropna(axis=1)
    table.to_csv(tmp_path / name, index=False)
    with pytest.raises(DataError, match=expected):
        predicted(classifier, tmp_path / name)


def test_nothing_is_ever_replaced(classifier: FinishedRun, folder: Path, tmp_path: Path) -> None:
    answers, taken = predicted(classifier, folder / "signs.csv"), tmp_path / "taken.csv"
    taken.write_text("mine")
    (tmp_path / "link.csv").symlink_to("nowhere")
    for path in (taken, tmp_path / "link.csv"):
        with pytest.raises(ThroughtimeError, match="exists already, and nothing is ever replaced"):
            serving.write(answers, path)
        with pytest.raises(ThroughtimeError, match="exists already"):  # taken only after the first look
            serving.write_new(path, b"theirs")
    assert taken.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "taken.csv"]


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ThroughtimeError, match="cannot be written \\(No space left on device\\)"):
        serving.write_new(tmp_path / "answers.csv", b"half")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_hard_links_keeps_what_is_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    serving.write_new(tmp_path / "answers.csv", b"whole")
    with pytest.raises(ThroughtimeError, match="exists already"):
        serving.write_new(tmp_path / "answers.csv", b"theirs")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.xlsx", "written as .jsonl or .csv or .parquet"), ("nowhere/a.csv", "no such directory")],
)
def test_where_answers_cannot_go_is_refused_before_any_work(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ThroughtimeError, match=expected):
        serving.refuse_output(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_the_scores_are_those_of_scikit_learn(classifier: FinishedRun, folder: Path, tmp_path: Path) -> None:
    table = pd.read_csv(folder / "signs.csv")
    table[table["id"] < "s40"].to_csv(tmp_path / "some.csv", index=False)
    found = serving.evaluate(classifier, str(tmp_path / "some.csv"))
    answers = predicted(classifier, tmp_path / "some.csv")
    true = table[table["id"] < "s40"].groupby("id")["label"].first().tolist()
    said = [record["label"] for record in answers.records()]
    score = found.score
    assert isinstance(score, ClassScore)
    assert score.confusion.tolist() == confusion_matrix(true, said, labels=score.classes).tolist()
    precision, recall, _, counts = precision_recall_fscore_support(true, said, labels=score.classes)
    assert list(score.by_class()) == list(zip(score.classes, counts, recall, precision, strict=True))
    shares = shares_of(answers).astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)  # scikit-learn wants more digits than float32 has
    assert found.score.loss == pytest.approx(log_loss(true, shares), rel=1e-5)
    assert score.commonest == max(((label, true.count(label) / 40) for label in score.classes), key=lambda row: row[1])
    assert json.loads(json.dumps(found.record()))["accuracy"] == score.headline


@pytest.mark.parametrize(("name", "file"), [("classifier", "signs.csv"), ("tagger", "words.conll")])
def test_on_the_data_of_the_run_its_test_part_alone_counts(
    name: str, file: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(name)
    found = serving.evaluate(run, str(folder / file))
    assert (found.score.headline, found.score.count) == (run.result["score"], run.result["count"])
    assert found.score.loss == pytest.approx(run.result["loss"])
    assert found.notices[0].startswith("the run was made from this: only its test part counts")


def test_a_label_that_training_did_not_have_is_refused(classifier: FinishedRun, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text((folder / "signs.csv").read_text().replace(",up,", ",level,"))
    with pytest.raises(DataError, match="'level'"):
        serving.evaluate(classifier, str(tmp_path / "new.csv"))


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def streams(run: FinishedRun, **options: Any) -> Streams:
    return Streams(run.model, run.encoder, **options)


def answer(open_streams: Streams, line: Any) -> dict[str, Any]:
    said = open_streams.answer(line if isinstance(line, bytes) else json.dumps(line).encode())
    assert said is not None
    assert said.endswith(b"\n")
    assert said.count(b"\n") == 1
    result: dict[str, Any] = json.loads(said)
    return result


def test_interleaved_streams_say_what_predict_says(classifier: FinishedRun, folder: Path) -> None:
    expected = {line["id"]: line for line in predicted(classifier, folder / "signs.csv").records()}
    table = pd.read_csv(folder / "signs.csv").sort_values(["t", "id"])  # all first steps, then all second ones, ...
    open_streams, last = streams(classifier), {}
    for row in table.itertuples():
        last[row.id] = answer(open_streams, {"id": row.id, "x": {"gain": row.gain, "pitch": row.pitch}})
    assert last.keys() == expected.keys()
    for name, said in last.items():
        assert said["label"] == expected[name]["label"]
        assert said["probabilities"] == pytest.approx(expected[name]["probabilities"], abs=1e-6)
        assert said["step"] == (table["id"] == name).sum()


def test_a_tagger_streams_its_tags_and_names_what_it_does_not_know(tagger: FinishedRun) -> None:
    open_streams = streams(tagger)
    said = [answer(open_streams, {"id": 1, "x": [word]}) for word in ("the", "zebra", "runs")]
    assert [each["label"] for each in said] == ["D", "N", "V"]
    assert [each.get("unknown") for each in said] == [None, list(tagger.encoder.symbol_columns), None]


GOOD = {"id": "a", "x": [0.5, -1.0]}

BAD: list[tuple[Any, str]] = [
    (b"nonsense", "the line is not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[" * 100_000, "the line is not JSON"),
    (b"7", "not a JSON object"),
    ({"x": [1, 2]}, 'needs an "id"'),
    ({"id": 1.5, "x": [1, 2]}, 'needs an "id"'),
    ({"id": True, "x": [1, 2]}, 'needs an "id"'),
    (b'{"id": "\\ud800", "x": [1, 2]}', 'needs an "id"'),
    (b'{"id": "a", "id": "b", "x": [1, 2]}', "given twice"),
    ({"id": "a"}, 'needs an "x"'),
    ({"id": "a", "x": 1}, 'needs an "x"'),
    ({"id": "a", "x": [1]}, "1 values where a step has 2: 'pitch', 'gain'"),
    ({"id": "a", "x": [1, 2], "gain": 3}, "'gain' is not an entry of a line"),
    ({"id": "a", "x": {"pitch": 1}}, "column 'gain' is missing"),
    ({"id": "a", "x": {"pitch": 1, "gain": 2, "hue": 3}}, "column 'hue' was not in training"),
    ({"id": "a", "x": ["1", 2]}, "column 'pitch': '1' is not a finite number"),
    (b'{"id": "a", "x": [NaN, 1]}', "NaN is not a finite number"),
    (b'{"id": "a", "x": [1' + b"0" * 400 + b", 1]}", "is not a finite number"),
    ({"id": "a", "x": [1e300, 1]}, "out of float32's range"),
    ({"id": "b", "end": True}, "there is no sequence 'b' to end"),
    ({"id": "a", "end": "yes"}, '"end" is true'),
    ({"id": "a", "end": True, "x": [1, 2]}, '"end" is true'),
]


@pytest.mark.parametrize(("line", "expected"), BAD)
def test_a_bad_line_is_answered_with_its_cause_and_leaves_every_state(
    line: Any, expected: str, classifier: FinishedRun
) -> None:
    disturbed, undisturbed = streams(classifier), streams(classifier)
    for open_streams in (disturbed, undisturbed):
        answer(open_streams, GOOD)
    said = answer(disturbed, line)
    assert said["line"] == 2
    assert expected in said["error"]
    assert len(disturbed) == 1
    assert answer(disturbed, GOOD) == answer(undisturbed, GOOD)


def test_an_answer_that_is_not_a_number_leaves_the_state_too(classifier: FinishedRun) -> None:
    open_streams, undisturbed = streams(classifier), streams(classifier)
    for each in (open_streams, undisturbed):
        answer(each, GOOD)
    weight = classifier.model.readout.linear.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.inf)
    assert "the answer is not a number" in answer(open_streams, GOOD)["error"]
    with torch.no_grad():
        weight.copy_(kept)
    assert answer(open_streams, GOOD) == answer(undisturbed, GOOD)


def test_an_id_that_ends_begins_anew(classifier: FinishedRun) -> None:
    open_streams = streams(classifier)
    first = answer(open_streams, GOOD)
    assert answer(open_streams, GOOD)["probabilities"] != first["probabilities"]
    assert answer(open_streams, {"id": "a", "end": True}) == {"id": "a", "step": 2, "end": True}
    assert answer(open_streams, GOOD) == first
    assert answer(open_streams, {**GOOD, "id": 1})["step"] == answer(open_streams, {**GOOD, "id": "1"})["step"] == 1


def test_beyond_the_bound_a_new_id_is_refused(classifier: FinishedRun) -> None:
    open_streams = streams(classifier, most=2)
    for name in "ab":
        answer(open_streams, {**GOOD, "id": name})
    assert "2 sequences are open, as many as were allowed" in answer(open_streams, {**GOOD, "id": "c"})["error"]
    assert answer(open_streams, GOOD)["step"] == 2
    answer(open_streams, {"id": "b", "end": True})
    assert answer(open_streams, {**GOOD, "id": "c"})["step"] == 1


def test_or_the_one_silent_for_longest_is_forgotten_and_named(classifier: FinishedRun) -> None:
    open_streams = streams(classifier, most=2, when_full="forget")
    for name in "aba":
        answer(open_streams, {**GOOD, "id": name})
    assert "forgotten" not in answer(open_streams, GOOD)
    bad = answer(open_streams, {"id": "c", "x": [1]})
    assert ("error" in bad, "forgotten" in bad, len(open_streams)) == (True, False, 2)
    assert answer(open_streams, {**GOOD, "id": "c"})["forgotten"] == "b"
    assert len(open_streams) == 2
    assert answer(open_streams, GOOD)["step"] == 4


def test_a_step_reads_no_earlier_one_again_and_keeps_no_more(
    classifier: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(classifier.model), "forward", None)  # what reads whole sequences
    open_streams = streams(classifier)
    sizes = []
    for _ in range(50):
        answer(open_streams, GOOD)
        state = open_streams._open["a"].state
        sizes.append(sum(each.untyped_storage().nbytes() for each in (state if isinstance(state, tuple) else (state,))))
    assert set(sizes) == {open_streams.state_bytes}


def test_lines_are_answered_one_by_one_and_one_too_long_is_not_kept(classifier: FinishedRun) -> None:
    sent: list[int] = []

    class Outgoing(io.BytesIO):
        def flush(self) -> None:
            sent.append(incoming.tell())

    good = json.dumps(GOOD).encode() + b"\n"
    incoming, outgoing = io.BytesIO(good + b"\n" + b"x" * (2 * LONGEST_LINE) + b"\n" + good[:-1]), Outgoing()
    serve(streams(classifier), incoming, outgoing)
    said = [json.loads(line) for line in outgoing.getvalue().splitlines()]
    assert [each.get("step") for each in said] == [1, None, 2]
    assert said[1] == {"line": 3, "error": "the line is longer than 1,048,576 bytes; give one step a line"}
    assert sent[0] == len(good), "the first answer is sent before the second line is read"


def test_a_model_that_reads_both_ways_cannot_stream(classifier: FinishedRun) -> None:
    from throughtime.tasks.model import Architecture, build

    shape = Architecture.fitting(classifier.encoder, hidden_size=3, bidirectional=True)
    with pytest.raises(ThroughtimeError, match="reads a sequence from its end too"):
        Streams(build(classifier.model.recurrent.cell, shape, seed=0), classifier.encoder)
