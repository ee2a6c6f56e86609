"""torchvision's EfficientNet-B3 with a four-channel first convolution and the genre head."""

import pickle
import re
from http.client import HTTPException
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import EfficientNet, EfficientNet_B3_Weights, efficientnet_b3

from stemgenre.errors import UserError, first_line
from stemgenre.files import sha256
from stemgenre.settings import ModelSettings
from stemgenre.training.checkpoint import load_tensors

WEIGHTS = EfficientNet_B3_Weights.IMAGENET1K_V1


def build_backbone(stochastic_depth: float) -> EfficientNet:
    """torchvision's EfficientNet-B3 (Tan and Le, 2019) with new weights, for RGB images."""
    return efficientnet_b3(weights=None, stochastic_depth_prob=stochastic_depth)


class GenreNet(nn.Module):
    """EfficientNet with a genre head: images (B, 4, S, S) -> logits (B, num_classes).

    The first `freeze_stages` of the nine stages are not trained. Their BatchNorm follows the
    statistics of the images ("adapt") or stays as it is ("fixed").
    """

    def __init__(
        self,
        num_classes: int,
        *,
        freeze_stages: int = 0,
        frozen_batchnorm: str = "adapt",
        head_dropout: tuple[float, float] = (0.5, 0.3),
        stochastic_depth: float = 0.2,
    ):
        super().__init__()
        backbone = build_backbone(stochastic_depth)
        self.features = backbone.features
        self.avgpool = backbone.avgpool
        self.classifier = nn.Sequential(
            nn.Dropout(head_dropout[0]),
            nn.Linear(backbone.classifier[-1].in_features, 512),
            nn.ReLU(),
            nn.Dropout(head_dropout[1]),
            nn.Linear(512, num_classes),
        )
        self.freeze_stages = freeze_stages
        self.frozen_batchnorm = frozen_batchnorm
        self.features[0][0] = widen(self.features[0][0], in_channels=4)
        for parameter in self.features[:freeze_stages].parameters():
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "GenreNet":
        """Frozen stages stay in evaluation mode, except a BatchNorm that adapts."""
        super().train(mode)
        if mode:
            self.features[: self.freeze_stages].eval()
            if self.frozen_batchnorm == "adapt":
                for module in self.features[: self.freeze_stages].modules():
                    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                        module.train()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of images (B, 4, S, S)."""
        with torch.no_grad():  # stores no activations of frozen stages
            frozen = self.features[: self.freeze_stages](images)
        features = self.features[self.freeze_stages :](frozen)
        return self.classifier(self.avgpool(features).flatten(1))


def widen(convolution: nn.Conv2d, *, in_channels: int) -> nn.Conv2d:
    """A three-channel convolution for more: its kernels, then their mean for the other channels."""
    wide = nn.Conv2d(
        in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        bias=False,
    )
    with torch.no_grad():
        wide.weight[:, :3] = convolution.weight
        wide.weight[:, 3:] = convolution.weight.mean(1, keepdim=True)
    return wide


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
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net, DistributedDataParallel(net, broadcast_buffers=False)


def average_stats(net: nn.Module, world_size: int) -> None:
    """Sets BatchNorm's running statistics to their mean over all ranks. A collective."""
    for buffer in net.buffers() if world_size > 1 else ():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world_size


def all_finite(net: nn.Module) -> bool:
    """Whether no weight and no statistic of `net` is NaN or infinite; waits for the device once."""
    tensors = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def build_model(
    model_settings: ModelSettings, *, num_classes: int, seed: int, resuming: bool = False
) -> GenreNet:
    """A GenreNet to train, from ImageNet weights if PRETRAINED=True.

    New weights are a pure function of `seed`. A run that is `resuming` takes its weights from the
    checkpoint, and none are loaded here. Raises UserError, and never falls back to random weights,
    if the ImageNet weights cannot be loaded.
    """
    torch.manual_seed(seed)
    net = GenreNet(
        num_classes,
        freeze_stages=model_settings.freeze_stages,
        frozen_batchnorm=model_settings.frozen_batchnorm,
        head_dropout=model_settings.head_dropout,
        stochastic_depth=model_settings.stochastic_depth,
    )
    if model_settings.pretrained and not resuming:
        state = imagenet_weights(model_settings.weights_file)
        backbone = build_backbone(model_settings.stochastic_depth)
        try:
            backbone.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            source = model_settings.weights_file or WEIGHTS.url
            raise UserError(
                f"{source} does not hold EfficientNet-B3: {first_line(error)}"
            ) from None
        backbone.features[0][0] = widen(backbone.features[0][0], in_channels=4)
        net.features.load_state_dict(backbone.features.state_dict())
    return net


def imagenet_weights(weights_file: str | None = None) -> dict[str, torch.Tensor]:
    """The state_dict of torchvision's EfficientNet-B3, from a file, or downloaded once.

    Raises UserError, with the ways to get them, if the weights cannot be loaded.
    """
    name = WEIGHTS.url.rsplit("/", 1)[1]
    way_out = (
        f"Download {WEIGHTS.url} on a machine with internet access and set WEIGHTS_FILE to it, or "
        f"put it into {torch.hub.get_dir()}/checkpoints; TORCH_HOME moves that folder. "
        "PRETRAINED=False trains from scratch"
    )
    path = Path(weights_file or Path(torch.hub.get_dir(), "checkpoints", name))
    try:
        if not weights_file and not path.is_file():
            return WEIGHTS.get_state_dict(progress=False, check_hash=True)
        expected = re.search(r"-([0-9a-f]{8,})\.", path.name)
        if expected and path.is_file() and not sha256(path).startswith(expected[1]):
            raise UserError(
                f"{path} is damaged or another file: its SHA-256 does not begin with the "
                f"{expected[1]} in its name; remove it"
            )
        return load_tensors(path, "ImageNet weights")
    except UserError as error:
        raise UserError(f"{'WEIGHTS_FILE: ' if weights_file else ''}{error}. {way_out}") from None
    except (OSError, HTTPException, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise UserError(
            f"the ImageNet weights {name} cannot be loaded ({reason}). {way_out}"
        ) from None
