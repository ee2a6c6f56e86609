"""status.json: what a page can tell of a run, while it runs and when it has ended."""

import json
import signal
import time

import kill_points
import pytest
from helpers import SMALL_RUN

from stemgenre import status
from stemgenre.errors import Interrupted, UserError
from stemgenre.status import Status

KEYS = {
    "run": str, "pid": int, "started": str, "updated": str, "stage": str, "network": str,
    "network_number": int, "networks": int, "epoch": int, "epochs": int, "step": int,
    "steps": int, "done": int, "total": int, "message": str,
}  # fmt: skip


def read(folder):
    return json.loads((folder / status.FILE).read_text(encoding="utf-8"))


def run(data, out, *overrides, **event):
    words = [*SMALL_RUN, f"DATA_DIR={data}", f"OUTPUT_DIR={out}", *overrides]
    return kill_points.run(words, **event)


def test_progress_is_written_at_once_for_a_stage_and_then_once_a_second(tmp_path):
    now = Status()
    with now.recording(tmp_path / status.FILE):
        assert read(tmp_path)["stage"] == "loading"
        now.stage("separation", total=3)
        now.add_clips(2)
        assert (read(tmp_path)["stage"], read(tmp_path)["done"]) == ("separation", 0)
        time.sleep(status.WRITE_SECONDS)
        now.add_clips(2)
        assert (read(tmp_path)["done"], read(tmp_path)["total"]) == (3, 3)
    assert read(tmp_path)["stage"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == [status.FILE]


@pytest.mark.parametrize(
    ("error", "stage", "message"),
    [
        (UserError("no room\nin a second line"), "failed", "no room"),
        (ValueError("a bug"), "failed", "ValueError: a bug"),
        (Interrupted(signal.SIGTERM, "stopped"), "stopped", ""),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_how_a_run_ended_is_written(tmp_path, error, stage, message):
    now = Status()
    with pytest.raises(type(error)), now.recording(tmp_path / status.FILE):
        raise error
    assert (read(tmp_path)["stage"], read(tmp_path)["message"]) == (stage, message)


def test_other_ranks_write_nothing(tmp_path):
    with Status().recording(tmp_path / status.FILE, is_main=False):
        pass
    assert not list(tmp_path.iterdir())


def test_a_status_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / status.FILE).mkdir()
    now = Status()
    with now.recording(tmp_path / status.FILE):
        now.stage("training")
    assert len(caplog.records) == 1
    assert "status.json cannot be written" in caplog.text


def test_of_a_finished_run(small_data, tmp_path):
    code, output = run(small_data, tmp_path)
    assert code == 0, output
    content = read(tmp_path)
    assert {name: type(value) for name, value in content.items()} == KEYS
    assert content["stage"] == "finished"
    assert (content["network"], content["network_number"], content["networks"]) == ("", 1, 1)
    assert (content["epoch"], content["epochs"]) == (2, 2)
    assert content["step"] == content["steps"] > 0
    assert content["run"] in (tmp_path / "metrics.csv").read_text()


def test_of_a_run_that_is_killed_in_its_second_network_then_stopped(small_data, tmp_path):
    overrides = ("FOLDS=2", "EPOCHS=1", "CHECKPOINT_MINUTES=1e-9")
    code, output = run(small_data, tmp_path, *overrides, at="step", count=3)
    assert code == kill_points.KILLED, output
    content = read(tmp_path)
    assert content["stage"] == "training"
    assert (content["network"], content["network_number"], content["networks"]) == ("fold_2", 2, 2)
    options = {"at": "step", "count": 1, "action": signal.SIGINT}
    code, output = run(small_data, tmp_path, *overrides, "RESUME_FROM_CHECKPOINT=True", **options)
    assert code == 128 + signal.SIGINT, output
    assert (read(tmp_path)["stage"], read(tmp_path)["network"]) == ("stopped", "fold_2")
    assert not list(tmp_path.glob("fold_*/status.json"))


def test_of_a_run_that_fails(small_data, tmp_path):
    code, output = run(small_data, tmp_path, "NUM_CLASSES=9")
    assert code == 2, output
    assert read(tmp_path)["stage"] == "failed"
    assert read(tmp_path)["message"].startswith("NUM_CLASSES=9, but the data has 10 genres")
