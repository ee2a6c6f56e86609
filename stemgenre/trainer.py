"""Training: fit, checkpoints, the best model.

Whatever is random in a step (augmentation, dropout, stochastic depth) is a pure function of
(SEED, epoch, step): a run that is interrupted and resumed is the same run.
"""

import logging
import time

import torch
from torch import nn
from tqdm import tqdm

from stemgenre import checkpoint
from stemgenre.augmentation import draw
from stemgenre.dataset import epoch_batches
from stemgenre.errors import Interrupted, UserError, first_line
from stemgenre.inference import predict
from stemgenre.learner import Learner
from stemgenre.progress import Progress, write_metrics
from stemgenre.runtime import seed_of, to_device

log = logging.getLogger(__name__)


class Trainer:
    """One run of training: fit() until EPOCHS or PATIENCE ends it.

    `train` and `valid` are tables of clips, `reader` a StemReader, `frontend` a FrontEnd with the
    channel statistics, `identity` what a checkpoint must share with this run.
    """

    def __init__(self, model, frontend, reader, train, valid, settings, runtime, identity):
        self.learner = Learner(model, frontend, settings.train, runtime)
        self.net, self.model = self.learner.net, self.learner.model
        self.frontend, self.reader, self.train, self.valid = frontend, reader, train, valid
        self.settings, self.runtime, self.identity = settings, runtime, identity
        self.clip_indices, self.targets = train.index.tolist(), train["target"].to_numpy()
        self.progress = Progress()
        self.has_saved = False  # or was restored: CHECKPOINT_FILE is this run's
        self.saved_at = time.monotonic()

    def fit(self, *, after_epoch):
        """Trains to the end and returns the Progress. Raises Interrupted once stopped and saved.

        Calls after_epoch(progress, logits of the validation clips) when an epoch is saved.
        """
        options, progress = self.settings.train, self.progress
        while progress.epoch < options.epochs:
            if progress.history and progress.epoch - progress.best_epoch >= options.patience:
                log.info(
                    "no better validation accuracy for %d epochs: stopped early", options.patience
                )
                break
            self._train_epoch()
            logits = self._finish_epoch()
            self.save()
            after_epoch(progress, logits)
            if self.runtime.stop_requested():
                self._interrupt(self.runtime.stop.signal_number)
        return progress

    def _train_epoch(self):
        """The steps of the epoch in hand that are still to do."""
        progress, runtime, options = self.progress, self.runtime, self.settings.train
        seed = self.settings.machine.seed
        self.model.train()
        batches = epoch_batches(
            self.train, batch_size=options.batch_size, seed=seed, epoch=progress.epoch
        )
        shares = [batch[runtime.rank :: runtime.world] for batch in batches]
        sums = torch.zeros(3, device=runtime.device)  # loss, correct, gradient norm
        finite = torch.ones(len(batches), dtype=torch.bool, device=runtime.device)  # of each step
        if runtime.is_main and progress.sums:
            sums += torch.tensor(progress.sums["values"], device=runtime.device)
        started = time.monotonic() - progress.sums.get("seconds", 0.0)
        todo = self.reader.batches(self.train, shares[progress.step :])
        bar = tqdm(
            todo,
            initial=progress.step,
            total=len(batches),
            leave=False,
            unit="batch",
            desc=f"epoch {progress.epoch + 1}/{options.epochs}",
            disable=not runtime.is_main,
        )
        for positions, stems in bar:
            torch.manual_seed(seed_of(seed, progress.epoch, progress.step, runtime.rank, 3))
            *results, finite[progress.step] = self._step(
                positions, stems, len(batches[progress.step])
            )
            sums += torch.stack(results)
            progress.step += 1
            if progress.step == len(batches):
                break
            due = time.monotonic() - self.saved_at > 60 * options.checkpoint_minutes
            due, stopping = runtime.maximum(int(due), runtime.stop.signal_number)
            if due or stopping:
                self._keep(sums, started, finite, shares)
                self.save()
            if stopping:
                self._interrupt(stopping)
        self._keep(sums, started, finite, shares)

    def _step(self, positions, stems, batch_clips):
        """One optimiser step on this rank's share of a batch; what Learner.step() returns."""
        seed, epoch = self.settings.machine.seed, self.progress.epoch
        draws = [
            draw(self.settings.augment, seed=seed, epoch=epoch, clip_index=self.clip_indices[i])
            for i in positions
        ]
        targets = to_device(torch.from_numpy(self.targets[positions]), self.runtime.device)
        return self.learner.step(stems, draws, targets, batch_clips)

    def _keep(self, sums, started, finite, shares):
        """Stores the epoch's sums over all ranks in the progress; this waits for the device.

        `finite` says of each step whether its loss and gradients were, `shares` which clips it had.
        Raises UserError, before anything is saved, if they or the weights are no numbers any more.
        """
        self._check_finite(finite.tolist(), shares)
        values = [sum(column) for column in zip(*self.runtime.gather(sums.tolist()), strict=True)]
        self.progress.sums = {"values": values, "seconds": time.monotonic() - started}

    def _check_finite(self, finite, shares):
        """Raises UserError on every rank if any has a step that is not finite, or such weights."""
        found = ()
        if not all(finite):
            step = finite.index(False)
            names = self.train["file_name"].iloc[shares[step]].tolist()
            found = (step, f"batch {step + 1} of {len(finite)}, clips {_first(names)}")
        elif not _all_finite(self.net):
            found = (self.progress.step, f"the weights after batch {self.progress.step}")
        found = [one for one in self.runtime.gather(found) if one]
        if found:
            raise UserError(
                f"the loss is no number any more in epoch {self.progress.epoch + 1}: "
                f"{min(found)[1]}; the last good checkpoint is kept. Resume with "
                "LOAD_SCHEDULER_STATE=False and a lower LR, or with USE_AMP=False"
            )

    def _finish_epoch(self):
        """Validates, logs the epoch's line, and keeps the model if it is the best.

        Returns the logits (clips, genres) of the validation clips.
        """
        progress, runtime, sums = self.progress, self.runtime, self.progress.sums
        started = time.monotonic()
        steps = progress.step
        for buffer in self.net.buffers() if runtime.world > 1 else ():
            torch.distributed.broadcast(buffer, 0)
        logits = predict(
            self.net, self.frontend, self.reader, self.valid, self.settings.train, runtime
        )
        targets = torch.tensor(self.valid["target"].to_numpy())
        loss, correct, norm = sums["values"]
        row = {
            "epoch": progress.epoch + 1,
            "train_loss": loss / len(self.train),
            "train_accuracy": correct / len(self.train),
            "valid_loss": nn.functional.cross_entropy(logits, targets).item(),
            "valid_accuracy": (logits.argmax(1) == targets).float().mean().item(),
            "learning_rate": self.learner.learning_rate,
            "gradient_norm": norm / steps,
            "seconds": sums["seconds"] + time.monotonic() - started,
        }
        self.learner.scheduler.step()
        progress.history.append(row)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        better = progress.is_better(row["valid_accuracy"], row["valid_loss"])
        if better:
            progress.best_epoch = progress.epoch
            progress.best_accuracy, progress.best_loss = row["valid_accuracy"], row["valid_loss"]
        if runtime.is_main:
            if better:
                self._save_best()
            write_metrics(self.settings.paths.output("metrics.csv"), progress.history)
        log.info(
            "epoch %3d/%d  train loss %.4f accuracy %.3f  valid loss %.4f accuracy %.3f  "
            "lr %.1e  %.1f s%s",
            progress.epoch,
            self.settings.train.epochs,
            row["train_loss"],
            row["train_accuracy"],
            row["valid_loss"],
            row["valid_accuracy"],
            row["learning_rate"],
            row["seconds"],
            "  best so far" if better else "",
        )
        return logits

    def _save_best(self):
        checkpoint.save(
            self.settings.paths.output(self.settings.paths.best_model_file),
            "model",
            {
                "weights": self.net.state_dict(),
                "epoch": self.progress.best_epoch,
                "valid_accuracy": self.progress.best_accuracy,
                "label_ids": list(self.identity["labels"].values()),
                "label_names": list(self.identity["labels"]),
                "separation_model": self.settings.separation.separation_model,
                **self.frontend.state(),
            },
        )

    @property
    def checkpoint_path(self):
        return self.settings.paths.output(self.settings.paths.checkpoint_file)

    def save(self):
        """Writes the whole state of the run to CHECKPOINT_FILE."""
        if self.runtime.is_main:
            checkpoint.save_run(
                self.checkpoint_path,
                {
                    "identity": self.identity,
                    "progress": vars(self.progress),
                    **self.learner.state(),
                    **self.frontend.state(),
                },
                first=not self.has_saved,
            )
        self.has_saved, self.saved_at = True, time.monotonic()

    def restore(self, saved):
        """Takes over the content of a checkpoint whose identity fits this run.

        Raises UserError if it is not whole.
        """
        try:
            self.progress = Progress(**saved["progress"])
            self.learner.restore(saved, epochs_done=self.progress.epoch)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(f"{self.checkpoint_path} is not a whole checkpoint: {reason}") from None
        self.has_saved = True
        log.info(
            "resumed from epoch %d, step %d (%s)",
            self.progress.epoch + 1,
            self.progress.step,
            self.checkpoint_path,
        )

    def _interrupt(self, signal_number):
        log.info(
            "stopped in epoch %d after step %d; saved in %s. To go on, run again with "
            "RESUME_FROM_CHECKPOINT=True",
            self.progress.epoch + 1,
            self.progress.step,
            self.checkpoint_path,
        )
        raise Interrupted(signal_number)


def _all_finite(net):
    """Whether every weight and statistic of the network is a number; waits for the device once."""
    numbers = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    return torch.stack([tensor.isfinite().all() for tensor in numbers]).all().item()


def _first(names, most=5):
    """The first names of a list, with ", ..." for the others."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def check_batch_size(batch_size, world, clips):
    """Raises UserError unless every process gets equally many clips of a batch, two or more."""
    if batch_size % world or (world > 1 and batch_size < 2 * world):
        fitting = max(2, round(batch_size / world)) * world
        raise UserError(
            f"BATCH_SIZE={batch_size} does not divide by {world} processes into two clips or "
            f"more; try {fitting}"
        )
    if clips < 2 * world:
        raise UserError(f"{clips} training clips are too few for {world} processes")
