"""The CUDA path without a GPU: tensors that have a device, a type and a shape, and no values.

PyTorch's FakeTensorMode raises what a GPU would: for operands on two devices, and types or shapes
that do not fit. It also raises where the host would wait for a value, which no step may do. What
needs CUDA itself is replaced (see `cuda`); there are no gradients, as autograd starts CUDA.
"""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch
from demucs import htdemucs
from demucs.apply import BagOfModels
from helpers import SMALL_RUN
from tiny_demucs import TINY_DEMUCS
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stemgenre.features.augmentation import NO_AUGMENT, sample_params
from stemgenre.features.log_mel import Frontend
from stemgenre.runtime import MicroBatch, Runtime, StopRequest
from stemgenre.separation import demucs_model
from stemgenre.separation.demucs_model import Separator
from stemgenre.settings import SeparationSettings, load_settings
from stemgenre.training import optimisation
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.inference import stems_to_logits
from stemgenre.training.model import GenreNet
from stemgenre.training.stem_loader import StemLoader
from stemgenre.training.trainer import Trainer

CUDA = torch.device("cuda", 0)
CLIPS = 6


def move(module, *arguments, **options):
    """module.to(CUDA), which cannot replace the data of parameters by fake ones."""
    moved = {}
    for each in module.modules():
        for name, tensor in each.named_parameters(recurse=False):
            weights = nn.Parameter(tensor.detach().to(CUDA), requires_grad=tensor.requires_grad)
            each._parameters[name] = moved[tensor] = weights
        for name, tensor in each.named_buffers(recurse=False):
            each._buffers[name] = tensor.to(CUDA)
    if isinstance(module, GenreNet):
        module.stages = [[moved[weights] for weights in stage] for stage in module.stages]
    return module


class Generator:
    """A torch.Generator of a GPU, as far as it is used."""

    def __init__(self, device):
        assert device == CUDA

    def manual_seed(self, seed):
        return self


@pytest.fixture
def networks():
    """(a small GenreNet with a frozen stage, a second one, HTDemucs), not yet of fake tensors."""
    genre_nets = [GenreNet(2, backbone="cnn", freeze_stages=1) for _ in range(2)]
    return *genre_nets, htdemucs.HTDemucs(**TINY_DEMUCS)


@pytest.fixture
def cuda(networks, monkeypatch):
    """Within the test, tensors on CUDA can be made, of which none has values."""
    monkeypatch.setattr(nn.Module, "to", move)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80e9, 80e9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, generator: tensor.fill_(0.1))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.usefixtures("cuda")
def test_what_a_gpu_would_refuse_or_wait_for_is_noticed():
    on_gpu = torch.ones(3, device=CUDA)
    with pytest.raises(RuntimeError, match="two devices"):
        on_gpu + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        on_gpu.sum().item()


def settings_of(*words):
    levers = ("STEM_GAIN_DB=3", "STEM_DROPOUT=0.3")
    folder = ("OUTPUT_DIR=/nowhere", f"BATCH_SIZE={CLIPS}", "MICRO_BATCH=4")
    return load_settings([*SMALL_RUN, *levers, *folder, "DEVICE=cuda", *words])


def put_stems(settings, *, device=CUDA, channels=4):
    samples = round(settings.features.clip_seconds * settings.features.sr)
    return [torch.empty(channels, samples, dtype=torch.float16, device=device)] * CLIPS


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("device", "words"),
    [
        (CUDA, ()),
        (CUDA, ("CHANNELS=mix,drums", "NUM_CHANNELS=5")),
        ("cpu", ("CHANNELS=mix,drums", "DB_REFERENCE=stem")),
        ("cpu", ("CHANNELS=mix", "NUM_CHANNELS=3")),
    ],
)
def test_images_are_computed_on_the_gpu_without_waiting_for_it(device, words):
    settings = settings_of(*words)
    frontend = Frontend(settings.features, device=CUDA)
    stems = put_stems(settings, device=device, channels=1 if "CHANNELS=mix" in words else 4)
    augmented = [
        sample_params(settings.augment, seed=0, epoch=epoch, clip_index=0) for epoch in range(13)
    ]
    stems = [*stems, stems[0][:, :9000]] * 2
    # Stems that did not fit into the GPU's memory are on the CPU, and copied as they are needed.
    with NoBlockingCopy() if device == CUDA else contextlib.nullcontext():
        images = frontend(stems, [NO_AUGMENT, *augmented])
    assert (images.device, images.dtype) == (CUDA, torch.float32)
    assert images.shape == (len(stems), len(settings.features.channel_names), 64, 64)


class NoBlockingCopy(TorchDispatchMode):
    """Raises AssertionError for a copy between the CPU and the GPU that the host waits for."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        result = operation(*arguments, **options)
        if operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = arguments[operation == torch.ops.aten.copy_.default]
            waits = not options.get("non_blocking", arguments[2:3] == (True,))
            assert source.device == result.device or not waits, "the host waits for a copy"
        if operation == torch.ops.aten.index.Tensor:
            assert all(i is None or i.device == result.device for i in arguments[1]), "of an index"
        return result


class Operations(TorchDispatchMode):
    """Counts the operations on the GPU that are not mere views, most of them a kernel."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.device == CUDA:
            self.count += not operation.is_view
        return result


@pytest.mark.usefixtures("cuda")
def test_a_clip_more_costs_few_kernels():
    """One by one, the clips of a batch would cost more than the network's forward pass."""
    settings, counts = settings_of(), []
    frontend = Frontend(settings.features, device=CUDA)
    params = [
        sample_params(settings.augment, seed=0, epoch=epoch, clip_index=0) for epoch in range(24)
    ]
    for clips in (12, 24):
        with Operations() as operations:
            frontend(put_stems(settings)[:1] * clips, params[:clips])
        counts.append(operations.count)
    assert counts[1] - counts[0] < 12 * 6


def make_trainer(net, settings):
    clips = pd.DataFrame({"clip": "a", "file_name": "a.wav", "target": np.arange(CLIPS) % 2})
    return Trainer(
        net,
        Frontend(settings.features, device=CUDA),
        StemLoader(None, threads=1, device=CUDA, device_cache=0.0),
        train_clips=clips,
        valid_clips=clips,
        label_names=["a", "b"],
        label_ids=[0, 1],
        settings=settings,
        runtime=Runtime(CUDA, 0, 1, StopRequest()),
        run_signature={},
    )


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.bfloat16, ("EMA_DECAY=0.9", "LR_DECAY_PER_STAGE=0.8")),
        (torch.float16, ("MIXUP_ALPHA=0.4",)),
        (torch.float16, ("EMA_DECAY=0.9",)),
        (None, ("USE_AMP=False", "CLASS_WEIGHTS=True", "LABEL_SMOOTHING=0.1")),
    ],
)
def test_a_training_step_stays_on_the_gpu_without_waiting_for_it(
    dtype, words, networks, monkeypatch
):
    has_bf16 = dtype != torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has_bf16)
    settings = settings_of(*words)
    net, copied, _ = networks
    # Of a network of fake tensors, deepcopy() reads memory that is not there.
    with monkeypatch.context() as patch:
        patch.setattr(optimisation.copy, "deepcopy", lambda each: move(copied))
        trainer = make_trainer(net, settings)

    def backward(loss):
        assert (loss.device, loss.dtype) == (CUDA, torch.float32)
        for tensor in trainer.trainable:
            tensor.grad = torch.empty_like(tensor)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert trainer.amp_dtype == dtype
    assert trainer.scaler.is_enabled() == (dtype == torch.float16)
    stems = put_stems(settings)
    monkeypatch.setattr(trainer.loader, "read", lambda clip, **section: stems[0])
    monkeypatch.setattr(trainer, "_collect", lambda *sums: None)  # at an epoch's end, it waits
    for epoch in range(2):
        trainer.state = TrainState(epoch=epoch)
        with NoBlockingCopy():
            trainer.train_epoch()
        assert trainer.state.step == 1
    logits = stems_to_logits(
        trainer.kept_net.eval(), trainer.frontend, put_stems(settings, device="cpu"), tta=1,
        micro_batch=MicroBatch(4), amp_dtype=trainer.amp_dtype,
    )  # fmt: skip
    assert (logits.device, logits.dtype, logits.shape) == (CUDA, torch.float32, (CLIPS, 2))


@pytest.mark.usefixtures("cuda")
def test_clips_are_separated_on_the_gpu_in_half_precision(networks, monkeypatch):
    """Demucs and istft() wait for the GPU to check what they compute: it is taken as right here."""

    def istft(spectrum, n_fft, hop_length, *, window, length, **options):
        assert (spectrum.device, spectrum.dtype) == (CUDA, torch.complex64)
        assert window.device == CUDA
        return torch.empty(*spectrum.shape[:-2], length, device=CUDA)

    monkeypatch.setattr(torch, "istft", istft)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda condition: True)
    model, dtypes = networks[2], set()
    monkeypatch.setattr(demucs_model, "load_demucs", lambda name, repo: BagOfModels([model]))
    separator = Separator(SeparationSettings.from_config(), sample_rate=11025, device=CUDA)
    assert separator.half and separator.micro_batch.size > 1
    model.decoder[0].register_forward_hook(lambda *call: dtypes.add(call[2][0].dtype))
    waves = [torch.empty(2, 100_000 - 400 * clip) for clip in range(2)]
    stems = separator._apply(waves, half=True)
    assert dtypes == {torch.float16}
    assert [(clip.device, clip.dtype) for clip in stems] == [(CUDA, torch.float32)] * 2
    assert [clip.shape for clip in stems] == [(4, 25000), (4, 24900)]
