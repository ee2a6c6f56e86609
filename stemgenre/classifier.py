"""The genre of any audio file, with a trained model: what predict.py and other programs use.

from stemgenre import Classifier
prediction = Classifier.load("best_model.pth").predict("song.mp3")
print(prediction.genre, prediction.confidence)

A file that is longer than the model's clips is heard in windows of that length, half overlapping;
their probabilities are averaged. Windows go by as the file is read (see stemgenre.streaming), so
that memory does not grow with its length.
"""

import collections
import dataclasses
import hashlib
import itertools
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stemgenre import checkpoint
from stemgenre.augmentation import PLAIN
from stemgenre.cache import CacheError, StemCache
from stemgenre.errors import UserError
from stemgenre.inference import amp_type, autocast, load_best
from stemgenre.prediction import Prediction, Span
from stemgenre.prefetch import in_batches, read_ahead
from stemgenre.runtime import pick_device
from stemgenre.separation import Separator
from stemgenre.settings import SeparationSettings
from stemgenre.spool import StemSpool, cached_blocks
from stemgenre.stems import separate_fitting
from stemgenre.streaming import Piece, WindowCutter, kept_stems, read_pieces

log = logging.getLogger(__name__)

SILENT = 1e-4  # of full scale, -80 dB: a window that is never louder has no say in a song's genre
READ_AHEAD = 2  # pieces decoded while another is separated
NOT_DEMUCS = ("synthesised",)  # what the demo's stems are said to be made by


@dataclass
class _Window:
    start: float  # s
    end: float
    stems: torch.Tensor  # (4, samples)


@dataclass
class _Heard:
    """A window that went through the network: probabilities (classes,), loudest sample it saw."""

    start: float  # s
    end: float
    probabilities: torch.Tensor
    peak: float


@dataclass
class _Job:
    """A file on its way, and what has been heard of it."""

    path: Path
    clip: str  # its name in the cache
    cutter: WindowCutter
    spool: StemSpool | None = None
    heard: list = field(default_factory=list)
    failure: UserError | None = None


_END = object()  # follows the last piece of a file


class Classifier:
    """A trained model, ready to predict audio files."""

    def __init__(self, trained, *, separation, device, stems=None, batch_size=8):
        """See load(). `trained` is an inference.Trained, on the torch.device `device`."""
        self.net, self.frontend = trained.model, trained.frontend
        self.label_ids, self.label_names = trained.label_ids, trained.label_names
        self.features = trained.frontend.features
        self.separation, self.device, self.batch_size = separation, device, batch_size
        self.cache = stems and StemCache(
            stems, model=separation.separation_model, sample_rate=self.features.sr
        )
        self._separator = None
        self._precision_chosen = False

    @classmethod
    def load(
        cls,
        path,
        *,
        device="auto",
        separation_model=None,
        separation=SeparationSettings(),  # noqa: B008 frozen
        stems=None,
        batch_size=8,
    ):
        """The Classifier of a best_model.pth.

        device: as the knob DEVICE. separation_model: the Demucs model; without it the one that
        `path` was trained with, or else that of `separation`, a SeparationSettings with the other
        knobs of the separation. stems: a folder in which the stems are kept and found again.
        batch_size: windows through the network at once.
        Raises UserError if the file is not there or does not hold a whole model. Demucs itself is
        loaded when it is first needed.
        """
        if not isinstance(device, torch.device):
            device = pick_device(device)
        recorded = checkpoint.load(path, "model").get("separation_model")
        name = separation_model or (None if recorded in NOT_DEMUCS else recorded)
        if name:
            separation = dataclasses.replace(separation, separation_model=name)
        trained = load_best(path, device)
        return cls(
            trained, separation=separation, device=device, stems=stems, batch_size=batch_size
        )

    def predict(self, path, *, progress=None):
        """The Prediction of one file. Raises UserError if it cannot be decoded or is silent."""
        for _, result in self.predict_all([path], progress=progress):
            if isinstance(result, UserError):
                raise result
        return result

    def predict_all(self, paths, *, progress=None):
        """Yields (path, Prediction) of each file in order; for a bad file (path, UserError).

        Short files share batches, so a result can come some files later. `progress` is called with
        seconds of audio whenever more of it has been separated. Raises UserError for what stops
        all files alike: no Demucs model, no room on the disk, not enough memory.
        """
        items = read_ahead(self._read(paths), depth=READ_AHEAD)
        items = in_batches(
            items,
            Piece,
            self._separate,
            size=lambda: self._separator.batch_size,
            alike=lambda piece: self._separator.windows(piece.wave.shape[1]),
        )
        items = self._cut(items, progress or (lambda seconds: None))
        for job, value in in_batches(items, _Window, self._hear, size=lambda: self.batch_size):
            if value is _END:
                yield job.path, job.failure or self._prediction(job.heard)
            else:
                job.heard.append(value)

    def _read(self, paths):
        """Yields (job, Piece or cached stems) of all files; after each file (job, _END)."""
        paths = [Path(path) for path in paths]
        for path, clip in zip(paths, clip_names(paths), strict=True):
            job = _Job(path, clip, WindowCutter(self.frontend.clip_samples))
            try:
                for value in self._stems_or_pieces(job):
                    yield job, value
            except _BadFile as error:
                job.failure = error.reason
            yield job, _END

    def _stems_or_pieces(self, job):
        """The file's stems from the cache, or its Pieces. Raises _BadFile for what is its fault."""
        if not job.path.is_file():
            raise _BadFile(UserError(f"{job.path} is not there"))
        source = self._cached(job)
        if source is None:
            source = read_pieces(job.path, self._loaded_separator())
            job.spool = self.cache and StemSpool(self.cache)
        try:
            yield from source
        except UserError as error:
            raise _BadFile(error) from None

    def _cached(self, job):
        """The blocks of the file's stems in the cache; None if it has to be separated."""
        if not self.cache or not self.cache.is_current(job.clip, job.path):
            return None
        blocks = cached_blocks(self.cache.path(job.clip), samples=self.frontend.clip_samples)
        try:
            return itertools.chain([next(blocks)], blocks)
        except CacheError as error:
            log.warning("%s; it is separated anew", error)
            return None

    def _loaded_separator(self):
        if self._separator is None:
            self._separator = Separator(
                self.separation, sample_rate=self.features.sr, device=self.device
            )
        return self._separator

    def _separate(self, pieces):
        """What is kept of the stems of each piece: [(4, samples) float16, on the CPU]."""
        separator = self._separator
        if self.device.type == "cuda" and not self._precision_chosen:
            separator.choose_precision(pieces[0].wave)
            self._precision_chosen = True
        stems = separate_fitting(separator, [piece.wave for piece in pieces])
        rates = {"from_rate": separator.model.samplerate, "to_rate": separator.sample_rate}
        return [kept_stems(*both, **rates) for both in zip(pieces, stems, strict=True)]

    def _cut(self, items, progress):
        """Yields (job, _Window) from the stems of each file, and keeps the stems if asked to."""
        for job, value in items:
            if value is not _END:
                if not value.isfinite().all():
                    job.failure = UserError(f"{job.path} is too short or far too loud to separate")
                if job.spool:
                    job.spool.add(value)
                yield from self._windows(job, job.cutter.add(value))
                progress(value.shape[1] / self.features.sr)
                continue
            if not job.failure:
                yield from self._windows(job, job.cutter.finish())
            if job.spool:
                if not job.failure:
                    job.spool.store(job.clip, job.path)
                job.spool.close()
            yield job, _END

    def _windows(self, job, windows):
        sr = self.features.sr
        for start, stems in windows:
            yield job, _Window(start / sr, (start + stems.shape[1]) / sr, stems)

    @torch.inference_mode()
    def _hear(self, windows):
        """[_Heard] of some windows, through the network together."""
        try:
            stems = [window.stems for window in windows]
            images = self.frontend(stems, [PLAIN] * len(stems))  # (B, 4, S, S)
            with autocast(self.device, amp_type(self.device, True)):
                logits = self.net(images.to(memory_format=torch.channels_last))
            probabilities = logits.float().softmax(1).cpu()
            return [
                _Heard(one.start, one.end, row, self.frontend.signals(one.stems).abs().max().item())
                for one, row in zip(windows, probabilities, strict=True)
            ]
        except torch.OutOfMemoryError:
            if len(windows) == 1:
                raise UserError(
                    "not even one window fits the card's memory; free the card or set DEVICE=cpu"
                ) from None
        torch.cuda.empty_cache()
        self.batch_size = len(windows) // 2
        log.warning("out of memory: %d windows now go through the card at once", self.batch_size)
        return self._hear(windows[: self.batch_size]) + self._hear(windows[self.batch_size :])

    def _prediction(self, heard):
        """The mean over the windows that can be heard, or over all if none can."""
        audible = [one for one in heard if one.peak > SILENT] or heard
        mean = torch.stack([one.probabilities for one in audible]).mean(0)
        spans = [Span(one.start, one.end, *self._answer(one.probabilities)) for one in audible]
        return Prediction(*self._answer(mean), spans)

    def _answer(self, probabilities):
        """(genre, its probability, {genre: probability}) of probabilities (classes,)."""
        best = probabilities.argmax().item()
        named = dict(zip(self.label_names, probabilities.tolist(), strict=True))
        return self.label_names[best], probabilities[best].item(), named


class _BadFile(Exception):
    """What is wrong with one file; the others go on."""

    def __init__(self, reason):
        super().__init__(str(reason))
        self.reason = reason


def clip_names(paths):
    """A name for each path, in order: its stem, or with a mark where paths share a stem."""
    stems = [path.stem.casefold() for path in paths]
    counts = collections.Counter(stems)
    return [
        path.stem
        if counts[stem] == 1
        else f"{path.stem}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
        for path, stem in zip(paths, stems, strict=True)
    ]
