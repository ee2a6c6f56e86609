"""The network: a backbone of any kind and the genre head, trained in part or as a whole."""

import functools
import logging
import math
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from stemgenre.errors import UserError
from stemgenre.settings import ModelSettings
from stemgenre.training.backbones import TIMM, build_backbone

log = logging.getLogger(__name__)


class GenreNet(nn.Module):
    """A backbone with a genre head: images (B, in_channels, H, W) -> logits (B, num_classes).

    The first `freeze_stages` of the backbone's stages are not trained, but for its first
    convolution with `train_first_conv`. Their BatchNorm follows the statistics of the images
    ("adapt") or stays as it is ("fixed"). Raises UserError if the backbone cannot be built or has
    fewer stages.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "efficientnet_b3",
        in_channels: int = 4,
        freeze_stages: int = 0,
        train_first_conv: bool = False,
        frozen_batchnorm: str = "adapt",
        head_dropout: tuple[float, float] = (0.5, 0.3),
        stochastic_depth: float = 0.2,
    ):
        super().__init__()
        parts = build_backbone(backbone, in_channels=in_channels, stochastic_depth=stochastic_depth)
        self.features, self.avgpool = parts.features, parts.avgpool
        self.classifier = nn.Sequential(
            nn.Dropout(head_dropout[0]),
            nn.Linear(parts.num_features, 512),
            nn.ReLU(),
            nn.Dropout(head_dropout[1]),
            nn.Linear(512, num_classes),
        )
        self.backbone, self.frozen_batchnorm = backbone, frozen_batchnorm
        if freeze_stages > len(parts.stages):
            raise UserError(
                f"FREEZE_STAGES={freeze_stages}, but {backbone} has {len(parts.stages)} stages; "
                f"use 0 to {len(parts.stages)}"
            )
        weights = dict(self.features.named_parameters())
        self.stages = [[weights[name] for name in names] for names in parts.stages]
        for stage in self.stages[:freeze_stages]:
            for weight in stage:
                weight.requires_grad_(False)
        if train_first_conv:
            for name in parts.first_convs:
                self.features.get_submodule(name).requires_grad_()

    def train(self, mode: bool = True) -> "GenreNet":
        """Modules without trained weights stay in evaluation mode, but for adapting BatchNorm."""
        super().train(mode)
        for module in self.features.modules() if mode else ():  # each before those in it
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.train(self.frozen_batchnorm == "adapt" and isinstance(module, _BatchNorm))
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of images (B, in_channels, H, W).

        Autograd stores no activations before the first weight that is trained.
        """
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def maybe_compile(net: nn.Module, enabled: bool) -> nn.Module:
    """`net`, compiled by torch.compile at its first call if `enabled`.

    Each batch size is compiled by itself, of which an epoch has two or three: static shapes run
    faster than dynamic ones.
    """
    return torch.compile(net, dynamic=False) if enabled else net


def wrap_ddp(net: GenreNet) -> tuple[GenreNet, DistributedDataParallel]:
    """(the network, the same in DDP) for one of several processes, on its device.

    On CUDA, BatchNorm takes the statistics of all ranks. PyTorch has no SyncBatchNorm elsewhere:
    there, each rank normalises by its own clips (see average_stats). The names in the state_dict
    stay.
    """
    if next(net.parameters()).device.type == "cuda":
        net = to_sync_batchnorm(net)
    with warnings.catch_warnings():  # PyTorch 2.14 has another name for it, which 2.13 has not
        warnings.simplefilter("ignore", FutureWarning)
        return net, DistributedDataParallel(net, broadcast_buffers=False)


def to_sync_batchnorm(net: GenreNet) -> GenreNet:
    """`net` with BatchNorm over all ranks; timm's has an activation, which only timm keeps."""
    if net.backbone.startswith(TIMM):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(net)
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def copy_buffers(net: nn.Module) -> list[torch.Tensor]:
    """Copies of the network's buffers, BatchNorm's statistics, in their order.

    On a GPU they take a kernel for many, instead of EfficientNet-B3's 234 for each training step.
    """
    buffers = list(net.buffers())
    copies = [torch.empty_like(buffer) for buffer in buffers]
    for dtype in {buffer.dtype for buffer in buffers}:
        pairs = [pair for pair in zip(copies, buffers, strict=True) if pair[1].dtype == dtype]
        torch._foreach_copy_(*zip(*pairs, strict=True))
    return copies


def average_stats(net: nn.Module, world_size: int) -> None:
    """Sets BatchNorm's running statistics to their mean over all ranks. A collective."""
    for buffer in net.buffers() if world_size > 1 else ():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world_size


def all_finite(net: nn.Module) -> bool:
    """Whether no weight and no statistic of `net` is NaN or infinite; waits for the device once."""
    tensors = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    largest = torch._foreach_norm(tensors, math.inf)  # a kernel for many of the tensors
    return bool(torch.stack(largest).isfinite().all())


def build_model(
    model_settings: ModelSettings,
    *,
    num_classes: int,
    in_channels: int = 4,
    seed: int,
    resuming: bool = False,
) -> GenreNet:
    """A GenreNet to train, from ImageNet weights if PRETRAINED=True.

    New weights are a pure function of `seed`. A run that is `resuming` takes its weights from the
    checkpoint, and none are loaded here. Raises UserError, and never falls back to random weights,
    if the ImageNet weights cannot be loaded.
    """
    torch.manual_seed(seed)
    net = GenreNet(
        num_classes,
        backbone=model_settings.backbone,
        in_channels=in_channels,
        freeze_stages=model_settings.freeze_stages,
        train_first_conv=model_settings.train_first_conv,
        frozen_batchnorm=model_settings.frozen_batchnorm,
        head_dropout=model_settings.head_dropout,
        stochastic_depth=model_settings.stochastic_depth,
    )
    if not model_settings.pretrained and model_settings.freeze_stages:
        _warn_of_frozen_random_weights(model_settings.freeze_stages)
    if model_settings.pretrained and not resuming:
        pretrained = build_backbone(
            model_settings.backbone,
            in_channels=in_channels,
            stochastic_depth=model_settings.stochastic_depth,
            pretrained=True,
            weights_file=model_settings.weights_file,
        )
        if not all_finite(pretrained.features):
            source = model_settings.weights_file or f"the download for {model_settings.backbone}"
            raise UserError(f"{source} holds weights that are NaN or infinite")
        net.features.load_state_dict(pretrained.features.state_dict())
        net.avgpool.load_state_dict(pretrained.avgpool.state_dict())
    return net


@functools.cache  # once for all networks
def _warn_of_frozen_random_weights(stages):
    log.warning(
        "PRETRAINED=False: the weights of %d frozen stages are random and stay so; FREEZE_STAGES=0 "
        "trains them",
        stages,
    )
