"""A network and what changes it: one optimiser step, micro-batch by micro-batch."""

import contextlib
import logging

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stemgenre.errors import UserError
from stemgenre.inference import amp_type, autocast

log = logging.getLogger(__name__)


class Learner:
    """The network with its optimiser, learning rate and loss scale.

    `net` is the GenreNet itself, `model` the same over all processes; `options` are TrainSettings,
    `frontend` is a FrontEnd with the channel statistics.
    """

    def __init__(self, net, frontend, options, runtime):
        self.net = net.to(runtime.device, memory_format=torch.channels_last)
        self.frontend, self.options, self.runtime = frontend, options, runtime
        self.model = DistributedDataParallel(self.net) if runtime.world > 1 else self.net
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=options.lr,
            weight_decay=options.weight_decay,
            fused=runtime.device.type in ("cuda", "cpu"),
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, options.epochs, eta_min=options.min_lr
        )
        self.amp_type = amp_type(runtime.device, options.use_amp)
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=self.amp_type == torch.float16
        )
        self.micro_batch = (
            options.batch_size if options.micro_batch == "auto" else options.micro_batch
        )

    @property
    def learning_rate(self):
        """That of the epoch in hand."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, stems, draws, targets, batch_clips):
        """One optimiser step on this rank's share of a batch of `batch_clips`.

        `stems` and `draws` as FrontEnd takes them, `targets` class indices on the device. Returns
        loss summed over clips, correct clips, gradient norm, and whether these are finite, as
        tensors on the device, without waiting for it.
        """
        while True:
            try:
                loss, correct = self._backward(stems, draws, targets, batch_clips)
                break
            except torch.OutOfMemoryError:
                pass  # outside this block, so that the failed step's tensors are let go
            self._halve_micro_batch(len(stems))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.options.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        finite = loss.isfinite()
        if self.scaler.is_enabled():  # it skips steps whose gradients overflow, and goes on
            norm = torch.where(norm.isfinite(), norm, 0.0)
        else:
            finite = finite & norm.isfinite()
        return loss, correct, norm / self.runtime.world, finite

    def _backward(self, stems, draws, targets, batch_clips):
        """Gradients of the mean loss over the whole batch, micro-batch by micro-batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = correct = torch.zeros((), device=self.runtime.device)
        pieces = -(-len(stems) // self.micro_batch)
        bounds = [len(stems) * piece // pieces for piece in range(pieces + 1)]
        for start, end in zip(bounds, bounds[1:], strict=False):
            images = self.frontend(stems[start:end], draws[start:end])
            images = images.to(memory_format=torch.channels_last)
            last = end == len(stems)
            with (
                contextlib.nullcontext()
                if last or self.runtime.world == 1
                else self.model.no_sync()
            ):
                with autocast(self.runtime.device, self.amp_type):
                    logits = self.model(images)
                piece_loss = nn.functional.cross_entropy(
                    logits.float(), targets[start:end], reduction="sum"
                )
                # DistributedDataParallel divides by the number of ranks; the loss's mean is global.
                self.scaler.scale(piece_loss * self.runtime.world / batch_clips).backward()
            loss = loss + piece_loss.detach()
            correct = correct + (logits.argmax(1) == targets[start:end]).sum()
        return loss, correct

    def _halve_micro_batch(self, clips):
        if self.runtime.world > 1:  # the other processes wait for this step's gradients already
            raise UserError(
                f"out of memory with {min(self.micro_batch, clips)} clips at once on a card; "
                "set MICRO_BATCH to half of that and resume with RESUME_FROM_CHECKPOINT=True"
            )
        if self.micro_batch == 1:
            raise UserError(
                f"not even one image of IMG_SIZE={self.frontend.features.img_size} fits the card's "
                "memory; lower IMG_SIZE or raise FREEZE_STAGES"
            )
        self.micro_batch = max(1, min(self.micro_batch, clips) // 2)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        log.warning("out of memory: %d clips now go through the card at once", self.micro_batch)

    def state(self):
        """What a checkpoint holds of it."""
        return {
            "weights": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved, *, epochs_done):
        """Takes over what state() gave, as far as LOAD_OPTIMIZER_STATE, LOAD_SCHEDULER_STATE say.

        A scheduler that is not loaded restarts over the epochs that are left.
        """
        options = self.options
        self.net.load_state_dict(saved["weights"])
        if options.load_optimizer_state:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
        if options.load_scheduler_state:
            self.scheduler.load_state_dict(saved["scheduler"])
            self.scheduler.T_max = options.epochs
            for group, lr in zip(
                self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True
            ):
                group["lr"] = lr
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] = options.lr
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
                self.optimizer, max(1, options.epochs - epochs_done), eta_min=options.min_lr
            )
