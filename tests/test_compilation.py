"""COMPILE: the same weights are learned, and a compiler that fails does not end the run."""

import types

import pytest
import torch
from helpers import assert_same_run, run_results, run_training
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from stemgenre.training import backbones, trainer


def one_stage(name, stochastic_depth):
    """A backbone of one stage, with BatchNorm, that is quickly traced."""
    stage = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, bias=False), nn.BatchNorm2d(8), nn.SiLU())
    pool, head = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Dropout(), nn.Linear(8, 2))
    return types.SimpleNamespace(features=nn.Sequential(stage), avgpool=pool, classifier=head)


@pytest.fixture
def compiled_run(small_settings, tmp_path, monkeypatch):
    """A function: runs with COMPILE=True and a backend, and compares with COMPILE=False."""
    monkeypatch.setattr(backbones, "torchvision_network", one_stage)
    torch._dynamo.reset()

    def run(backend):
        expected = run_training(small_settings(f"OUTPUT_DIR={tmp_path / 'uncompiled'}"))
        compiled = []

        def maybe_compile(net, enabled):
            compiled.append(enabled)
            return torch.compile(net, backend=backend)

        monkeypatch.setattr(trainer, "maybe_compile", maybe_compile)
        assert_same_run(run_training(small_settings("COMPILE=True")), run_results(expected))
        assert compiled == [True]

    return run


def failing_compiler(*arguments):
    raise RuntimeError("no compiler here\nand a long explanation")


def working_compiler(graph, inputs):
    return graph.forward


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_without_a_compiler_the_run_continues_as_the_same_run(fails_in, compiled_run, caplog):
    compilers = {"fw_compiler": working_compiler, "bw_compiler": working_compiler}
    compilers[f"{fails_in[0]}w_compiler"] = failing_compiler
    with caplog.at_level("WARNING"):
        compiled_run(aot_autograd(**compilers))
    (warning,) = [text for text in caplog.messages if "COMPILE" in text]
    assert "no compiler here" in warning
    assert "\n" not in warning


@pytest.mark.heavy
def test_without_a_c_compiler_torch_compile_is_done_without(compiled_run, monkeypatch, caplog):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with caplog.at_level("WARNING"):
        compiled_run("inductor")
    assert len([text for text in caplog.messages if "COMPILE" in text]) == 1


def test_a_compiled_network_learns_the_same(compiled_run, caplog):
    with caplog.at_level("WARNING"):
        compiled_run("aot_eager")
    assert "COMPILE" not in caplog.text


def test_compile_true_compiles_and_false_does_not():
    net = nn.Linear(2, 2)
    assert trainer.maybe_compile(net, False) is net
    assert isinstance(trainer.maybe_compile(net, True), torch._dynamo.OptimizedModule)
