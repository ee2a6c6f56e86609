"""What can go wrong around a run ends in a clear line, with nothing lost."""

import http.server
import re
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from helpers import SMALL_RUN, run_training, tone

from stemgenre.errors import UserError
from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.separation.demucs_model import Separator, load_demucs
from stemgenre.separation.separate import separate_missing
from stemgenre.settings import MachineSettings, ModelSettings, load_settings
from stemgenre.training import backbones, checkpoint, model
from stemgenre.training.trainer import Trainer


@pytest.fixture(scope="module")
def first_epoch(small_data, tmp_path_factory):
    """The output folder of a run of one epoch; not to be changed."""
    out = tmp_path_factory.mktemp("first_epoch")
    options = [*SMALL_RUN, "EPOCHS=1", f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}"]
    return run_training(load_settings(options))


@pytest.fixture
def trained(first_epoch, small_settings):
    """(settings to resume with, path and bytes of the checkpoint) after one of two epochs."""
    settings = small_settings("RESUME_FROM_CHECKPOINT=True")
    path = settings.paths.output("checkpoint.pth")
    shutil.copytree(first_epoch, path.parent)
    return settings, path, path.read_bytes()


@pytest.fixture
def after_step(monkeypatch):
    """A function: calls change(trainer) after the `number`-th step; returns the list of steps."""

    def set_hook(number, change):
        steps = []

        def hook(trainer, step):
            steps.append(step)
            if len(steps) == number:
                change(trainer)

        monkeypatch.setattr(Trainer, "on_step", hook)
        return steps

    return set_hook


def fill_weight(value):
    """A function that sets the weights of a trainer's last layer to a value."""

    def fill(trainer):
        with torch.no_grad():
            trainer.net.classifier[4].weight.fill_(value)

    return fill


def scale_gradients(trainer):
    """From now on, gradients of the first layer of a trainer's head are infinite."""
    weight = trainer.net.classifier[1].weight
    weight.register_hook(lambda gradient: gradient * float("inf"))


def test_a_nan_loss_names_the_epoch_the_batch_and_its_clips(trained, after_step, small_data):
    settings, path, before = trained
    after_step(1, fill_weight(float("nan")))
    with pytest.raises(UserError) as caught:
        run_training(settings)
    message = str(caught.value)
    found = re.match(
        r"the loss became NaN or infinite in epoch 2, batch 2 of 3 \(clips (.*), \.\.\.\); "
        "the last good checkpoint is kept",
        message,
    )
    names = found[1].split(", ")
    assert len(set(names)) == 5, "the first five of the batch"
    assert all(list(small_data.rglob(name)) for name in names)
    assert "\n" not in message
    assert path.read_bytes() == before


def test_it_is_found_when_a_checkpoint_is_due(trained, small_settings, after_step):
    _, path, before = trained
    steps = after_step(1, fill_weight(float("inf")))
    with pytest.raises(UserError, match=r"in epoch 2 after batch 1 of 3"):
        run_training(small_settings("RESUME_FROM_CHECKPOINT=True", "CHECKPOINT_MINUTES=1e-9"))
    assert len(steps) == 1
    assert path.read_bytes() == before


def test_infinite_gradients_name_the_batch_that_has_them(trained, after_step):
    settings, path, before = trained
    after_step(2, scale_gradients)
    with pytest.raises(UserError, match=r"in epoch 2, batch 3 of 3 \(clips train_"):
        run_training(settings)
    assert path.read_bytes() == before


def test_nan_weights_are_never_saved(trained, after_step):
    settings, path, before = trained
    after_step(3, fill_weight(float("nan")))
    with pytest.raises(UserError, match="the weights became NaN .* in epoch 2 after batch 3 of 3"):
        run_training(settings)
    assert path.read_bytes() == before


def test_steps_that_the_fp16_scaler_skips_do_not_stop_the_run(small_settings, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**127)
    )
    out = run_training(small_settings("EPOCHS=1"))
    saved = checkpoint.load(out / "checkpoint.pth", "checkpoint")
    assert saved["scaler"]["scale"] < 2.0**127, "steps were skipped"
    assert np.isfinite(pd.read_csv(out / "metrics.csv").drop(columns="run_id")).all().all()


@pytest.fixture
def fp16_scaler(monkeypatch):
    """From now on, a run takes its steps as an fp16 GPU does, with a gradient scaler."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))


def test_a_run_moves_between_an_fp16_gpu_and_others(trained, small_settings, request):
    settings, path, _ = trained
    request.getfixturevalue("fp16_scaler")
    run_training(settings)
    assert checkpoint.load(path, "checkpoint")["scaler"]["scale"] > 1
    request.getfixturevalue("monkeypatch").undo()
    run_training(small_settings("RESUME_FROM_CHECKPOINT=True", "EPOCHS=3"))
    assert len(pd.read_csv(path.with_name("metrics.csv"))) == 3


class Overflow(torch.nn.Module):
    """Infinite instead of its input in some calls of a training run; counts them."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, images):
        self.calls += self.training
        return images * float("inf") if self.training and self.calls in self.at else images


@pytest.fixture
def overflow_in(monkeypatch):
    """A function: from then on, these forward passes of a training run overflow."""

    def set_calls(*calls):
        build = backbones.torchvision_network

        def backbone(name, stochastic_depth):
            net = build(name, stochastic_depth)
            net.features[8].insert(0, Overflow(calls))  # before a BatchNorm
            return net

        monkeypatch.setattr(backbones, "torchvision_network", backbone)

    return set_calls


def test_a_step_whose_forward_pass_overflows_in_fp16_is_skipped(
    small_settings, fp16_scaler, overflow_in
):
    overflow_in(2)
    out = run_training(small_settings("EPOCHS=2"))
    saved = checkpoint.load(out / "checkpoint.pth", "checkpoint")
    assert saved["scaler"]["scale"] == 2.0**15, "one step was skipped"
    assert all(tensor.isfinite().all() for tensor in saved["weights"].values())
    metrics = pd.read_csv(out / "metrics.csv").drop(columns="run_id")
    assert np.isfinite(metrics).all().all()


def test_an_epoch_of_nothing_but_overflows_stops_the_run(small_settings, fp16_scaler, overflow_in):
    overflow_in(1, 2, 3)
    with pytest.raises(UserError, match="in epoch 1, batch 1 of 3"):
        run_training(small_settings("EPOCHS=2"))


def test_a_nan_output_is_no_prediction(trained, small_settings):
    _, path, _ = trained
    best = path.with_name("best_model.pth")
    content = checkpoint.load(best, "model")
    content["weights"]["classifier.4.weight"].fill_(float("nan"))
    checkpoint.save(best, "model", content)
    submission = path.with_name("submit.csv")
    submission.unlink()
    with pytest.raises(UserError, match=r"the model's output for \w+ is NaN or infinite"):
        run_training(small_settings("RESUME_FROM_CHECKPOINT=True", "EPOCHS=1"))
    assert not submission.exists()


def test_a_new_run_leaves_nothing_of_an_older_one(trained, small_settings):
    settings, path, _ = trained
    previous = checkpoint.previous_path(path)
    run_training(settings)
    assert checkpoint.load(previous, "checkpoint")["train_state"]["epoch"] == 1
    run_training(small_settings("EPOCHS=1"))
    assert not previous.exists()


def test_when_neither_checkpoint_can_be_read_the_run_stops(trained):
    settings, path, before = trained
    for damaged in (path, checkpoint.previous_path(path)):
        damaged.write_bytes(before[:1000])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        run_training(settings)


@pytest.mark.parametrize(
    "key",
    ["optimizer", "scheduler", "channel_stats", "train_state", "run_signature", "best_weights"],
)
def test_a_checkpoint_without_a_part_is_refused(trained, key):
    settings, path, _ = trained
    content = checkpoint.load(path, "checkpoint")
    del content[key]
    checkpoint.save(path, "checkpoint", content)
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        run_training(settings)


@pytest.fixture
def separate(fast_repo, small_settings, tmp_path):
    """A function: separates the clips `a` and `b`; and their paths and cache as attributes."""
    cache = StemCache(tmp_path / "cache", model="htdemucs", sample_rate=11025)
    settings = small_settings("SEPARATION_MODEL=htdemucs", f"SEPARATION_REPO={fast_repo}")
    paths = [tmp_path / f"{name}.wav" for name in "ab"]
    for number, path in enumerate(paths):
        soundfile.write(path, tone(frequency=200 + 50 * number, seconds=0.5, sr=11025), 11025)
    clips = pd.DataFrame({"clip": ["a", "b"], "path": paths})

    def run():
        with start_runtime(MachineSettings.from_config(device="cpu")) as process:
            separate_missing(clips, cache, settings, process)

    run.cache, run.paths = cache, paths
    return run


def test_a_clip_that_is_gone_before_it_is_read_is_named(separate):
    separate.paths[0].unlink()
    with pytest.raises(UserError, match=r"1 clips could not be separated.*\n.*a\.wav"):
        separate()
    assert [path.name for path in separate.cache.folder.iterdir()] == ["b.npz"]


def test_a_clip_that_is_gone_after_it_is_read_is_named(separate, monkeypatch):
    call = Separator.__call__

    def vanishing(self, waves):
        separate.paths[0].unlink(missing_ok=True)
        return call(self, waves)

    monkeypatch.setattr(Separator, "__call__", vanishing)
    with pytest.raises(
        UserError, match=r"1 clips could.*\n.*a\.wav can no longer be read: No such"
    ):
        separate()
    assert [path.name for path in separate.cache.folder.iterdir()] == ["b.npz"]


def test_a_clip_that_is_gone_although_its_stems_are_cached_is_named(separate):
    separate()
    separate.paths[1].unlink()
    with pytest.raises(UserError, match=r"b\.wav cannot be decoded: there is no such file"):
        separate()


YAML = b"models: ['955717e8']\n"
YAML_HASH = "0d5f2089fa3e1a0335d93de070f6802598cd4a4d"  # what `git hash-object` says of it


class CutOff(http.server.BaseHTTPRequestHandler):
    """Promises 5 MB, sends 1 MB and hangs up; but for a yaml, which is sent whole."""

    def do_HEAD(self):  # noqa: N802
        whole = self.path.endswith(".yaml")
        self.send_response(200)
        self.send_header("Content-Length", str(len(YAML) if whole else 5 * 2**20))
        self.send_header("X-Repo-Commit", "a" * 40)  # what Demucs' hub sends
        self.send_header("ETag", f'"{self.server.yaml_hash if whole else "b" * 64}"')
        self.end_headers()

    def do_GET(self):  # noqa: N802
        self.do_HEAD()
        self.wfile.write(YAML if self.path.endswith(".yaml") else bytes(2**20))

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def cut_off():
    """A server that hangs up half-way."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CutOff) as server:
        server.address = f"http://127.0.0.1:{server.server_port}"
        server.yaml_hash = YAML_HASH
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def use_hub(server, folder, monkeypatch):
    """Lets `server` stand for the Hugging Face hub, with an empty cache in `folder`."""
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))


def test_weights_that_arrive_in_part_are_neither_used_nor_kept(cut_off, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = backbones.torchvision_weights("efficientnet_b3")
    name = weights.url.rsplit("/", 1)[1]
    monkeypatch.setattr(weights.value, "url", f"{cut_off.address}/{name}")
    for _ in range(2):
        with pytest.raises(UserError, match="WEIGHTS_FILE") as caught:
            model.build_model(ModelSettings.from_config(), num_classes=2, seed=0)
        assert "\n" not in str(caught.value)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_demucs_model_that_arrives_in_part_is_neither_used_nor_kept(
    cut_off, tmp_path, monkeypatch
):
    use_hub(cut_off, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="SEPARATION_REPO") as caught:
        load_demucs("htdemucs")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("htdemucs.yaml"))
    assert not list(tmp_path.rglob("*.safetensors"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 1000 for path in files)


def test_a_demucs_yaml_that_is_not_what_the_hub_has_is_refused(cut_off, tmp_path, monkeypatch):
    cut_off.yaml_hash = "c" * 40
    use_hub(cut_off, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"htdemucs\.yaml was not downloaded whole"):
        load_demucs("htdemucs")
    assert not list(tmp_path.rglob("htdemucs.yaml"))
