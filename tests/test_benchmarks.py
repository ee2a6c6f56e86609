"""The GPU's benchmark: a step that fails or hangs ends no other, and nothing takes longer."""

import json
import sys
import time

import pytest
import torch
from helpers import ROOT, NoReport, run_python


@pytest.fixture
def gpu(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    return gpu


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """A function: the results of steps, given as {name: (needs CUDA, code of its process)}."""
    monkeypatch.setattr(gpu, "MIN_FRACTION", 0.05)  # of a limit of 20 s

    def run(steps, *, seconds=60, limit=20):
        return gpu.run_steps(
            [gpu.Step(name, limit, needs_cuda) for name, (needs_cuda, _) in steps.items()],
            lambda step: [sys.executable, "-c", steps[step.name][1]],
            seconds=seconds,
            log=tmp_path / "gpu.log",
            save=lambda results: run.saved.append([*results]),
        )

    run.saved = []  # the steps whose results were saved, each time
    return run


CPU, GPU = (False, "print('{\"cuda\": false}')"), (False, "print('{\"cuda\": true}')")
GOOD = """print('so far\\n{"a": 1}\\na complaint at the exit')"""
FAILS = 'print("so far"); raise ValueError("no such engine")'


def test_a_step_that_fails_shows_its_last_lines_and_ends_no_other(run, gpu, tmp_path):
    results = run({"first": GPU, "bad": (True, FAILS), "good": (True, GOOD)})
    assert [result["status"] for result in results.values()] == ["ok", "failed", "ok"]
    assert results["good"]["figures"] == {"a": 1}
    assert results["bad"]["last_lines"][-1] == "ValueError: no such engine"
    text = gpu.table(results)
    assert "ValueError: no such engine" in text
    assert "a 1" in text
    assert "so far" in (tmp_path / "gpu.log").read_text()
    assert run.saved == [["first"], ["first", "bad"], ["first", "bad", "good"]]


def test_a_step_that_hangs_ends_with_its_children_at_its_limit(run, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    results = run({"first": GPU, "hangs": (True, code), "good": GPU}, limit=1.5)
    assert [result["status"] for result in results.values()] == ["ok", "time limit", "ok"]
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_steps_that_the_time_does_not_suffice_for_are_named(run):
    results = run({"first": GPU, "long": (True, "import time; time.sleep(9)"), "next": GPU},
                  seconds=3)  # fmt: skip
    assert [result["status"] for result in results.values()] == ["ok", "time limit", "not run"]


def test_without_a_gpu_the_steps_about_one_are_named(run):
    results = run({"first": CPU, "both": CPU, "gpu": (True, FAILS)})
    assert [result["status"] for result in results.values()] == ["ok", "ok", "needs CUDA"]


def test_if_nothing_can_be_prepared_nothing_is_run(run):
    results = run({"first": (False, FAILS), "next": GPU})
    assert [result["status"] for result in results.values()] == ["failed", "not run"]


def test_the_competition_is_extrapolated_from_what_grows_and_what_does_not(gpu):
    from gpu_steps import extrapolate

    stages = {"separation": 30.0, "channel statistics": 1.0, "training": 14.0, "prediction": 2.0}
    written = [100 + 0.1 * clip for clip in range(200)]  # 10 s of start, 0.1 s a clip
    seconds = extrapolate(50.0, stages, [5.0, 1.0, 1.0, 1.0], written, clips=200)
    assert seconds["separation"] == pytest.approx(30 + 80)
    assert seconds["channel statistics"] == 5
    assert seconds["between epochs, of it"] == pytest.approx(50 * 1.5)
    assert seconds["training"] == pytest.approx(4 + 50 * 5 + 50 * 1.5)
    assert seconds["outside of stages"] == 3
    assert seconds["total"] == pytest.approx(110 + 5 + 329 + 10 + 3)


@pytest.fixture
def steps(gpu, monkeypatch):
    """benchmarks/gpu_steps.py as a module, with reports that write no pages."""
    import gpu_steps

    monkeypatch.setattr("stemgenre.report.report.Report", NoReport)
    monkeypatch.setattr(gpu_steps.Trainer, "on_step", gpu_steps.Trainer.on_step)  # set back
    return gpu_steps


def test_rates_are_those_of_the_network_the_front_end_and_the_epoch(steps, tmp_path):
    steps.put_stems(tmp_path, steps.QUICK)
    figures = steps.FUNCTIONS["rates"](tmp_path, steps.QUICK, "cpu")
    assert figures["network_clips_per_second"] > 0
    assert figures["frontend_clips_per_second"] > 0
    assert figures["network_fraction"] > 0
    json.dumps(figures)


def test_operations_are_counted_with_their_backward_passes_and_without_views(gpu):
    from operations import ByteCounter, figures

    a, b = torch.ones(1000), torch.ones(1000, requires_grad=True)
    with ByteCounter() as counter:
        a.view(10, 100)[:5].t()
    assert counter.bytes == 0
    with ByteCounter() as counter:
        torch.mul(a, a, out=torch.empty(1000))
    assert counter.bytes == 2 * 4000
    with ByteCounter() as counter:
        product = a * b
    assert counter.bytes == 3 * 4000
    with ByteCounter() as counter:
        product.backward(torch.ones(1000))
    assert counter.bytes >= 3 * 4000

    square = torch.ones(200, 200)
    found = figures(lambda: [square @ square for _ in range(20)], torch.device("cpu"))
    assert found["gigabytes"] == round(20 * 2 * 160_000 / 1e9, 2)
    assert found["operations"]["aten::mm"] > 0.5
    assert found["seconds"] > 0


@pytest.mark.heavy
def test_the_demo_is_interrupted_resumed_and_compared(steps, tmp_path):
    steps.put_demo(tmp_path, steps.QUICK)
    figures = steps.FUNCTIONS["demo_float32"](tmp_path, steps.QUICK, "cpu")
    assert figures["precision"] == "float32"
    assert figures["resumed_weights_difference"] == 0, "on a CPU, bit for bit"
    assert figures["submit_equal"]
    assert len(figures["train_loss"]) == 3


def test_there_is_a_function_for_every_step(gpu, steps):
    assert {step.name for step in gpu.STEPS} == steps.FUNCTIONS.keys()


def test_the_command_ends_in_json_and_writes_it_to_a_folder(tmp_path):
    """In too little time for any step."""
    done = run_python(
        "benchmarks/gpu.py", "--quick", "--device=cpu", "--minutes=0.1", "--out", tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {step["status"] for step in result["steps"].values()} == {"not run"}
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
