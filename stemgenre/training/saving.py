"""What a run saves of its Trainer, and how a Trainer resumes from it."""

import logging
from typing import TYPE_CHECKING, Any

from stemgenre.errors import UserError, first_line
from stemgenre.training import checkpoint
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.optimisation import WarmupCosineLR

if TYPE_CHECKING:
    from stemgenre.training.trainer import Trainer

log = logging.getLogger(__name__)


def save_checkpoint(trainer: "Trainer") -> None:
    """Writes the whole state of the run to CHECKPOINT_FILE, on rank 0."""
    if not trainer.runtime.is_main:
        return
    content = {
        "run_id": trainer.run_id,
        "run_signature": trainer.run_signature,
        "train_state": vars(trainer.state),
        "weights": trainer.net.state_dict(),
        "average": trainer.average.state_dict() if trainer.average else {},
        "best_weights": trainer.best_weights,
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        **trainer.frontend.state(),
    }
    checkpoint.save_run(
        trainer.checkpoint_path,
        content,
        first=not trainer.owns_checkpoint,
        replaces_damaged=trainer.is_damaged,
        keep_older=trainer.state.epoch == 0,
    )


def save_best_model(trainer: "Trainer") -> None:
    """Writes the best epoch's weights, and what predicting needs, to BEST_MODEL_FILE, on rank 0."""
    if not trainer.runtime.is_main:
        return
    content = {
        "run_id": trainer.run_id,
        "backbone": trainer.settings.model.backbone,
        "weights": trainer.best_weights,
        "epoch": trainer.state.best_epoch,
        "valid_accuracy": trainer.state.best_accuracy,
        "label_ids": trainer.label_ids,
        "label_names": trainer.label_names,
        "separation_model": trainer.settings.separation.separation_model,
        **trainer.frontend.state(),
    }
    checkpoint.save(trainer.best_model_path, "model", content)


def write_metrics(trainer: "Trainer") -> None:
    """Writes metrics.csv, on rank 0."""
    if trainer.runtime.is_main:
        path = trainer.settings.paths.output("metrics.csv")
        checkpoint.write_metrics(path, trainer.state.history, trainer.run_id)


def restore(trainer: "Trainer", saved: dict[str, Any]) -> None:
    """Resumes from the content of a checkpoint whose run_signature is the trainer's.

    The optimiser and the scheduler resume as LOAD_OPTIMIZER_STATE and LOAD_SCHEDULER_STATE say; a
    scheduler that does not restarts, without warm-up, over the remaining epochs. Raises UserError
    if the content is incomplete.
    """
    try:
        trainer.run_id, trainer.best_weights = saved["run_id"], saved["best_weights"]
        trainer.state = TrainState(**saved["train_state"])
        trainer.state.check()
        if trainer.state.best_epoch:
            trainer.net.load_state_dict(trainer.best_weights)  # so that these, too, are complete
        trainer.net.load_state_dict(saved["weights"])
        if trainer.average:
            trainer.average.load_state_dict(saved["average"])
        _restore_optimizer(trainer, saved)
    except checkpoint.MALFORMED as error:
        reason = first_line(error)
        raise UserError(f"{saved['path']} is not a complete checkpoint: {reason}") from None
    trainer.owns_checkpoint = True
    trainer.is_damaged = saved["path"] != trainer.checkpoint_path
    state, path = trainer.state, trainer.best_model_path
    log.info("resumed %s (%s)", state.position, saved["path"])
    if state.epoch >= trainer.settings.train.epochs:
        log.info("EPOCHS=%d are done: nothing is left to train", trainer.settings.train.epochs)
    if state.best_epoch and trainer.runtime.is_main:
        write_metrics(trainer)  # those in the folder may be of another run or a later epoch
        if not checkpoint.is_best_model_of(path, trainer.run_id, state.best_epoch):
            log.warning("%s is missing or of another run: written from the checkpoint", path)
            save_best_model(trainer)


def _restore_optimizer(trainer, saved):
    """The optimiser with its learning rates, the loss scale, the scheduler."""
    options = trainer.settings.train
    initial_lrs = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    if options.load_optimizer_state:
        trainer.optimizer.load_state_dict(saved["optimizer"])
        for group in trainer.optimizer.param_groups:
            group["weight_decay"] = options.weight_decay
        if saved["scaler"]:  # empty from a run that was not in fp16
            trainer.scaler.load_state_dict(saved["scaler"])
    groups = trainer.optimizer.param_groups
    if options.load_scheduler_state:
        asked = _schedule(trainer.scheduler)
        trainer.scheduler.load_state_dict(saved["scheduler"])
        for name, kept in _schedule(trainer.scheduler).items():
            if asked[name] != kept:
                log.warning(
                    "%s=%g has no effect: the resumed schedule keeps %g; with "
                    "LOAD_SCHEDULER_STATE=False it restarts",
                    *(name, asked[name], kept),
                )
        ended = trainer.scheduler.last_epoch >= trainer.scheduler.T_max + trainer.scheduler.warmup
        if ended and trainer.state.epoch < options.epochs:
            log.warning(
                "the learning rate's schedule has ended: it stays at %g; with "
                "LOAD_SCHEDULER_STATE=False it restarts",
                trainer.scheduler.get_last_lr()[0],
            )
        before = trainer.state.epoch - trainer.scheduler.last_epoch  # epochs before it restarted
        trainer.scheduler.T_max = options.epochs - before - trainer.scheduler.warmup
        for group, lr in zip(groups, trainer.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
    else:
        for group, lr in zip(groups, initial_lrs, strict=True):
            group.update(lr=lr, initial_lr=lr)
        remaining = max(1, options.epochs - trainer.state.epoch)
        trainer.scheduler = WarmupCosineLR(trainer.optimizer, remaining, min_lr=options.min_lr)


def _schedule(scheduler):
    """The settings that a schedule is made of."""
    lr, min_lr, warmup = scheduler.base_lrs[0], scheduler.eta_min, scheduler.warmup
    return {"LR": lr, "MIN_LR": min_lr, "WARMUP_EPOCHS": warmup}
