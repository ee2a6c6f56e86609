"""Inference over clips: normalisation statistics and logits.

A clip that has several windows or views, or is predicted by several networks, gets the mean of
their probabilities. It is passed on as its logarithm, which is as good as logits: softmax gives the
mean again.
"""

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from stemgenre.errors import UserError, first_line
from stemgenre.features.augmentation import tta_views
from stemgenre.features.log_mel import Frontend, RunningStats
from stemgenre.features.windows import OVERLAP, TTA_OVERLAP
from stemgenre.prefetch import batch_values
from stemgenre.runtime import MicroBatch, Runtime
from stemgenre.settings import FeatureSettings
from stemgenre.training import checkpoint
from stemgenre.training.model import GenreNet
from stemgenre.training.stem_loader import StemLoader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A network of a best_model.pth, ready to predict: class index i is `label_names[i]`."""

    net: GenreNet
    frontend: Frontend
    label_ids: list[int]
    label_names: list[str]
    separation_model: str | None  # that its stems were separated by


def load_models(*paths: Path | str, device: torch.device) -> list[LoadedModel]:
    """The LoadedModels of one or several best_model.pth, to be averaged.

    Raises UserError if a file does not hold any, or if they cannot be averaged: networks of other
    genres, or that need other stems or windows.
    """
    models = [(path, saved) for path in paths for saved in checkpoint.load_members(path)]
    loaded = [_load_member(path, saved, device) for path, saved in models]
    for (path, _), model in zip(models, loaded, strict=True):
        for what, ours, theirs in _must_agree(loaded[0], model):
            if ours != theirs:
                raise UserError(
                    f"{models[0][0]} and {path} cannot be averaged: their {what} differ "
                    f"({ours} and {theirs}); use one at a time"
                )
    return loaded


def _must_agree(first, other):
    """(what, of the first, of the other) of all that has to be the same in averaged networks."""
    for what in ("label_names", "label_ids", "separation_model"):
        name = {"separation_model": "SEPARATION_MODEL"}.get(what, "genres")
        yield name, getattr(first, what), getattr(other, what)
    waves = [",".join(m.frontend.features.cached_waves) for m in (first, other)]
    yield "CHANNELS", *waves
    for what in ("sr", "clip_seconds"):
        yield what.upper(), *(getattr(m.frontend.features, what) for m in (first, other))


def _load_member(path, saved, device):
    """The LoadedModel of the content of a model file's member."""
    try:
        features = FeatureSettings.from_config(**saved["features"])  # config.py: what is newer
        channels = len(features.channel_names)
        if torch.tensor(saved["channel_stats"]).shape != (2, channels):
            raise ValueError(
                f"its channel statistics are not mean and deviation of {channels} channels"
            )
        num_classes = len(saved["weights"]["classifier.4.bias"])
        ids, names, separation_model = map(
            saved.get, ("label_ids", "label_names", "separation_model")
        )
        if not (_is_list_of(int, ids) and _is_list_of(str, names)):
            raise ValueError("its genres are not integers and their names")
        if not len(ids) == len(names) == num_classes:
            raise ValueError(f"it has {num_classes} outputs for {len(ids)} genres")
        if not isinstance(separation_model, str | None):
            raise ValueError("its separation_model is not a plain name")
        backbone = saved.get("backbone", "efficientnet_b3")  # older files do not name it
        net = GenreNet(num_classes, backbone=backbone, in_channels=channels)
        net.load_state_dict(saved["weights"])
        frontend = Frontend(features, device=device, channel_stats=saved["channel_stats"])
        net.to(device, memory_format=torch.channels_last).eval()
        return LoadedModel(net, frontend, ids, names, separation_model)
    except (UserError, *checkpoint.MALFORMED) as error:
        reason = first_line(error)
        raise UserError(f"{path} does not hold a complete model: {reason}") from None


def _is_list_of(kind, values):
    return isinstance(values, list) and all(type(value) is kind for value in values)


def compute_channel_stats(
    loader: StemLoader,
    clips: pd.DataFrame,
    *,
    features: FeatureSettings,
    runtime: Runtime,
    again: str = "the same command",
) -> tuple[list[float], list[float]]:
    """(mean, std) in dB of each channel over the clips' own frames, the same on every rank.

    Each rank reads its part of the clips. Raises Interrupted if the run is asked to stop, with
    `again`, what begins it again.
    """
    runtime.status.stage("channel statistics", total=len(clips))
    frontend = Frontend(features, device=runtime.device)
    stats = RunningStats()
    mine = np.arange(len(clips))[runtime.rank :: runtime.world_size]
    windows = loader.windows(clips, mine, samples=frontend.clip_samples, overlap=1)
    clip_windows = itertools.groupby(windows, key=lambda window: window[0])
    for _, group in tqdm(
        clip_windows,
        total=len(mine),
        unit="clip",
        desc="channel statistics",
        leave=False,
        disable=not runtime.is_main,
    ):
        for _, stems in group:
            stats.add(frontend.log_mel(stems))
        runtime.status.add_clips(runtime.world_size)
        if runtime.stop.signal_number:
            break
    if runtime.sync_stop():
        raise runtime.interrupted(f"stopped before training: {again} begins it again")
    total = RunningStats()
    for part in runtime.all_gather(stats.cpu()):
        total.merge(part)
    return total.mean_and_std()


def amp_type(device: torch.device, use_amp: bool) -> torch.dtype | None:
    """What autocast computes in: bf16 if the GPU has it, else fp16; None without AMP."""
    if not use_amp or device.type != "cuda":
        return None
    with torch.cuda.device(device):  # otherwise another GPU's answer
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


def autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """torch.autocast in `dtype`; for None, a context that changes nothing."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def average_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits (..., classes) of the mean probability over N of logits (..., N, classes).

    Where N is 1, they are unchanged.
    """
    count = logits.shape[-2]
    if count == 1:
        return logits[..., 0, :]
    return logits.log_softmax(-1).logsumexp(-2) - math.log(count)


@torch.inference_mode()
def stems_to_logits(
    net: nn.Module,
    frontend: Frontend,
    stems: list[torch.Tensor],
    *,
    tta: int = 0,
    micro_batch: MicroBatch,
    amp_dtype: torch.dtype | None,
) -> torch.Tensor:
    """Logits (B, classes), float32 on the device, of the stems [(4, samples)] of B windows.

    With `tta`, of the mean over so many further views of each. `net` is in evaluation mode. The
    micro-batch is halved while GPU memory runs out; raises UserError if one window does not fit.
    """
    views = [[view] * len(stems) for view in tta_views(tta)]

    def forward(size, params):
        parts = []
        for start in range(0, len(stems), size):
            part = slice(start, start + size)
            images = frontend(stems[part], params[part])  # (size, C, height, width)
            with autocast(frontend.device, amp_dtype):
                parts.append(net(images.to(memory_format=torch.channels_last)).float())
        return torch.cat(parts)

    logits = [
        micro_batch.run(
            functools.partial(forward, params=params),
            len(stems),
            too_large="a single clip exceeds GPU memory; close other GPU programs or set "
            "DEVICE=cpu",
        )
        for params in views
    ]
    return average_logits(torch.stack(logits, dim=1))


def compute_logits(
    net: GenreNet,
    frontend: Frontend,
    loader: StemLoader,
    clips: pd.DataFrame,
    *,
    tta: int = 0,
    micro_batch: MicroBatch,
    amp_dtype: torch.dtype | None,
    runtime: Runtime,
    may_stop: bool = False,
) -> torch.Tensor:
    """Logits (len(clips), classes), float32 on the CPU, in the order of `clips`, on every rank.

    Those of a clip with several windows are of their mean probability. Each rank computes its part
    of the clips, each clip once; if memory runs out, the micro-batch is the smallest of all ranks
    afterwards. Raises UserError for logits that are NaN or infinite, which argmax would turn into a
    prediction; and if it `may_stop`, in a run that is saved, Interrupted.
    """
    if not len(clips):
        return torch.empty(0, net.classifier[-1].out_features)
    net.eval()
    mine = np.arange(len(clips))[runtime.rank :: runtime.world_size]
    overlap = TTA_OVERLAP if tta else OVERLAP
    windows = loader.windows(clips, mine, samples=frontend.clip_samples, overlap=overlap)
    if may_stop:
        windows = itertools.takewhile(lambda _: not runtime.stop.signal_number, windows)
    results = batch_values(
        windows,
        torch.Tensor,
        functools.partial(
            stems_to_logits, net, frontend, tta=tta, micro_batch=micro_batch, amp_dtype=amp_dtype
        ),
        size=lambda: micro_batch.size,
    )
    rows, found = [], []
    for row, window_logits in results:
        if rows[-1:] != [row]:
            runtime.status.add_clips(runtime.world_size)
        rows.append(row)
        found.append(window_logits)
    if may_stop and runtime.sync_stop():
        raise runtime.interrupted(
            "stopped while predicting: RESUME_FROM_CHECKPOINT=True predicts again"
        )
    part = _average_windows(rows, torch.stack(found).cpu()) if rows else None
    gathered, sizes = zip(*runtime.all_gather((part, micro_batch.size)), strict=True)
    micro_batch.size = min(sizes)  # in a training step, all ranks take equally many parts
    logits = torch.empty(len(clips), gathered[0].shape[1])
    for rank, part in enumerate(gathered):
        if part is not None:
            logits[rank :: runtime.world_size] = torch.from_numpy(part)
    finite = logits.isfinite().all(1)
    if not finite.all():
        clip = clips["clip"].iloc[finite.tolist().index(False)]
        raise UserError(
            f"the model's output for {clip} is NaN or infinite; resume from the last good "
            "checkpoint with USE_AMP=False, or with LOAD_SCHEDULER_STATE=False and a lower LR"
        )
    return logits


def _average_windows(rows: Sequence[int], logits: torch.Tensor) -> np.ndarray:
    """Logits (clips, classes) of windows' logits (N, classes); `rows` has each window's clip."""
    counts = [len(list(group)) for _, group in itertools.groupby(rows)]
    return torch.stack([average_logits(part) for part in logits.split(counts)]).numpy()
