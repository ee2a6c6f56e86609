"""A long run neither grows nor keeps files open."""

import json

from helpers import run_python


def test_thirty_epochs_leave_no_file_open_and_hardly_grow():
    done = run_python("benchmarks/long_run.py", "--epochs", 30)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["epochs"] == 30
    first, last = found["open_files"]
    assert last == first
    assert found["growth_percent"] < 5
