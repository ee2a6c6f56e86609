"""Checkpoints and models on disk: written atomically, read without running what is in them."""

import contextlib
import io
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stemgenre.errors import UserError, first_line
from stemgenre.files import atomic_write, load_tensors
from stemgenre.settings import Settings, config_values

log = logging.getLogger(__name__)

FORMAT = 3
TARGETS = "genres of the training clips"  # in a run's signature
MALFORMED = (
    LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError,
)  # fmt: skip
# raised by using what a file holds, if that is incomplete or of the wrong type or shape

REQUIRED = {
    "run_id", "run_signature", "train_state", "weights", "best_weights", "channel_stats",
}  # fmt: skip


@dataclass
class TrainState:
    """How far a run has come: what a checkpoint holds beside the weights and the optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps done in the current epoch
    sums: dict = field(default_factory=dict)  # over these steps: values and seconds
    history: list = field(default_factory=list)  # a row of metrics.csv per finished epoch
    step_history: list = field(default_factory=list)  # a row per LOG_EVERY_STEPS steps
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")

    @property
    def position(self) -> str:
        """How far it has come, in words."""
        if not self.step:
            return f"after epoch {self.epoch}"
        return f"in epoch {self.epoch + 1} after step {self.step}"

    def check(self) -> None:
        """Raises one of MALFORMED unless the values are such as a run has."""
        counts = (self.epoch, self.step, self.best_epoch)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("its epochs and steps are not counts")
        first = min(1, self.epoch)  # which is the best so far
        if not first <= self.best_epoch <= self.epoch:
            raise ValueError("its best epoch is none of its epochs")
        if type(self.history) is not list or len(self.history) != self.epoch:
            raise ValueError("its metrics are not those of its epochs")
        self.epochs_without_improvement()  # looks at each
        numbers = [value for row in self.history for value in row.values()]
        numbers += [self.best_accuracy, self.best_loss]
        if self.step:
            loss, correct, norm = self.sums["values"]
            numbers += [loss, correct, norm, self.sums["seconds"]]
        elif self.sums:
            raise ValueError("it has sums of no step")
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("its metrics are not numbers")

    def is_better(self, accuracy: float, loss: float, *, by: str = "accuracy") -> bool:
        """Whether an epoch is better than the best: by "accuracy" or "loss"; the "last" always is.

        An equal accuracy is better with a lower loss, and an equal loss with a higher accuracy.
        """
        now, best = (accuracy, -loss), (self.best_accuracy, -self.best_loss)
        return by == "last" or (now[::-1] > best[::-1] if by == "loss" else now > best)

    def epochs_without_improvement(self, by: str = "accuracy") -> int:
        """How many epochs have finished since the validation accuracy, or loss, was at its best.

        An equal accuracy with a lower loss gives a better model, but does not count here. Where the
        last epoch is kept, there is none to wait for: 0.
        """
        if by == "last" or not self.history:
            return 0
        sign = -1 if by == "loss" else 1
        values = [sign * row[f"valid_{by}"] for row in self.history]
        return len(values) - 1 - values.index(max(values))


def new_run_id() -> str:
    """A name for a run that no other has: the local time and a random part."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def save(path: Path, kind: str, content: dict[str, Any], *, previous: Path | None = None) -> None:
    """Writes `content` (tensors and plain values) atomically, as a "checkpoint" or a "model".

    With `previous`, the file that is replaced stays under that name. Raises UserError if it cannot
    be written.
    """
    data = io.BytesIO()  # on a full disk, torch.save into the file raises errors of its own
    torch.save({"format": FORMAT, "kind": kind, **content}, data)
    with atomic_write(path, previous=previous) as file:
        file.write(data.getbuffer())


def load(path: Path | str, kind: str) -> dict[str, Any]:
    """The content of a file that save() wrote, on the CPU.

    Raises UserError if it is missing, damaged, of another kind, or of an unknown format.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the {kind}'s file in it")
    if not path.is_file():
        way_out = "; python train.py makes one, --model names another" if kind == "model" else ""
        raise UserError(f"there is no {kind} {path}{way_out}")
    content = load_tensors(path, f"a {kind}")
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or content.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} of this program")
    if version != FORMAT:
        raise UserError(
            f"{path} has the {kind} format {version}; this program reads "
            f"format {FORMAT}: use the version that wrote it"
        )
    return content


def load_members(path: Path | str) -> list[dict[str, Any]]:
    """The contents of the models in a model file: one, or those that merge_models() wrote."""
    content = load(path, "model")
    members = content.get("members", [content])
    if not (isinstance(members, list) and members and all(isinstance(m, dict) for m in members)):
        raise UserError(f"{path} does not hold a complete model: its members are damaged")
    return members


def merge_models(paths: list[Path], merged: Path) -> None:
    """Writes the models at `paths` as one file, whose probabilities are averaged."""
    members = [member for path in paths for member in load_members(path)]
    save(merged, "model", {"members": members})


def previous_path(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept: checkpoint.previous.pth."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def older_path(path: Path) -> Path:
    """Where another run's checkpoint is kept until this one's first epoch: checkpoint.older.pth."""
    return path.with_name(f"{path.stem}.older{path.suffix}")


def set_aside(path: Path) -> None:
    """Renames the checkpoint of an earlier run, so that only a run's own can be resumed.

    A run that starts from scratch calls it before its first step: if it is killed before its first
    checkpoint, there is none. A run that has not finished an epoch does not take the place of one
    that was set aside for it. Raises UserError if the file cannot be renamed.
    """
    older = older_path(path)
    try:
        if path.is_file():
            if older.is_file():
                path.unlink()
                log.warning("%s is removed: its run had not finished an epoch", path)
            else:
                path.replace(older)
            previous_path(path).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be renamed: {error.strerror}") from None
    if older.is_file():
        log.warning(
            "the checkpoint of an earlier run is now %s, until this run has finished an epoch. To "
            "resume that run, rename it to %s and set RESUME_FROM_CHECKPOINT=True",
            older,
            path.name,
        )


def save_run(
    path: Path,
    content: dict[str, Any],
    *,
    first: bool,
    keep_older: bool,
    replaces_damaged: bool = False,
) -> None:
    """Writes a run's checkpoint; the one before it stays until the next, unless it is damaged.

    The `first` of a run replaces the previous one of another run; the one that was set aside stays
    with `keep_older`. Raises UserError if it cannot be written.
    """
    previous = previous_path(path)
    if first:
        with contextlib.suppress(OSError):  # save() names a folder that cannot be written
            previous.unlink(missing_ok=True)
    save(path, "checkpoint", content, previous=None if first or replaces_damaged else previous)
    if not keep_older:
        with contextlib.suppress(OSError):
            older_path(path).unlink(missing_ok=True)


def is_best_model_of(path: Path, run_id: str, epoch: int) -> bool:
    """Whether `path` holds a model that can be read, of that run and epoch."""
    try:
        model = load(path, "model")
    except UserError:
        return False
    return (model.get("run_id"), model.get("epoch")) == (run_id, epoch)


def write_metrics(path: Path, history: list[dict[str, float]], run_id: str) -> None:
    """Writes metrics.csv: a row per finished epoch, with the id of the run as the last column."""
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        pd.DataFrame(history).assign(run_id=run_id).to_csv(file, index=False)


def log_epoch(row: dict[str, float], *, epochs: int, better: bool) -> None:
    """Logs a row of metrics.csv as one line."""
    log.info(
        "epoch %(epoch)3d/%(epochs)d  train loss %(train_loss).4f accuracy %(train_accuracy).3f  "
        "valid loss %(valid_loss).4f accuracy %(valid_accuracy).3f  "
        "lr %(learning_rate).1e  %(seconds).1f s%(best)s",
        row | {"epochs": epochs, "best": "  best so far" if better else ""},
    )


def load_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a run's newest readable checkpoint: the one at `path`, or the previous.

    The previous one is for a damaged file; without one at `path` there is no checkpoint. Raises
    UserError if there is none, or if neither can be read.
    """
    previous, older = previous_path(path), older_path(path)
    if not path.is_file():
        left = [kept.name for kept in (previous, older) if kept.is_file()]
        raise UserError(
            f"there is no checkpoint {path}; RESUME_FROM_CHECKPOINT=False starts from scratch"
            + (f". To resume from {' or '.join(left)}, rename it to {path.name}" if left else "")
        )
    try:
        return path, load(path, "checkpoint")
    except UserError as error:
        if not previous.is_file():
            raise
        content = load(previous, "checkpoint")
        log.warning("%s; the previous one is used, %s", error, previous)
        return previous, content


def load_resume_checkpoint(
    settings: Settings, run_signature: dict[str, Any]
) -> dict[str, Any] | None:
    """The content of the checkpoint to resume from, and its path as "path".

    None for a run that starts from scratch. Raises UserError if RESUME_FROM_CHECKPOINT=True and
    there is none that fits the run.
    """
    if not settings.train.resume_from_checkpoint:
        return None
    path, saved = load_run(settings.paths.output(settings.paths.checkpoint_file))
    if missing := REQUIRED - saved.keys():
        raise UserError(f"{path} is not a complete checkpoint: it has no {min(missing)}")
    try:
        check_signature(path, saved["run_signature"], run_signature)
        if not isinstance(saved["run_id"], str):
            raise ValueError("its run_id is not a name")
        stats = torch.tensor(saved["channel_stats"], dtype=torch.float32)
        channels = len(settings.features.channel_names)
        if stats.shape != (2, channels) or not stats.isfinite().all():
            raise ValueError("its channel statistics are not a mean and a deviation of each")
    except MALFORMED as error:
        raise UserError(f"{path} is not a complete checkpoint: {first_line(error)}") from None
    return saved | {"path": path}


def run_signature(
    settings: Settings, train_clips: pd.DataFrame, *, label_names: list[str], label_ids: list[int]
) -> dict[str, Any]:
    """{name: plain value} of what a checkpoint must have in common with the run that resumes it."""
    return {
        "labels": dict(zip(label_names, label_ids, strict=True)),
        "training clips": sorted(train_clips["clip"]),
        TARGETS: _targets(train_clips),
        "SEED": settings.machine.seed,
        "TEST_SIZE": settings.data.test_size,
        "BATCH_SIZE": settings.train.batch_size,
        "FREEZE_STAGES": settings.model.freeze_stages,
        "TRAIN_FIRST_CONV": settings.model.train_first_conv,
        "FROZEN_BATCHNORM": settings.model.frozen_batchnorm,
        "model": settings.model.backbone,
        "LR_DECAY_PER_STAGE": settings.train.lr_decay_per_stage,  # the optimiser's groups
        "EMA_DECAY": settings.train.ema_decay,  # the average needs all steps before
        "SEPARATION_MODEL": settings.separation.separation_model,
        **{name.upper(): value for name, value in settings.features.model_dump().items()},
    }


def _targets(clips):
    """{clip: class index, or with a soft target each genre's probability}."""
    soft = clips.get("soft_target", [None] * len(clips))
    return {
        clip: probabilities if isinstance(probabilities, list) else target
        for clip, target, probabilities in zip(
            clips["clip"], clips["target"].tolist(), soft, strict=True
        )
    }


def check_signature(path: Path | str, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError, with a line for each difference, unless a checkpoint fits this run."""
    defaults = config_values()  # of settings newer than the checkpoint
    defaults |= {TARGETS: current.get(TARGETS)}  # which older checkpoints do not have
    lines = []
    for name in {**current, **saved}:
        was, now = saved.get(name, defaults.get(name)), current.get(name)
        if was != now:
            differ = ""
            if isinstance(was, list | dict) or isinstance(now, list | dict):
                was, now, differ = len(was or ()), len(now or ()), ", not the same"
            lines.append(f"    {name}: {was} in the checkpoint, {now} here{differ}")
    if lines:
        raise UserError(
            f"{path} does not fit this run:\n" + "\n".join(lines) + "\n"
            "set these back (that run's settings_used.py has them), or start from scratch with "
            "RESUME_FROM_CHECKPOINT=False"
        )
