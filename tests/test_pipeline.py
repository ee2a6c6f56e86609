"""From files to submit.csv: what a whole run leaves behind; a stopped one loses nothing."""

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_RUN

import config
import train
from stemgenre import Classifier, checkpoint, runtime
from stemgenre.errors import Interrupted, UserError
from stemgenre.learner import Learner
from stemgenre.progress import Progress
from stemgenre.settings import load_settings
from stemgenre.trainer import Trainer

ROOT = Path(__file__).parents[1]


def run(settings):
    with runtime.start(settings.machine) as process:
        train.run_competition(settings, process)
    return settings.paths.output("")


def result(folder):
    """What must be equal in two equal runs: weights, metrics without the seconds, submission."""
    weights = checkpoint.load(folder / "checkpoint.pth", "checkpoint")["weights"]
    best = checkpoint.load(folder / "best_model.pth", "model")["weights"]
    metrics = pd.read_csv(folder / "metrics.csv").drop(columns="seconds")
    return weights, best, metrics, (folder / "submit.csv").read_bytes()


def assert_equal_results(one, other):
    for left, right in zip(one[:2], other[:2], strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    pd.testing.assert_frame_equal(one[2], other[2], check_exact=True)
    assert one[3] == other[3]


@pytest.fixture(scope="module")
def uninterrupted(small_data, tmp_path_factory):
    """The output folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return run(load_settings(config, [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}"]))


def test_a_run_leaves_a_submission_in_sample_submits_form(uninterrupted, small_data):
    rows = list(csv.reader((uninterrupted / "submit.csv").open(), delimiter="\t"))
    sample = list(csv.reader((small_data / "sample_submit.tsv").open(), delimiter="\t"))
    assert [row[0] for row in rows] == [row[0] for row in sample]
    assert all(len(row) == 2 and 0 <= int(row[1]) <= 9 for row in rows)


def test_a_run_leaves_metrics_a_summary_and_models(uninterrupted):
    metrics = pd.read_csv(uninterrupted / "metrics.csv")
    assert metrics["epoch"].tolist() == [1, 2]
    assert np.isfinite(metrics).all().all()
    assert metrics["learning_rate"].is_monotonic_decreasing
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["clips"] == {"train": 19, "valid": 11, "test": 10}
    assert summary["best_epoch"] in (1, 2)
    assert summary["valid_accuracy"] == metrics["valid_accuracy"].max()
    assert 0 <= summary["test_accuracy"] <= 1
    assert set(summary["seconds"]) == {"separation", "channel statistics", "training", "prediction"}
    assert not list(uninterrupted.glob("*.part"))


@pytest.mark.parametrize("channels", ["mix", "other,bass"])
def test_a_run_on_some_stems_leaves_a_model_that_predicts_with_these(
    channels, small_settings, small_data
):
    out = run(small_settings(f"CHANNELS={channels}", "EPOCHS=1"))
    saved = checkpoint.load(out / "best_model.pth", "model")
    assert saved["features"]["channels"] == channels
    assert [len(set(numbers)) for numbers in saved["channels"]] == [1 + channels.count(",")] * 2
    classifier = Classifier.load(
        out / "best_model.pth",
        device="cpu",
        stems=small_data / "separated",
        separation_model="synthesised",
    )
    ids = dict(zip(classifier.label_names, classifier.label_ids, strict=True))
    submitted = csv.reader((out / "submit.csv").open(), delimiter="\t")
    for name, label_id in submitted:
        (path,) = small_data.rglob(name)
        assert ids[classifier.predict(path).timeline[0].genre] == int(label_id)


def test_a_run_without_test_clips_leaves_a_model_and_an_empty_submission(
    small_settings, small_data, tmp_path
):
    data = shutil.copytree(small_data, tmp_path / "data")
    for path in (data / "sample_submit.tsv", data / "test_master.tsv"):
        path.unlink()
    for folder in data.glob("test_sound_*"):
        shutil.rmtree(folder)
    out = run(small_settings(f"DATA_DIR={data}", "EPOCHS=1"))
    assert (out / "submit.csv").read_bytes() == b""
    assert json.loads((out / "summary.json").read_text())["clips"]["test"] == 0
    assert (out / "best_model.pth").is_file()


def test_two_runs_are_the_same_run_whatever_reads_ahead(uninterrupted, small_settings):
    again = run(small_settings("NUM_WORKERS=5"))
    assert_equal_results(result(uninterrupted), result(again))


@pytest.mark.parametrize("stops", [[random.randrange(1, 6)], [2, 3, 5]])
def test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not_been(
    stops, uninterrupted, small_settings, monkeypatch
):
    steps, step = [], Trainer._step

    def counted(self, *arguments):
        steps.append(len(steps) + 1)
        if steps[-1] in stops:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", counted)
    for number in range(len(stops)):
        with pytest.raises(Interrupted) as stopped:
            run(small_settings(f"RESUME_FROM_CHECKPOINT={number > 0}"))
        assert stopped.value.signal_number == signal.SIGTERM
    out = run(small_settings("RESUME_FROM_CHECKPOINT=True"))
    assert len(steps) == 6, "no step is done twice"
    assert_equal_results(result(uninterrupted), result(out))


def test_a_finished_run_can_be_resumed_for_more_epochs(uninterrupted, small_settings, tmp_path):
    run(small_settings("EPOCHS=1"))
    out = run(small_settings("EPOCHS=2", "RESUME_FROM_CHECKPOINT=True"))
    assert pd.read_csv(out / "metrics.csv")["epoch"].tolist() == [1, 2]


@pytest.mark.parametrize("state", ["LOAD_OPTIMIZER_STATE", "LOAD_SCHEDULER_STATE"])
def test_a_part_that_is_not_loaded_restarts_warm(state, small_settings):
    run(small_settings("EPOCHS=1"))
    out = run(small_settings("EPOCHS=3", "RESUME_FROM_CHECKPOINT=True", f"{state}=False"))
    metrics = pd.read_csv(out / "metrics.csv")
    assert len(metrics) == 3
    restarted = metrics["learning_rate"][1] == 2e-4
    assert restarted == (state == "LOAD_SCHEDULER_STATE")


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(small_settings):
    run(small_settings("EPOCHS=1"))
    before = (small_settings().paths.output("checkpoint.pth")).read_bytes()
    with pytest.raises(UserError) as error:
        run(small_settings("RESUME_FROM_CHECKPOINT=True", "IMG_SIZE=96", "SEED=7"))
    assert "IMG_SIZE: 64 in the checkpoint, 96 here" in str(error.value)
    assert "SEED: 42 in the checkpoint, 7 here" in str(error.value)
    assert small_settings().paths.output("checkpoint.pth").read_bytes() == before


def test_resuming_without_a_checkpoint_is_an_error_not_a_new_run(small_settings):
    with pytest.raises(UserError, match=r"no checkpoint .*checkpoint\.pth"):
        run(small_settings("RESUME_FROM_CHECKPOINT=True"))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(
    small_settings, monkeypatch
):
    run(small_settings("EPOCHS=1"))
    path = small_settings().paths.output("checkpoint.pth")
    before = path.read_bytes()
    step = Trainer._step

    def broken(self, *arguments):
        with torch.no_grad():
            self.net.classifier[1].weight.fill_(float("nan"))
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", broken)
    with pytest.raises(UserError, match="the loss is no number any more in epoch 2"):
        run(small_settings("RESUME_FROM_CHECKPOINT=True"))
    assert path.read_bytes() == before


def test_training_stops_early_without_a_better_epoch(small_settings):
    out = run(
        small_settings(
            "EPOCHS=9", "PATIENCE=2", "LR=1e-30", "MIN_LR=0", "WEIGHT_DECAY=0",
            "FREEZE_STAGES=9", "FROZEN_BATCHNORM=fixed",
        )
    )  # fmt: skip
    assert len(pd.read_csv(out / "metrics.csv")) == 3


def test_ties_in_accuracy_go_to_the_lower_loss():
    progress = Progress(best_accuracy=0.5, best_loss=1.0)
    assert progress.is_better(0.5, 0.9)
    assert progress.is_better(0.6, 2.0)
    assert not progress.is_better(0.5, 1.0)
    assert not progress.is_better(0.4, 0.1)


@pytest.fixture
def fixed_head(small_settings):
    """A function: the head's weights after one epoch of a run whose BatchNorm does not move."""

    def weights(*overrides):
        options = ("EPOCHS=1", "FREEZE_STAGES=9", "FROZEN_BATCHNORM=fixed", "HEAD_DROPOUT=(0,0)")
        out = run(small_settings(*options, *overrides))
        return checkpoint.load(out / "checkpoint.pth", "checkpoint")["weights"][
            "classifier.1.weight"
        ]

    return weights


def test_the_micro_batch_does_not_change_what_is_learned(fixed_head):
    assert torch.allclose(fixed_head(), fixed_head("MICRO_BATCH=3"), atol=1e-6)


def test_out_of_memory_halves_the_micro_batch_and_learns_the_same(fixed_head, monkeypatch):
    whole = fixed_head()
    backward = Learner._backward

    def small_card(self, stems, *arguments):
        if self.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(self, stems, *arguments)

    monkeypatch.setattr(Learner, "_backward", small_card)
    assert torch.allclose(whole, fixed_head(), atol=1e-6)


def script(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_script_stops_on_a_signal_and_says_how_to_go_on(number, code, small_data, tmp_path):
    command = [sys.executable, "train.py", *SMALL_RUN, "EPOCHS=500", "PATIENCE=500"]
    command += [f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == code, output
    assert "RESUME_FROM_CHECKPOINT=True" in output
    assert "Traceback" not in output
    assert checkpoint.load(tmp_path / "checkpoint.pth", "checkpoint")["progress"]["epoch"] >= 1
    log = (tmp_path / "train_log.txt").read_text()
    assert "RESUME_FROM_CHECKPOINT=True" in log


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["DATA_DIR=/nowhere/at/all"], "python train.py --demo"),
        (["IMG_SIZ=300"], "did you mean IMG_SIZE?"),
        (["NUM_CLASSES=9"], "NUM_CLASSES=9, but the data has 10 genres"),
        (["OUTPUT_DIR=/proc/nowhere"], "cannot be written"),
        (["DEVICE=cuda:99"], "DEVICE=cuda:99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(overrides, message, small_data, tmp_path):
    folders = [f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}"]
    done = script("train.py", *SMALL_RUN, *folders, *overrides)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_every_knob():
    done = script("train.py", "--help")
    assert done.returncode == 0
    for name in vars(config):
        if name.isupper():
            assert f"  {name} = " in done.stdout


def test_real_recordings_are_separated_trained_on_and_submitted(music_run):
    data, out = music_run
    lines = (out / "submit.csv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"test_{i}.au" for i in range(6)]
    assert len(list((data / "separated").glob("*.npz"))) == 23
    assert len(pd.read_csv(out / "metrics.csv")) == 2
