"""submit.csv mirrors sample_submit, with the predicted label ids; the files beside it."""

import csv
import dataclasses
import json
import os
import time

import pytest
import torch
from helpers import put_audio

from stemgenre.data.competition import load_competition
from stemgenre.submission import Summary, write_probabilities, write_submission
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.members import Member, MemberResult, combine


def result_of(competition, valid, valid_logits, test_logits, state=None):
    """The MemberResult of a run's only network, made up."""
    train = competition.train.drop(valid.index)
    member = Member("", 1, None, train, valid, {})
    return MemberResult(member, state or TrainState(), valid_logits, test_logits)


def predictions_of(competition, result):
    return combine([result], test_targets=competition.test["target"].to_numpy())


IDS = {"blues": 7, "jazz": 0, "rock": 42}
PREDICTED = {"test_0.wav": 42, "test_2.wav": 0, "test_10.wav": 7}


@pytest.fixture
def data(tmp_path):
    """A competition with three test clips, without a sample_submit."""
    put_audio(*(tmp_path / "train_sound" / f"train_{n}.wav" for n in range(3)))
    put_audio(*(tmp_path / "test_sound" / name for name in PREDICTED))
    labels = "".join(f"{name},{label_id}\n" for name, label_id in IDS.items())
    (tmp_path / "label_master.csv").write_text("label_name,label_id\n" + labels)
    (tmp_path / "train_master.csv").write_text(
        "file_name,label_id\ntrain_0.wav,7\ntrain_1.wav,0\ntrain_2.wav,42\n"
    )
    return tmp_path


def load(folder):
    return load_competition(folder, num_classes=3, cache_dir=folder / "separated")


def submit(folder):
    """The bytes of the submission for PREDICTED."""
    competition = load(folder)
    names = competition.test["file_name"]
    predicted = [competition.label_ids.index(PREDICTED[name]) for name in names]
    write_submission(folder / "out" / "submit.csv", competition, predicted)
    return (folder / "out" / "submit.csv").read_bytes().decode()


@pytest.mark.parametrize(
    ("name", "sample", "expected"),
    [
        (
            "sample_submit.tsv",
            "test_2.wav\t0\ntest_0.wav\t0\ntest_10.wav\t0\n",
            "test_2.wav\t0\ntest_0.wav\t42\ntest_10.wav\t7\n",
        ),
        ("sample_submit.csv", "test_10.wav,3\ntest_2.wav,3\n", "test_10.wav,7\ntest_2.wav,0\n"),
        ("sample_submit.csv", "test_10.wav;3\ntest_2.wav;3\n", "test_10.wav;7\ntest_2.wav;0\n"),
        ("sample_submit.csv", "test_10.wav\t3\n", "test_10.wav\t7\n"),
        ("sample_submit.csv", "test_10.wav\ntest_2.wav\n", "test_10.wav,7\ntest_2.wav,0\n"),
        ("sample_submit.tsv", "file\ntest_2.wav\n", "file\tlabel_id\ntest_2.wav\t0\n"),
        (
            "sample_submit.csv",
            "test_0.wav,1\r\ntest_2.wav,1\r\n",
            "test_0.wav,42\r\ntest_2.wav,0\r\n",
        ),
        (
            "sample_submit.csv",
            "File Name,Genre\ntest_0.wav,1\n",
            "File Name,Genre\ntest_0.wav,42\n",
        ),
        ("sample_submit.csv", "0,test_2.wav,1\n1,test_0.wav,1\n",
         "0,test_2.wav,0\n1,test_0.wav,42\n"),
        ("sample_submit.csv", "label_id,file\n9,test_0.wav\n", "label_id,file\n42,test_0.wav\n"),
        (
            "sample_submit.csv",
            'file,label_id,note\ntest_0.wav,1,"a, b"\n',
            'file,label_id,note\ntest_0.wav,42,"a, b"\n',
        ),
        (
            "sample_submit.csv",
            "id,file_name,Label,confidence\n0,test_0.wav,1,0.5\n",
            "id,file_name,Label,confidence\n0,test_0.wav,42,0.5\n",
        ),
        ("sample_submit.csv", "test_0.wav,1\ntest_0.wav,1\n", "test_0.wav,42\ntest_0.wav,42\n"),
        ("sample_submit.csv", "test_0.wav,rock\ntest_2.wav,rock\n",
         "test_0.wav,rock\ntest_2.wav,jazz\n"),
        (
            "sample_submit.csv",
            "test_sound/test_0.wav,1\ntest_sound/test_2.wav,1\n",
            "test_sound/test_0.wav,42\ntest_sound/test_2.wav,0\n",
        ),
    ],
)  # fmt: skip
def test_the_submission_mirrors_sample_submit(data, monkeypatch, name, sample, expected):
    monkeypatch.setitem(PREDICTED, "test_sound/test_0.wav", 42)
    monkeypatch.setitem(PREDICTED, "test_sound/test_2.wav", 0)
    (data / name).write_bytes(sample.encode())
    assert submit(data) == expected


def test_the_column_of_the_predictions_is_named_where_no_name_tells_it(data, caplog):
    (data / "sample_submit.csv").write_text("file,answer,note\ntest_0.wav,1,x\n")
    assert submit(data) == "file,answer,note\ntest_0.wav,1,42\n"
    assert "sample_submit.csv has no column label_id or label" in caplog.text
    assert "the predictions replace its last one, note" in caplog.text


def test_genres_whose_names_are_numbers_are_submitted_by_their_ids(data):
    (data / "label_master.csv").write_text("label_name,label_id\n42,7\n7,0\n0,42\n")
    (data / "sample_submit.csv").write_text("test_0.wav,0\ntest_2.wav,7\n")
    assert submit(data) == "test_0.wav,42\ntest_2.wav,0\n"


def test_without_sample_submit_all_clips_are_in_natural_order(data):
    assert submit(data) == "test_0.wav,42\ntest_2.wav,0\ntest_10.wav,7\n"


def test_two_test_clips_with_the_same_name_have_a_row_each(tmp_path):
    places = ["rock/1.wav", "blues/1.wav", "test/a/1.wav", "test/b/1.wav"]
    put_audio(*(tmp_path / place for place in places))
    competition = load_competition(tmp_path, num_classes=2, cache_dir=tmp_path / "separated")
    write_submission(tmp_path / "submit.csv", competition, [0, 1])
    assert (tmp_path / "submit.csv").read_text() == "test/a/1.wav,0\ntest/b/1.wav,1\n"


def test_a_name_that_is_not_utf8_is_written_as_it_is(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    put_audio(*(tmp_path / place for place in ("rock/1.wav", "blues/1.wav")))
    put_audio(tmp_path / "test" / "cafe.wav")
    (tmp_path / "test" / "cafe.wav").rename(tmp_path / "test" / name)
    competition = load_competition(tmp_path, num_classes=2, cache_dir=tmp_path / "separated")
    write_submission(tmp_path / "submit.csv", competition, [1])
    assert (tmp_path / "submit.csv").read_bytes() == b"caf\xe9.wav,1\n"
    valid = competition.train[:1]
    result = result_of(competition, valid, torch.zeros(1, 2), torch.zeros(1, 2))
    write_probabilities(tmp_path, competition, predictions_of(competition, result))
    rows = (tmp_path / "test_probabilities.csv").read_bytes().splitlines()
    assert rows[1].startswith(b"caf\xe9.wav,0.5")


def test_without_test_clips_there_is_no_submission(tmp_path, caplog):
    put_audio(*(tmp_path / place for place in ("rock/1.wav", "blues/1.wav")))
    competition = load_competition(tmp_path, num_classes=2, cache_dir=tmp_path / "separated")
    (tmp_path / "submit.csv").write_text("of an earlier run")
    write_submission(tmp_path / "submit.csv", competition, [])
    assert not (tmp_path / "submit.csv").exists()
    assert "no test clips" in caplog.text


def test_a_wrong_number_of_predictions_is_an_error(data):
    with pytest.raises(ValueError, match="zip"):
        write_submission(data / "submit.csv", load(data), [0, 1])
    assert not (data / "submit.csv").exists()


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("sample", ["test_2.wav,0\ntest_10.wav,0\ntest_2.wav,0\n", None])
def test_probabilities_are_in_the_order_of_the_submission(data, sample):
    names = ["test_0.wav", "test_2.wav", "test_10.wav"]
    if sample:
        (data / "sample_submit.csv").write_text(sample)
        names = ["test_2.wav", "test_10.wav", "test_2.wav"]
    competition = load(data)
    competition.label_names[0] = 'jazz, "cool"'
    order = competition.test["file_name"].tolist()
    logits = torch.tensor([[0.0, 0.0, PREDICTED[name]] for name in order])
    valid = competition.train[1:]
    result = result_of(competition, valid, torch.eye(3)[[2, 1]].log(), logits)
    write_probabilities(data, competition, predictions_of(competition, result))
    header, *rows = read(data / "test_probabilities.csv")
    assert header == ["file_name", 'jazz, "cool"', "blues", "rock"]
    assert [row[0] for row in rows] == names
    for name, *probabilities in rows:
        expected = torch.tensor([0.0, 0.0, PREDICTED[name]]).softmax(0).tolist()
        assert [float(text) for text in probabilities] == pytest.approx(expected, abs=1e-6)
    assert read(data / "valid_predictions.csv") == [
        ["file_name", "label", "predicted", 'jazz, "cool"', "blues", "rock"],
        ["train_1.wav", 'jazz, "cool"', "rock", "0.000000", "0.000000", "1.000000"],
        ["train_2.wav", "rock", "blues", "0.000000", "1.000000", "0.000000"],
    ]


def test_the_table_of_an_earlier_run_with_folds_does_not_stay_beside_another(data):
    competition, older = load(data), data / "oof_predictions.csv"
    older.write_text("of an earlier run")
    result = result_of(competition, competition.train[:1], torch.zeros(1, 3), torch.zeros(3, 3))
    write_probabilities(data, competition, predictions_of(competition, result))
    assert (data / "valid_predictions.csv").is_file()
    assert not older.exists()


def test_without_test_clips_their_table_of_probabilities_has_no_rows(data):
    competition = load(data)
    without_test = dataclasses.replace(competition, test=competition.test[:0])
    logits = torch.zeros(1, 3), torch.empty(0, 3)
    result = result_of(without_test, competition.train[:1], *logits)
    write_probabilities(data, without_test, predictions_of(without_test, result))
    assert read(data / "test_probabilities.csv") == [["file_name", "jazz", "blues", "rock"]]


@pytest.mark.parametrize(
    ("test_labels", "accuracy"),
    [
        ("", None),
        ("test_0.wav,42\ntest_2.wav,0\ntest_10.wav,7\n", 2 / 3),
        ("test_2.wav,0\n", 1.0),
        ("test_10.wav,7\n", 0.0),
    ],
)
def test_the_summary_has_the_results_of_the_run(data, test_labels, accuracy):
    if test_labels:
        (data / "test_master.csv").write_text("file_name,label_id\n" + test_labels)
    competition, summary = load(data), Summary()
    with summary.stage("training"):
        pass
    state = TrainState(epoch=5, best_epoch=3, best_accuracy=0.75, best_loss=0.5)
    logits = torch.eye(3)[[2, 0, 2]]  # label ids 42, 0, 42: wrong for test_10
    result = result_of(competition, competition.train[:1], torch.eye(3)[[0]], logits, state)
    predictions = predictions_of(competition, result)
    summary.write(data / "summary.json", competition, [result], predictions)
    found = json.loads((data / "summary.json").read_text())
    assert found.pop("seconds").keys() == {"training"}
    assert found.pop("test_accuracy") == (accuracy and pytest.approx(accuracy))
    assert found == {
        "best_epoch": 3,
        "epochs": 5,
        "valid_accuracy": 0.75,
        "valid_loss": 0.5,
        "clips": {"train": 2, "valid": 1, "test": 3},
    }


def test_the_seconds_of_all_networks_add_up():
    summary = Summary()
    for _ in range(3):
        with summary.stage("training"):
            time.sleep(0.01)
    assert summary.seconds["training"] >= 0.03
