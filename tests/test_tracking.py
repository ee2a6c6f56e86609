"""TRACKER and LOG_EVERY_STEPS: what TensorBoard, W&B and metrics_steps.csv hold of a run."""

import json
import os
import re
import struct
import subprocess
import sys
import time

import kill_points
import pandas as pd
import pytest
from helpers import ROOT, SMALL_RUN, run_training

from stemgenre.errors import UserError
from stemgenre.settings import load_settings
from stemgenre.training.trainer import Trainer

STEPS = 3  # in an epoch of a small run


def need(package):
    """Skips the test where the optional package is not installed, but not in CI."""
    if "CI" not in os.environ:
        pytest.importorskip(package)


@pytest.fixture
def tensorboard():
    need("tensorboard")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG"):  # else in the home folder
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))


def run(data, out, *overrides, resume=False):
    words = [*SMALL_RUN, f"DATA_DIR={data}", f"OUTPUT_DIR={out}", *overrides]
    return run_training(load_settings([*words, f"RESUME_FROM_CHECKPOINT={resume}"]))


def killed_run(data, out, *overrides, step):
    """A run whose process is killed after so many steps in all."""
    words = [*SMALL_RUN, f"DATA_DIR={data}", f"OUTPUT_DIR={out}", *overrides]
    code, output = kill_points.run(words, at="step", count=step)
    assert code == kill_points.KILLED, output


def events(folder):
    """TensorBoard's own reader of the one run below `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(file.parent), size_guidance={"scalars": 0})
    reader.Reload()
    return reader


def scalars(reader, tag):
    return {event.step: event.value for event in reader.Scalars(tag)}


def records(folder):
    """W&B's records of the one offline run below `folder`, which has ended.

    W&B's own process can still be writing the last of them when finish() has returned.
    """
    (path,) = folder.rglob("*.wandb")
    for _ in range(100):
        found = read_records(path.read_bytes())
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.2)
    raise AssertionError(f"{path} has no end")


def read_records(data):
    """W&B's records of a file in the form of LevelDB's log: blocks of 32 KiB, parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, parts, block, found = 7, b"", 2**15, []
    while position + 7 <= len(data):
        if block - position % block < 7:  # no room for a header
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):
            break
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(found):
    """[{name: value}] of W&B's rows."""
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.history.item}
        for row in found
        if row.HasField("history")
    ]


def steps_of(out):
    return pd.read_csv(out / "metrics_steps.csv")


def test_each_nth_step_has_a_row(small_data, tmp_path):
    out = run(small_data, tmp_path, "LOG_EVERY_STEPS=2")
    table, epochs = steps_of(out), pd.read_csv(out / "metrics.csv")
    assert table["step"].tolist() == [2, 4, 6]
    assert table["epoch"].tolist() == [1, 2, 2]
    assert table["learning_rate"].tolist() == epochs["learning_rate"].iloc[[0, 1, 1]].tolist()
    assert (table[["gradient_norm", "seconds", "train_loss"]] > 0).all(axis=None)
    assert set(table["run_id"]) == set(epochs["run_id"])


def test_an_epoch_is_the_mean_of_its_steps(small_data, tmp_path):
    out = run(small_data, tmp_path, "LOG_EVERY_STEPS=1", "EPOCHS=1")
    table, epoch = steps_of(out), pd.read_csv(out / "metrics.csv").iloc[0]
    clips = [7, 6, 6]  # of each batch
    for name in ("train_loss", "train_accuracy"):
        mean = (table[name] * clips).sum() / sum(clips)
        assert mean == pytest.approx(epoch[name], rel=1e-6)
    assert table["gradient_norm"].mean() == pytest.approx(epoch["gradient_norm"], rel=1e-6)


def test_a_killed_and_resumed_run_has_each_step_once(small_data, tmp_path):
    killed_run(small_data, tmp_path, "LOG_EVERY_STEPS=1", step=5)
    assert steps_of(tmp_path)["step"].tolist() == [1, 2, 3, 4, 5]
    table = steps_of(run(small_data, tmp_path, "LOG_EVERY_STEPS=1", resume=True))
    assert table["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["run_id"].nunique() == 1


def test_the_steps_of_an_earlier_run_do_not_stay(small_data, tmp_path):
    run(small_data, tmp_path, "LOG_EVERY_STEPS=1")
    out = run(small_data, tmp_path, "EPOCHS=1")
    assert not (out / "metrics_steps.csv").exists()


def test_tensorboards_reader_finds_the_metrics_and_results(tensorboard, small_data, tmp_path):
    out = run(small_data, tmp_path, "TRACKER=tensorboard", "LOG_EVERY_STEPS=2")
    reader = events(out / "tensorboard")
    epochs, steps = pd.read_csv(out / "metrics.csv"), steps_of(out)
    for prefix, table, key in (("epoch", epochs, "epoch"), ("step", steps, "step")):
        for name in table.columns.drop(["epoch", "step", "run_id"], errors="ignore"):
            expected = dict(zip(table[key], table[name], strict=True))
            assert scalars(reader, f"{prefix}/{name}") == pytest.approx(expected, rel=1e-6), name
    assert reader.Tags()["images"] == ["confusion matrix"]
    texts = {tag.split("/")[0] for tag in reader.Tags()["tensors"]}
    assert texts == {"settings", "genres", "misclassified clips"}
    summary = json.loads((out / "summary.json").read_text())
    assert scalars(reader, "result/accuracy")[0] == pytest.approx(summary["valid_accuracy"])


@pytest.mark.parametrize("step", [2, 5])
def test_tensorboard_has_each_epoch_of_a_killed_and_resumed_run_once(
    tensorboard, small_data, tmp_path, step
):
    options = ("TRACKER=tensorboard", "LOG_EVERY_STEPS=1", "CHECKPOINT_MINUTES=1e-9")
    killed_run(small_data, tmp_path, *options, step=step)
    out = run(small_data, tmp_path, *options, resume=True)
    reader = events(out / "tensorboard")
    assert [event.step for event in reader.Scalars("epoch/valid_loss")] == [1, 2]
    found = reader.Scalars("step/train_loss")
    assert [event.step for event in found] == [1, 2, 3, 4, 5, 6]
    times = [event.wall_time for event in found]
    assert times == sorted(times)


def test_wandb_offline_holds_the_metrics_results_settings_and_model(wandb, small_data, tmp_path):
    out = run(small_data, tmp_path / "out", "TRACKER=wandb", "LOG_EVERY_STEPS=1", "LR=3e-4")
    found = records(out / "wandb")
    epochs = pd.read_csv(out / "metrics.csv")
    rows = history(found)
    by_epoch = {row["epoch/epoch"]: row for row in rows if "epoch/epoch" in row}
    assert list(by_epoch) == [1, 2]
    for _, epoch in epochs.iterrows():
        for name in ("train_loss", "valid_accuracy", "gradient_norm", "seconds"):
            assert by_epoch[epoch["epoch"]][f"epoch/{name}"] == pytest.approx(epoch[name])
    assert [row["step/step"] for row in rows if "step/step" in row] == [1, 2, 3, 4, 5, 6]
    assert rows[-1].keys() >= {"confusion matrix", "genres", "misclassified clips"}
    (start,) = [record.run for record in found if record.HasField("run")][:1]
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert config["LR"] == 3e-4
    assert start.run_id == epochs["run_id"][0]
    assert start.project == "stem-genre"
    assert any(record.request.HasField("log_artifact") for record in found) or any(
        record.HasField("artifact") for record in found
    )


def test_wandb_offline_has_each_epoch_of_an_interrupted_and_resumed_run_once(
    wandb, small_data, tmp_path, monkeypatch
):
    options = ("TRACKER=wandb", "LOG_EVERY_STEPS=1")

    def fail(trainer, step):
        if (trainer.state.epoch, step) == (1, 2):
            raise ValueError("an internal error")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="an internal error"):
        patch.setattr(Trainer, "on_step", fail)
        run(small_data, tmp_path / "out", *options)
    assert len(history(records(tmp_path / "out" / "wandb"))) == STEPS + 2
    out = run(small_data, tmp_path / "out", *options, resume=True)
    rows = history(records(out / "wandb"))
    assert [row["epoch/epoch"] for row in rows if "epoch/epoch" in row] == [1, 2]
    assert [row["step/step"] for row in rows if "step/step" in row] == [1, 2, 3, 4, 5, 6]


def test_each_network_is_a_run_of_one_group(tensorboard, wandb, small_data, tmp_path):
    out = tmp_path / "out"
    run(small_data, out, "TRACKER=tensorboard, wandb", "FOLDS=2", "EPOCHS=1", "LOG_EVERY_STEPS=1")
    (group,) = (out / "tensorboard").iterdir()
    assert sorted(path.name for path in group.iterdir()) == ["all", "fold_1", "fold_2"]
    assert events(group / "all").Tags()["images"] == ["confusion matrix"]
    folders = list((out / "wandb").glob("offline-run-*"))
    runs = [record.run for f in folders for record in records(f) if record.HasField("run")]
    assert {run.run_group for run in runs} == {group.name}
    names = {f"{group.name} {name}" for name in ("all", "fold_1", "fold_2")}
    assert {run.display_name for run in runs} == names
    for name in ("fold_1", "fold_2"):
        folder = f"OUTPUT_DIR = {str(out / name)!r}"
        (text,) = events(group / name).Tensors("settings/text_summary")
        assert folder in text.tensor_proto.string_val[0].decode()
    assert sorted(path.parent.name for path in out.rglob("metrics_steps.csv")) == [
        "fold_1", "fold_2",
    ]  # fmt: skip


def test_networks_of_a_killed_and_resumed_run_stay_one_group(tensorboard, small_data, tmp_path):
    options = ("TRACKER=tensorboard", "FOLDS=2", "EPOCHS=1", "CHECKPOINT_MINUTES=1e-9")
    killed_run(small_data, tmp_path, *options, step=4)
    out = run(small_data, tmp_path, *options, resume=True)
    (group,) = (out / "tensorboard").iterdir()
    for name in ("fold_1", "fold_2"):
        run_id = pd.read_csv(out / name / "metrics.csv")["run_id"][0]
        assert (run_id == group.name) == (name == "fold_1")
        assert list(scalars(events(group / name), "epoch/train_loss")) == [1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_any_work(name, small_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"TRACKER={name} needs {name}: pip install {name}$"):
        run(small_data, tmp_path, f"TRACKER={name}")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_unknown_trackers_are_refused():
    with pytest.raises(UserError, match=re.escape("TRACKER='mlflow' is invalid: expected one or")):
        load_settings(["TRACKER=mlflow"])
    assert load_settings(["TRACKER=none"]).tracking.tracker is None


def test_a_tracker_that_fails_is_one_warning(tensorboard, small_data, tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("not a folder")
    (tmp_path / "metrics_steps.csv").mkdir()
    out = run(small_data, tmp_path, "TRACKER=tensorboard", "LOG_EVERY_STEPS=1")
    warned = [r.getMessage() for r in caplog.records if "continues without it" in r.getMessage()]
    assert len(warned) == 2
    assert warned[0].startswith("metrics_steps.csv: ")
    assert warned[1].startswith("tensorboard: ")
    assert (out / "submit.csv").is_file()


@pytest.mark.heavy
def test_wandb_without_a_key_is_one_warning(wandb, small_data, tmp_path):
    code = (
        "import sys, torch; from stemgenre import cli; from stemgenre.runtime import *\n"
        "from stemgenre.settings import load_settings\n"
        "from stemgenre.tracking.tracking import Tracking\n"
        "cli.log_to_console()\n"
        "runtime = Runtime(torch.device('cpu'), 0, 1, StopRequest())\n"
        "Tracking(load_settings(['TRACKER=wandb']), runtime)\n"
    )
    names = ("WANDB_MODE", "WANDB_SILENT", "WANDB_API_KEY")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=env | {"HOME": str(tmp_path)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        "warning: wandb: .*wandb login.*the run continues without it\n", done.stdout
    )
