"""Two runs never share an OUTPUT_DIR; a run that was killed holds nobody up."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import kill_points
import pytest
import torch
from conftest import SMALL_RUN
from helpers import ROOT

from stemgenre import lock
from stemgenre.errors import UserError
from stemgenre.files import remove_leftovers, replacing
from stemgenre.runtime import Runtime, StopRequest


def process(rank=0):
    return Runtime(torch.device("cpu"), rank, 2, StopRequest())


def test_a_second_run_is_told_who_has_the_folder_and_since_when(tmp_path):
    first, second = (lock.hold(tmp_path / "out", process()) for _ in range(2))
    with first, pytest.raises(UserError) as caught, second:
        pass
    message = str(caught.value)
    assert f"{tmp_path / 'out'} is in use by process {os.getpid()}" in message
    assert socket.gethostname() in message
    assert time.strftime("since %Y-%m-%d") in message
    assert "set OUTPUT_DIR elsewhere" in message
    assert "\n" not in message


def test_the_folder_is_free_after_the_run_and_for_other_ranks(tmp_path):
    for _ in range(2):
        with lock.hold(tmp_path, process()), lock.hold(tmp_path, process(rank=1)):
            pass
    assert (tmp_path / lock.NAME).read_text() == ""


def test_a_second_script_stops_and_leaves_the_other_runs_log_alone(small_data, tmp_path):
    knobs = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}"]
    with lock.hold(tmp_path, process()):
        code, output = kill_points.run(knobs)
    assert code == 2
    pattern = rf"error: {tmp_path} is in use by process {os.getpid()} on .+ since .+; .+\n"
    assert re.fullmatch(pattern, output)
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


HOLD = """
import sys, time, torch
from stemgenre import files, lock
from stemgenre.runtime import Runtime, StopRequest
with lock.hold(sys.argv[1], Runtime(torch.device("cpu"), 0, 1, StopRequest())):
    with files.replacing(sys.argv[1] + "/checkpoint.pth") as file:
        file.write(b"half")
        file.flush()
        print("ready", flush=True)
        time.sleep(100)
"""


def test_a_lock_and_a_half_written_file_last_as_long_as_their_process(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"ready\n"
    (part,) = tmp_path.glob(".*.part")
    remove_leftovers(tmp_path)
    assert part.exists(), "it is being written"
    with pytest.raises(UserError, match=f"process {other.pid} "), lock.hold(tmp_path, process()):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with lock.hold(tmp_path, process()):
        remove_leftovers(tmp_path)
        assert not part.exists()


def test_other_peoples_files_are_no_leftovers(tmp_path):
    names = [".film.mkv.part", "x.12.0123abcd.part", ".x.part", ".x.12.0123abcd.partial"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("name", ["x" * 251 + ".npz", "曲" * 83 + ".npz"])
def test_a_name_may_be_as_long_as_the_file_system_has_it(tmp_path, name):
    with replacing(tmp_path / name) as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_file_before_stays_under_its_own_name(tmp_path):
    path, previous = tmp_path / "a.pth", tmp_path / "a.previous.pth"
    for content in (b"1", b"2", b"3"):
        with replacing(path, previous=previous) as file:
            file.write(content)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    with pytest.raises(UserError), replacing(path, previous=previous):
        raise OSError(28, "No space left on device")
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
