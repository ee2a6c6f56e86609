"""A run that is killed at any moment and started again ends as an undisturbed one.

The same weights, metrics, submission and stems, bit for bit, on a CPU.
"""

import concurrent.futures
import os
import shutil
import signal

import kill_points
import pytest
import soundfile
from helpers import SMALL_RUN, assert_same_run, run_results, tone

from stemgenre.training.checkpoint import previous_path

EVERY_STEP = "CHECKPOINT_MINUTES=1e-9"
OLDER = ("LR=3e-3", "EPOCHS=3")
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
    ("open:.*.npz*", 1), ("half:.*.npz*", 2), ("replace:*.npz", 3), ("replaced:*.npz", 2),
    ("open:.*.npz*", 3),
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


def stored_stems(cache):
    return {path.name: path.read_bytes() for path in cache.glob("*.npz")}


def run(overrides, out, *, fresh=False, **event):
    """(exit code, output) of one run; it resumes from a checkpoint if there is one, or is fresh."""
    resume = (out / "checkpoint.pth").exists() and not fresh
    options = [*overrides, f"OUTPUT_DIR={out}", f"RESUME_FROM_CHECKPOINT={resume}"]
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


def assert_ends_well(overrides, out, cache, expected):
    """Runs to the end, which has to be that of the undisturbed run; returns the output."""
    for path in cache.glob(".*.part"):  # younger ones could be another run's
        os.utime(path, (0, 0))
    code, output = run(overrides, out)
    assert code == 0, output
    assert_same_run(out, expected[0])
    assert stored_stems(cache) == expected[1]
    left = [path for folder in (out, out / "report", cache) for path in folder.glob(".*.part")]
    assert not left, "what a killed run left unfinished is removed"
    return output


def kill_at_each(events, overrides, out, *, used=False):
    """One killed run after another in `out`, which may be `used` by an older run."""
    for number, (event, count) in enumerate(events):
        options = {"with_report": "index.html" in event, "fresh": used and number == 0}
        code, output = run(overrides, out, at=event, count=count, **options)
        assert code == kill_points.KILLED, f"{event} {count}: {output}"


@pytest.fixture(scope="module")
def training(small_data, tmp_path_factory):
    """(overrides, the cache, (results, stems) of an undisturbed run)."""
    out = tmp_path_factory.mktemp("training")
    overrides = [*SMALL_RUN, f"DATA_DIR={small_data}"]
    code, output = run(overrides, out)
    assert code == 0, output
    cache = small_data / "separated"
    return [*overrides, EVERY_STEP], cache, (run_results(out), stored_stems(cache))


@pytest.fixture(scope="module")
def older(training, tmp_path_factory):
    """The output folder of a finished run with other settings; not to be changed."""
    out = tmp_path_factory.mktemp("older")
    code, output = run([*training[0][:-1], *OLDER], out)
    assert code == 0, output
    return out


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(events, id=moment, marks=[pytest.mark.heavy] * (moment != "while saving"))
        for moment, events in TRAINING.items()
    ],
)
def test_killed_in_training(training, older, tmp_path, events):
    overrides, cache, expected = training
    out = shutil.copytree(older, tmp_path / "out")
    kill_at_each(events, overrides, out, used=True)
    assert_ends_well(overrides, out, cache, expected)
    assert not [path for path in out.iterdir() if "older" in path.name]


@pytest.mark.parametrize(
    ("at", "action"),
    [
        ("step", kill_points.KILL),
        pytest.param("replaced:best_model.pth", kill_points.KILL, marks=pytest.mark.heavy),
        pytest.param("open:.checkpoint.pth*", kill_points.FULL, marks=pytest.mark.heavy),
    ],
)
def test_a_fresh_run_without_a_checkpoint_yet_never_resumes_the_older_run(
    training, older, tmp_path, at, action
):
    overrides, cache, expected = training
    out, overrides = shutil.copytree(older, tmp_path / "out"), overrides[:-1]
    code, output = run(overrides, out, fresh=True, at=at, action=action)
    assert code != 0, output
    options = [*overrides, f"OUTPUT_DIR={out}", "RESUME_FROM_CHECKPOINT=True"]
    code, output = kill_points.run(options)
    assert code == 2, "resumed as the README says"
    assert "there is no checkpoint" in output
    assert "To resume from checkpoint.older.pth, rename it to checkpoint.pth" in output
    assert_ends_well(overrides, out, cache, expected)


@pytest.fixture(scope="module")
def killed(training, tmp_path_factory):
    """The output folder of a run that was killed in the second epoch; not to be changed."""
    out = tmp_path_factory.mktemp("killed")
    kill_at_each([("step", 5)], training[0], out)
    return out


@pytest.mark.parametrize("fault", ["torn", "flipped"])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(training, killed, tmp_path, fault):
    overrides, cache, expected = training
    out = shutil.copytree(killed, tmp_path / "out")
    path = out / "checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if fault == "flipped" else data[: len(data) // 2])
    output = assert_ends_well(overrides, out, cache, expected)
    assert f"the previous one is used, {previous_path(path)}" in output
    assert f"resumed after epoch 1 ({previous_path(path)})" in output


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(training, killed, tmp_path):
    overrides, cache, expected = training
    out = shutil.copytree(killed, tmp_path / "out")
    (out / "checkpoint.pth").write_bytes(b"damaged")
    resume = [*overrides, f"OUTPUT_DIR={out}", "RESUME_FROM_CHECKPOINT=True"]
    code, output = kill_points.run(resume, at="replace:checkpoint.pth")
    assert code == kill_points.KILLED, output
    assert (out / "checkpoint.pth").read_bytes() == b"damaged"
    assert_ends_well(overrides, out, cache, expected)


def test_a_deleted_checkpoint_is_no_checkpoint(training, killed, tmp_path):
    out = shutil.copytree(killed, tmp_path / "out")
    for name in ("checkpoint.pth", "best_model.pth"):
        (out / name).unlink()
    options = [*training[0], f"OUTPUT_DIR={out}", "RESUME_FROM_CHECKPOINT=True"]
    code, output = kill_points.run(options)
    assert code == 2, output
    assert "there is no checkpoint" in output
    assert "RESUME_FROM_CHECKPOINT=False starts from scratch" in output
    assert "To resume from checkpoint.previous.pth, rename it to checkpoint.pth" in output


@pytest.mark.parametrize("events", [FULL[::2], pytest.param(FULL, marks=pytest.mark.heavy)])
def test_a_full_disk_ends_in_one_line_and_nothing_is_lost(training, tmp_path, events):
    overrides, cache, expected = training
    for event, count, name in events:
        code, output = run(overrides, tmp_path, at=event, count=count, action=kill_points.FULL)
        assert code == 2, output
        assert (
            f"{name} cannot be written: File too large; files may not be that large there" in output
        )
        assert "Traceback" not in output
        assert not list(tmp_path.glob(".*.part"))
    assert_ends_well(overrides, tmp_path, cache, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_resume_and_does(training, tmp_path, number):
    overrides, cache, expected = training
    code, output = run(overrides, tmp_path, at="step", count=2, action=number)
    assert code == 128 + number
    assert "To resume, run again with RESUME_FROM_CHECKPOINT=True" in output
    assert "Traceback" not in output
    assert "resumed in epoch 1 after step 2" in assert_ends_well(
        overrides, tmp_path, cache, expected
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("DATA_DIR=/nowhere/at/all", "python train.py --demo"),
        ("IMG_SIZ=300", "did you mean IMG_SIZE?"),
        ("NUM_CLASSES=9", "NUM_CLASSES=9, but the data has 10 genres"),
        ("OUTPUT_DIR=/proc/nowhere", "cannot be written"),
        ("DEVICE=cuda:99", "DEVICE=cuda:99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(override, message, small_data, tmp_path):
    folders = [f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}"]
    code, output = kill_points.run([*SMALL_RUN, *folders, override])
    assert code == 2, output
    assert message in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in output


def test_without_space_for_the_log_the_run_continues_without_it(training, tmp_path):
    overrides, cache, expected = training
    output = assert_ends_well([*overrides, "LOG_FILE=/dev/full"], tmp_path, cache, expected)
    assert output.count("/dev/full can no longer be written (No space left on device)") == 1
    assert "Traceback" not in output


def test_with_all_stems_cached_the_data_may_be_read_only(training, tmp_path, read_only):
    overrides, cache, expected = training
    read_only(cache, cache.parent)
    code, output = run(overrides, tmp_path, as_user=True)
    assert code == 0, output
    assert_same_run(tmp_path, expected[0])


def test_a_read_only_output_folder_is_named_before_any_work(training, tmp_path, read_only):
    overrides, *_ = training
    read_only(tmp_path)
    code, output = run(overrides, tmp_path, as_user=True)
    assert code == 2
    assert output == (
        f"error: {tmp_path} cannot be written (Permission denied); set OUTPUT_DIR elsewhere\n"
    )


def test_a_clock_that_is_set_back_changes_nothing(training, killed, tmp_path):
    overrides, cache, expected = training
    out = shutil.copytree(killed, tmp_path / "out")
    code, output = run(overrides, out, backwards=True)
    assert code == 0, output
    assert_same_run(out, expected[0])


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
    """(overrides without DATA_DIR, what an undisturbed run ends with)."""
    overrides = [*SMALL_RUN, "SEPARATION_MODEL=htdemucs", f"SEPARATION_REPO={tiny_repo}"]
    overrides += ["EPOCHS=1", "NUM_CLASSES=auto", "CLIP_SECONDS=0.6"]
    data = mixes()
    code, output = run([*overrides, f"DATA_DIR={data}"], data / "out")
    assert code == 0, output
    return overrides, (run_results(data / "out"), stored_stems(data / "separated"))


def test_killed_in_the_separation(separation, mixes):
    overrides, expected = separation
    data = mixes()
    overrides = [*overrides, f"DATA_DIR={data}"]
    kill_at_each(SEPARATION, overrides, data / "out")
    assert_ends_well(overrides, data / "out", data / "separated", expected)


def test_a_full_disk_in_the_separation_keeps_what_is_separated(separation, mixes):
    overrides, expected = separation
    data = mixes()
    overrides = [*overrides, f"DATA_DIR={data}"]
    code, output = run(
        overrides, data / "out", at="open:.*.npz.*", count=5, action=kill_points.FULL
    )
    assert code == 2, output
    assert ".npz cannot be written: File too large" in output
    assert "Traceback" not in output
    assert len(list((data / "separated").glob("*.npz"))) == 4
    output = assert_ends_well(overrides, data / "out", data / "separated", expected)
    assert "7 of 11 clips are to be separated" in output


def test_a_read_only_cache_is_named(separation, mixes, read_only):
    overrides, _ = separation
    data = mixes()
    (data / "separated").mkdir()
    read_only(data / "separated")
    code, output = run([*overrides, f"DATA_DIR={data}"], data / "out", as_user=True)
    assert code == 2, output
    assert ".npz cannot be written: Permission denied; choose a folder that can" in output
    assert "Traceback" not in output


def test_two_runs_at_once_share_one_cache(separation, mixes):
    overrides, expected = separation
    data = mixes()
    overrides = [*overrides, f"DATA_DIR={data}"]
    outs = [data / "one", data / "two"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda out: run(overrides, out), outs))
    assert [code for code, _ in ends] == [0, 0], ends
    for out in outs:
        assert_same_run(out, expected[0])
    assert stored_stems(data / "separated") == expected[1]
