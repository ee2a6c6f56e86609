"""The page of a run, opened in a browser: while it goes on, at its end, whatever is in it."""

import csv
import dataclasses
import importlib.metadata
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from browser import look
from conftest import SMALL_RUN
from helpers import put_audio, put_table
from sklearn.calibration import calibration_curve

import config
import train
from stemgenre import report, runtime, scores
from stemgenre.metadata import load_competition
from stemgenre.progress import Progress
from stemgenre.report import Report
from stemgenre.settings import load_settings

GENRES = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "R&B $\\frac$ 演歌")


def run(settings):
    with runtime.start(settings.machine) as process:
        train.run_competition(settings, process)
    return settings.paths.output("")


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """The output folder of a run of two epochs, the second one resumed, with a killed page."""
    out = tmp_path_factory.mktemp("finished")
    knobs = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}"]
    run(load_settings(config, [*knobs, "EPOCHS=1"]))
    (out / "report" / ".index.html.123.0123abcd.part").write_text("half")
    return run(load_settings(config, [*knobs, "RESUME_FROM_CHECKPOINT=True"]))


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_of_a_finished_run_is_whole(finished, dark):
    seen = look(finished / "report" / "index.html", dark=dark)
    assert seen.faults() == []
    metrics = pd.read_csv(finished / "metrics.csv")
    best = metrics.loc[metrics["valid_accuracy"].idxmax()]
    assert f"{best['valid_accuracy']:.1%}" in seen.text
    assert "after 2 of 2 epochs" in seen.text
    for text in (
        "Curves", "Confusion matrix: best epoch", "precision", "Expected calibration error",
        "Most confident mistakes", "Test clips", "IMG_SIZE\t64\t600",
        f"torch\t{importlib.metadata.version('torch')}",
    ):  # fmt: skip
        assert text in seen.text, text
    assert "BATCH_SIZE\t8\t24" in seen.text
    assert "WEIGHT_DECAY" not in seen.text, "it has its default"
    mistakes = min(8, _mistakes(finished))
    assert mistakes, "two epochs cannot have taught it everything"
    assert seen.players == 5 * mistakes
    assert seen.pictures == 5 + mistakes
    assert all(1.5 < seconds < 2.5 for seconds in seen.seconds), "clips of 2 s"


def _mistakes(out):
    table = pd.read_csv(out / "valid_predictions.csv")
    return int((table["label"] != table["predicted"]).sum())


def test_the_page_of_real_recordings_is_whole(music_run):
    _, out = music_run
    seen = look(out / "report" / "index.html")
    assert seen.faults() == []
    assert seen.players == 5 * _mistakes(out) > 0
    assert all(seconds > 9 for seconds in seen.seconds)


def test_a_phone_shows_the_page_without_scrolling_sideways(finished):
    assert look(finished / "report" / "index.html", width=390).faults() == []


def test_nothing_else_is_left_in_its_folder(finished):
    assert [path.name for path in (finished / "report").iterdir()] == ["index.html"]


def test_the_predictions_are_those_of_the_best_model(finished, small_data):
    valid = pd.read_csv(finished / "valid_predictions.csv")
    metrics = pd.read_csv(finished / "metrics.csv")
    accuracy = (valid["label"] == valid["predicted"]).mean()
    assert accuracy == pytest.approx(metrics["valid_accuracy"].max())
    shares = valid.iloc[:, 3:]
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-4)
    assert (shares.idxmax(axis=1) == valid["predicted"]).all()
    true = -np.log([row[row["label"]] for _, row in valid.iterrows()]).mean()
    best = metrics.sort_values(["valid_accuracy", "valid_loss"], ascending=[False, True]).iloc[0]
    assert true == pytest.approx(best["valid_loss"], abs=1e-3)


def test_the_test_clips_probabilities_are_those_of_the_submission(finished, small_data):
    shares = pd.read_csv(finished / "test_probabilities.csv")
    submitted = list(csv.reader((finished / "submit.csv").open(), delimiter="\t"))
    assert shares["file_name"].tolist() == [name for name, _ in submitted]
    ids = pd.read_csv(small_data / "label_master.tsv", sep="\t").set_index("label_name")["label_id"]
    likeliest = shares.iloc[:, 1:].idxmax(axis=1).map(ids)
    assert likeliest.tolist() == [int(label) for _, label in submitted]


@pytest.fixture
def hostile(tmp_path, small_settings):
    """A Report of made-up results over three genres with hostile names, and its Progress."""
    put_audio(*(tmp_path / "data" / f"{number}.wav" for number in range(9)))
    names = [(f"{number}.wav", number % 3) for number in range(9)]
    put_table(tmp_path / "data" / "train_master.tsv", [("file_name", "label_id"), *names])
    labels = [("label_name", "label_id"), *((f'"{g.replace(chr(34), chr(34) * 2)}"', i)
              for i, g in enumerate(GENRES))]  # fmt: skip
    put_table(tmp_path / "data" / "label_master.tsv", labels)
    clips = load_competition(tmp_path / "data", num_classes=3, cache_dir=tmp_path / "none")
    assert clips.label_names == list(GENRES)
    settings = small_settings("SEPARATION_MODEL=<b>bold</b>")
    progress = Progress(epoch=1, history=[_row(1)], best_epoch=1, best_accuracy=0.5, best_loss=1)
    with runtime.start(settings.machine) as process:
        yield Report(settings, clips, clips.train, clips.train[::2], process), progress


def _row(epoch):
    return dict.fromkeys(
        ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds"), 0.5
    ) | {"epoch": epoch, "learning_rate": 1e-4}


def logits():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_hostile_names_are_text_on_the_page_while_a_run_goes_on(hostile, monkeypatch):
    page, progress = hostile
    monkeypatch.setattr(page, "seconds", 0)
    page.update(progress, logits())
    seen = look(page.path)
    assert seen.faults() == []
    assert all(name in seen.text for name in GENRES)
    assert "'<b>bold</b>'" in seen.text
    assert "Confusion matrix: epoch 1" in seen.text
    assert seen.scripts == 0
    assert 'http-equiv="refresh"' in page.path.read_text()


def test_a_page_is_there_before_the_first_epoch(hostile):
    page, _ = hostile
    page.begin(Progress())
    seen = look(page.path)
    assert seen.faults() == []
    assert "No epoch is finished yet" in seen.text


def test_pages_take_a_small_share_of_a_runs_time(hostile, monkeypatch):
    page, progress = hostile
    now, pages = [0.0], []

    def document(*parts, **options):
        pages.append(now[0])
        now[0] += 2.0
        return ""

    monkeypatch.setattr(report, "document", document)
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for name in ("_results", "_curves", "_environment"):
        monkeypatch.setattr(page, name, lambda *_: [])
    page.written_at = 0.0
    for _ in range(1000):
        now[0] += 1.5
        page.update(progress, logits())
    assert len(pages) > 20
    assert 2.0 * len(pages) < 0.06 * now[0]
    pages.clear()
    for _ in range(5):
        now[0] += 60
        page.update(progress, logits())
    assert len(pages) == 5, "long epochs have a page each"


def test_a_page_that_cannot_be_written_costs_nothing_but_a_warning(small_settings, caplog):
    settings = small_settings("EPOCHS=1")
    out = settings.paths.output("")
    out.mkdir()
    (out / "report").write_text("in the way")
    runtime.log.propagate = True
    run(settings)
    assert (out / "submit.csv").is_file()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) >= 2, "before the first epoch and at the end"
    assert all("index.html cannot be written" in text for text in warnings)


def test_a_mistake_in_making_the_page_is_told_and_costs_nothing(hostile, monkeypatch, caplog):
    page, _ = hostile
    monkeypatch.setattr(report.sections, "knobs", lambda _: 1 / 0)
    runtime.log.propagate = True
    page.begin(Progress())
    assert "ZeroDivisionError" in caplog.text
    assert not page.path.exists()


def test_only_the_first_process_writes(hostile):
    page, _ = hostile
    page.run = dataclasses.replace(page.run, rank=1)
    page.begin(Progress())
    assert not page.path.exists()


def test_calibration_is_sklearns_and_its_error_the_mean_distance():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(4, 0.4), size=500)
    targets = rng.integers(0, 4, 500)
    found = scores.calibration(targets, shares)
    right, confidence = shares.argmax(1) == targets, shares.max(1)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    assert np.allclose(found.accuracy, accuracy)
    assert np.allclose(found.confidence, mean)
    assert found.clips.sum() == 500
    sure = np.array([[0.75, 0.25]] * 4)
    assert scores.calibration(np.array([0, 0, 0, 1]), sure).error == pytest.approx(0)
    assert scores.calibration(np.array([1, 1, 1, 1]), sure).error == pytest.approx(0.75)


def test_the_surest_mistakes_come_first():
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.95, 0.05]])
    assert scores.confident_mistakes(np.array([1, 1, 0, 0]), shares, 2).tolist() == [0, 2]
    assert not len(scores.confident_mistakes(np.array([0, 0, 1, 0]), shares, 2))


def test_a_genre_that_is_never_predicted_has_no_precision():
    rows = scores.per_genre(np.array([0, 0, 1]), np.array([0, 0, 0]), ["a", "b"])
    assert rows["precision"].tolist()[0] == pytest.approx(2 / 3)
    assert np.isnan(rows["precision"][1])
    assert rows["recall"].tolist() == [1, 0]
