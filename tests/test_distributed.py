"""Two processes do one process's work: the same clips and augmentation; one that dies ends all.

Two processes train from scratch, separation included, until one of them is killed; two resume what
one process began, and end as that does. They are forked, with what torchrun tells its processes;
the heavy test starts torchrun itself.
"""

import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import ROOT, SMALL_RUN, limit_images, run_training, wait_until
from kill_points import CONTEXT, free_port, start_server, start_two

from stemgenre.features.log_mel import Frontend
from stemgenre.runtime import MicroBatch, Runtime, StopRequest
from stemgenre.separation.cache import StemCache
from stemgenre.settings import load_settings
from stemgenre.training import checkpoint
from stemgenre.training.inference import compute_logits
from stemgenre.training.model import GenreNet

# Without dropout and BatchNorm statistics, a batch in two halves is the same batch.
HEAD_ONLY = (
    "FREEZE_STAGES=9", "FROZEN_BATCHNORM=fixed", "HEAD_DROPOUT=(0,0)", "LR=1e-3", "MIN_LR=1e-3",
)  # fmt: skip

ENDLESS = ("EPOCHS=9999", "PATIENCE=9999")


@pytest.fixture(scope="module")
def overrides(small_data, fast_repo, tmp_path_factory):
    """KEY=VALUE words of a run whose stems are separated by a tiny Demucs."""
    stems = tmp_path_factory.mktemp("distributed") / "stems"
    return [
        *SMALL_RUN, *HEAD_ONLY, f"DATA_DIR={small_data}", f"SEPARATION_CACHE_DIR={stems}",
        f"SEPARATION_REPO={fast_repo}", "SEPARATION_MODEL=htdemucs",
    ]  # fmt: skip


def start_torchrun(*words):
    """train.py, started by torchrun as two processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "tests/tiny_train.py"]
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def workers_of(process):
    """Process ids of the two ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def output_of(ranks):
    """What two processes that ended well have printed."""
    ended = [rank.wait() for rank in ranks]
    output = "".join(output for _, output in ended)
    assert [code for code, _ in ended] == [0, 0], output
    return output


@pytest.fixture(scope="module")
def killed(overrides, tmp_path_factory):
    """(output folder, exit code, output) of a process whose other was killed after an epoch."""
    out = tmp_path_factory.mktemp("killed")
    ranks = start_two([*overrides, *ENDLESS, f"OUTPUT_DIR={out}"])
    wait_until((out / "checkpoint.pth").exists)
    ranks[1].process.kill()
    return out, *ranks[0].wait()


@pytest.fixture(scope="module")
def both(overrides, killed, tmp_path_factory):
    """Output folders of a run by one process, and of one whose second epoch is by two."""
    one, two = (tmp_path_factory.mktemp("both") / name for name in ("one", "two"))
    settings = [*overrides, f"OUTPUT_DIR={one}"]
    run_training(load_settings([*settings, "EPOCHS=1"]))
    shutil.copytree(one, two)
    resume = ("EPOCHS=2", "RESUME_FROM_CHECKPOINT=True")
    ranks = start_two([*overrides, f"OUTPUT_DIR={two}", *resume], max_images=4)
    run_training(load_settings([*settings, *resume]))
    output = output_of(ranks)
    assert "resumed after epoch 1" in output
    assert output.count("best epoch") == 1, "one process writes the log"
    assert "out of memory" not in output, "validation, too, takes half of BATCH_SIZE=8 per process"
    assert "Warning" not in output
    return one, two


def test_two_processes_separate_every_clip_once(killed, overrides, small_data):
    settings = load_settings(overrides)
    cache = StemCache(settings.cache_folder, model="htdemucs", sample_rate=11025)
    clips = list(small_data.rglob("*.au"))
    assert len(clips) == 40
    for path in clips:
        assert cache.is_current(path.stem, path)
    assert killed[2].count("stems: 40 of 40 clips") == 1


def test_two_processes_learn_what_one_learns(both):
    one, two = (checkpoint.load(out / "checkpoint.pth", "checkpoint") for out in both)
    for name, tensor in one["weights"].items():
        assert torch.allclose(tensor.float(), two["weights"][name].float(), atol=1e-5), name


def test_two_processes_count_and_predict_every_clip_once(both, killed):
    one, two, first = (
        pd.read_csv(out / "metrics.csv").drop(columns=["seconds", "run_id"])
        for out in (*both, killed[0])
    )
    pd.testing.assert_frame_equal(one, two, atol=1e-4)
    pd.testing.assert_frame_equal(one[:1], first[:1], atol=1e-4)
    assert (both[0] / "submit.csv").read_bytes() == (both[1] / "submit.csv").read_bytes()


@pytest.mark.parametrize("beside", ["nothing", "another run's"])
def test_two_processes_predict_with_the_model_that_one_of_them_writes(
    beside, both, overrides, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(both[1], out)
    model = checkpoint.load(out / "best_model.pth", "model")
    (out / "best_model.pth").unlink()
    if beside != "nothing":
        model["weights"]["classifier.4.weight"].neg_()
        checkpoint.save(out / "best_model.pth", "model", model | {"run_id": "another"})
    words = [*overrides, f"OUTPUT_DIR={out}", "EPOCHS=2", "RESUME_FROM_CHECKPOINT=True"]
    output_of(start_two(words, max_images=4))
    name = "test_probabilities.csv"
    assert (out / name).read_bytes() == (both[1] / name).read_bytes()


def test_two_processes_measure_every_clip_once(both, killed):
    one, two = (
        checkpoint.load(out / "checkpoint.pth", "checkpoint")["channel_stats"]
        for out in (both[0], killed[0])
    )
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)


@pytest.mark.heavy
def test_under_torchrun_a_killed_process_ends_the_other(overrides, tmp_path):
    process = start_torchrun(*overrides, *ENDLESS, f"OUTPUT_DIR={tmp_path}")
    wait_until((tmp_path / "checkpoint.pth").exists)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode
    assert "RESUME_FROM_CHECKPOINT=True" in output


def test_a_killed_process_ends_the_other_and_one_process_can_resume(killed, overrides):
    out, code, output = killed
    assert code != 0
    assert "RESUME_FROM_CHECKPOINT=True" in output
    done = checkpoint.load(out / "checkpoint.pth", "checkpoint")["train_state"]["epoch"]
    resume = (f"EPOCHS={done + 1}", "PATIENCE=9999", "RESUME_FROM_CHECKPOINT=True")
    run_training(load_settings([*overrides, f"OUTPUT_DIR={out}", *resume]))
    assert len(pd.read_csv(out / "metrics.csv")) == done + 1


def test_batchnorm_follows_the_clips_of_both_processes(small_data, tmp_path):
    """Weights that hardly move, and batches of equal halves: its input is that of one process."""
    overrides = [*SMALL_RUN, f"DATA_DIR={small_data}", "TEST_SIZE=0.33", "BATCH_SIZE=4"]
    overrides += ["EPOCHS=1", "LR=1e-30", "MIN_LR=0", "WEIGHT_DECAY=0"]
    ranks = start_two([*overrides, f"OUTPUT_DIR={tmp_path / 'two'}"])
    run_training(load_settings([*overrides, f"OUTPUT_DIR={tmp_path / 'one'}"]))
    output_of(ranks)
    one, two = (
        checkpoint.load(tmp_path / name / "checkpoint.pth", "checkpoint")["weights"]
        for name in ("one", "two")
    )
    mean, variance = "features.0.1.running_mean", "features.0.1.running_var"
    assert torch.allclose(one[mean], two[mean], atol=1e-5)
    assert torch.allclose(one[variance], two[variance], rtol=0.3), "within a process, on a CPU"


def test_a_process_that_fails_says_why_and_ends_without_waiting_for_the_others(overrides, tmp_path):
    words = [*overrides, f"OUTPUT_DIR={tmp_path}", "EPOCHS=1"]
    ends = [rank.wait() for rank in start_two(words, max_images=3, group_waits=True)]
    output = "".join(output for _, output in ends)
    assert [code for code, _ in ends] == [2, 2], output
    assert "error: GPU out of memory with 4 clips per forward pass; set MICRO_BATCH" in output


def validate(rank, port):
    """Exits with the micro-batch's size after a validation in which rank 1 runs out of memory."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    limit_images(8 if rank == 0 else 2)
    net, micro_batch = GenreNet(2), MicroBatch(4)
    frontend = Frontend(load_settings(SMALL_RUN).features, device=torch.device("cpu"))
    windows = types.SimpleNamespace(
        windows=lambda clips, rows, **how: ((row, torch.ones(4, 11025)) for row in rows)
    )
    compute_logits(
        net, frontend, windows, pd.DataFrame({"clip": list("abcdefgh")}), micro_batch=micro_batch,
        amp_dtype=None, runtime=Runtime(torch.device("cpu"), rank, 2, StopRequest()),
    )  # fmt: skip
    sys.exit(micro_batch.size)


def test_memory_that_runs_out_in_one_process_halves_the_micro_batch_of_both():
    """In a training step each takes equally many parts: SyncBatchNorm waits for all."""
    start_server()
    port = free_port()
    ranks = [CONTEXT.Process(target=validate, args=(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [2, 2]


def test_machines_that_share_no_file_system_are_named_at_the_start(overrides, tmp_path):
    ranks = start_two([*overrides, f"OUTPUT_DIR={tmp_path}/{{rank}}"])
    (code, output), (other_code, other_output) = (rank.wait() for rank in ranks)
    assert code and other_code
    output += other_output
    assert "process 1 of 2 does not see the files that process 0 writes to" in output
    assert "separat" not in output.split("does not see")[0], "before any work"
    assert 'Traceback (most recent call last):\n  File "train.py' not in output
    assert not list((tmp_path / "0").glob(".shared*"))
