"""The training's levers in whole runs: what they change, and that runs with them resume alike."""

import signal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import assert_same_run, run_results, run_training, tiny_backbone

from stemgenre.errors import Interrupted, UserError
from stemgenre.runtime import start_runtime
from stemgenre.training import backbones, checkpoint, trainer
from stemgenre.training.model import build_model
from stemgenre.training.trainer import Trainer

LEVERS = (
    "STEM_GAIN_DB=6", "STEM_DROPOUT=0.2", "STEM_SWAP=0.3", "MIXUP_ALPHA=0.4", "LABEL_SMOOTHING=0.1",
    "CLASS_WEIGHTS=True", "EMA_DECAY=0.9", "WARMUP_EPOCHS=1", "LR_DECAY_PER_STAGE=0.5",
    "BEST_BY=loss",
)  # fmt: skip
DETERMINISTIC = (
    "EPOCHS=1", "FREEZE_STAGES=9", "FROZEN_BATCHNORM=fixed", "HEAD_DROPOUT=(0,0)",
    "STOCHASTIC_DEPTH=0",
)  # fmt: skip


def saved_by(out):
    return checkpoint.load(out / "checkpoint.pth", "checkpoint")


def equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def test_a_run_with_all_levers_stopped_in_each_epoch_resumes_as_the_same_run(
    small_settings, tmp_path, monkeypatch
):
    def start(folder, resume=False):
        out = f"OUTPUT_DIR={tmp_path / folder}"
        return run_training(small_settings(*LEVERS, out, f"RESUME_FROM_CHECKPOINT={resume}"))

    def stop(trainer, step):
        steps.append(step)
        if len(steps) in (2, 5):
            signal.raise_signal(signal.SIGTERM)

    steps, whole = [], start("whole")
    monkeypatch.setattr(Trainer, "on_step", stop)
    for resume in (False, True):
        with pytest.raises(Interrupted):
            start("stopped", resume)
    stopped = start("stopped", resume=True)
    assert steps == [1, 2, 3, 1, 2, 3], "no step is done twice"
    assert_same_run(stopped, run_results(whole))
    assert equal(saved_by(stopped)["average"], saved_by(whole)["average"])

    metrics, saved = pd.read_csv(whole / "metrics.csv"), saved_by(whole)
    assert metrics["learning_rate"].tolist() == pytest.approx([1e-4, 2e-4])
    rates = [group["initial_lr"] for group in saved["optimizer"]["param_groups"]]
    assert rates == pytest.approx([2e-4 * 0.5**distance for distance in range(10)])
    best = metrics["valid_loss"].idxmin() + 1
    assert checkpoint.load(whole / "best_model.pth", "model")["epoch"] == best
    assert not equal(saved["weights"], saved["best_weights"]), "the average is kept"


@pytest.mark.parametrize("lever", ["EMA_DECAY", "LR_DECAY_PER_STAGE"])
def test_a_checkpoint_without_a_levers_state_is_refused_unless_it_is_off(lever):
    off = {"EMA_DECAY": 0.0, "LR_DECAY_PER_STAGE": 1.0}
    checkpoint.check_signature("x.pth", {"SEED": 1}, {"SEED": 1} | off)
    with pytest.raises(UserError, match=f"{lever}: {off[lever]} in the checkpoint, 0.9 here"):
        checkpoint.check_signature("x.pth", {"SEED": 1}, {"SEED": 1} | off | {lever: 0.9})


def test_what_is_kept_is_the_average_over_the_steps(small_settings, monkeypatch):
    averages, decays = {}, iter([0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4])

    def average(trainer, step):
        decay = next(decays)
        for name, tensor in trainer.net.state_dict().items():
            before = averages.get(name, 0)
            averages[name] = decay * before + (1 - decay) * tensor.clone()

    monkeypatch.setattr(Trainer, "on_step", average)
    out = run_training(small_settings("EMA_DECAY=0.4", "BEST_BY=last", "LR=1e-2"))
    valid = pd.read_csv(out / "valid_predictions.csv")
    correct = valid["predicted"] == valid["label"]
    of_label = [row[row["label"]] for _, row in valid.iterrows()]
    metrics = pd.read_csv(out / "metrics.csv").iloc[-1]
    assert metrics["valid_accuracy"] == pytest.approx(correct.mean())
    assert metrics["valid_loss"] == pytest.approx(-np.log(of_label).mean(), abs=1e-4)
    best, last = saved_by(out)["best_weights"], saved_by(out)["weights"]
    assert equal(best, checkpoint.load(out / "best_model.pth", "model")["weights"])
    for name, tensor in best.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, averages[name], atol=1e-5), name
    assert not torch.allclose(best["classifier.4.weight"], last["classifier.4.weight"], atol=1e-4)


def test_a_step_that_the_fp16_scaler_skips_does_not_count_in_the_average(
    small_settings, monkeypatch
):
    gradients = []

    def overflow_once(gradient):
        gradients.append(gradient)
        return gradient * torch.inf if len(gradients) == 2 else gradient

    def backbone(name, stochastic_depth):
        net = tiny_backbone(name, stochastic_depth)
        net.features[8][0].weight.register_hook(overflow_once)
        return net

    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    monkeypatch.setattr(backbones, "torchvision_network", backbone)
    out = run_training(small_settings("EPOCHS=1", "EMA_DECAY=0.9"))
    assert len(gradients) == 3
    assert saved_by(out)["average"]["n_averaged"] == 2


@pytest.mark.parametrize(
    ("best_by", "kept", "epochs"), [("accuracy", 1, 3), ("loss", 2, 4), ("last", 5, 5)]
)
def test_the_kept_epoch_is_the_best_by_the_setting(
    best_by, kept, epochs, small_settings, monkeypatch, caplog
):
    confidences = iter([9.0, 0.0, 5.0, 6.0, 7.0])  # in one class for all clips

    def give_logits(net, frontend, loader, clips, **options):
        logits = torch.zeros(len(clips), 10)
        logits[:, 0] = confidence = next(confidences)
        if confidence == 9.0:  # more clips are right, and the others very wrong
            logits[1:3] = 9 * torch.eye(10)[clips["target"].tolist()[1:3]]
        return logits

    caplog.set_level("INFO")
    monkeypatch.setattr(trainer, "compute_logits", give_logits)
    options = ("EPOCHS=5", "PATIENCE=2", "FREEZE_STAGES=9", f"BEST_BY={best_by}")
    out = run_training(small_settings(*options))
    metrics = pd.read_csv(out / "metrics.csv")
    assert metrics["valid_accuracy"].idxmax() == 0
    assert metrics["valid_loss"].idxmin() == 1
    assert checkpoint.load(out / "best_model.pth", "model")["epoch"] == kept
    assert len(metrics) == epochs
    stopped = f"no better validation {best_by} for 2 epochs: stopped early"
    assert (stopped in caplog.text) == (epochs < 5)


def head_weights(settings):
    return saved_by(run_training(settings))["weights"]["classifier.1.weight"]


def test_mixup_does_not_depend_on_the_micro_batch(small_settings):
    options = (*DETERMINISTIC, "MIXUP_ALPHA=0.4")
    whole = head_weights(small_settings(*options))
    assert torch.allclose(whole, head_weights(small_settings(*options, "MICRO_BATCH=3")), atol=1e-6)
    assert not torch.allclose(whole, head_weights(small_settings(*DETERMINISTIC)), atol=1e-6)


CLIPS = 16
TABLE = pd.DataFrame({"clip": range(CLIPS), "file_name": range(CLIPS)})
TABLE["target"] = [0, 0, 0, 1, 2, 0, 1, 0] * 2


class MarkedClips:
    """Loader and frontend of images in which row 0 says which clips they were mixed from."""

    def batches(self, clips, batches, *, section, prepare):
        return ((batch, [prepare(i, i) for i in batch]) for batch in batches)

    def drop_gpu_cache(self):
        return False

    clip_samples = 1

    def needed_samples(self, params):
        return 1

    def __call__(self, stems, params):
        images = torch.zeros(len(stems), 4, 64, 64)
        images[range(len(stems)), :, 0, stems] = 1
        return images


def train_on_marked_clips(settings, table):
    """(loss of an epoch, correct clips, logits, mixture, main clips) of a net that stays.

    `mixture` (clips, clips) is what each image was made of; all in the order of the steps.
    """
    seen = SimpleNamespace(logits=[], images=[])

    def look(module, inputs, output):
        seen.images.append(inputs[0])
        seen.logits.append(output)

    clips = MarkedClips()
    net = build_model(settings.model, num_classes=3, seed=0)
    net.register_forward_hook(look)
    with start_runtime(settings.machine) as runtime:
        fitted = Trainer(
            net, clips, clips, train_clips=table, valid_clips=table, label_names=["a", "b", "c"],
            label_ids=[0, 1, 2], settings=settings, runtime=runtime, run_signature={},
        )  # fmt: skip
        fitted.train_epoch()
    mixture = torch.cat(seen.images)[:, 0, 0, :CLIPS]
    loss, correct, _ = fitted.state.sums["values"]
    return loss, correct, torch.cat(seen.logits).detach(), mixture


@pytest.fixture
def marked_settings(small_settings):
    """A function: Settings of a run whose weights stay, with further overrides."""
    still = ("LR=1e-30", "MIN_LR=0", "WEIGHT_DECAY=0", "BATCH_SIZE=8")
    return lambda *overrides: small_settings(*DETERMINISTIC, *still, *overrides)


@pytest.mark.parametrize("micro_batch", [8, 3])
@pytest.mark.parametrize("lever", ["MIXUP_ALPHA=1.0", "MIXUP_ALPHA=0"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_the_loss_is_the_one_computed_by_hand(
    lever, micro_batch, smoothing, weighted, soft, marked_settings
):
    table, targets = TABLE, np.eye(3)[TABLE["target"]]
    if soft:
        column = [None] * (CLIPS - 1) + [[0.25, 0.5, 0.25]]
        table, targets[-1] = TABLE.assign(soft_target=column, target=[*TABLE["target"][:-1], 1]), (
            0.25, 0.5, 0.25,
        )  # fmt: skip
    settings = marked_settings(
        lever, f"MICRO_BATCH={micro_batch}", f"LABEL_SMOOTHING={smoothing}",
        f"CLASS_WEIGHTS={weighted}",
    )  # fmt: skip
    loss, correct, logits, mixture = train_on_marked_clips(settings, table)
    assert (mixture.amax(1) < 1).any() == (lever == "MIXUP_ALPHA=1.0")
    weights = CLIPS / (3 * targets.sum(0)) if weighted else np.ones(3)
    smoothed = (1 - smoothing) * mixture.numpy() @ targets + smoothing / 3
    by_hand = -(smoothed * weights * logits.log_softmax(1).numpy()).sum()
    assert loss == pytest.approx(by_hand, rel=1e-5)
    main = table["target"].to_numpy()[mixture.argmax(1)]
    assert correct == (logits.argmax(1).numpy() == main).sum()
