"""A process knows its device, its seeds, and how many clips fit into the GPU's memory."""

import logging
import re
import signal

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stemgenre.errors import UserError
from stemgenre.runtime import (
    MicroBatch,
    Runtime,
    StopRequest,
    derive_seed,
    log_device,
    pick_device,
    start_runtime,
    thread_count,
    to_device,
)
from stemgenre.settings import MachineSettings


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "auto, cuda, cuda:1, mps or cpu"),
        ("0", "auto, cuda, cuda:1, mps or cpu"),
        ("cuda:x", "auto, cuda, cuda:1, mps or cpu"),
        ("cuda:-1", "cpu"),
        ("meta", "auto, cuda, cuda:1, mps or cpu"),
        ("cuda:99", "CUDA devices found; try DEVICE=cpu"),
    ],
)
def test_a_device_that_is_not_available_is_named(name, said):
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        pick_device(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_auto_takes_the_best_available_device():
    assert pick_device("cpu").type == "cpu"
    usable = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.backends.mps.is_available():
        assert pick_device("auto").type == usable


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_without_a_gpu_cuda_is_refused(name):
    with pytest.raises(UserError, match=f"DEVICE={name} is not available: 0 CUDA devices"):
        pick_device(name)


@pytest.mark.parametrize(
    ("name", "gpus", "said"),
    [
        ("cuda", 1, "try --nproc-per-node=1"),
        ("cuda", 0, "try DEVICE=cpu"),
        ("cuda:0", 1, "DEVICE=cuda gives each one its own"),
    ],
)
def test_more_processes_than_gpus_are_told_how_many(monkeypatch, name, gpus, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    with pytest.raises(UserError, match=said):
        pick_device(name, local_rank=1, world_size=2)


def test_a_driver_too_old_for_this_pytorch_is_named(monkeypatch):
    """The driver's own library counts the GPUs; CUDA does not start."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="driver does not fit PyTorch's CUDA .*; update it, or"):
        pick_device("cuda:0")


def test_a_stop_that_arrives_while_ranks_wait_for_each_other_counts_the_next_time(monkeypatch):
    runtime = Runtime(torch.device("cpu"), 0, 2, StopRequest())

    def arrive(runtime, *numbers):
        runtime.stop(signal.SIGINT, None)
        return numbers

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "all_reduce_max", arrive)
        assert not runtime.sync_stop()
    monkeypatch.setattr(Runtime, "all_reduce_max", lambda runtime, *numbers: numbers)
    assert runtime.sync_stop() and runtime.stop.signal_number == signal.SIGINT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_each_local_process_gets_its_own_gpu():
    for rank in range(torch.cuda.device_count()):
        assert pick_device("cuda", local_rank=rank, world_size=2).index == rank


@pytest.mark.parametrize(("given", "count"), [(1, 1), (3, 3), (100, 100)])
def test_the_number_of_threads_is_the_one_given(given, count):
    assert thread_count(MachineSettings.from_config(num_threads=given)) == count


def test_auto_is_one_to_eight_threads():
    assert 1 <= thread_count(MachineSettings.from_config(num_threads="auto")) <= 8


def test_what_is_on_the_gpu_already_stays_there():
    device = torch.device("cuda", 0)
    with FakeTensorMode():  # a GPU's tensors without one
        stems = torch.empty(4, 9, device=device)
        assert to_device(stems, device) is stems


def test_a_seed_is_the_same_in_every_run_and_on_every_machine():
    assert derive_seed(42, 3, 7) == 2561115902547369509
    assert 0 <= derive_seed(42, 3, 7) < 2**63


def test_every_part_of_a_seed_counts():
    parts = [(seed, epoch, clip) for seed in (0, 1, 2**31 - 1) for epoch in range(9) for clip in
             range(30)]  # fmt: skip
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_the_first_line_names_the_device_and_without_a_gpu_the_recipe(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("stemgenre"), "propagate", True)
    caplog.set_level(logging.INFO)
    runtime = Runtime(torch.device("cpu"), 0, 1, StopRequest())
    log_device(runtime, quick_recipe="recipes/quick.py")
    first, second = caplog.messages
    assert first.startswith("device: cpu, ")
    assert "slow" in second
    assert "recipes/quick.py" in second


def test_a_micro_batch_halves_until_it_fits_and_stays_there():
    micro_batch, sizes = MicroBatch(24), []

    def step(size):
        sizes.append(size)
        if size > 5:
            raise torch.OutOfMemoryError
        return "done"

    assert micro_batch.run(step, 20, too_large="too large") == "done"
    assert sizes == [20, 10, 5]
    assert micro_batch.run(step, 20, too_large="too large") == "done"
    assert sizes == [20, 10, 5, 5]


CUDNN = "FIND was unable to find an engine to execute this computation after trying 9 plans"


@pytest.mark.parametrize("text", [CUDNN, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_a_library_that_finds_no_memory_halves_the_micro_batch(text):
    def step(size):
        if size > 2:
            raise RuntimeError(text)

    micro_batch = MicroBatch(8)
    micro_batch.run(step, 8, too_large="too large")
    assert micro_batch.size == 2


def test_another_error_of_a_step_ends_the_run():
    def step(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatch(8).run(step, 8, too_large="too large")


def test_a_last_small_batch_leaves_the_micro_batch_as_it_is():
    micro_batch = MicroBatch(24)
    micro_batch.run(lambda size: None, 3, too_large="too large")
    assert micro_batch.size == 24


def test_a_single_clip_that_does_not_fit_is_the_users_to_fix():
    def step(size):
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="lower IMG_SIZE"):
        MicroBatch(4).run(step, 4, too_large="a single image exceeds GPU memory; lower IMG_SIZE")


@pytest.mark.parametrize("value", ["4", "many", ""])
def test_ranks_left_in_the_environment_are_ignored(monkeypatch, caplog, value):
    monkeypatch.setattr(logging.getLogger("stemgenre"), "propagate", True)
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.setenv("RANK", value)
    with start_runtime(MachineSettings.from_config(device="cpu")) as runtime:
        assert (runtime.rank, runtime.world_size) == (0, 1)
    assert f"WORLD_SIZE={value} in the environment ignored" in caplog.text
