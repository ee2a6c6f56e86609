"""Checkpoints and models on disk: saved whole, loaded without running what is in them."""

import contextlib
import dataclasses
import io
import logging
import pickle
import zipfile
from pathlib import Path

import torch

from stemgenre.errors import UserError, first_line
from stemgenre.files import replacing
from stemgenre.settings import KNOBS

log = logging.getLogger(__name__)

FORMAT = 1


def save(path, kind, content, *, previous=None):
    """Writes `content` (tensors and plain values) as a file of `kind`, whole or not at all.

    With `previous`, the file that is replaced stays under that name.
    """
    data = io.BytesIO()  # torch.save into a file that cannot grow ends in an error of its own
    torch.save({"format": FORMAT, "kind": kind, **content}, data)
    with replacing(path, previous=previous) as file:
        file.write(data.getbuffer())


def previous_path(path):
    """Where the checkpoint before the one at `path` is kept: checkpoint.previous.pth."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_run(path, content, *, first):
    """Writes a run's checkpoint; the one before it stays until the next.

    The `first` of a run replaces another run's, of which nothing is to be left.
    """
    previous = previous_path(path)
    if first:
        with contextlib.suppress(OSError):  # a folder that cannot be written is named by save()
            previous.unlink(missing_ok=True)
    save(path, "checkpoint", content, previous=None if first else previous)


def load_run(path):
    """(path, content) of a run's newest checkpoint that can be read, the one at `path` or before.

    Raises UserError if neither can.
    """
    try:
        return path, load(path, "checkpoint")
    except UserError as error:
        previous = previous_path(path)
        if not previous.is_file():
            raise
        content = load(previous, "checkpoint")
        log.warning("%s; the one before it is used, %s", error, previous)
        return previous, content


def load(path, kind):
    """The content of a file that save() wrote, on the CPU.

    Raises UserError if it is missing, damaged, of another kind, or of an unknown format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {kind} {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the CRCs
            claimed = sum(info.file_size for info in archive.infolist())
            if claimed > path.stat().st_size:  # torch.save does not compress
                raise ValueError(f"it claims to hold {claimed} bytes")
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        AssertionError,
        OverflowError,
        MemoryError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        reason = first_line(error, most=120)
        raise UserError(f"{path} cannot be read as a {kind}: {reason}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} of this program")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} has the {kind} format {content.get('format')}; this program reads "
            f"format {FORMAT}: use the version that wrote it"
        )
    return content


def run_identity(settings, competition, train):
    """What a checkpoint must share with the run that resumes from it: {name: plain value}."""
    return {
        "labels": dict(zip(competition.label_names, competition.label_ids, strict=True)),
        "training clips": sorted(train["clip"]),
        "SEED": settings.machine.seed,
        "TEST_SIZE": settings.data.test_size,
        "BATCH_SIZE": settings.train.batch_size,
        "FREEZE_STAGES": settings.model.freeze_stages,
        "FROZEN_BATCHNORM": settings.model.frozen_batchnorm,
        "model": "efficientnet_b3",
        "SEPARATION_MODEL": settings.separation.separation_model,
        **{name.upper(): value for name, value in dataclasses.asdict(settings.features).items()},
    }


def to_resume_from(settings, identity):
    """The checkpoint this run goes on from, or None if it starts afresh.

    Raises UserError if RESUME_FROM_CHECKPOINT=True and there is none that fits the run.
    """
    path = settings.paths.output(settings.paths.checkpoint_file)
    if not settings.train.resume_from_checkpoint:
        if path.is_file() or previous_path(path).is_file():
            log.warning(
                "%s of an earlier run will be replaced after the first epoch; "
                "RESUME_FROM_CHECKPOINT=True goes on from it instead",
                path,
            )
        return None
    path, saved = load_run(path)
    if missing := {"identity", "progress", "weights", "channels"} - saved.keys():
        raise UserError(f"{path} is not a whole checkpoint: it has no {min(missing)}")
    check_identity(path, saved["identity"], identity)
    return saved


def check_identity(path, saved, current):
    """Raises UserError with the list of what differs between a checkpoint and this run."""
    lines = []
    for name in {**current, **saved}:
        unsaved = KNOBS[name].default if name in KNOBS else None  # of a knob that is newer
        was, now = saved.get(name, unsaved), current.get(name)
        if was != now:
            if isinstance(was, list | dict) or isinstance(now, list | dict):
                was, now = f"{len(was or ())} of them", f"{len(now or ())}, not the same"
            lines.append(f"    {name}: {was} in the checkpoint, {now} here")
    if lines:
        raise UserError(
            f"{path} does not fit this run:\n" + "\n".join(lines) + "\n"
            "set these back, or start afresh with RESUME_FROM_CHECKPOINT=False"
        )
