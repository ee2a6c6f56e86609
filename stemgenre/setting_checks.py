"""What settings must be together, beyond the type and range of each one."""

import difflib
import os
from pathlib import Path
from typing import Any

from stemgenre.errors import UserError

RUN_FILES = (  # what a run writes below OUTPUT_DIR beside the files that settings name
    "metrics.csv", "summary.json", "settings_used.py", "valid_predictions.csv",
    "test_probabilities.csv", "oof_predictions.csv", "report", "status.json",
    "metrics_steps.csv", "classification_report.csv", "tensorboard", "wandb", ".run.lock",
    ".run.txt",
)  # fmt: skip
MASTERS = ("train_master", "label_master", "sample_submit", "sample_submission")
INPUT_SUFFIXES = (".py", ".au", ".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".m4a", ".npz")
BACKBONES = (  # of torchvision's networks those that are a sequence of stages; timm's besides
    "cnn", *(f"efficientnet_b{i}" for i in range(8)), "efficientnet_v2_s",
    "efficientnet_v2_m", "efficientnet_v2_l", "convnext_tiny", "convnext_small", "convnext_base",
    "convnext_large", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
)  # fmt: skip


def check_backbone(name: str) -> None:
    """Raises UserError, with near names, unless BACKBONE=`name` exists or is for timm to say.

    ModelSettings takes any text: a saved model's name is checked by this alone.
    """
    if name in BACKBONES or name.startswith("timm/"):
        return
    near = difflib.get_close_matches(name.lower(), BACKBONES, n=3, cutoff=0.75)
    hint = f"use one of {', '.join(BACKBONES)}, or timm/NAME for one of timm's"
    hint = f"did you mean {' or '.join(near)}?" if near else hint
    raise UserError(f"BACKBONE={name[:100]!r} is unknown or not a sequence of stages; {hint}")


def check_together(settings: Any) -> None:
    """Raises UserError for Settings that do not make sense together."""
    features, train, model = settings.features, settings.train, settings.model
    check_backbone(model.backbone)
    if model.backbone == "cnn" and (model.pretrained or model.freeze_stages):
        raise UserError(
            "BACKBONE=cnn has no ImageNet weights and is trained as a whole; set "
            "PRETRAINED=False FREEZE_STAGES=0"
        )
    if features.hop_length > features.n_fft:
        raise UserError(
            f"HOP_LENGTH={features.hop_length} skips samples between windows of "
            f"N_FFT={features.n_fft}; use at most {features.n_fft}"
        )
    if features.n_fft > features.clip_seconds * features.sr:
        raise UserError(
            f"N_FFT={features.n_fft} is longer than CLIP_SECONDS={features.clip_seconds}; "
            f"use at most {int(features.clip_seconds * features.sr)}"
        )
    named = len(features.channels.split(","))
    if features.num_channels != "auto" and features.num_channels < named:
        raise UserError(
            f"NUM_CHANNELS={features.num_channels} is fewer than the {named} CHANNELS; use "
            '"auto", which is as many'
        )
    if train.warmup_epochs >= train.epochs:
        raise UserError(
            f"WARMUP_EPOCHS={train.warmup_epochs} leaves none of EPOCHS={train.epochs}; use fewer"
        )
    if train.min_lr > train.lr:
        raise UserError(f"MIN_LR={train.min_lr} is above LR={train.lr}; use at most {train.lr}")
    _check_outputs(settings)
    networks = settings.data.folds * settings.data.seeds
    for field in ("checkpoint_file", "best_model_file") if networks > 1 else ():
        path = Path(getattr(settings.paths, field))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{field.upper()}={path} would be the same file for all {networks} networks; name "
                "a file without its folder"
            )


def _check_outputs(settings):
    """Raises UserError where a run's outputs would overwrite each other or an input."""
    paths = settings.paths
    written = {_real(paths.output(name)): f"the run's own {name}" for name in RUN_FILES}
    checkpoint = Path(paths.checkpoint_file)
    kept = {
        f"{checkpoint.stem}.previous{checkpoint.suffix}": "the checkpoint before the newest",
        f"{checkpoint.stem}.older{checkpoint.suffix}": "the checkpoint of an earlier run",
    }
    if settings.model.weights_file:
        weights = settings.model.weights_file
        written[_real(weights)] = f"WEIGHTS_FILE={weights}"
    for field in ("checkpoint_file", "best_model_file", "submit_file", "log_file"):
        name = getattr(paths, field)
        this, path = f"{field.upper()}={name}", paths.output(name)
        if path.exists() and not path.is_file() and not path.is_dir():
            continue  # a device, such as /dev/null
        if path.is_dir():
            raise UserError(f"{this} is a folder; name a file")
        if path.stem.casefold() in MASTERS:
            raise UserError(f"{this} is one of the competition's own files; choose another name")
        real = _real(path)
        for other, what in written.items():
            if real == other or real in other.parents or other in real.parents:
                raise UserError(f"{this} is {what}; choose another name")
        if path.suffix.casefold() in INPUT_SUFFIXES:
            raise UserError(f"{this} could overwrite an input; choose another suffix")
        written[real] = this
        if field == "checkpoint_file":
            for name, what in kept.items():
                written[_real(paths.output(checkpoint.with_name(name)))] = f"{name}, {what}"


def _real(path):
    """The path that a file system may take for the same: links resolved, in lower case."""
    return Path(os.path.realpath(path).casefold())
