"""What a training step gets: its epoch's order, images and dropout; what the optimiser is told."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from stemgenre.data.competition import load_competition
from stemgenre.features.log_mel import Frontend
from stemgenre.runtime import Runtime, StopRequest
from stemgenre.separation.cache import open_cache
from stemgenre.training import checkpoint, optimisation
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.inference import compute_logits
from stemgenre.training.model import build_model
from stemgenre.training.saving import restore, save_best_model
from stemgenre.training.stem_loader import StemLoader
from stemgenre.training.trainer import Trainer

CPU = torch.device("cpu")
PLAIN = ("AUGMENT_PROBABILITY=0", "CLIP_SECONDS=2")


@pytest.fixture(scope="module")
def clips(small_data):
    """The training clips of the small demo, with their targets."""
    return load_competition(small_data, num_classes=10, cache_dir=small_data / "separated").train


@pytest.fixture
def make_trainer(small_settings, clips):
    """A function: a Trainer of these clips, or others, on small_data's stems."""

    def make(*overrides, train_clips=clips):
        settings = small_settings("BATCH_SIZE=15", *overrides)
        channels = len(settings.features.channel_names)
        stats = ([-40.0] * channels, [15.0] * channels)
        net = build_model(settings.model, num_classes=10, in_channels=channels, seed=0)
        return Trainer(
            net,
            Frontend(settings.features, device=CPU, channel_stats=stats),
            StemLoader(open_cache(settings), threads=2, device=CPU, device_cache=0.0),
            train_clips=train_clips,
            valid_clips=clips[:10],
            label_names=[str(target) for target in range(10)],
            label_ids=list(range(10)),
            settings=settings,
            runtime=Runtime(CPU, 0, 1, StopRequest()),
            run_signature={},
        )

    return make


def train_epoch(trainer, epoch=0):
    """What the network gets in an epoch: [(images, seed of its dropout)] of each step."""
    seen = []

    def look(module, inputs):
        assert module.training, "dropout is on, after a validation too"
        seen.append((inputs[0].clone(), torch.initial_seed()))

    handle = trainer.net.register_forward_pre_hook(look)
    trainer.state.epoch, trainer.state.step, trainer.state.sums = epoch, 0, {}
    trainer.net.eval()  # as a validation leaves it
    trainer.train_epoch()
    handle.remove()
    return seen


def sums_of(steps):
    """A number for each image, in the order in which they were seen."""
    return torch.cat([images for images, _ in steps]).double().sum((1, 2, 3)).tolist()


def test_each_epoch_has_its_own_order_of_the_same_clips(make_trainer):
    trainer = make_trainer(*PLAIN)
    first, second = (sums_of(train_epoch(trainer, epoch)) for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_each_epoch_has_its_own_augmentation_windows_and_swapped_stems(make_trainer):
    plain = "AUGMENT_PROBABILITY=0"
    for words in (["AUGMENT_PROBABILITY=1"], [plain, "CLIP_SECONDS=1"], [plain, "STEM_SWAP=0.6"]):
        trainer = make_trainer(*words)
        first, second = (set(sums_of(train_epoch(trainer, epoch))) for epoch in (0, 1))
        assert len(first & second) < len(first) / 2, words


def test_images_are_the_same_where_the_network_computes_them_as_on_a_gpu(make_trainer):
    words = ("CLIP_SECONDS=1", "AUGMENT_PROBABILITY=1")
    by_threads, by_network = make_trainer(*words), make_trainer(*words)
    by_network.epoch_images.on_cpu = False
    for epoch in (0, 1):
        for left, right in zip(
            train_epoch(by_threads, epoch), train_epoch(by_network, epoch), strict=True
        ):
            torch.testing.assert_close(left[0], right[0])


def test_a_window_is_as_long_as_the_tempo_of_its_image_needs(make_trainer):
    trainer = make_trainer("CLIP_SECONDS=1", "AUGMENT_PROBABILITY=1")
    images = trainer.epoch_images
    images.on_cpu = False  # so that it gives stems
    ((positions, stems),) = images.batches([np.arange(30)], epoch=3)
    lengths = [clip.shape[1] for clip in stems]
    params = images.params(positions, epoch=3)
    assert lengths == [trainer.frontend.needed_samples(augment) for augment in params]
    assert len(set(lengths)) > 10


def test_a_clips_image_depends_on_its_index_and_not_on_the_clips_around_it(make_trainer, clips):
    """So that a run with further clips, or another fold, shows the others as before."""
    words = ("CLIP_SECONDS=1", "AUGMENT_PROBABILITY=1")
    whole, part = (
        set(sums_of(train_epoch(make_trainer(*words, train_clips=table))))
        for table in (clips, clips[3:])
    )
    assert part <= whole


def test_dropout_and_mixup_are_of_the_epoch_the_step_and_the_process(make_trainer, monkeypatch):
    mix_pairs, mixup_seeds = optimisation.mix_pairs, []

    def look(*batch, alpha, seed):
        mixup_seeds.append(seed)
        return mix_pairs(*batch, alpha=alpha, seed=seed)

    monkeypatch.setattr(optimisation, "mix_pairs", look)
    trainer, dropout_seeds = make_trainer(*PLAIN, "MIXUP_ALPHA=0.4"), []
    for rank in (0, 1):
        trainer.runtime = Runtime(CPU, rank, 1, StopRequest())
        for epoch in (0, 1):
            dropout_seeds += [seed for _, seed in train_epoch(trainer, epoch)]
    for seeds in (dropout_seeds, mixup_seeds):
        assert len(set(seeds)) == len(seeds) == 8


def test_a_step_that_is_repeated_moves_the_batchnorm_statistics_once(make_trainer, monkeypatch):
    scaler, failed = torch.amp.GradScaler, []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    trainer = make_trainer(*PLAIN)

    def fail_once(*call):
        if not failed:
            failed.append(call)
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.optimizer.register_step_pre_hook(fail_once)
    passes = train_epoch(trainer)
    counts = {tensor.item() for name, tensor in trainer.net.named_buffers() if "num_" in name}
    assert counts == {len(passes) - 1}, "that of the failed step is undone"


def test_validation_has_no_dropout_and_leaves_the_batchnorm_statistics(make_trainer):
    trainer = make_trainer(*PLAIN)
    trainer.net.train()
    before = [buffer.clone() for buffer in trainer.net.buffers()]
    first, again = (
        compute_logits(
            trainer.kept_net, trainer.frontend, trainer.loader, trainer.valid_clips,
            micro_batch=trainer.micro_batch, amp_dtype=None, runtime=trainer.runtime,
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(first, again)
    assert all(map(torch.equal, before, trainer.net.buffers()))


def test_gradients_are_clipped_and_do_not_add_up_over_steps(make_trainer):
    trainer = make_trainer(*PLAIN, "GRADIENT_CLIP=1e-3")
    norms = []

    def look(step):
        gradients = [p.grad for p in trainer.trainable if p.grad is not None]
        norms.append(nn.utils.get_total_norm(gradients).item())

    trainer.on_step = look
    train_epoch(trainer)
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)


def test_the_optimiser_and_its_schedule_are_those_of_the_settings(make_trainer):
    trainer = make_trainer(
        "LR=1e-3", "MIN_LR=1e-5", "WEIGHT_DECAY=0.3", "WARMUP_EPOCHS=1", "EPOCHS=4",
        "LR_DECAY_PER_STAGE=0.5",
    )  # fmt: skip
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.3}
    assert groups[1]["initial_lr"] == pytest.approx(5e-4)
    rates = []
    for _ in range(5):
        rates.append(groups[0]["lr"])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates == pytest.approx([5e-4, 1e-3, 7.525e-4, 2.575e-4, 1e-5])


def test_a_resumed_run_keeps_its_loss_scale_and_restarts_its_schedule_from_lr_to_min_lr(
    make_trainer, monkeypatch
):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))
    stopped = make_trainer(*PLAIN)
    train_epoch(stopped)
    stopped.state.step, stopped.state.sums = 0, {}
    stopped.scaler.update(1024.0)
    stopped.save()
    resumed = make_trainer(
        *PLAIN, "EPOCHS=4", "LR=1e-3", "MIN_LR=1e-5", "LOAD_SCHEDULER_STATE=False"
    )
    path = stopped.checkpoint_path
    restore(resumed, checkpoint.load(path, "checkpoint") | {"path": path})
    assert resumed.scaler.get_scale() == 1024.0
    rates = []
    for _ in range(5):
        rates.append(resumed.optimizer.param_groups[0]["lr"])
        resumed.optimizer.step()
        resumed.scheduler.step()
    assert (rates[0], rates[-1]) == (1e-3, pytest.approx(1e-5))


def test_a_resumed_schedule_with_a_warm_up_is_that_of_the_run_without_a_stop(make_trainer):
    words = (*PLAIN, "EPOCHS=6", "WARMUP_EPOCHS=2")
    run, resumed = make_trainer(*words), make_trainer(*words)

    def rates(trainer, epochs):
        found = []
        for _ in range(epochs):
            trainer.optimizer.step()
            trainer.scheduler.step()
            found.append(trainer.optimizer.param_groups[0]["lr"])
        return found

    rates(run, 3)
    history = [{"valid_accuracy": 0.5, "valid_loss": 1.0}] * 3
    run.state = TrainState(epoch=3, best_epoch=1, history=history)
    run.best_weights, run.is_saved = run.net.state_dict(), False
    run.save()
    path = run.checkpoint_path
    restore(resumed, checkpoint.load(path, "checkpoint") | {"path": path})
    assert rates(resumed, 3) == rates(run, 3)


def test_a_resumed_run_keeps_the_checkpoint_that_it_resumed_until_its_second_one(make_trainer):
    stopped, resumed = make_trainer(*PLAIN), make_trainer(*PLAIN)
    path = stopped.checkpoint_path
    stopped.is_saved = resumed.is_saved = False  # as after a step
    stopped.save()
    before = path.read_bytes()
    restore(resumed, checkpoint.load(path, "checkpoint") | {"path": path})
    resumed.save()
    assert checkpoint.previous_path(path).read_bytes() == before


def test_the_best_model_says_what_it_is_of_however_late_it_is_written(make_trainer):
    trainer = make_trainer(*PLAIN)
    trainer.best_weights = {name: 2 * value for name, value in trainer.net.state_dict().items()}
    trainer.state.epoch, trainer.state.best_epoch, trainer.state.best_accuracy = 3, 1, 0.7
    save_best_model(trainer)
    saved = checkpoint.load(trainer.best_model_path, "model")
    assert (saved["epoch"], saved["valid_accuracy"]) == (1, 0.7)
    assert saved["separation_model"] == "synthesised"
    for name, value in trainer.best_weights.items():
        assert torch.equal(saved["weights"][name], value)


@pytest.mark.parametrize(("seconds", "expected"), [(110, []), (130, ["checkpoint"])])
def test_a_checkpoint_is_due_after_checkpoint_minutes(seconds, expected, make_trainer, monkeypatch):
    saved, write = [], checkpoint.save

    def count(path, kind, *arguments, **options):
        saved.append(kind)
        write(path, kind, *arguments, **options)

    def let_time_pass(step):
        trainer.saved_at = time.monotonic() - seconds

    monkeypatch.setattr(checkpoint, "save", count)
    trainer = make_trainer(*PLAIN, "CHECKPOINT_MINUTES=2")
    trainer.on_step = let_time_pass
    train_epoch(trainer)
    assert saved == expected
