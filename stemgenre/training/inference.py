"""Inference over clips: normalisation statistics and logits."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from stemgenre.errors import UserError, first_line
from stemgenre.features.augmentation import NO_AUGMENT, AugmentParams
from stemgenre.features.log_mel import Frontend, RunningStats
from stemgenre.runtime import MicroBatch, Runtime
from stemgenre.settings import FeatureSettings
from stemgenre.training import checkpoint
from stemgenre.training.model import GenreNet
from stemgenre.training.stem_loader import StemLoader


@dataclass(frozen=True)
class LoadedModel:
    """What best_model.pth holds, ready to predict: class index i is `label_names[i]`."""

    net: GenreNet
    frontend: Frontend
    label_ids: list[int]
    label_names: list[str]


def load_model(path: Path | str, device: torch.device) -> LoadedModel:
    """The LoadedModel of a best_model.pth. Raises UserError if the file does not hold one."""
    saved = checkpoint.load(path, "model")
    try:
        features = FeatureSettings.from_config(**saved["features"])  # config.py: what is newer
        if torch.tensor(saved["channel_stats"]).shape != (2, 4):
            raise ValueError("its channel statistics are not mean and deviation of four channels")
        num_classes = len(saved["weights"]["classifier.4.bias"])
        if not len(saved["label_ids"]) == len(saved["label_names"]) == num_classes:
            raise ValueError(f"it has {num_classes} outputs for {len(saved['label_ids'])} genres")
        net = GenreNet(num_classes)
        net.load_state_dict(saved["weights"])
        frontend = Frontend(features, device=device, channel_stats=saved["channel_stats"])
        net.to(device, memory_format=torch.channels_last).eval()
        return LoadedModel(net, frontend, saved["label_ids"], saved["label_names"])
    except (UserError, *checkpoint.MALFORMED) as error:
        reason = first_line(error)
        raise UserError(f"{path} does not hold a complete model: {reason}") from None


def compute_channel_stats(
    loader: StemLoader, clips: pd.DataFrame, *, features: FeatureSettings, runtime: Runtime
) -> tuple[list[float], list[float]]:
    """(mean, std) in dB of each channel over the clips' own frames, the same on every rank.

    Each rank reads its part of the clips. Raises Interrupted if the run is asked to stop.
    """
    frontend = Frontend(features, device=runtime.device)
    stats = RunningStats()
    batches = np.arange(len(clips))[runtime.rank :: runtime.world_size, None]
    for _, (stems,) in tqdm(
        loader.batches(clips, list(batches)),
        total=len(batches),
        unit="clip",
        desc="channel statistics",
        leave=False,
        disable=not runtime.is_main,
    ):
        stats.add(frontend.log_mel(stems))
        if runtime.stop.signal_number:
            break
    if runtime.sync_stop():
        raise runtime.interrupted()
    total = RunningStats()
    for part in runtime.all_gather(stats):
        total.merge(part)
    return total.mean_and_std()


def amp_type(device: torch.device, use_amp: bool) -> torch.dtype | None:
    """What autocast computes in: bf16 if the GPU has it, else fp16; None without AMP."""
    if not use_amp or device.type != "cuda":
        return None
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


def autocast(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """torch.autocast in `dtype`; for None, a context that changes nothing."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@torch.inference_mode()
def stems_to_logits(
    net: nn.Module,
    frontend: Frontend,
    stems: list[torch.Tensor],
    *,
    params: list[AugmentParams] | None = None,
    micro_batch: MicroBatch,
    amp_dtype: torch.dtype | None,
) -> torch.Tensor:
    """Logits (B, classes), float32 on the device, of the stems [(4, samples)] of B clips.

    `params` are the clips' augmentations, by default none; `net` is in evaluation mode. The
    micro-batch is halved while GPU memory runs out; raises UserError if one clip does not fit.
    """
    params = params or [NO_AUGMENT] * len(stems)

    def forward(size):
        parts = []
        for start in range(0, len(stems), size):
            part = slice(start, start + size)
            images = frontend(stems[part], params[part])  # (size, 4, S, S)
            with autocast(frontend.device, amp_dtype):
                parts.append(net(images.to(memory_format=torch.channels_last)).float())
        return torch.cat(parts)

    return micro_batch.run(
        forward,
        len(stems),
        too_large="a single clip exceeds GPU memory; close other GPU programs or set DEVICE=cpu",
    )


def compute_logits(
    net: GenreNet,
    frontend: Frontend,
    loader: StemLoader,
    clips: pd.DataFrame,
    *,
    micro_batch: MicroBatch,
    amp_dtype: torch.dtype | None,
    runtime: Runtime,
) -> torch.Tensor:
    """Logits (len(clips), classes), float32 on the CPU, in the order of `clips`, on every rank.

    Each rank computes its part of the clips, each clip once. Raises UserError for logits that are
    NaN or infinite, which argmax would turn into a prediction.
    """
    if not len(clips):
        return torch.empty(0, net.classifier[-1].out_features)
    net.eval()
    mine = np.arange(len(clips))[runtime.rank :: runtime.world_size]
    batches = [mine[i : i + micro_batch.size] for i in range(0, len(mine), micro_batch.size)]
    parts = [
        stems_to_logits(net, frontend, stems, micro_batch=micro_batch, amp_dtype=amp_dtype)
        for _, stems in loader.batches(clips, batches)
    ]
    gathered = runtime.all_gather(torch.cat(parts).cpu().numpy() if parts else None)
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
