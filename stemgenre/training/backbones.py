"""The networks before the genre head: torchvision's, timm's, and a small one without weights.

Each is a Backbone: any number of image channels, stages that can be frozen, a pooling.
"""

import copy
import difflib
import functools
import pickle
import re
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torchvision import models
from torchvision.ops import Conv2dNormActivation

from stemgenre import setting_checks
from stemgenre.errors import UserError, first_line
from stemgenre.files import load_tensors, sha256

CNN_WIDTHS = (24, 48, 96, 128)
TIMM = "timm/"
LOAD_ERRORS = (OSError, HTTPException, RuntimeError, ValueError, TypeError, AttributeError,
               pickle.UnpicklingError)  # fmt: skip
# raised by weights that cannot be downloaded, read or loaded into a network


@dataclass(frozen=True)
class Backbone:
    """A network without its head: avgpool(features(images)) has `num_features` values a clip."""

    features: nn.Module
    avgpool: nn.Module
    num_features: int
    first_convs: list[str]  # names in `features`: the convolutions that see the images
    stages: list[list[str]]  # names in `features`: the weights of each stage, from the first on


def check_backbone(name: str) -> None:
    """Raises UserError, with near names, unless BACKBONE=`name` can be built here.

    Imports timm for a network of timm's.
    """
    setting_checks.check_backbone(name)
    if name.startswith(TIMM):
        _import_timm(name)


def build_backbone(
    name: str,
    *,
    in_channels: int,
    stochastic_depth: float,
    pretrained: bool = False,
    weights_file: str | None = None,
) -> Backbone:
    """The Backbone of the network `name` for images of `in_channels` channels.

    It has new weights, or ImageNet weights from `weights_file` or downloaded once. Raises UserError
    if there is no such network, or if its weights cannot be loaded.
    """
    check_backbone(name)
    if name == "cnn":
        return small_cnn(in_channels)
    if name.startswith(TIMM):
        backbone = _timm_backbone(name, stochastic_depth, pretrained, weights_file)
    else:
        backbone = _torchvision_backbone(name, stochastic_depth, pretrained, weights_file)
    features = backbone.features
    for key in backbone.first_convs:
        features.set_submodule(key, widen(features.get_submodule(key), in_channels=in_channels))
    return backbone


def small_cnn(in_channels: int) -> Backbone:
    """A small residual network (He et al., 2016) of 0.5 M weights, for training from scratch.

    On a few hundred clips, ImageNet's networks need their weights: see docs/score.md.
    """
    stem = Conv2dNormActivation(in_channels, CNN_WIDTHS[0], kernel_size=5, stride=2)
    features = nn.Sequential(stem)
    for before, width in zip((CNN_WIDTHS[0], *CNN_WIDTHS), CNN_WIDTHS, strict=False):
        # The rows first: an image of (64, 172) keeps its resolution in time for longer.
        features.append(ResidualBlock(before, width, stride=(2, 1) if len(features) == 1 else 2))
    num_features = 2 * CNN_WIDTHS[-1]
    return Backbone(features, MeanMaxPool(), num_features, ["0.0"], _stages_of_children(features))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut of average pooling and a 1x1 convolution."""

    def __init__(self, before: int, width: int, *, stride: int | tuple[int, int]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Conv2dNormActivation(before, width, kernel_size=3, stride=stride),
            Conv2dNormActivation(width, width, kernel_size=3, activation_layer=None),
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(stride, ceil_mode=True),
            Conv2dNormActivation(before, width, kernel_size=1, activation_layer=None),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, before, H, W) -> (B, width, H / stride, W / stride), rounded up."""
        return (self.body(images) + self.shortcut(images)).relu()


class MeanMaxPool(nn.Module):
    """The mean and the largest value of each channel: (B, C, H, W) -> (B, 2 C, 1, 1)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The pooled features of a batch."""
        return torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)[..., None, None]


def widen(convolution: nn.Conv2d, *, in_channels: int) -> nn.Conv2d:
    """A three-channel convolution for another number of channels, the rest of it as it is.

    The first three kernels stay, further ones are their mean. Fewer than three are all the mean,
    scaled so that a grey image gives the same response.
    """
    wide = copy.deepcopy(convolution)
    kernels = convolution.weight.detach()
    mean = kernels.mean(1, keepdim=True)
    if in_channels < 3:
        kernels = (mean * (3 / in_channels)).repeat(1, in_channels, 1, 1)
    else:
        kernels = torch.cat([kernels, *[mean] * (in_channels - 3)], dim=1)
    wide.weight, wide.in_channels = nn.Parameter(kernels), in_channels
    return wide


# torchvision


def torchvision_network(name: str, stochastic_depth: float) -> nn.Module:
    """torchvision's network `name` with new weights; MobileNets skip no residual blocks."""
    skips = name.startswith(("efficientnet", "convnext"))
    options = {"stochastic_depth_prob": stochastic_depth} if skips else {}
    return models.get_model(name, weights=None, **options)


def _torchvision_backbone(name, stochastic_depth, pretrained, weights_file):
    """The Backbone of a network with `features` and `classifier`, for RGB images."""
    network = torchvision_network(name, stochastic_depth)
    if pretrained:
        state = imagenet_weights(name, weights_file)
        try:
            network.load_state_dict(state)
        except LOAD_ERRORS as error:
            source = weights_file or torchvision_weights(name).url
            raise UserError(f"{source} does not hold {name}: {first_line(error)}") from None
    features = network.features
    pool = getattr(network, "avgpool", nn.AdaptiveAvgPool2d(1))  # MobileNetV2 has none
    norms = [layer for layer in network.classifier if isinstance(layer, nn.LayerNorm)]
    pool = nn.Sequential(pool, *norms) if norms else pool  # ConvNeXt normalises after pooling
    linear = next(layer for layer in network.classifier if isinstance(layer, nn.Linear))
    layers = features.named_modules()
    first = next(key for key, layer in layers if isinstance(layer, nn.Conv2d))
    return Backbone(features, pool, linear.in_features, [first], _stages_of_children(features))


def _stages_of_children(features):
    """The names of the weights of each child of a Sequential."""
    return [
        [f"{child}.{key}" for key, _ in stage.named_parameters()]
        for child, stage in features.named_children()
    ]


def torchvision_weights(name: str) -> models.WeightsEnum:
    """torchvision's ImageNet weights of a network: its newest; of efficientnet_b3, the first."""
    if name == "efficientnet_b3":
        return models.EfficientNet_B3_Weights.IMAGENET1K_V1
    return models.get_model_weights(name).DEFAULT


def weights_path(name: str, weights_file: str | None = None) -> Path:
    """Where build_backbone() finds or puts the ImageNet weights: a file, or timm's folder."""
    if weights_file:
        return Path(weights_file)
    if name.startswith(TIMM):
        config = _import_timm(name).get_pretrained_cfg(name.removeprefix(TIMM))
        if not config.hf_hub_id:
            return Path(torch.hub.get_dir(), "checkpoints")
        from huggingface_hub import constants  # only here: it comes with timm
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=config.hf_hub_id, repo_type="model")
        return Path(constants.HF_HUB_CACHE, folder)
    file_name = torchvision_weights(name).url.rsplit("/", 1)[1]
    return Path(torch.hub.get_dir(), "checkpoints", file_name)


def imagenet_weights(name: str, weights_file: str | None = None) -> dict[str, torch.Tensor]:
    """The state_dict of torchvision's network `name`, from a file, or downloaded once.

    Raises UserError, with the ways to get them, if the weights cannot be loaded.
    """
    weights = torchvision_weights(name)
    path = weights_path(name, weights_file)
    way_out = (
        f"Download {weights.url} on a machine with internet access and set WEIGHTS_FILE to it, or "
        f"put it into {torch.hub.get_dir()}/checkpoints; TORCH_HOME moves that folder. "
        "PRETRAINED=False FREEZE_STAGES=0 trains from scratch"
    )
    try:
        if not weights_file and not path.is_file():
            return weights.get_state_dict(progress=False, check_hash=True)
        return _read_weights(path)
    except UserError as error:
        raise UserError(f"{'WEIGHTS_FILE: ' if weights_file else ''}{error}. {way_out}") from None
    except LOAD_ERRORS as error:
        reason = first_line(error)
        raise UserError(
            f"the ImageNet weights {path.name} cannot be loaded ({reason}). {way_out}"
        ) from None


def _read_weights(path):
    """The state_dict in a .safetensors file, or in one of torch.save's.

    Raises UserError for a damaged file: if its name has a hash, by that.
    """
    expected = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if expected and path.is_file() and not sha256(path).startswith(expected[1]):
        raise UserError(
            f"{path} is damaged or another file: its SHA-256 does not begin with the "
            f"{expected[1]} in its name; remove it"
        )
    if path.suffix != ".safetensors":
        return load_tensors(path, "ImageNet weights")
    from safetensors import SafetensorError  # only here: it comes with Demucs and timm
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as ImageNet weights: {first_line(error)}") from None


# timm, which is installed only by who uses it


def _import_timm(name: str) -> ModuleType:
    """The module timm, which has the network `name`. Raises UserError if it does not."""
    try:
        import timm
    except ImportError:
        raise UserError(f"BACKBONE={name} needs timm: pip install timm") from None
    model, _, tag = name.removeprefix(TIMM).partition(".")
    if not timm.is_model(model):
        near = difflib.get_close_matches(model.lower(), timm.list_models(), n=3)
        hint = 'timm.list_models("*resnet*") lists names'
        hint = f"did you mean {' or '.join(TIMM + other for other in near)}?" if near else hint
        raise UserError(f"BACKBONE={name[:100]!r} is not a network of timm's; {hint}")
    if tag and f"{model}.{tag}" not in (tags := timm.list_models(f"{model}.*", pretrained=True)):
        raise UserError(
            f"timm has no weights BACKBONE={name[:100]!r}; "
            f"use one of {', '.join(TIMM + other for other in tags) or TIMM + model}"
        )
    return timm


def _timm_backbone(name, stochastic_depth, pretrained, weights_file):
    """The Backbone of a network of timm's, for RGB images; it pools by itself."""
    timm = _import_timm(name)
    download = pretrained and not weights_file
    create = functools.partial(
        timm.create_model, name.removeprefix(TIMM), num_classes=0, pretrained=download
    )
    try:
        try:
            network = create(drop_path_rate=stochastic_depth)
        except TypeError:  # it skips no blocks
            network = create()
        if pretrained and weights_file:
            state = _read_weights(Path(weights_file))
            if missing := network.load_state_dict(state, strict=False).missing_keys:
                raise ValueError(f"it has no {missing[0]}")
    except UserError as error:
        raise UserError(f"WEIGHTS_FILE: {error}") from None
    except LOAD_ERRORS as error:
        if weights_file:
            raise UserError(f"{weights_file} does not hold {name}: {first_line(error)}") from None
        raise UserError(
            f"the ImageNet weights of {name} cannot be loaded ({first_line(error)}). Set "
            "WEIGHTS_FILE to their model.safetensors, downloaded from timm's repository on the hub "
            "on a machine with internet access; or PRETRAINED=False FREEZE_STAGES=0 trains "
            "from scratch"
        ) from None
    first_convs = network.pretrained_cfg.get("first_conv") or ()
    first_convs = [first_convs] if isinstance(first_convs, str) else list(first_convs)
    kernels = [network.get_submodule(key).weight for key in first_convs]
    if not kernels or any(kernel.ndim != 4 or kernel.shape[1] != 3 for kernel in kernels):
        raise UserError(f"BACKBONE={name} has no first convolution of 3 channels to widen")
    try:  # an odd size, as IMG_SIZE can be
        with torch.no_grad():
            num_features = network.eval()(torch.zeros(1, 3, 100, 150)).shape[1]
        matcher = network.group_matcher(coarse=True)
    except (AssertionError, RuntimeError, ValueError, AttributeError):
        raise UserError(
            f"BACKBONE={name} takes no images of any height and width; use a convolutional network"
        ) from None
    network.train()  # as it was made
    stages = list(timm.models.group_parameters(network, matcher).values())
    return Backbone(network, nn.Identity(), num_features, first_convs, stages)
