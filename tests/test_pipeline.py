"""From files to submit.csv: what a whole run leaves behind; a stopped one loses nothing."""

import csv
import json
import os
import random
import shutil
import signal
import time

import kill_points
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import (
    SMALL_RUN,
    assert_same_run,
    limit_images,
    run_results,
    run_training,
    tiny_backbone,
)

from stemgenre import Classifier
from stemgenre.errors import Interrupted, UserError
from stemgenre.runtime import Runtime, StopRequest
from stemgenre.separation.cache import open_cache
from stemgenre.settings import load_settings
from stemgenre.training import backbones, checkpoint, inference, trainer
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.inference import compute_channel_stats
from stemgenre.training.stem_loader import StemLoader, check_batch_size
from stemgenre.training.trainer import Trainer


def test_a_run_leaves_a_submission_in_sample_submits_form(finished_run, small_data):
    rows = list(csv.reader((finished_run / "submit.csv").open(), delimiter="\t"))
    sample = list(csv.reader((small_data / "sample_submit.tsv").open(), delimiter="\t"))
    assert [row[0] for row in rows] == [row[0] for row in sample]
    assert all(len(row) == 2 and 0 <= int(row[1]) <= 9 for row in rows)


def test_a_run_leaves_metrics_a_summary_and_models(finished_run):
    metrics = pd.read_csv(finished_run / "metrics.csv")
    assert metrics["epoch"].tolist() == [1, 2]
    assert np.isfinite(metrics.drop(columns="run_id")).all().all()
    assert metrics["learning_rate"].is_monotonic_decreasing
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["clips"] == {"train": 19, "valid": 11, "test": 10}
    assert summary["best_epoch"] in (1, 2)
    assert summary["valid_accuracy"] == pytest.approx(metrics["valid_accuracy"].max())
    assert 0 <= summary["test_accuracy"] <= 1
    assert set(summary["seconds"]) == {"separation", "channel statistics", "training", "prediction"}
    assert not list(finished_run.glob("*.part"))


def test_validation_clips_have_no_part_in_the_channel_statistics(finished_run, small_settings):
    saved = checkpoint.load(finished_run / "checkpoint.pth", "checkpoint")
    settings, cpu = small_settings(), torch.device("cpu")
    expected = compute_channel_stats(
        StemLoader(open_cache(settings), threads=2, device=cpu, device_cache=0.0),
        pd.DataFrame({"clip": saved["run_signature"]["training clips"]}),
        features=settings.features,
        runtime=Runtime(cpu, 0, 1, StopRequest()),
    )
    assert np.array(saved["channel_stats"]) == pytest.approx(np.array(expected))


@pytest.mark.parametrize("channels", ["mix", "other,bass"])
def test_a_run_on_some_stems_leaves_a_model_that_predicts_with_these(
    channels, small_settings, small_data
):
    out = run_training(small_settings(f"CHANNELS={channels}", "EPOCHS=1"))
    saved = checkpoint.load(out / "best_model.pth", "model")
    assert saved["features"]["channels"] == channels
    distinct = 1 + channels.count(",")
    assert [len(set(numbers)) for numbers in saved["channel_stats"]] == [distinct] * 2
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


def test_a_run_without_test_clips_leaves_a_model_and_no_submission(
    small_settings, small_data, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(small_data / "separated", data / "separated")
    with (small_data / "train_master.tsv").open(newline="") as file:
        labels = {row["file_name"]: row["label_id"] for row in csv.DictReader(file, delimiter="\t")}
    for path in small_data.rglob("train_*.au"):
        genre = data / f"genre_{labels[path.name]}"
        genre.mkdir(exist_ok=True)
        shutil.copy(path, genre)
    out = run_training(small_settings(f"DATA_DIR={data}", "EPOCHS=1"))
    assert not (out / "submit.csv").exists()
    assert json.loads((out / "summary.json").read_text())["clips"]["test"] == 0
    assert (out / "best_model.pth").is_file()


def test_two_runs_are_the_same_run_with_any_number_of_threads(finished_run, small_settings):
    assert_same_run(run_training(small_settings("NUM_THREADS=5")), run_results(finished_run))


@pytest.fixture
def short_epochs(monkeypatch):
    """Epochs take less time than there has to be between checkpoints, as on a GPU."""
    fit = Trainer.fit

    def fit_quickly(trainer, **options):
        trainer.save_seconds = 3600.0
        return fit(trainer, **options)

    monkeypatch.setattr(Trainer, "fit", fit_quickly)


@pytest.mark.usefixtures("short_epochs")
def test_of_short_epochs_only_the_last_is_saved(finished_run, small_settings, monkeypatch):
    saved, save = [], checkpoint.save

    def count(path, *arguments, **options):
        saved.append(path.name)
        save(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", count)
    out = run_training(small_settings())
    assert saved == ["best_model.pth", "checkpoint.pth"]
    assert_same_run(out, run_results(finished_run))


@pytest.mark.parametrize("stops", [[random.randrange(1, 6)], [2, 3, 5]])
@pytest.mark.parametrize("epochs", ["epochs", "short_epochs"])
def test_a_run_stopped_at_any_step_resumes_as_the_same_run(
    stops, epochs, finished_run, small_settings, monkeypatch, request
):
    if epochs == "short_epochs":
        request.getfixturevalue(epochs)
    steps = []

    def count(trainer, step):
        steps.append(step)
        if len(steps) in stops:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "on_step", count)
    for number in range(len(stops)):
        with pytest.raises(Interrupted) as stopped:
            run_training(small_settings(f"RESUME_FROM_CHECKPOINT={number > 0}"))
        assert stopped.value.signal_number == signal.SIGTERM
        epoch, step = divmod(len(steps), 3)
        where = f"in epoch {epoch + 1} after step {step}" if step else f"after epoch {epoch}"
        assert str(stopped.value).startswith(f"stopped {where}; saved in ")
    out = run_training(small_settings("RESUME_FROM_CHECKPOINT=True"))
    assert steps == [1, 2, 3, 1, 2, 3], "no step is done twice"
    assert_same_run(out, run_results(finished_run))


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory, small_data):
    """A function: Settings with overrides, to resume a copy of a run of one epoch."""
    folder = tmp_path_factory.mktemp("one_epoch")
    first = folder / "first"
    options = [*SMALL_RUN, f"DATA_DIR={small_data}"]
    run_training(load_settings([*options, f"OUTPUT_DIR={first}", "EPOCHS=1"]))

    def resumed(*overrides):
        out = folder / f"{time.monotonic_ns()}"
        shutil.copytree(first, out)
        return load_settings(
            [*options, f"OUTPUT_DIR={out}", "RESUME_FROM_CHECKPOINT=True", *overrides]
        )

    return resumed


def test_a_finished_run_can_be_resumed_for_more_epochs(one_epoch):
    out = run_training(one_epoch("EPOCHS=2"))
    assert pd.read_csv(out / "metrics.csv")["epoch"].tolist() == [1, 2]


@pytest.mark.parametrize("beside", ["nothing", "another run's"])
def test_the_checkpoint_alone_carries_a_run_to_another_machine(beside, one_epoch, caplog):
    settings = one_epoch("EPOCHS=1")
    out = settings.paths.output("")
    expected, metrics = run_results(out), (out / "metrics.csv").read_text()
    other = checkpoint.load(out / "best_model.pth", "model") | {"run_id": "another"}
    other["weights"]["classifier.4.weight"].zero_()
    for path in out.iterdir():
        if path.is_file() and path.name != "checkpoint.pth":
            path.unlink()
    if beside != "nothing":
        checkpoint.save(out / "best_model.pth", "model", other)
        (out / "metrics.csv").write_text("another run's\n")
    assert_same_run(run_training(settings), expected)
    assert (out / "metrics.csv").read_text() == metrics
    assert "best_model.pth is missing or of another run: written from the checkpoint" in caplog.text


def test_checkpoint_best_model_and_metrics_name_their_run(finished_run, one_epoch):
    def run_ids(out):
        saved = checkpoint.load(out / "checkpoint.pth", "checkpoint")
        best = checkpoint.load(out / "best_model.pth", "model")
        return {saved["run_id"], best["run_id"], *pd.read_csv(out / "metrics.csv")["run_id"]}

    settings = one_epoch("EPOCHS=2")
    first = run_ids(settings.paths.output(""))
    assert len(first) == 1
    assert run_ids(run_training(settings)) == first, "a resumed run is the same run"
    assert run_ids(finished_run).isdisjoint(first)


def test_a_resumed_run_says_if_nothing_is_left_or_its_schedule_has_ended(one_epoch, caplog):
    caplog.set_level("INFO")
    settings = one_epoch("EPOCHS=1")
    run_training(settings)
    assert "EPOCHS=1 are done: nothing is left to train" in caplog.text
    submission = settings.paths.output("submit.csv")
    assert f"{submission} is an earlier run's, until this run has written" in caplog.text
    assert f"the genres of 10 test clips are in {submission}" in caplog.text
    assert "schedule has ended" not in caplog.text
    run_training(one_epoch("EPOCHS=2"))
    assert "the learning rate's schedule has ended: it stays at 1e-06" in caplog.text


@pytest.mark.parametrize("state", ["LOAD_OPTIMIZER_STATE", "LOAD_SCHEDULER_STATE"])
def test_a_part_that_is_not_loaded_restarts_warm(state, one_epoch):
    out = run_training(one_epoch("EPOCHS=3", f"{state}=False"))
    metrics = pd.read_csv(out / "metrics.csv")
    assert len(metrics) == 3
    restarted = metrics["learning_rate"][1] == 2e-4
    assert restarted == (state == "LOAD_SCHEDULER_STATE")


def test_a_run_whose_schedule_was_restarted_resumes_as_the_same_run(one_epoch, monkeypatch):
    longer = ("EPOCHS=4", "LOAD_SCHEDULER_STATE=False")
    expected = run_results(run_training(one_epoch(*longer)))
    settings, steps = one_epoch(*longer), []

    def stop(trainer, step):
        steps.append(step)
        if len(steps) == 4:  # in the second epoch after that
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "on_step", stop)
    with pytest.raises(Interrupted):
        run_training(settings)
    used = settings.paths.output("settings_used.py")
    out = run_training(load_settings([str(used), "RESUME_FROM_CHECKPOINT=True"]))
    assert_same_run(out, expected)


def test_a_run_that_is_given_more_epochs_midway_goes_along_the_longer_schedule(
    small_settings, monkeypatch
):
    def stop(trainer, step):
        if trainer.state.epoch == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "on_step", stop)
    with pytest.raises(Interrupted):
        run_training(small_settings("EPOCHS=3"))
    monkeypatch.undo()
    out = run_training(small_settings("EPOCHS=6", "RESUME_FROM_CHECKPOINT=True"))
    rates = pd.read_csv(out / "metrics.csv")["learning_rate"]
    assert len(rates) == 6 and rates.is_monotonic_decreasing
    assert rates.iloc[-1] > 2e-6, "MIN_LR is reached after the last epoch"


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(one_epoch):
    settings = one_epoch("IMG_SIZE=96", "SEED=7")
    before, used = (
        settings.paths.output(name).read_bytes() for name in ("checkpoint.pth", "settings_used.py")
    )
    with pytest.raises(UserError) as error:
        run_training(settings)
    assert "IMG_SIZE: 64 in the checkpoint, 96 here" in str(error.value)
    assert "SEED: 42 in the checkpoint, 7 here" in str(error.value)
    assert settings.paths.output("checkpoint.pth").read_bytes() == before
    assert settings.paths.output("settings_used.py").read_bytes() == used, "it is of that run"


def test_what_a_resumed_schedule_does_not_take_is_named(one_epoch, caplog):
    out = run_training(one_epoch("EPOCHS=2", "LR=1e-2", "WEIGHT_DECAY=0.5"))
    assert "LR=0.01 has no effect: the resumed schedule keeps 0.0002" in caplog.text
    assert "MIN_LR" not in caplog.text
    assert pd.read_csv(out / "metrics.csv")["learning_rate"].max() == 2e-4
    saved = checkpoint.load(out / "checkpoint.pth", "checkpoint")
    assert {group["weight_decay"] for group in saved["optimizer"]["param_groups"]} == {0.5}


def test_resuming_without_a_checkpoint_is_an_error_not_a_new_run(small_settings):
    with pytest.raises(UserError, match=r"no checkpoint .*checkpoint\.pth"):
        run_training(small_settings("RESUME_FROM_CHECKPOINT=True"))


def test_training_stops_early_without_a_better_epoch(small_settings):
    out = run_training(
        small_settings(
            "EPOCHS=9", "PATIENCE=2", "LR=1e-30", "MIN_LR=0", "WEIGHT_DECAY=0",
            "FREEZE_STAGES=9", "FROZEN_BATCHNORM=fixed",
        )
    )  # fmt: skip
    assert len(pd.read_csv(out / "metrics.csv")) == 3


def test_patience_is_about_the_accuracy_that_its_message_names(small_settings, monkeypatch):
    losses = iter(range(9, 0, -1))

    def improve_the_loss_alone(*arguments, **options):
        logits = compute_logits(*arguments, **options)
        return torch.zeros_like(logits).index_fill(1, torch.tensor([0]), float(next(losses)))

    compute_logits = trainer.compute_logits
    monkeypatch.setattr(trainer, "compute_logits", improve_the_loss_alone)
    out = run_training(small_settings("EPOCHS=9", "PATIENCE=2"))
    metrics = pd.read_csv(out / "metrics.csv")
    assert metrics["valid_loss"].is_monotonic_decreasing
    assert len(metrics) == 3
    assert checkpoint.load(out / "best_model.pth", "model")["epoch"] == 3, "ties: the lower loss"


def test_ties_in_accuracy_go_to_the_lower_loss():
    state = TrainState(best_accuracy=0.5, best_loss=1.0)
    assert state.is_better(0.5, 0.9)
    assert state.is_better(0.6, 2.0)
    assert not state.is_better(0.5, 1.0)
    assert not state.is_better(0.4, 0.1)


@pytest.fixture
def trained_head(small_settings):
    """A function: the head's weights after one epoch of a run whose BatchNorm does not move."""

    def weights(*overrides):
        options = ("EPOCHS=1", "FREEZE_STAGES=9", "FROZEN_BATCHNORM=fixed", "HEAD_DROPOUT=(0,0)")
        out = run_training(small_settings(*options, *overrides))
        saved = checkpoint.load(out / "checkpoint.pth", "checkpoint")
        return saved["weights"]["classifier.1.weight"]

    return weights


def test_the_micro_batch_does_not_change_what_is_learned(trained_head):
    assert torch.allclose(trained_head(), trained_head("MICRO_BATCH=3"), atol=1e-6)


@pytest.fixture
def gpu_memory(monkeypatch):
    """A function: from then on, so many images at most fit into memory."""

    return lambda images: limit_images(images, monkeypatch.setattr)


def test_out_of_memory_halves_the_micro_batch_and_learns_the_same(trained_head, gpu_memory, caplog):
    expected = trained_head()
    gpu_memory(2)
    assert torch.allclose(expected, trained_head(), atol=1e-6)
    messages = [text for text in caplog.messages if "out of memory" in text]
    assert messages[-1] == "GPU out of memory: micro-batch reduced to 1 clips"
    assert len(messages) == 2, "the smaller size is kept, for validation and test, too"


def test_on_out_of_memory_stems_kept_on_the_gpu_are_dropped_first(
    trained_head, monkeypatch, caplog
):
    expected = trained_head()
    loaders = []

    def keep_stems(loader, *arguments, **options):
        prepare(loader, *arguments, **options)
        loader.budget_bytes = 10**9
        loaders.append(loader)

    def check(module, inputs):
        if len(inputs[0]) > 4 and loaders[-1].gpu_cache:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def backbone(name, stochastic_depth):
        net = tiny_backbone(name, stochastic_depth)
        net.features[1].register_forward_pre_hook(check)
        return net

    prepare = StemLoader.__init__
    monkeypatch.setattr(StemLoader, "__init__", keep_stems)
    monkeypatch.setattr(backbones, "torchvision_network", backbone)
    assert torch.allclose(expected, trained_head(), atol=1e-6)
    messages = [text for text in caplog.messages if "out of memory" in text]
    assert messages == ["GPU out of memory: stems are no longer kept on the GPU"]


@pytest.mark.parametrize("amp", ["fp16", "other"])
def test_out_of_memory_in_the_optimisers_first_step_repeats_the_step(
    amp, trained_head, monkeypatch, caplog
):
    if amp == "fp16":
        scaler = torch.amp.GradScaler
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    expected = trained_head()
    allocate, calls = torch.zeros_like, []

    def fail_once(tensor, **options):
        calls.append(tensor)
        if len(calls) == 4:  # the second weights' second moments
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(tensor, **options)

    monkeypatch.setattr(torch, "zeros_like", fail_once)
    assert torch.allclose(expected, trained_head(), atol=1e-6)
    assert len(calls) == 4 + 8, "the moments of the head's two weights and biases, once more"
    assert "GPU out of memory: micro-batch reduced to 3 clips" in caplog.messages


def test_a_clip_that_does_not_fit_into_memory_names_the_ways_out(small_settings, gpu_memory):
    gpu_memory(0)
    with pytest.raises(UserError, match="a single clip exceeds GPU memory; lower IMG_SIZE or"):
        run_training(small_settings("EPOCHS=1"))


class OnMps(torch.Tensor):
    """A tensor on a device that, as Apple's MPS does, refuses float64; cpu() takes it off."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls):
            if result.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
            if function is torch.Tensor.cpu:
                return result.as_subclass(torch.Tensor)
        return result


def test_no_step_of_a_run_needs_float64_on_the_device(finished_run, small_settings, monkeypatch):
    on_device = []

    def to_device(tensor, device):
        on_device.append(tensor.as_subclass(OnMps))
        return on_device[-1] + 0

    for module in ("stem_loader", "trainer"):
        monkeypatch.setattr(f"stemgenre.training.{module}.to_device", to_device)
    out = run_training(small_settings())
    assert len(on_device) > 30, "every clip's stems, in every stage"
    metrics, expected = run_results(out)[1], run_results(finished_run)[1]
    pd.testing.assert_frame_equal(metrics, expected, rtol=1e-3)  # the network ran on OnMps, too


def test_a_run_stopped_while_it_predicts_is_resumed_there(
    finished_run, small_settings, monkeypatch
):
    fit, epochs = Trainer.fit, []

    def fit_and_stop(trainer, **options):
        state = fit(trainer, **options)
        signal.raise_signal(signal.SIGTERM)
        return state

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fit_and_stop)
        with pytest.raises(Interrupted, match="stopped while predicting: RESUME_FROM_CHECKPOINT="):
            run_training(small_settings())
    monkeypatch.setattr(Trainer, "train_epoch", lambda *_: epochs.append(_))
    out = run_training(small_settings("RESUME_FROM_CHECKPOINT=True"))
    assert_same_run(out, run_results(finished_run))
    assert not epochs


@pytest.mark.parametrize(("call", "again"), [(1, "the same command"), (2, "RESUME_FROM_CHECK")])
def test_a_run_stopped_between_two_networks_says_how_to_keep_the_first(
    call, again, small_settings, monkeypatch
):
    calls = []

    def stop_and_compute(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return compute_channel_stats(*arguments, **options)

    monkeypatch.setattr(inference, "compute_channel_stats", stop_and_compute)
    with pytest.raises(Interrupted, match=f"stopped before training: {again}.* begins it again"):
        run_training(small_settings("FOLDS=2", "EPOCHS=1"))


def test_the_script_stops_on_a_signal_and_says_how_to_resume(small_data, tmp_path):
    words = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}"]
    run = kill_points.Forked([*words, "EPOCHS=500", "PATIENCE=500"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(run.process.pid, signal.SIGTERM)
    code, output = run.wait()
    assert code == 143, output
    assert "RESUME_FROM_CHECKPOINT=True" in output
    assert "Traceback" not in output
    assert checkpoint.load(tmp_path / "checkpoint.pth", "checkpoint")["train_state"]["epoch"] >= 1
    assert "RESUME_FROM_CHECKPOINT=True" in (tmp_path / "train_log.txt").read_text()


@pytest.mark.parametrize(
    ("batch_size", "world_size", "clips", "message"),
    [
        (9, 2, 100, "BATCH_SIZE=9 does not divide by 2 processes .* try 8"),
        (4, 4, 100, "BATCH_SIZE=4 does not divide by 4 processes into two clips .* try 8"),
        (8, 4, 7, "7 training clips are too few for 4 processes"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(
    batch_size, world_size, clips, message
):
    with pytest.raises(UserError, match=message):
        check_batch_size(batch_size, world_size=world_size, clips=clips)
    check_batch_size(8, world_size=2, clips=100)
