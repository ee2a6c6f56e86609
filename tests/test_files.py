"""Files are written atomically; two runs never share an OUTPUT_DIR; a kill leaves no lock."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kill_points
import pytest
from helpers import ROOT, SMALL_RUN

from stemgenre import files
from stemgenre.errors import UserError
from stemgenre.files import atomic_write, output_lock, remove_stale_temp_files


def test_a_second_run_is_told_who_has_the_folder_and_since_when(tmp_path):
    first, second = (output_lock(tmp_path / "out") for _ in range(2))
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
        with output_lock(tmp_path), output_lock(tmp_path, is_main=False):
            pass
    assert not (tmp_path / files.LOCK_INFO_NAME).exists()


def test_a_second_script_stops_and_leaves_the_other_runs_log_alone(small_data, tmp_path):
    settings = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}"]
    with output_lock(tmp_path):
        code, output = kill_points.run(settings)
    assert code == 2
    pattern = rf"error: {tmp_path} is in use by process {os.getpid()} on .+ since .+; .+\n"
    assert re.fullmatch(pattern, output)
    assert [path.name for path in tmp_path.iterdir()] == [files.LOCK_NAME]


HOLD = """
import sys, time
from stemgenre import files
with files.output_lock(sys.argv[1]), files.atomic_write(sys.argv[1] + "/checkpoint.pth") as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(100)
"""


def test_a_killed_run_leaves_no_lock_and_its_half_written_file_is_removed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"ready\n"
    (part,) = tmp_path.glob(".*.part")
    with pytest.raises(UserError, match=f"process {other.pid} "), output_lock(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with output_lock(tmp_path):
        remove_stale_temp_files(tmp_path)
        assert part.exists(), "another run could be writing it in a shared folder"
        remove_stale_temp_files(tmp_path, older_than=0)
        assert not part.exists()


def test_an_old_half_written_file_in_a_shared_folder_is_removed(tmp_path):
    old, new = tmp_path / ".x.npz.12.0123abcd.part", tmp_path / ".y.npz.12.0123abcd.part"
    old.touch(), new.touch()
    os.utime(old, (time.time() - 2 * files.STALE_SECONDS,) * 2)
    remove_stale_temp_files(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_other_files_are_never_removed(tmp_path):
    names = [".film.mkv.part", "x.12.0123abcd.part", ".x.part", ".x.12.0123abcd.partial"]
    for name in names:
        (tmp_path / name).touch()
    remove_stale_temp_files(tmp_path, tmp_path / "nowhere", older_than=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("name", ["x" * 251 + ".npz", "曲" * 83 + ".npz"])
def test_a_name_may_be_as_long_as_the_file_system_has_it(tmp_path, name):
    with atomic_write(tmp_path / name) as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_file_before_stays_under_its_own_name(tmp_path):
    path, previous = tmp_path / "a.pth", tmp_path / "a.previous.pth"
    for content in (b"1", b"2", b"3"):
        with atomic_write(path, previous=previous) as file:
            file.write(content)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    with pytest.raises(UserError), atomic_write(path, previous=previous):
        raise OSError(28, "No space left on device")
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")


def test_what_is_not_a_regular_file_is_written_through_and_stays(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        files.write_text(path, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert pipe.is_fifo()
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    null = tmp_path / "null"  # a device, as /dev/null is
    null.symlink_to("/dev/null")
    files.write_text(null, "gone")
    assert Path("/dev/null").is_char_device()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="loop cannot be written"):
        files.write_text(loop, "x")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="folder cannot be written"):
        files.write_text(folder, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["target", "link", "pipe", "null", "loop", "folder"]
    )


def test_a_linked_checkpoint_keeps_the_one_before(tmp_path):
    (tmp_path / "big").mkdir()
    path, previous = tmp_path / "a.pth", tmp_path / "a.previous.pth"
    path.symlink_to(tmp_path / "big" / "a.pth")
    for content in (b"1", b"2"):
        with atomic_write(path, previous=previous) as file:
            file.write(content)
    assert path.is_symlink()
    assert (path.read_bytes(), previous.read_bytes()) == (b"2", b"1")
