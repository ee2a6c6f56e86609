"""Where a run's metrics go: a table of steps, TensorBoard's event files, Weights & Biases.

A tracker begins with the rows of all steps and epochs that the checkpoint holds, and makes its
record from these: a resumed run has each of them once, wherever it was killed.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stemgenre.errors import UserError, first_line
from stemgenre.settings import Settings, format_settings
from stemgenre.training import checkpoint
from stemgenre.training.checkpoint import TrainState

PROJECT = "stem-genre"  # W&B's, unless WANDB_PROJECT names another
LOGIN_SECONDS = 60  # that W&B's question for a key waits for an answer
UPLOAD_SECONDS = 600.0  # that the end of a run waits for W&B; `wandb sync` uploads what is left

Row = dict[str, float]  # {column of metrics.csv or metrics_steps.csv: value}


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told at the beginning of a run, that of one network."""

    run_id: str
    name: str  # of the network's folder; empty if there is only one network
    group: str  # the run_id of the first network
    settings: Settings
    state: TrainState
    steps_per_epoch: int


@dataclass(frozen=True, eq=False)
class Results:
    """What a tracker is told at the end: of the best epoch, over the validation clips."""

    scores: dict[str, float]
    confusion: np.ndarray  # a picture: (height, width, 3), uint8
    genres: pd.DataFrame
    mistakes: pd.DataFrame
    model: Path


class Tracker:
    """Takes a run's metrics. Whatever a method raises ends the tracker, not the run."""

    def log_step(self, row: Row) -> None:
        """Takes a row of metrics_steps.csv."""

    def log_epoch(self, row: Row) -> None:
        """Takes a row of metrics.csv."""

    def finish(self, results: Results) -> None:
        """Takes the results, at the end of a run that was not stopped."""

    def close(self, exit_code: int) -> None:
        """Ends the record; 0 is for a run that was not stopped."""


class StepsFile(Tracker):
    """metrics_steps.csv at `path`, with the id of the run as the last column."""

    def __init__(self, path: Path, run: RunInfo) -> None:
        self.path, self.run_id = path, run.run_id
        if run.state.step_history:
            checkpoint.write_metrics(path, run.state.step_history, run.run_id)
        else:
            path.unlink(missing_ok=True)

    def log_step(self, row: Row) -> None:
        """Appends the row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame([row]).assign(run_id=self.run_id)
        table.to_csv(self.path, mode="a", header=not self.path.exists(), index=False)


class TensorBoard(Tracker):
    """An event file in `folder`, which is for this run alone.

    A resumed run writes it again from the start.
    """

    def __init__(self, folder: Path, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        # With purge_step, a TensorBoard that has read the earlier file forgets what was in it.
        self.writer = SummaryWriter(str(folder), purge_step=0)
        self.writer.add_text("settings", f"```\n{format_settings(run.settings)}```")
        time_of = _times(run)
        for row in run.state.step_history:
            self._add("step", row, row["step"], walltime=time_of(row["step"]))
        for row in run.state.history:
            walltime = time_of(row["epoch"] * run.steps_per_epoch)
            self._add("epoch", row, row["epoch"], walltime=walltime)
        self.writer.flush()

    def _add(self, prefix, row, number, **options):
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(f"{prefix}/{name}", value, number, **options)

    def log_step(self, row: Row) -> None:
        """Adds step/train_loss and so on, over the steps of all epochs."""
        self._add("step", row, row["step"])
        self.writer.flush()

    def log_epoch(self, row: Row) -> None:
        """Adds epoch/train_loss and so on, over the epochs."""
        self._add("epoch", row, row["epoch"])
        self.writer.flush()

    def finish(self, results: Results) -> None:
        """Adds scores, the confusion matrix as a picture, and tables as text."""
        for name, value in results.scores.items():
            self.writer.add_scalar(f"result/{name}", value)
        self.writer.add_image("confusion matrix", results.confusion, dataformats="HWC")
        self.writer.add_text("genres", _markdown(results.genres))
        self.writer.add_text("misclassified clips", _markdown(results.mistakes))

    def close(self, exit_code: int) -> None:
        """Closes the file."""
        self.writer.close()


def _times(run):
    """A function: the seconds since 1970 at which a step was done, had the run had no break."""
    state, steps = run.state, run.steps_per_epoch
    epochs = list(range(state.epoch + 1))
    seconds = np.cumsum([0.0, *(row["seconds"] for row in state.history)]).tolist()
    if state.step:
        epochs.append(state.epoch + state.step / steps)
        seconds.append(seconds[-1] + state.sums["seconds"])
    started = time.time() - seconds[-1]
    return lambda step: started + float(np.interp(step / steps, epochs, seconds))


def _markdown(table):
    """A DataFrame as a Markdown table, in which a name is text, never markup."""

    def cell(value):
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|&" else c for c in text)

    rows = [table.columns, ["---"] * len(table.columns)]
    rows += [map(cell, row) for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class WandB(Tracker):
    """A run of W&B with the run's own id, below `folder`: a resumed run is the same one there.

    W&B keeps what it was sent, so it is sent only what it does not have. Offline it has nothing: a
    resumed run writes a folder with everything, which replaces the earlier one.
    """

    def __init__(self, folder: Path, run: RunInfo) -> None:
        import wandb

        self.steps_per_epoch, self.last_step = run.steps_per_epoch, 0
        options = {"console": "off", "quiet": True}
        if "finish_timeout" in wandb.Settings.model_fields:  # older versions have none
            options["finish_timeout"] = UPLOAD_SECONDS
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.run_id,
            name=os.environ.get("WANDB_NAME") or f"{run.group} {run.name}".strip(),
            group=run.group if run.name else None,
            dir=str(folder),
            config=run.settings.values(),
            allow_val_change=True,
            resume=None if is_offline() else "allow",
            settings=wandb.Settings(**options),
        )
        self.run.define_metric("step/*", step_metric="step/step")
        self.run.define_metric("epoch/*", step_metric="epoch/epoch")
        rows = [(row["step"], self.log_step, row) for row in run.state.step_history]
        rows += [
            (row["epoch"] * run.steps_per_epoch, self.log_epoch, row) for row in run.state.history
        ]
        for _, log_row, row in sorted(rows, key=lambda item: item[0]):
            log_row(row)
        if is_offline():
            current = Path(self.run.dir).parent
            for earlier in current.parent.glob(f"offline-run-*-{run.run_id}"):
                if earlier != current:
                    shutil.rmtree(earlier, ignore_errors=True)

    def _log(self, prefix, row, step):
        """W&B takes only steps that do not decrease; the same one twice is one of its rows."""
        self.last_step = step
        if step >= self.run.starting_step:
            self.run.log({f"{prefix}/{name}": value for name, value in row.items()}, step=step)

    def log_step(self, row: Row) -> None:
        """Logs step/train_loss and so on."""
        self._log("step", row, row["step"])

    def log_epoch(self, row: Row) -> None:
        """Logs epoch/train_loss and so on, at the last step of the epoch."""
        self._log("epoch", row, row["epoch"] * self.steps_per_epoch)

    def finish(self, results: Results) -> None:
        """Logs the confusion matrix, tables, scores as the summary, the model as an artifact."""
        import wandb

        media = {
            "confusion matrix": wandb.Image(results.confusion),
            "genres": wandb.Table(dataframe=results.genres),
            "misclassified clips": wandb.Table(dataframe=results.mistakes),
        }
        self.run.log(media, step=max(self.last_step, self.run.starting_step))
        self.run.summary.update(results.scores)
        model = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=results.scores)
        model.add_file(str(results.model))
        self.run.log_artifact(model)

    def close(self, exit_code: int) -> None:
        """Waits until all is sent, or, offline, written."""
        self.run.finish(exit_code=exit_code)


def is_offline() -> bool:
    """Whether W&B is to send nothing: WANDB_MODE=offline, or after `wandb offline`."""
    import wandb

    return wandb.setup().settings.mode in ("offline", "dryrun", "disabled")


def log_in() -> None:
    """Asks for W&B's key if it has none, before a long run. Raises UserError without one."""
    import wandb

    if is_offline():
        return
    reason = "no key"
    try:
        if wandb.login(timeout=LOGIN_SECONDS):
            return
    except wandb.Error as error:
        reason = first_line(error)
    raise UserError(f"{reason}. Run `wandb login`, or set WANDB_MODE=offline")
