"""A run that is killed at any moment and started again ends as one that nobody disturbed.

The same weights, metrics, submission and stems, bit for bit, on a CPU.
"""

import concurrent.futures
import os
import shutil

import kill_points
import pandas as pd
import pytest
import soundfile
import torch
from conftest import SMALL_RUN
from helpers import tone

from stemgenre import checkpoint
from stemgenre.checkpoint import previous_path

SMALLER_RUN = [*SMALL_RUN, "FREEZE_STAGES=8"]  # makes smaller checkpoints, too
EVERY_STEP = "CHECKPOINT_MINUTES=1e-9"
TRAINING = {  # one run each, killed at event after event; 2 epochs of 3 steps, saved after each
    "before anything is saved": [
        ("measure", 7), ("half:.index.html*", 1), ("step", 1), ("half:.checkpoint.pth*", 1),
        ("replaced:checkpoint.pth", 1), ("step", 2),
    ],
    "while saving": [
        ("half:.checkpoint.pth*", 2), ("unlink:checkpoint.previous.pth", 1),
        ("link:checkpoint.previous.pth", 1), ("replace:checkpoint.pth", 2),
        ("replaced:checkpoint.pth", 1),
    ],
    "at the end of an epoch": [
        ("validate", 1), ("half:.best_model.pth*", 1), ("replaced:best_model.pth", 1),
        ("half:.metrics.csv*", 1), ("replaced:metrics.csv", 1),
    ],
    "at the end": [
        ("predict", 1), ("half:.submit.csv*", 1), ("replace:submit.csv", 1),
        ("replaced:submit.csv", 1), ("half:.valid_predictions.csv*", 1),
        ("replace:test_probabilities.csv", 1), ("half:.summary.json*", 1),
        ("half:.index.html*", 2),
    ],
}  # fmt: skip
SEPARATION = [
    ("separate", 1), ("half:.*.npz*", 2), ("replace:*.npz", 3), ("replaced:*.npz", 2),
    ("separate", 3),
]  # fmt: skip
FULL = [
    ("open:.checkpoint.pth*", 2, "checkpoint.pth"),
    ("open:.best_model.pth*", 1, "best_model.pth"),
    ("open:.metrics.csv*", 1, "metrics.csv"),
    ("open:.submit.csv*", 1, "submit.csv"),
    ("open:.valid_predictions.csv*", 1, "valid_predictions.csv"),
    ("open:.test_probabilities.csv*", 1, "test_probabilities.csv"),
    ("open:.summary.json*", 1, "summary.json"),
]


TABLES = ("submit.csv", "valid_predictions.csv", "test_probabilities.csv")


@pytest.fixture(scope="module", autouse=True)
def server():
    kill_points.start_server()


def result(out, cache):
    """What must be equal: weights, best weights, metrics without seconds, predictions, stems."""
    saved = checkpoint.load(out / "checkpoint.pth", "checkpoint")
    best = checkpoint.load(out / "best_model.pth", "model")
    metrics = pd.read_csv(out / "metrics.csv").drop(columns="seconds")
    stems = {path.name: path.read_bytes() for path in cache.glob("*.npz")}
    tables = [(out / name).read_bytes() for name in TABLES]
    return [saved["weights"], best["weights"]], metrics, tables, stems


def assert_equal(one, other):
    for left, right in zip(one[0], other[0], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    pd.testing.assert_frame_equal(one[1], other[1], check_exact=True)
    assert one[2:] == other[2:]


def run(knobs, out, **event):
    """(exit code, output) of one run; it goes on from a checkpoint if there is one."""
    path = out / "checkpoint.pth"
    resume = path.exists() or previous_path(path).exists()
    options = [*knobs, f"OUTPUT_DIR={out}", f"RESUME_FROM_CHECKPOINT={resume}"]
    return kill_points.run(options, **event)


@pytest.fixture
def read_only():
    """A function: makes folders read-only until the test is over."""
    changed = []

    def change(*folders):
        for folder in folders:
            changed.append((folder, folder.stat().st_mode))
            folder.chmod(0o555)

    yield change
    for folder, mode in changed:
        folder.chmod(mode)


def assert_ends_well(knobs, out, cache, expected):
    code, output = run(knobs, out)
    assert code == 0, output
    assert_equal(result(out, cache), expected)
    left = [path for folder in (out, out / "report", cache) for path in folder.glob(".*.part")]
    assert not left, "what a killed run left half-written is gone"
    return output


def kill_at_each(events, knobs, out):
    for event, count in events:
        code, output = run(knobs, out, kill_at=event, count=count)
        assert code == kill_points.KILLED, f"{event} {count}: {output}"


@pytest.fixture(scope="module")
def training(small_data, tmp_path_factory):
    """(knobs, the cache, what an undisturbed run ends with)."""
    out = tmp_path_factory.mktemp("training")
    knobs = [*SMALLER_RUN, f"DATA_DIR={small_data}"]
    code, output = run(knobs, out)
    assert code == 0, output
    cache = small_data / "separated"
    return [*knobs, EVERY_STEP], cache, result(out, cache)


@pytest.mark.parametrize("events", TRAINING.values(), ids=TRAINING)
def test_killed_in_training(training, tmp_path, events):
    knobs, cache, expected = training
    kill_at_each(events, knobs, tmp_path)
    assert_ends_well(knobs, tmp_path, cache, expected)


@pytest.fixture(scope="module")
def killed(training, tmp_path_factory):
    """The output folder of a run that was killed in the second epoch; not to be changed."""
    out = tmp_path_factory.mktemp("killed")
    kill_at_each([("step", 5)], training[0], out)
    return out


@pytest.mark.parametrize("fault", ["torn", "flipped", "missing"])
def test_a_checkpoint_that_is_lost_is_replaced_by_the_one_before(training, killed, tmp_path, fault):
    knobs, cache, expected = training
    out = shutil.copytree(killed, tmp_path / "out")
    path = out / "checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if fault != "missing":
        path.write_bytes(data if fault == "flipped" else data[: len(data) // 2])
    output = assert_ends_well(knobs, out, cache, expected)
    assert f"the one before it is used, {previous_path(path)}" in output
    assert "resumed from epoch 2, step 0" in output


def test_a_full_disk_ends_in_one_line_and_nothing_is_lost(training, tmp_path):
    knobs, cache, expected = training
    for event, count, name in FULL:
        code, output = run(knobs, tmp_path, full_at=event, count=count)
        assert code == 2, output
        assert f"{name} cannot be written: File too large; a file may not be that long" in output
        assert "train_log.txt cannot be written any more" in output
        assert "Traceback" not in output
        assert not list(tmp_path.glob(".*.part"))
    assert_ends_well(knobs, tmp_path, cache, expected)


def test_without_room_for_the_log_the_run_goes_on_without_it(training, tmp_path):
    knobs, cache, expected = training
    output = assert_ends_well([*knobs, "LOG_FILE=/dev/full"], tmp_path, cache, expected)
    assert output.count("/dev/full cannot be written any more (No space left on device)") == 1
    assert "Traceback" not in output


def test_with_all_stems_cached_the_data_may_be_read_only(training, tmp_path, read_only):
    knobs, cache, expected = training
    read_only(cache, cache.parent)
    code, output = run(knobs, tmp_path, obeying=True)
    assert code == 0, output
    assert_equal(result(tmp_path, cache), expected)


def test_a_read_only_output_folder_is_named_before_any_work(training, tmp_path, read_only):
    knobs, *_ = training
    read_only(tmp_path)
    code, output = run(knobs, tmp_path, obeying=True)
    assert code == 2
    assert output == (
        f"error: {tmp_path} cannot be written (Permission denied); set OUTPUT_DIR elsewhere\n"
    )


def test_a_clock_that_is_set_back_changes_nothing(training, killed, tmp_path):
    knobs, cache, expected = training
    out = shutil.copytree(killed, tmp_path / "out")
    code, output = run(knobs, out, backwards=True)
    assert code == 0, output
    assert_equal(result(out, cache), expected)


@pytest.fixture(scope="module")
def mixes(tmp_path_factory):
    """A function: a new folder with two genres of five clips each, and a test clip."""

    def make():
        folder = tmp_path_factory.mktemp("mixes")
        names = [f"{genre}/{genre}_{n}" for genre in ("blues", "rock") for n in range(5)]
        for number, name in enumerate([*names, "test/test_0"]):
            path = folder / f"{name}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, tone(frequency=200 + 30 * number, seconds=0.6, sr=11025), 11025)
            os.utime(path, ns=(10**18, 10**18))  # it stands in the cache's entry
        return folder

    return make


@pytest.fixture(scope="module")
def separation(mixes, tiny_repo):
    """(knobs without DATA_DIR, what an undisturbed run ends with)."""
    knobs = [*SMALLER_RUN, "SEPARATION_MODEL=htdemucs", f"SEPARATION_REPO={tiny_repo}"]
    knobs += ["EPOCHS=1", "NUM_CLASSES=auto", "CLIP_SECONDS=0.6"]
    data = mixes()
    code, output = run([*knobs, f"DATA_DIR={data}"], data / "out")
    assert code == 0, output
    return knobs, result(data / "out", data / "separated")


def test_killed_in_the_separation(separation, mixes):
    knobs, expected = separation
    data = mixes()
    knobs = [*knobs, f"DATA_DIR={data}"]
    kill_at_each(SEPARATION, knobs, data / "out")
    assert_ends_well(knobs, data / "out", data / "separated", expected)


def test_a_full_disk_in_the_separation_keeps_what_is_separated(separation, mixes):
    knobs, expected = separation
    data = mixes()
    knobs = [*knobs, f"DATA_DIR={data}"]
    code, output = run(knobs, data / "out", full_at="open:.*.npz.*", count=5)
    assert code == 2, output
    assert ".npz cannot be written: File too large" in output
    assert "Traceback" not in output
    assert len(list((data / "separated").iterdir())) == 4
    output = assert_ends_well(knobs, data / "out", data / "separated", expected)
    assert "7 of 11 clips are to be separated" in output


def test_a_read_only_cache_is_named(separation, mixes, read_only):
    knobs, _ = separation
    data = mixes()
    (data / "separated").mkdir()
    read_only(data / "separated")
    code, output = run([*knobs, f"DATA_DIR={data}"], data / "out", obeying=True)
    assert code == 2, output
    assert ".npz cannot be written: Permission denied; choose a folder that can" in output
    assert "Traceback" not in output


def test_two_runs_at_once_share_one_cache(separation, mixes):
    knobs, expected = separation
    data = mixes()
    knobs = [*knobs, f"DATA_DIR={data}"]
    outs = [data / "one", data / "two"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda out: run(knobs, out), outs))
    assert [code for code, _ in ends] == [0, 0], ends
    for out in outs:
        assert_equal(result(out, data / "separated"), expected)
