"""The training loop: epochs, steps, micro-batches; validation, best model, checkpoints.

Whatever is random in a step (augmentation, dropout, stochastic depth) is a pure function of
(SEED, epoch, step): a run that is interrupted and resumed is the same run.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from stemgenre.errors import UserError, first_line
from stemgenre.features.log_mel import Frontend
from stemgenre.runtime import (
    MicroBatch,
    Runtime,
    derive_seed,
    is_out_of_memory,
    to_device,
)
from stemgenre.settings import Settings
from stemgenre.training import checkpoint, optimisation, saving
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.epoch_images import EpochImages
from stemgenre.training.epoch_sums import EpochSums
from stemgenre.training.inference import amp_type, autocast, compute_logits
from stemgenre.training.model import GenreNet, average_stats, copy_buffers, maybe_compile, wrap_ddp
from stemgenre.training.stem_loader import StemLoader, epoch_batches, split_evenly

log = logging.getLogger(__name__)

GPU_SAVE_SECONDS = 10.0  # between checkpoints: there, writing one takes as long as a short epoch


class Trainer:
    """Trains `net`: fit() runs until EPOCHS or PATIENCE ends it, train_epoch() is one epoch.

    `frontend` has the channel statistics. `train_clips` and `valid_clips` are tables with the
    columns clip, file_name and target; a clip's augmentation depends on its index in the table.
    Training clips may have probabilities in a column soft_target (see target_probabilities).
    `run_signature` is what a checkpoint must have in common with this run.
    """

    def __init__(
        self,
        net: GenreNet,
        frontend: Frontend,
        loader: StemLoader,
        *,
        train_clips: pd.DataFrame,
        valid_clips: pd.DataFrame,
        label_names: list[str],
        label_ids: list[int],
        settings: Settings,
        runtime: Runtime,
        run_signature: dict[str, Any],
    ):
        options, device = settings.train, runtime.device
        self.frontend, self.loader = frontend, loader
        self.train_clips, self.valid_clips = train_clips, valid_clips
        self.label_names, self.label_ids = label_names, label_ids
        self.settings, self.runtime, self.run_signature = settings, runtime, run_signature
        self.epoch_images = EpochImages(
            frontend,
            loader,
            train_clips,
            augment=settings.augment,
            seed=settings.machine.seed,
            device=device,
        )
        self.steps_per_epoch = math.ceil(len(train_clips) / options.batch_size)
        self.labels = torch.tensor(train_clips["target"].to_numpy())
        probabilities = optimisation.target_probabilities(train_clips, num_classes=len(label_names))
        soft = settings.augment.mixup_alpha > 0 or "soft_target" in train_clips
        self.targets = probabilities if soft else self.labels
        weights = optimisation.balanced_weights(probabilities) if options.class_weights else None
        self.loss = nn.CrossEntropyLoss(  # takes class indices and probabilities
            weights, label_smoothing=options.label_smoothing, reduction="sum"
        ).to(device)

        net = net.to(device, memory_format=torch.channels_last)
        self.net, self.ddp_net = wrap_ddp(net) if runtime.world_size > 1 else (net, net)
        self.compiled_net = maybe_compile(self.ddp_net, options.compile)
        self.trainable = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            optimisation.parameter_groups(
                self.net, lr=options.lr, decay=options.lr_decay_per_stage
            ),
            weight_decay=options.weight_decay,
            fused=device.type in ("cuda", "cpu"),
        )
        self.scheduler = optimisation.WarmupCosineLR(
            self.optimizer, options.epochs, warmup=options.warmup_epochs, min_lr=options.min_lr
        )
        decay = options.ema_decay
        self.average = optimisation.AveragedNet(self.net, decay=decay) if decay else None
        self.kept_net = self.average.module if decay else self.net  # the one that is validated
        self.amp_dtype = amp_type(device, options.use_amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        auto = options.micro_batch == "auto"
        self.micro_batch = MicroBatch(
            options.batch_size // runtime.world_size if auto else options.micro_batch,
            free_memory=loader.drop_gpu_cache,
        )

        paths = settings.paths
        self.checkpoint_path = paths.output(paths.checkpoint_file)
        self.best_model_path = paths.output(paths.best_model_file)
        self.state, self.run_id = TrainState(), checkpoint.new_run_id()
        self.best_weights = {}  # on the CPU, of state.best_epoch
        self.saved_at = time.monotonic()
        self.save_seconds = GPU_SAVE_SECONDS if device.type == "cuda" else 0.0
        self.is_saved = self.is_best_saved = True  # nothing is done yet
        self.owns_checkpoint = False  # CHECKPOINT_FILE is of this run: saved or restored by it
        self.is_damaged = False  # CHECKPOINT_FILE: this run was restored from the previous one

    def fit(
        self,
        *,
        after_epoch: Callable[[TrainState, torch.Tensor], None],
        after_step: Callable[[dict[str, float]], None] = lambda row: None,
    ) -> TrainState:
        """Trains to the end; returns how far the run has come. Raises Interrupted once it is saved.

        Calls after_epoch(state, logits of the validation clips) after each epoch, and
        after_step(row of metrics_steps.csv) every LOG_EVERY_STEPS steps. An epoch is saved unless
        the last checkpoint is younger than `save_seconds`, the last epoch always.
        """
        options, state, runtime = self.settings.train, self.state, self.runtime
        by = options.best_by
        runtime.status.stage("training")
        while state.epoch < options.epochs:
            if state.epochs_without_improvement(by) >= options.patience:
                log.info(
                    "no better validation %s for %d epochs: stopped early", by, options.patience
                )
                break
            self.train_epoch(after_step)
            started = time.monotonic()
            runtime.status.update(done=0, total=len(self.valid_clips))
            logits = compute_logits(
                self.kept_net,
                self.frontend,
                self.loader,
                self.valid_clips,
                micro_batch=self.micro_batch,
                amp_dtype=self.amp_dtype,
                runtime=runtime,
            )  # (clips, classes)
            row = self._metrics(logits, seconds=time.monotonic() - started)
            self.scheduler.step()
            state.history.append(row)
            state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
            better = state.is_better(row["valid_accuracy"], row["valid_loss"], by=by)
            if better:
                state.best_epoch = state.epoch
                state.best_accuracy, state.best_loss = row["valid_accuracy"], row["valid_loss"]
                weights = self.kept_net.state_dict().items()
                self.best_weights = {name: tensor.cpu().clone() for name, tensor in weights}
                self.is_best_saved = False
            saving.write_metrics(self)
            checkpoint.log_epoch(row, epochs=options.epochs, better=better and by != "last")
            if time.monotonic() - self.saved_at >= self.save_seconds:
                self.save()
            after_epoch(state, logits)
            if runtime.sync_stop():
                self.save()
                raise self._interrupted()
        self.save()
        runtime.all_gather(None)  # no rank reads BEST_MODEL_FILE before it is written
        return state

    def train_epoch(
        self, after_step: Callable[[dict[str, float]], None] = lambda row: None
    ) -> None:
        """Takes the remaining steps of the current epoch. Raises Interrupted once saved."""
        options, state, runtime = self.settings.train, self.state, self.runtime
        batches = epoch_batches(
            self.train_clips,
            batch_size=options.batch_size,
            seed=self.settings.machine.seed,
            epoch=state.epoch,
        )
        rank_batches = [batch[runtime.rank :: runtime.world_size] for batch in batches]
        sums = EpochSums(state.sums, done=state.step, steps=len(batches), runtime=runtime)
        self.ddp_net.train()
        runtime.status.update(
            run=self.run_id,
            epoch=state.epoch + 1,
            epochs=options.epochs,
            step=state.step,
            steps=len(batches),
            done=0,
            total=0,
        )
        for positions, inputs in tqdm(
            self.epoch_images.batches(rank_batches[state.step :], epoch=state.epoch),
            initial=state.step,
            total=len(batches),
            desc=f"epoch {state.epoch + 1}/{options.epochs}",
            unit="batch",
            leave=False,
            disable=not runtime.is_main,
        ):
            batch_clips = len(batches[state.step])  # on all ranks
            loss, correct, norm = self.micro_batch.run(
                functools.partial(self._repeatable_step, positions, inputs, batch_clips),
                -(-batch_clips // runtime.world_size),  # of the rank that has most
                too_large="training on a single clip exceeds GPU memory; lower IMG_SIZE or raise "
                "FREEZE_STAGES",
            )
            may_overflow = self.scaler.is_enabled()  # in a step that is then skipped
            sums.add(state.step, loss, correct, norm, may_overflow=may_overflow)
            if self.average:
                is_taken = norm.isfinite() if may_overflow else None
                self.average.update_parameters(self.net, is_taken=is_taken)
            state.step, self.is_saved = state.step + 1, False
            runtime.status.update(step=state.step)
            self._log_step(sums, batch_clips, after_step)
            self.on_step(state.step)
            due = time.monotonic() - self.saved_at > 60 * options.checkpoint_minutes
            due, stop_signal = runtime.all_reduce_max(int(due), runtime.stop.signal_number)
            if (due or stop_signal) and state.step < len(batches):
                self._collect(sums, rank_batches)
                self.save()
                if stop_signal:
                    runtime.stop.signal_number = stop_signal  # of any rank
                    raise self._interrupted()
        self._collect(sums, rank_batches)

    def _repeatable_step(self, positions, inputs, batch_clips, size):
        """What _train_step() gives; if it fails, everything is as it was, and it can be repeated.

        It fails because memory runs out, which is for self.micro_batch to repeat, or because
        torch.compile does not work here: then it is repeated, and continued, without.
        """
        scaler, world_size = self.scaler, self.runtime.world_size
        compiled = self.compiled_net is not self.ddp_net
        may_undo = self.runtime.device.type == "cuda" or compiled or scaler.is_enabled()
        buffers = copy_buffers(self.net) if may_undo else []
        try:
            loss, correct, norm = self._train_step(positions, inputs, batch_clips, size)
            if scaler.is_enabled():  # of a skipped step, not even BatchNorm's statistics remain
                is_taken = norm.isfinite()
                for buffer, before in zip(self.net.buffers(), buffers, strict=True):
                    buffer.copy_(torch.where(is_taken, buffer, before))
            return loss, correct, norm
        except RuntimeError as error:
            for buffer, before in zip(self.net.buffers(), buffers, strict=False):
                buffer.copy_(before)
            if is_out_of_memory(error):
                if world_size == 1:
                    raise
                raise UserError(  # the other ranks are waiting for this step's gradients
                    f"GPU out of memory with {min(size, len(inputs))} clips per forward pass; set "
                    "MICRO_BATCH to half of that and resume with RESUME_FROM_CHECKPOINT=True"
                ) from None
            if not compiled:
                raise
            reason = first_line(getattr(error, "inner_exception", error))
        # outside that block, so that the failed step's tensors are freed
        log.warning("COMPILE=True: torch.compile failed (%s); training continues without", reason)
        self.compiled_net = self.ddp_net
        return self._repeatable_step(positions, inputs, batch_clips, size)

    def _train_step(self, positions, inputs, batch_clips, size):
        """(loss, correct, gradient norm) of a step: the first two summed over this rank's clips.

        `inputs` are of epoch_images, for the clips at `positions`. It goes in micro-batches of at
        most `size` clips.
        """
        seed, epoch, step = self.settings.machine.seed, self.state.epoch, self.state.step
        device, rank, world_size = self.runtime.device, self.runtime.rank, self.runtime.world_size
        params = self.epoch_images.params(positions, epoch=epoch)
        labels, targets = (to_device(t[positions], device) for t in (self.labels, self.targets))
        alpha, mixed = self.settings.augment.mixup_alpha, None
        torch.manual_seed(derive_seed(seed, epoch, step, rank, 3))
        self.optimizer.zero_grad(set_to_none=True)
        loss = correct = torch.zeros((), device=device)
        if alpha:  # of all images, so that the micro-batch's size does not decide on the pairs
            images = self.epoch_images.compute(inputs, params)
            pairs_seed = derive_seed(seed, epoch, step, rank, 5)
            mixed, targets = optimisation.mix_pairs(images, targets, alpha=alpha, seed=pairs_seed)
        # Every rank takes equally many parts, as SyncBatchNorm's forward pass is a collective.
        largest, smallest = -(-batch_clips // world_size), batch_clips // world_size
        for part in split_evenly(len(inputs), min(-(-largest // size), smallest)):
            images = mixed[part] if alpha else self.epoch_images.compute(inputs[part], params[part])
            images = images.to(memory_format=torch.channels_last)
            more = part.stop < len(inputs) and world_size > 1
            with self.ddp_net.no_sync() if more else contextlib.nullcontext():
                with autocast(device, self.amp_dtype):
                    logits = self.compiled_net(images)  # (size, classes)
                part_loss = self.loss(logits.float(), targets[part])
                # The mean is over the batch of all ranks, of which DDP averages the gradients.
                self.scaler.scale(part_loss * world_size / batch_clips).backward()
            loss = loss + part_loss.detach()
            correct = correct + (logits.argmax(1) == labels[part]).sum()
        return loss, correct, self._optimizer_step()

    def _optimizer_step(self):
        """Clips the gradients and takes the optimiser's step; returns their norm before that.

        Its first call allocates the optimiser's state. It can be repeated if memory runs out.
        """
        try:
            if not self.optimizer.state:
                self.optimizer.state.update(optimisation.initial_state(self.optimizer))
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.trainable, self.settings.train.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return norm
        except torch.OutOfMemoryError:
            if self.scaler.is_enabled():
                self.scaler.update(self.scaler.get_scale())  # forgets that gradients are unscaled
            raise

    def _log_step(self, sums, batch_clips, after_step):
        """Every LOG_EVERY_STEPS steps, a row of metrics_steps.csv for after_step()."""
        state, every = self.state, self.settings.tracking.log_every_steps
        steps = state.epoch * self.steps_per_epoch + state.step  # of all epochs
        if every and steps % every == 0:
            lr = self.optimizer.param_groups[0]["lr"]
            row = sums.row(state.step, clips=batch_clips, learning_rate=lr)
            state.step_history.append({"epoch": state.epoch + 1, "step": steps} | row)
            after_step(state.step_history[-1])

    def on_step(self, step: int) -> None:
        """Does nothing; called after the `step`-th step of an epoch. A hook for tests and tools."""

    def _collect(self, sums, rank_batches):
        """Puts the sums over the epoch's steps, of all ranks, into the state. Waits for the device.

        Raises UserError if one of them or the weights are NaN or infinite.
        """
        average_stats(self.net, self.runtime.world_size)
        if self.average:
            average_stats(self.average, self.runtime.world_size)
        self.state.sums = sums.collect(
            self.net,
            epoch=self.state.epoch + 1,
            steps=self.state.step,
            may_overflow=self.scaler.is_enabled(),
            names_of=lambda step: self.train_clips["file_name"].iloc[rank_batches[step]].tolist(),
        )

    def _metrics(self, logits, *, seconds):
        """The row of metrics.csv for an epoch whose validation took so many `seconds`."""
        targets = torch.tensor(self.valid_clips["target"].to_numpy())
        loss, correct, norm = self.state.sums["values"]
        return {
            "epoch": self.state.epoch + 1,
            "train_loss": loss / len(self.train_clips),
            "train_accuracy": correct / len(self.train_clips),
            "valid_loss": nn.functional.cross_entropy(logits, targets).item(),
            "valid_accuracy": (logits.argmax(1) == targets).float().mean().item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": norm / self.state.step,
            "seconds": self.state.sums["seconds"] + seconds,
        }

    def save(self) -> None:
        """Writes BEST_MODEL_FILE, and the whole state of the run to CHECKPOINT_FILE, on rank 0.

        Either only if it has changed since it was written.
        """
        if self.is_saved:
            return
        if not self.is_best_saved:
            saving.save_best_model(self)
        saving.save_checkpoint(self)
        self.owns_checkpoint, self.is_damaged = True, False
        self.saved_at = time.monotonic()
        self.is_saved = self.is_best_saved = True

    def _interrupted(self):
        """The exception that ends a run that was asked to stop and is saved."""
        path, older = self.checkpoint_path, checkpoint.older_path(self.checkpoint_path)
        return self.runtime.interrupted(
            f"stopped {self.state.position}; saved in {path}. To resume, run again with "
            "RESUME_FROM_CHECKPOINT=True"
            + (
                f"; to resume the earlier run, rename {older} first, of FOLDS and SEEDS those of "
                "all networks"
                if older.is_file()
                else ""
            )
        )
