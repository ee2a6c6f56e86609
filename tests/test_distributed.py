"""Two processes do one process's work: the same clips, draws and rows; one that dies ends all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import SMALL_RUN

from stemgenre import checkpoint
from stemgenre.cache import StemCache

ROOT = Path(__file__).parents[1]
# Without dropout and BatchNorm statistics, a batch in two halves is the same batch.
HEAD_ONLY = ("FREEZE_STAGES=9", "FROZEN_BATCHNORM=fixed", "HEAD_DROPOUT=(0,0)", "LR=1e-3")


def start(processes, *knobs):
    """train.py of a small run, started with so many processes."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher = [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *(launcher if processes > 1 else []), "train.py"]
    return subprocess.Popen(
        [*command, *SMALL_RUN, *map(str, knobs)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, seconds=180):
    output, _ = process.communicate(timeout=seconds)
    return output


@pytest.fixture(scope="module")
def both(small_data, tmp_path_factory):
    """Output folders of the same run with one and with two processes."""
    folders = []
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"processes_{processes}")
        process = start(processes, *HEAD_ONLY, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}")
        output = finish(process)
        assert process.returncode == 0, output
        assert output.count("best epoch") == 1, "one process writes the log"
        folders.append(out)
    return folders


def test_two_processes_learn_what_one_learns(both):
    one, two = (checkpoint.load(out / "checkpoint.pth", "checkpoint") for out in both)
    assert one["channels"][0] == pytest.approx(two["channels"][0], abs=1e-6)
    for name, tensor in one["weights"].items():
        assert torch.allclose(tensor.float(), two["weights"][name].float(), atol=1e-5), name


def test_two_processes_count_and_predict_every_clip_once(both):
    one, two = (pd.read_csv(out / "metrics.csv").drop(columns="seconds") for out in both)
    pd.testing.assert_frame_equal(one, two, atol=1e-4)
    assert (both[0] / "submit.csv").read_bytes() == (both[1] / "submit.csv").read_bytes()


def test_a_run_goes_on_with_another_number_of_processes(both, small_data, tmp_path):
    knobs = (*HEAD_ONLY, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}")
    assert "best epoch" in finish(start(2, *knobs, "EPOCHS=1"))
    resumed = start(1, *knobs, "RESUME_FROM_CHECKPOINT=True")
    assert "resumed from" in finish(resumed)
    assert resumed.returncode == 0
    assert len(pd.read_csv(tmp_path / "metrics.csv")) == 2


def test_two_processes_share_the_separation(small_data, tiny_repo, tmp_path):
    process = start(
        2, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path / 'out'}",
        f"SEPARATION_CACHE_DIR={tmp_path / 'stems'}", f"SEPARATION_REPO={tiny_repo}",
        "SEPARATION_MODEL=htdemucs", "EPOCHS=1",
    )  # fmt: skip
    output = finish(process, 300)
    assert process.returncode == 0, output
    cache = StemCache(tmp_path / "stems", model="htdemucs", sample_rate=11025)
    clips = list(small_data.rglob("*.au"))
    assert len(clips) == 40
    for path in clips:
        assert cache.is_current(path.stem, path)


def workers_of(process):
    """Process ids of the two ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def test_a_killed_process_ends_the_others_and_the_run_can_go_on(small_data, tmp_path):
    knobs = (f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}", "EPOCHS=400", "PATIENCE=400")
    process = start(2, *knobs)
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    output = finish(process, 60)
    assert process.returncode != 0
    assert "RESUME_FROM_CHECKPOINT=True" in output
    done = checkpoint.load(tmp_path / "checkpoint.pth", "checkpoint")["progress"]["epoch"]
    resumed = start(2, *knobs[:2], f"EPOCHS={done + 1}", "RESUME_FROM_CHECKPOINT=True")
    assert "best epoch" in finish(resumed)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(small_data, tmp_path):
    process = start(2, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}", "BATCH_SIZE=9")
    assert "BATCH_SIZE=9 does not divide by 2 processes" in finish(process)
    assert process.returncode != 0
