"""The networks of a run, one for each seed and fold, and what they predict together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from stemgenre.files import remove_stale_temp_files
from stemgenre.settings import Settings
from stemgenre.training import checkpoint
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.inference import average_logits


@dataclass(frozen=True, eq=False)
class Member:
    """A network to train: the clips of its fold, and settings with its own OUTPUT_DIR and SEED."""

    name: str  # of its folder: fold_2, seed_1, seed_1_fold_2; empty if it is the only one
    fold: int  # from 1
    settings: Settings
    train: pd.DataFrame
    valid: pd.DataFrame
    run_signature: dict[str, Any]

    @property
    def checkpoint_path(self) -> Path:
        """The path of the network's checkpoint."""
        return self.settings.paths.output(self.settings.paths.checkpoint_file)

    @property
    def best_model_path(self) -> Path:
        """The path of the network's best model."""
        return self.settings.paths.output(self.settings.paths.best_model_file)

    def clean_folder(self, *, resuming: bool) -> None:
        """Removes what a killed run left half-written, and sets an earlier run's checkpoint aside.

        With `resuming`, the checkpoint is this run's own.
        """
        output = self.settings.paths.output
        remove_stale_temp_files(output(""), output("report"), older_than=0)
        if not resuming:
            checkpoint.set_aside(self.checkpoint_path)


@dataclass(frozen=True, eq=False)
class MemberResult:
    """A trained Member, with its best epoch's logits (clips, classes) of both tables of clips."""

    member: Member
    state: TrainState
    valid_logits: torch.Tensor
    test_logits: torch.Tensor


@dataclass(frozen=True)
class Score:
    """The accuracy of predictions, its 95 % confidence interval (Wilson's), and the macro F1."""

    clips: int
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"accuracy {self.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}), "
            f"macro F1 {self.macro_f1:.3f} over {self.clips} clips"
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the members predict together, as logits (clips, classes) of their mean probability.

    `valid` are the clips that were held out, with FOLDS each of the training clips; those of a clip
    are by the networks that were not trained on it.
    """

    valid: pd.DataFrame
    valid_logits: torch.Tensor
    test_logits: torch.Tensor
    valid_score: Score
    test_score: Score | None  # of the clips in test_master

    @property
    def kind(self) -> str:
        """What is said of the held-out clips: "out-of-fold" with FOLDS, else "validation"."""
        has_folds = "fold" in self.valid and self.valid["fold"].max() > 1
        return "out-of-fold" if has_folds else "validation"


def plan_members(
    settings: Settings,
    splits: list[tuple[pd.DataFrame, pd.DataFrame]],
    *,
    label_names: list[str],
    label_ids: list[int],
) -> list[Member]:
    """The Members of a run: one for each of the `splits` (training, validation), SEEDS times."""
    seeds, seed = settings.data.seeds, settings.machine.seed
    members = []
    for number in range(seeds):
        for fold, (train, valid) in enumerate(splits, start=1):
            parts = [f"seed_{number + 1}"] if seeds > 1 else []
            parts += [f"fold_{fold}"] if len(splits) > 1 else []
            name = "_".join(parts)
            own = settings.of_member(name, seed=seed + number) if name else settings
            signature = checkpoint.run_signature(
                own, train, label_names=label_names, label_ids=label_ids
            )
            members.append(Member(name, fold, own, train, valid, signature))
    return members


def members_to_resume(members: list[Member]) -> list[Member]:
    """Those to resume with RESUME_FROM_CHECKPOINT=True: that have a checkpoint.

    Raises UserError if none has one, or if one does not fit this run.
    """
    if not members[0].settings.train.resume_from_checkpoint:
        return []
    begun = [member for member in members if member.checkpoint_path.is_file()]
    for member in begun or members[:1]:
        checkpoint.load_resume_checkpoint(member.settings, member.run_signature)
    return begun


def combine(results: list[MemberResult], *, test_targets: np.ndarray) -> Predictions:
    """The Predictions of all members; of a single one, its own.

    `test_targets` are the test clips' class indices, -1 where they are not known.
    """
    valid, valid_logits = results[0].member.valid, results[0].valid_logits
    if len(results) > 1:
        tables = pd.concat([r.member.valid.assign(fold=r.member.fold) for r in results])
        logits = torch.cat([r.valid_logits for r in results])
        rows_of_clip = tables.groupby(
            level=0
        ).indices  # {row of the training clips: rows of logits}
        valid = tables[~tables.index.duplicated()].sort_index()
        valid_logits = torch.stack([average_logits(logits[rows_of_clip[i]]) for i in valid.index])
    test_logits = average_logits(torch.stack([r.test_logits for r in results], dim=1))
    return Predictions(
        valid,
        valid_logits,
        test_logits,
        score(valid["target"].to_numpy(), valid_logits),
        score(test_targets, test_logits),
    )


def score(targets: np.ndarray, logits: torch.Tensor) -> Score | None:
    """The Score of logits (clips, classes), over the clips whose target is known (not -1)."""
    known = targets >= 0
    if not known.any():
        return None
    targets, predicted = targets[known], logits.argmax(1).numpy()[known]
    correct = int((predicted == targets).sum())
    interval = accuracy_interval(correct, len(targets))
    macro_f1 = float(f1_score(targets, predicted, average="macro"))
    return Score(len(targets), correct / len(targets), interval, macro_f1)


def accuracy_interval(correct: int, clips: int) -> tuple[float, float]:
    """(low, high): the 95 % confidence interval of an accuracy, Wilson's score interval."""
    interval = binomtest(int(correct), int(clips)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
