"""Targets, mixup, the optimiser's groups and state, learning rates, averaged weights."""

import copy

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from stemgenre.runtime import to_device
from stemgenre.training.model import GenreNet


def target_probabilities(clips: pd.DataFrame, *, num_classes: int) -> torch.Tensor:
    """Each clip's probability of each class, (len(clips), num_classes) float32.

    It is 1 for the class in the column target, but for clips with an array in the column
    soft_target, if there is one.
    """
    targets = torch.tensor(clips["target"].to_numpy())
    probabilities = nn.functional.one_hot(targets, num_classes).float()
    for row, soft in enumerate(clips.get("soft_target", ())):
        if isinstance(soft, list | tuple | np.ndarray):  # None or NaN where there is none
            probabilities[row] = torch.as_tensor(soft, dtype=torch.float32)
    return probabilities


def balanced_weights(probabilities: torch.Tensor) -> torch.Tensor:
    """A weight for each class, (classes,), inversely proportional to its number of clips.

    `probabilities` are those of target_probabilities(). The mean weight of a clip is 1, so that the
    loss and the learning rate keep their scale; as scikit-learn's class_weight="balanced".
    """
    clips, num_classes = probabilities.shape
    return clips / (num_classes * probabilities.sum(0).clamp(min=1))


def mix_pairs(
    images: torch.Tensor, targets: torch.Tensor, *, alpha: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, targets), each mixed with another of the batch: mixup, Zhang et al., ICLR 2018.

    `targets` are probabilities (B, classes). The proportions are of a Beta(alpha, alpha) for each
    image, at least a half of which is its own, so that its own target remains the main one.
    """
    rng = np.random.default_rng(seed)
    partners = to_device(torch.from_numpy(rng.permutation(len(images))), images.device)
    proportions = rng.beta(alpha, alpha, len(images))
    foreign = torch.tensor(np.minimum(proportions, 1 - proportions), dtype=torch.float32)
    foreign = to_device(foreign, images.device)
    return (
        torch.lerp(images, images[partners], foreign[:, None, None, None]),
        torch.lerp(targets, targets[partners], foreign[:, None]),
    )


def parameter_groups(net: GenreNet, *, lr: float, decay: float) -> list[dict]:
    """The optimiser's groups of `net`'s trainable parameters; the first has the head's rate, `lr`.

    Each stage before the head has `decay` times the rate of the next one (layer-wise learning
    rates: Howard and Ruder, ACL 2018). With a `decay` of 1 there is a single group.
    """
    stages = net.stages if decay != 1 else []
    in_stages = {parameter for stage in stages for parameter in stage}
    groups = [{"params": [p for p in net.parameters() if p not in in_stages], "lr": lr}]
    for distance, stage in enumerate(reversed(stages), start=1):
        groups.append({"params": stage, "lr": lr * decay**distance})
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]


def initial_state(optimizer: torch.optim.AdamW) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """The state of all parameters before AdamW's first step, as that step would allocate it.

    AdamW does so for one group of parameters after it has changed those before: if memory runs out
    there, the step cannot be repeated.
    """
    return {
        parameter: {
            "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


class WarmupCosineLR(CosineAnnealingLR):
    """CosineAnnealingLR over `epochs`, in whose first `warmup` epochs the rate rises to LR.

    It rises linearly, from LR / (warmup + 1). All groups follow the first one's schedule, in
    proportion to the rates that they begin with.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, epochs: int, *, warmup: int = 0, min_lr: float
    ):
        self.warmup = warmup
        super().__init__(optimizer, epochs - warmup, eta_min=min_lr)

    def get_lr(self) -> list[float]:
        """The learning rate of each group in the epoch `last_epoch`."""
        first, epoch = self.base_lrs[0], self.last_epoch - self.warmup
        if epoch <= 0:
            lr = first * (self.last_epoch + 1) / (self.warmup + 1)
        else:
            self.last_epoch = epoch  # CosineAnnealingLR's own, from the rate of the epoch before
            lr = super().get_lr()[0]
            self.last_epoch += self.warmup
        return [lr * (base_lr / first) for base_lr in self.base_lrs]


class AveragedNet(nn.Module):
    """An exponential moving average of the weights and BatchNorm statistics of `net`, in `module`.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage: the average of a short run is not that of its first steps. The state
    is that of PyTorch's AveragedModel, for whose updates the host waits for the GPU.
    """

    def __init__(self, net: nn.Module, *, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(net).requires_grad_(False)
        self.decay = decay
        device = next(net.parameters()).device
        self.register_buffer("n_averaged", torch.tensor(0, device=device))

    @torch.no_grad()
    def update_parameters(self, net: nn.Module, *, is_taken: torch.Tensor | None = None) -> None:
        """Takes the weights and statistics of `net` into the average.

        Where `is_taken`, of bool, is False, nothing changes: for a step that was skipped.
        """
        n = self.n_averaged
        weight = 1 - ((1 + n) / (10 + n)).clamp(max=self.decay) * (n > 0)
        if is_taken is not None:
            weight = weight * is_taken
        pairs = list(zip(self.module.state_dict().values(), net.state_dict().values(), strict=True))
        averages, values = zip(
            *(pair for pair in pairs if pair[0].is_floating_point()), strict=True
        )
        changes = torch._foreach_sub(values, averages)
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_(averages, changes)
        if counts := [pair for pair in pairs if not pair[0].is_floating_point()]:  # of batches
            torch._foreach_copy_(*zip(*counts, strict=True))
        n += 1 if is_taken is None else is_taken
