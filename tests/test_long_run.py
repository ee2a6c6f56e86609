"""A long run neither grows nor keeps files open."""

import os
from pathlib import Path

import pytest
from helpers import run_training

from stemgenre.training.trainer import Trainer


@pytest.mark.heavy
def test_fifteen_epochs_leave_no_file_open_and_hardly_grow(small_settings, monkeypatch):
    memory, files = [], []

    def watch(trainer, step):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
        files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208

    monkeypatch.setattr(Trainer, "on_step", watch)
    run_training(small_settings("EPOCHS=15", "PATIENCE=15"))
    assert len(memory) == 45
    assert min(files[30:]) <= min(files[:15])  # a clip is being read now and then
    assert max(memory[30:]) < 1.05 * max(memory[:15])
