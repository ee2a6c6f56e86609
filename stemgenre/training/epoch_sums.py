"""What an epoch's steps add up to, and the first of them that was NaN or infinite."""

import time
from collections.abc import Callable
from typing import Any

import torch

from stemgenre.errors import UserError
from stemgenre.runtime import Runtime
from stemgenre.training.model import GenreNet, all_finite


class EpochSums:
    """Sums over the steps of an epoch, of this rank's clips.

    They stay on the device, for which only row() and collect() wait. `saved` is what collect() gave
    after the first `done` of the `steps`, empty for none.
    """

    def __init__(self, saved: dict[str, Any], *, done: int, steps: int, runtime: Runtime):
        self.runtime = runtime
        self.sums = torch.zeros(3, device=runtime.device)  # loss, correct clips, gradient norm
        if runtime.is_main and saved:
            self.sums += torch.tensor(saved["values"], device=runtime.device)
        self.last = torch.zeros_like(self.sums)  # the last step's
        self.finite = torch.ones(steps, dtype=torch.bool, device=runtime.device)
        now = time.monotonic()
        self.started = now - saved.get("seconds", 0.0)
        self.logged_at = now, done

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        correct: torch.Tensor,
        norm: torch.Tensor,
        *,
        may_overflow: bool,
    ) -> None:
        """Adds a step, counted from 0: its summed loss, its correct clips, its gradient norm.

        `may_overflow`: in fp16, a step whose gradients do is skipped, and no error.
        """
        self.finite[step] = loss.isfinite() & (norm.isfinite() | may_overflow)
        self.last = torch.stack([loss, correct, norm / self.runtime.world_size])
        self.sums += self.last.nan_to_num(0.0, 0.0, 0.0)

    def row(self, steps: int, *, clips: int, learning_rate: float) -> dict[str, float]:
        """The last step's values in a row of metrics_steps.csv, over the `clips` of all ranks.

        `steps` are done. Its seconds are the mean over the steps since the row before, in this
        epoch and start.
        """
        logged_at, logged_steps = self.logged_at
        gathered = self.runtime.all_gather(self.last.tolist())  # waits for the device
        loss, correct, norm = (sum(column) for column in zip(*gathered, strict=True))
        self.logged_at = time.monotonic(), steps
        return {
            "train_loss": loss / clips,
            "train_accuracy": correct / clips,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "seconds": (self.logged_at[0] - logged_at) / (steps - logged_steps),
        }

    def collect(
        self,
        net: GenreNet,
        *,
        epoch: int,
        steps: int,
        may_overflow: bool,
        names_of: Callable[[int], list[str]],
    ) -> dict[str, Any]:
        """The sums over the `steps` done, of all ranks, and their seconds.

        Raises UserError on every rank, so before anything is saved, if a step of any rank or the
        weights of `net` are NaN or infinite. `names_of` gives the file names of a step's clips.
        """
        found, finite = (), self.finite.tolist()
        if not (any if may_overflow else all)(finite):
            step = finite.index(False)
            names = names_of(step)
            clips = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            where = f"epoch {epoch}, batch {step + 1} of {len(finite)} (clips {clips})"
            found = (step, f"the loss became NaN or infinite in {where}")
        elif not all_finite(net):
            where = f"epoch {epoch} after batch {steps} of {len(finite)}"
            found = (steps, f"the weights became NaN or infinite in {where}")
        gathered = self.runtime.all_gather((found, self.sums.tolist()))
        if failures := [found for found, _ in gathered if found]:
            raise UserError(
                f"{min(failures)[1]}; the last good checkpoint is kept. Resume with "
                "LOAD_SCHEDULER_STATE=False and a lower LR, or with USE_AMP=False"
            )
        values = [sum(column) for column in zip(*(sums for _, sums in gathered), strict=True)]
        return {"values": values, "seconds": time.monotonic() - self.started}
