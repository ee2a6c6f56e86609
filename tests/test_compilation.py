"""COMPILE: the same numbers, tried only where it can pay, and never the end of a run."""

import pytest
import torch

from stemgenre.compilation import WORTH_SECONDS, Compilation

CARD = torch.device("cuda")  # only its type is looked at


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU())


def is_compiled(compilation):
    return compilation.called is not compilation.network


def test_a_compiled_network_learns_the_same(network):
    images = torch.randn(2, 4, 16, 16)
    compilation = Compilation(network, True, torch.device("cpu"))
    assert is_compiled(compilation)
    gradients = []
    for call in (compilation, network):
        network.zero_grad()
        call(images).square().sum().backward()
        gradients.append(network[0].weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert is_compiled(compilation)


@pytest.mark.parametrize(("choice", "device"), [(False, "cuda"), ("auto", "cpu")])
def test_it_is_left_alone_when_off_and_on_a_cpu(network, choice, device):
    compilation = Compilation(network, choice, torch.device(device))
    for _ in range(5):
        compilation.after_epoch(WORTH_SECONDS, left=100)
        assert not is_compiled(compilation)


def test_auto_leaves_a_short_run_alone(network):
    compilation = Compilation(network, "auto", CARD)
    for left in range(48, 0, -1):
        compilation.after_epoch(WORTH_SECONDS / 50, left=left)
        assert not is_compiled(compilation)


@pytest.mark.parametrize(("compiled_seconds", "stays"), [(80.0, True), (99.0, False)])
def test_auto_tries_in_a_long_run_and_stays_with_the_faster_way(
    network, compiled_seconds, stays, caplog
):
    compilation = Compilation(network, "auto", CARD)
    states = []
    for seconds in (130.0, 100.0, 160.0, compiled_seconds, 100.0, 100.0):
        states.append(is_compiled(compilation))
        compilation.after_epoch(seconds, left=30)
    assert states == [False, False, True, True, stays, stays]


def test_without_a_compiler_the_run_goes_on(network, monkeypatch, caplog):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch._dynamo.reset()
    images = torch.randn(1, 4, 20, 20)
    compilation = Compilation(network, True, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(compilation(images), network(images))
    assert caplog.text.count("cannot be compiled here") == 1
