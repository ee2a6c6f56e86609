"""torchvision's EfficientNet-B3 with a four-channel first convolution and the genre head."""

import pickle

import torch
from torch import nn
from torchvision.models import EfficientNet_B3_Weights, efficientnet_b3

from stemgenre.errors import UserError, first_line

WEIGHTS = EfficientNet_B3_Weights.IMAGENET1K_V1


class GenreNet(nn.Module):
    """EfficientNet-B3 (Tan and Le, 2019): images (B, 4, S, S) -> logits (B, classes).

    The first `freeze_stages` of the nine stages are not trained. Their BatchNorm follows the
    statistics of the images ("adapt") or stays as it is ("fixed").
    """

    def __init__(
        self,
        num_classes,
        *,
        freeze_stages=0,
        frozen_batchnorm="adapt",
        head_dropout=(0.5, 0.3),
        stochastic_depth=0.2,
    ):
        super().__init__()
        backbone = efficientnet_b3(weights=None, stochastic_depth_prob=stochastic_depth)
        self.features = backbone.features
        self.avgpool = backbone.avgpool
        self.classifier = nn.Sequential(
            nn.Dropout(head_dropout[0]),
            nn.Linear(1536, 512),
            nn.ReLU(),
            nn.Dropout(head_dropout[1]),
            nn.Linear(512, num_classes),
        )
        self.freeze_stages = freeze_stages
        self.frozen_batchnorm = frozen_batchnorm
        self.features[0][0] = widened(self.features[0][0], inputs=4)
        for parameter in self.features[:freeze_stages].parameters():
            parameter.requires_grad_(False)

    def train(self, mode=True):
        """Frozen stages stay in evaluation mode, but for a BatchNorm that adapts."""
        super().train(mode)
        if mode:
            self.features[: self.freeze_stages].eval()
            if self.frozen_batchnorm == "adapt":
                for module in self.features[: self.freeze_stages].modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.train()
        return self

    def forward(self, images):
        with torch.no_grad():  # keeps no activation of what is not trained
            frozen = self.features[: self.freeze_stages](images)
        features = self.features[self.freeze_stages :](frozen)
        return self.classifier(self.avgpool(features).flatten(1))


def widened(convolution, *, inputs):
    """`convolution` of three inputs with more: its kernels, then their mean for the rest."""
    wide = nn.Conv2d(
        inputs,
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


def build_model(model, *, num_classes, seed, resuming=False):
    """A GenreNet for training, from ImageNet weights if ModelSettings `model` says so.

    New weights are a pure function of `seed`. A run that is `resuming` has its weights in the
    checkpoint and needs no others. Raises UserError, never falls back to random
    weights, if the ImageNet weights cannot be had.
    """
    torch.manual_seed(seed)
    net = GenreNet(
        num_classes,
        freeze_stages=model.freeze_stages,
        frozen_batchnorm=model.frozen_batchnorm,
        head_dropout=model.head_dropout,
        stochastic_depth=model.stochastic_depth,
    )
    if model.pretrained and not resuming:
        state = imagenet_weights(model.weights_file)
        backbone = efficientnet_b3(weights=None)
        try:
            backbone.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            source = model.weights_file or WEIGHTS.url
            raise UserError(
                f"{source} does not hold EfficientNet-B3: {first_line(error)}"
            ) from None
        backbone.features[0][0] = widened(backbone.features[0][0], inputs=4)
        net.features.load_state_dict(backbone.features.state_dict())
    return net


def imagenet_weights(weights_file=None):
    """The state_dict of torchvision's EfficientNet-B3, from a file or downloaded once."""
    name = WEIGHTS.url.rsplit("/", 1)[1]
    way_out = (
        f"Download {WEIGHTS.url} where there is a network, set WEIGHTS_FILE to it, or put it into "
        f"{torch.hub.get_dir()}/checkpoints; TORCH_HOME moves that folder. "
        "PRETRAINED=False trains from scratch"
    )
    try:
        if weights_file:
            return torch.load(weights_file, map_location="cpu", weights_only=True)
        return WEIGHTS.get_state_dict(progress=False, check_hash=True)
    except FileNotFoundError:
        raise UserError(f"WEIGHTS_FILE={weights_file} is not there. {way_out}") from None
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        source = weights_file or name
        raise UserError(
            f"the ImageNet weights {source} cannot be had ({reason}). {way_out}"
        ) from None
