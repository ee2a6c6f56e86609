"""What runs over clips without learning from them: channel statistics, predictions."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from stemgenre import checkpoint
from stemgenre.augmentation import PLAIN
from stemgenre.errors import UserError, first_line
from stemgenre.frontend import DecibelStatistics, FrontEnd
from stemgenre.model import GenreNet
from stemgenre.settings import FeatureSettings, group_from


@dataclass(frozen=True)
class Trained:
    """What best_model.pth holds, ready to predict: class index i is `label_names[i]`."""

    model: GenreNet
    frontend: FrontEnd
    label_ids: list[int]
    label_names: list[str]


def load_best(path, device):
    """The Trained model of a best_model.pth. Raises UserError if the file does not hold one."""
    saved = checkpoint.load(path, "model")
    try:
        features = group_from(FeatureSettings, saved["features"])
        if unknown := saved["features"].keys() - vars(features):
            raise ValueError(f"it has the unknown feature {min(unknown)}")
        if torch.tensor(saved["channels"]).shape != (2, 4):
            raise ValueError(
                "its channel statistics are not a mean and a deviation of four channels"
            )
        classes = len(saved["weights"]["classifier.4.bias"])
        if not len(saved["label_ids"]) == len(saved["label_names"]) == classes:
            raise ValueError(f"it has {classes} outputs for {len(saved['label_ids'])} genres")
        net = GenreNet(classes)
        net.load_state_dict(saved["weights"])
        frontend = FrontEnd(features, device=device, channels=saved["channels"])
        net.to(device, memory_format=torch.channels_last).eval()
        return Trained(net, frontend, saved["label_ids"], saved["label_names"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, UserError) as error:
        reason = first_line(error)
        raise UserError(f"{path} does not hold a whole model: {reason}") from None


def measure_channels(features, reader, clips, runtime):
    """(mean, std) in dB of each channel over the clips' own frames, the same on every rank."""
    frontend = FrontEnd(features, device=runtime.device)
    statistics = DecibelStatistics()
    batches = np.arange(len(clips))[runtime.rank :: runtime.world, None]
    for _, (stems,) in tqdm(
        reader.batches(clips, list(batches)),
        total=len(batches),
        unit="clip",
        desc="channel statistics",
        leave=False,
        disable=not runtime.is_main,
    ):
        statistics.add(frontend.decibels(stems))
        if runtime.stop.signal_number:
            break
    if runtime.stop_requested():
        raise runtime.interrupted()
    total = DecibelStatistics()
    for part in runtime.gather(statistics):
        total.merge(part)
    return total.mean_and_std()


def amp_type(device, use_amp):
    """The type autocast computes in: bf16 where the card has it, else fp16; None without AMP."""
    if not use_amp or device.type != "cuda":
        return None
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def autocast(device, kind):
    """torch.autocast in `kind`, or nothing for None."""
    return torch.autocast(device.type, kind) if kind else contextlib.nullcontext()


@torch.inference_mode()
def predict(net, frontend, reader, clips, options, runtime):
    """Logits (len(clips), classes), float32 on the CPU, in the order of `clips`, on every rank.

    Each rank computes its share of the clips; none is computed twice. Raises UserError if they
    are no numbers, which would still make a prediction.
    """
    if not len(clips):
        return torch.empty(0, net.classifier[-1].out_features)
    net.eval()
    kind = amp_type(runtime.device, options.use_amp)
    mine = np.arange(len(clips))[runtime.rank :: runtime.world]
    size = options.batch_size if options.micro_batch == "auto" else options.micro_batch
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    shares = []
    for positions, stems in reader.batches(clips, batches):
        images = frontend(stems, [PLAIN] * len(positions)).to(memory_format=torch.channels_last)
        with autocast(runtime.device, kind):
            shares.append(net(images).float())
    mine = torch.cat(shares).cpu().numpy() if shares else None
    parts = runtime.gather(mine)
    logits = torch.empty(len(clips), parts[0].shape[1])
    for rank, part in enumerate(parts):
        if part is not None:
            logits[rank :: runtime.world] = torch.from_numpy(part)
    if not (finite := logits.isfinite().all(1)).all():
        clip = clips["clip"].iloc[finite.tolist().index(False)]
        raise UserError(
            f"the network's answer to {clip} is no number; go on from the last good checkpoint "
            "with USE_AMP=False, or with LOAD_SCHEDULER_STATE=False and a lower LR"
        )
    return logits
