"""The process knows its device, its seeds and how it ends: with 0, 2 or 128 + the signal."""

import logging
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from stemgenre.errors import UserError
from stemgenre.runtime import Runtime, StopRequest, log_to_file, pick_device, seed_of, worker_count
from stemgenre.settings import MachineSettings

SCRIPT = """
import os, signal, sys, warnings
from pathlib import Path
from stemgenre import runtime
from stemgenre.errors import UserError
from stemgenre.settings import MachineSettings

def main():
    with runtime.start(MachineSettings(device="cpu")) as run:
        runtime.log_to_file(Path(sys.argv[1]), run)
        runtime.log.info("begun on %s", run.device)
        warnings.warn("beware")
        ENDING
        runtime.log.info("ended")

if __name__ == "__main__":
    runtime.run_script(main)
"""
STOP = "if run.stop_requested():\n            raise run.interrupted()"
ENDINGS = {  # name: (what main does, exit code)
    "well": (STOP, 0),
    "user error": ('raise UserError("LR=0 does not fit")', 2),
    "SIGINT": (f"os.kill(os.getpid(), signal.SIGINT)\n        {STOP}", 130),
    "SIGTERM": (f"os.kill(os.getpid(), signal.SIGTERM)\n        {STOP}", 143),
    "SIGINT twice": ("[os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]", 130),
    "our mistake": ("assert False, 'a bug'", 1),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{ending: (exit code, stdout, stderr, log file's text)}, all run at once."""
    folder = tmp_path_factory.mktemp("runs")
    started = {}
    for number, (name, (ending, _)) in enumerate(ENDINGS.items()):
        log = folder / f"{number}" / "log.txt"
        command = [sys.executable, "-c", SCRIPT.replace("ENDING", ending), log]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = subprocess.Popen(command, cwd=ROOT, **pipes), log
    found = {}
    for name, (process, log) in started.items():
        stdout, stderr = process.communicate(timeout=120)
        found[name] = process.returncode, stdout, stderr, log.read_text()
    return found


@pytest.mark.parametrize(("name", "code"), [(name, end[1]) for name, end in ENDINGS.items()])
def test_the_exit_code_says_how_it_ended(runs, name, code):
    assert runs[name][0] == code


def test_what_the_user_can_fix_is_one_line_without_a_traceback(runs):
    assert runs["user error"][2] == "error: LR=0 does not fit\n"
    for name in ("SIGINT", "SIGTERM", "SIGINT twice"):
        assert "Traceback" not in runs[name][2]
    assert "a bug" in runs["our mistake"][2]
    assert "Traceback" in runs["our mistake"][2]


@pytest.mark.parametrize("name", ["well", "user error", "SIGINT twice"])
def test_the_log_file_has_what_the_console_showed(runs, name):
    _, stdout, stderr, text = runs[name]
    shown = (stdout + stderr).splitlines()
    logged = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in text.splitlines()]
    assert logged == shown
    assert any(line.startswith("warning: ") and "beware" in line for line in shown)
    assert "begun on cpu" in shown


@pytest.fixture
def project_log():
    """The project's logger, put back as it was afterwards."""
    loggers = [logging.getLogger("stemgenre"), logging.getLogger("py.warnings")]
    before = [list(logger.handlers) for logger in loggers]
    yield loggers[0]
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers = handlers


def test_only_the_first_process_writes_the_log_file(tmp_path, project_log):
    for rank in (0, 1):
        run = Runtime(torch.device("cpu"), rank, 2, StopRequest())
        log_to_file(tmp_path / str(rank) / "log.txt", run)
    project_log.error("a line")
    assert "a line" in (tmp_path / "0" / "log.txt").read_text()
    assert not (tmp_path / "1").exists()


def test_a_log_is_continued_by_the_next_run(tmp_path, project_log):
    run = Runtime(torch.device("cpu"), 0, 1, StopRequest())
    (tmp_path / "log.txt").write_text("earlier\n")
    log_to_file(tmp_path / "log.txt", run)
    project_log.error("later")
    assert re.fullmatch(r"earlier\n.*later\n", (tmp_path / "log.txt").read_text())


def test_an_output_folder_that_cannot_be_is_named(tmp_path, project_log):
    (tmp_path / "file").write_text("")
    run = Runtime(torch.device("cpu"), 0, 1, StopRequest())
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        log_to_file(tmp_path / "file" / "log.txt", run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "auto, cuda, cuda:1, mps or cpu"),
        ("0", "auto, cuda, cuda:1, mps or cpu"),
        ("cuda:x", "auto, cuda, cuda:1, mps or cpu"),
        ("cuda:-1", "cpu"),
        ("meta", "auto, cuda, cuda:1, mps or cpu"),
        ("cuda:99", "CUDA devices seen; try DEVICE=cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(name, said):
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        pick_device(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_auto_takes_what_there_is_and_cpu_is_always_there():
    assert pick_device("cpu").type == "cpu"
    usable = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.backends.mps.is_available():
        assert pick_device("auto").type == usable


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_without_a_card_cuda_is_refused(name):
    with pytest.raises(UserError, match=f"DEVICE={name} is not there: 0 CUDA devices"):
        pick_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")
def test_each_local_process_has_its_own_card():
    for rank in range(torch.cuda.device_count()):
        assert pick_device("cuda", local_rank=rank, world=2).index == rank


@pytest.mark.parametrize(("given", "count"), [(1, 1), (3, 3), (100, 100)])
def test_the_number_of_workers_is_the_one_given(given, count):
    assert worker_count(MachineSettings(num_workers=given)) == count


def test_auto_workers_are_one_to_eight():
    assert 1 <= worker_count(MachineSettings(num_workers="auto")) <= 8


def test_a_seed_is_the_same_in_every_run_and_on_every_machine():
    assert seed_of(42, 3, 7) == 2561115902547369509
    assert 0 <= seed_of(42, 3, 7) < 2**63


def test_every_part_of_a_seed_counts():
    parts = [(seed, epoch, clip) for seed in (0, 1, 2**31 - 1) for epoch in range(9) for clip in
             range(30)]  # fmt: skip
    assert len({seed_of(*part) for part in parts}) == len(parts)
    assert seed_of(1, 2) != seed_of(2, 1)
