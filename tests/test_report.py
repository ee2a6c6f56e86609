"""The page of a run, opened in a browser: while the run continues, at its end, and in bad luck."""

import csv
import dataclasses
import importlib.metadata
import subprocess
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from browser import open_page
from helpers import SMALL_RUN, copy_music, put_audio, put_table, run_training
from sklearn.calibration import calibration_curve
from sklearn.metrics import classification_report

from stemgenre import cli
from stemgenre.data.competition import load_competition
from stemgenre.features.log_mel import Frontend
from stemgenre.report import metrics, report
from stemgenre.report.report import Report
from stemgenre.runtime import start_runtime
from stemgenre.settings import load_settings
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.inference import LoadedModel

GENRES = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "R&B $\\frac$ 演歌")
HOSTILE_FILE = "<img src=x onerror=alert(2)> & \"'.wav"


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """The output folder of a run of two epochs, where a killed run had left half a page."""
    out = tmp_path_factory.mktemp("finished")
    (out / "report").mkdir()
    (out / "report" / ".index.html.123.0123abcd.part").write_text("half")
    settings = load_settings([*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}"])
    return run_training(settings, with_report=True)


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_of_a_finished_run_is_complete(finished, browser, dark):
    opened = open_page(browser, finished / "report" / "index.html", dark=dark)
    assert opened.problems() == []
    rows = pd.read_csv(finished / "metrics.csv")
    for text in (
        f"{100 * rows['valid_accuracy'].max():.1f} %", "after 2 of 2 epochs", "Curves",
        "Confusion matrix: best epoch", "precision", "Expected calibration error",
        "Most confident errors", "Test clips", "IMG_SIZE\t64\t600", "BATCH_SIZE\t8\t24",
        "settings_used.py", f"torch\t{importlib.metadata.version('torch')}",
    ):  # fmt: skip
        assert text in opened.text, text
    assert "WEIGHT_DECAY" not in opened.text, "it has its default"
    errors = min(8, count_errors(finished))
    assert errors, "two epochs cannot have taught it everything"
    assert opened.text.count(": true ") == errors
    assert len(opened.alts) == 5 + errors
    assert len(opened.durations) == 5 * errors
    assert all(1.5 < seconds < 2.5 for seconds in opened.durations), "clips of 2 s"


def count_errors(out):
    table = pd.read_csv(out / "valid_predictions.csv")
    return int((table["label"] != table["predicted"]).sum())


@pytest.fixture(scope="module")
def music_run(tmp_path_factory, fast_repo):
    """(DATA_DIR, OUTPUT_DIR) of a run on 3 s of the real clips, separated by a tiny Demucs."""
    folder = tmp_path_factory.mktemp("real")
    data, out = copy_music(folder / "music"), folder / "out"
    for path in data.rglob("*.au"):
        wave, rate = soundfile.read(path, stop=3 * soundfile.info(path).samplerate)
        soundfile.write(path, wave, rate)
    overrides = [f"DATA_DIR={data}", f"OUTPUT_DIR={out}", f"SEPARATION_REPO={fast_repo}"]
    overrides += ["DEVICE=cpu", "PRETRAINED=False", "IMG_SIZE=64", "EPOCHS=2", "BATCH_SIZE=4"]
    overrides += ["SEPARATION_OVERLAP=0"]
    run_training(load_settings(overrides), with_report=True)
    return data, out


def test_real_recordings_are_separated_trained_on_and_submitted(music_run):
    data, out = music_run
    lines = (out / "submit.csv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"test_{i}.au" for i in range(6)]
    assert len(list((data / "separated").glob("*.npz"))) == 23
    assert len(pd.read_csv(out / "metrics.csv")) == 2


def test_the_page_of_real_recordings_is_complete(music_run, browser):
    _, out = music_run
    opened = open_page(browser, out / "report" / "index.html")
    assert opened.problems() == []
    assert len(opened.durations) == 5 * count_errors(out) > 0
    assert all(seconds > 2.5 for seconds in opened.durations)


def test_a_phone_shows_the_page_without_scrolling_sideways(finished, browser):
    assert open_page(browser, finished / "report" / "index.html", width=390).problems() == []


def test_nothing_else_is_left_in_its_folder(finished):
    assert [path.name for path in (finished / "report").iterdir()] == ["index.html"]


def test_the_predictions_are_those_of_the_best_model(finished):
    valid = pd.read_csv(finished / "valid_predictions.csv")
    rows = pd.read_csv(finished / "metrics.csv")
    accuracy = (valid["label"] == valid["predicted"]).mean()
    assert accuracy == pytest.approx(rows["valid_accuracy"].max())
    probabilities = valid.iloc[:, 3:]
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    assert (probabilities.idxmax(axis=1) == valid["predicted"]).all()
    loss = -np.log([row[row["label"]] for _, row in valid.iterrows()]).mean()
    best = rows.sort_values(["valid_accuracy", "valid_loss"], ascending=[False, True]).iloc[0]
    assert loss == pytest.approx(best["valid_loss"], abs=1e-3)


def test_classification_report_is_scikit_learns(finished):
    valid = pd.read_csv(finished / "valid_predictions.csv")
    table = pd.read_csv(finished / "classification_report.csv", index_col="genre")
    expected = pd.DataFrame(
        classification_report(
            valid["label"], valid["predicted"], output_dict=True, zero_division=np.nan
        )
    ).T.loc[table.index]
    expected.columns = table.columns
    pd.testing.assert_frame_equal(table, expected, check_dtype=False, check_names=False)
    assert table["support"].sum() == len(valid)


def test_the_test_clips_probabilities_are_those_of_the_submission(finished, small_data):
    probabilities = pd.read_csv(finished / "test_probabilities.csv")
    submitted = list(csv.reader((finished / "submit.csv").open(), delimiter="\t"))
    assert probabilities["file_name"].tolist() == [name for name, _ in submitted]
    ids = pd.read_csv(small_data / "label_master.tsv", sep="\t").set_index("label_name")["label_id"]
    predicted = probabilities.iloc[:, 1:].idxmax(axis=1).map(ids)
    assert predicted.tolist() == [int(label) for _, label in submitted]


@pytest.fixture
def hostile(tmp_path, small_settings):
    """A Report of made-up results over three genres with hostile names, and its TrainState."""
    files = [*(f"{number}.wav" for number in range(8)), HOSTILE_FILE]
    put_audio(*(tmp_path / "data" / name for name in [*files, "test.wav"]))
    rows = [(f'"{name.replace(chr(34), chr(34) * 2)}"', i % 3) for i, name in enumerate(files)]
    put_table(tmp_path / "data" / "train_master.tsv", [("file_name", "label_id"), *rows])
    labels = [(f'"{genre.replace(chr(34), chr(34) * 2)}"', i) for i, genre in enumerate(GENRES)]
    put_table(tmp_path / "data" / "label_master.tsv", [("label_name", "label_id"), *labels])
    competition = load_competition(
        tmp_path / "data", num_classes=3, cache_dir=tmp_path / "separated"
    )
    assert competition.label_names == list(GENRES)
    settings = small_settings("SEPARATION_MODEL=<b>bold</b>")
    row = dict.fromkeys(
        ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds"), 0.5
    )
    history = [row | {"epoch": 1, "learning_rate": 1e-4}]
    state = TrainState(epoch=1, history=history, best_epoch=1, best_accuracy=0.5, best_loss=1)
    valid = competition.train[::2]  # the last of them is HOSTILE_FILE
    with start_runtime(settings.machine) as runtime:
        yield Report(settings, competition, competition.train, valid, runtime), state


def logits(clips=5):
    return torch.randn(clips, 3, generator=torch.Generator().manual_seed(0))


def test_hostile_names_are_text_on_the_page_of_a_running_training(hostile, browser):
    page, state = hostile
    page.update(state, logits())
    opened = open_page(browser, page.path)
    assert opened.problems() == []
    assert all(name in opened.text for name in GENRES)
    assert "'<b>bold</b>'" in opened.text
    assert "Confusion matrix: epoch 1" in opened.text
    assert opened.scripts == 0
    assert 'http-equiv="refresh"' in page.path.read_text()


def test_hostile_names_are_text_on_the_page_of_a_finished_training(hostile, browser):
    page, state = hostile
    features = page.settings.features
    frontend = Frontend(
        features, device=torch.device("cpu"), channel_stats=[[-40.0] * 4, [9.0] * 4]
    )
    best = LoadedModel(None, frontend, [0, 1, 2], list(GENRES), None)
    loader = SimpleNamespace(
        read=lambda clip, section: torch.rand(4, features.sr)[:, slice(*section(features.sr))] - 0.5
    )
    wrong = torch.zeros(5, 3)
    wrong[range(5), (page.valid["target"].to_numpy() + 1) % 3] = 2.0
    (page.valid["path"].iloc[0]).unlink()
    page.finish(state, best, loader, wrong, logits(1))
    opened = open_page(browser, page.path)
    assert opened.problems() == []
    assert f"{HOSTILE_FILE}: true {GENRES[2]}, predicted {GENRES[0]} (79 %)" in opened.text
    assert "there is no such file" in opened.text, "a clip that has been removed since"
    assert len(opened.durations) == 5 * 5 - 1
    assert "Test clips" in opened.text
    assert "refresh" not in page.path.read_text()


def test_a_page_is_there_before_the_first_epoch(hostile, browser):
    page, _ = hostile
    page.begin(TrainState())
    opened = open_page(browser, page.path)
    assert opened.problems() == []
    assert "No epoch is finished yet" in opened.text


def test_short_epochs_have_a_page_now_and_then_and_long_ones_each(hostile, monkeypatch):
    page, state = hostile
    page.begin(TrainState())
    page.update(state, logits())
    page.update(dataclasses.replace(state, epoch=2), logits())
    assert "Confusion matrix: epoch 1" in page.path.read_text()
    monkeypatch.setattr(report, "PAGE_SECONDS", 0.0)
    page.next_update = 0.0
    for epoch in (3, 4):
        page.update(dataclasses.replace(state, epoch=epoch), logits())
        assert f"Confusion matrix: epoch {epoch}" in page.path.read_text()


def test_a_page_that_cannot_be_written_costs_nothing_but_a_warning(hostile, caplog):
    page, state = hostile
    page.path.parent.parent.mkdir()
    page.path.parent.write_text("in the way")
    cli.log.propagate = True
    page.begin(TrainState())
    page.update(state, logits())
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert all("index.html cannot be written" in text for text in warnings)


def test_a_git_that_does_not_answer_costs_no_page(hostile, monkeypatch):
    (page, _), run_other = hostile, subprocess.run

    def run(command, **options):
        if command[0] == "git":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return run_other(command, **options)

    monkeypatch.setattr(report.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    page.begin(TrainState())
    assert "git did not answer" in page.path.read_text()


def test_an_internal_error_in_the_page_is_reported_and_costs_nothing(hostile, monkeypatch, caplog):
    page, _ = hostile
    monkeypatch.setattr(report, "render_page", lambda *_, **__: 1 / 0)
    cli.log.propagate = True
    page.begin(TrainState())
    assert "ZeroDivisionError" in caplog.text
    assert not page.path.exists()


def test_only_the_first_process_writes(hostile):
    page, _ = hostile
    page.runtime = dataclasses.replace(page.runtime, rank=1)
    page.begin(TrainState())
    assert not page.path.exists()


def test_calibration_is_sklearns_and_its_error_the_mean_difference():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(4, 0.4), size=500)
    targets = rng.integers(0, 4, 500)
    found = metrics.calibration(targets, probabilities)
    correct, confidence = probabilities.argmax(1) == targets, probabilities.max(1)
    accuracy, mean = calibration_curve(correct, confidence, n_bins=10)
    assert np.allclose(found.accuracy, accuracy)
    assert np.allclose(found.confidence, mean)
    assert found.clips.sum() == 500
    certain = np.array([[0.75, 0.25]] * 4)
    assert metrics.calibration(np.array([0, 0, 0, 1]), certain).error == pytest.approx(0)
    assert metrics.calibration(np.array([1, 1, 1, 1]), certain).error == pytest.approx(0.75)
    two_bins = np.array([[0.75, 0.25]] * 3 + [[0.95, 0.05]])  # off by 0.25 and by 0.95
    assert metrics.calibration(np.array([0, 0, 0, 1]), two_bins).error == pytest.approx(0.425)


def test_the_most_confident_errors_come_first():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.95, 0.05]])
    assert metrics.top_errors(np.array([1, 1, 0, 0]), probabilities, 2).tolist() == [0, 2]
    assert not len(metrics.top_errors(np.array([0, 0, 1, 0]), probabilities, 2))


def test_clips_are_counted_in_integers_where_a_genre_has_none():
    table = metrics.per_genre(np.array([0, 0, 1]), np.array([0, 1, 1]), ["a", "b", "c"])
    assert table["clips"].tolist() == [2, 1, 0] and table["clips"].dtype == int


def test_a_genre_that_is_never_predicted_has_no_precision():
    rows = metrics.per_genre(np.array([0, 0, 1]), np.array([0, 0, 0]), ["a", "b"])
    assert rows["precision"].tolist()[0] == pytest.approx(2 / 3)
    assert np.isnan(rows["precision"][1])
    assert rows["recall"].tolist() == [1, 0]
