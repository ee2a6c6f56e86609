"""The genre of any audio file, with a trained model: what predict.py and other programs use.

from stemgenre import Classifier
prediction = Classifier.load("best_model.pth").predict("song.mp3")
print(prediction.genre, prediction.confidence)

A file that is longer than the model's clips is classified in windows of that length, half
overlapping; their probabilities are averaged. Stems come block by block (separation.separate) and
windows are cut from them as they come, so that memory does not grow with a file's length. A model
of CHANNELS=mix needs no stems, and no Demucs: its windows are cut from the decoded file.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stemgenre.errors import ClipError, UserError
from stemgenre.features.windows import OVERLAP, TTA_OVERLAP, WindowCutter
from stemgenre.predict.inputs import readable_names
from stemgenre.predict.prediction import Prediction, Segment
from stemgenre.prefetch import batch_values, prefetch
from stemgenre.runtime import MicroBatch, pick_device
from stemgenre.separation.cache import StemCache
from stemgenre.separation.decode import EndOfFile, decode_files
from stemgenre.separation.demucs_model import Separator, is_plain_name
from stemgenre.separation.entry_reader import CacheError, cached_blocks
from stemgenre.separation.entry_writer import EntryWriter
from stemgenre.separation.separate import separate_files
from stemgenre.settings import STEMS, SeparationSettings, load_settings
from stemgenre.training.inference import (
    LoadedModel,
    amp_type,
    average_logits,
    load_models,
    stems_to_logits,
)

log = logging.getLogger(__name__)

SILENT_PEAK = 1e-4  # of full scale, -80 dB: windows that are never louder are left out
READ_AHEAD = 2  # blocks of cached stems read while another is classified
NOT_DEMUCS = ("synthesised",)  # what the demo's stems are recorded as separated by


@dataclass(frozen=True)
class _Window:
    start: float  # s
    end: float
    stems: torch.Tensor  # (4, samples), or the mix, (1, samples)


@dataclass(frozen=True)
class WindowResult:
    """A classified window: probabilities (classes,), and the peak of the stems that it shows."""

    start: float  # s
    end: float
    probabilities: torch.Tensor
    peak: float


@dataclass
class _File:
    """A file on its way, and the results of its windows."""

    path: Path
    cutter: WindowCutter
    blocks: Iterator[torch.Tensor] | None = None  # its cached stems
    writer: EntryWriter | None = None
    error: UserError | None = None
    results: list[WindowResult] = field(default_factory=list)


class Classifier:
    """A trained model, ready to predict audio files."""

    def __init__(
        self,
        models: list[LoadedModel],
        *,
        separation: SeparationSettings,
        device: torch.device,
        stems: Path | str | None = None,
        batch_size: int = 8,
        use_amp: bool = True,
        tta: int = 0,
        threads: int = 2,
    ) -> None:
        """See load(). `models` are on the torch.device `device`; their probabilities are averaged.

        What must be the same in all of them is taken from the first (see load_models).
        """
        self.models, self.tta = models, tta
        self.label_ids, self.label_names = models[0].label_ids, models[0].label_names
        self.features = models[0].frontend.features
        self.window_samples = models[0].frontend.clip_samples
        self.separation, self.device, self.threads = separation, device, threads
        self.micro_batch = MicroBatch(batch_size)
        self.amp_dtype = amp_type(device, use_amp)
        self.separates = self.features.cached_waves == STEMS
        if stems and not self.separates:
            log.warning("nothing is separated for a model of CHANNELS=mix: %s gets no stems", stems)
        self.cache = None
        if stems and self.separates:
            self.cache = StemCache(
                stems, model=separation.separation_model, sample_rate=self.features.sr
            )
        self._separator = None

    @classmethod
    def load(
        cls,
        *paths: Path | str,
        device: str | torch.device = "auto",
        separation_model: str | None = None,
        separation: SeparationSettings | None = None,
        stems: Path | str | None = None,
        batch_size: int = 8,
        use_amp: bool = True,
        tta: int = 0,
        threads: int = 2,
    ) -> "Classifier":
        """The Classifier of a best_model.pth, or of several, whose probabilities are averaged.

        device: as the setting DEVICE. separation_model: the Demucs model; without it the one that
        model was trained with, or else that of `separation`, which has the other settings of the
        separation. stems: a folder in which the stems are kept and found again; a model of
        CHANNELS=mix has none. batch_size: windows per forward pass. use_amp: autocast on CUDA.
        tta: further views of each window, averaged. threads: files decoded at a time. Raises
        UserError if a file is not there or does not hold a whole model, or for models that cannot
        be averaged. Demucs itself is loaded when it is first needed.
        """
        if not isinstance(device, torch.device):
            device = pick_device(device)
        separation = separation or load_settings().separation
        models = load_models(*paths, device=device)
        recorded = models[0].separation_model
        if recorded is not None and not is_plain_name(recorded):
            raise UserError(
                f"{paths[0]} is damaged: its separation_model {recorded!r:.100} is not a plain name"
            )
        name = separation_model or (None if recorded in NOT_DEMUCS else recorded)
        if name:
            separation = separation.model_copy(update={"separation_model": name})
        return cls(
            models,
            separation=separation,
            device=device,
            stems=stems,
            batch_size=batch_size,
            use_amp=use_amp,
            tta=tta,
            threads=threads,
        )

    def predict(
        self, path: Path | str, *, progress: Callable[[float], None] | None = None
    ) -> Prediction:
        """The Prediction of one file. Raises UserError if it cannot be decoded or is silent."""
        ((_, result),) = self.predict_all([path], progress=progress)
        if isinstance(result, UserError):
            raise result
        return result

    def predict_all(
        self, paths: list[Path | str], *, progress: Callable[[float], None] | None = None
    ) -> Iterator[tuple[Path, Prediction | UserError]]:
        """Yields (path, Prediction) of each file in order; for a bad file (path, UserError).

        Short files share batches, so a result can come some files later. `progress` is called with
        seconds of audio whenever more of it has been separated. Raises UserError for what stops
        all files alike: no Demucs model, a full disk, not enough memory.
        """
        blocks = self._stem_blocks([Path(path) for path in paths])
        windows = self._windows(blocks, progress or (lambda seconds: None))
        results = batch_values(windows, _Window, self._classify, size=lambda: self.micro_batch.size)
        for file, value in results:
            if isinstance(value, EndOfFile):
                yield file.path, file.error or self._prediction(file)
            else:
                file.results.append(value)

    def _stem_blocks(self, paths):
        """Yields (_File, stems) block by block of each file in order, then (_File, EndOfFile)."""

        def cached(group):
            for file in group:
                try:
                    for stems in file.blocks:
                        yield file, stems
                    yield file, EndOfFile()
                except UserError as error:
                    yield file, EndOfFile(error=error)

        files = self._open(paths)
        for is_cached, group in itertools.groupby(files, key=lambda file: file.blocks is not None):
            if is_cached:
                yield from prefetch(cached(group), depth=READ_AHEAD)
                continue
            pairs = ((file, file.path) for file in group)
            if self.separates:
                yield from separate_files(pairs, self._loaded_separator(), threads=self.threads)
            else:
                yield from decode_files(
                    pairs,
                    waves=self.features.cached_waves,
                    sample_rate=self.features.sr,
                    threads=self.threads,
                )

    def _open(self, paths):
        """Yields the _File of each path, with the blocks of its stems if they are cached."""
        names = readable_names(paths) if self.cache else {}
        for path in paths:
            file = _File(path, self._cutter())
            if not path.is_file():
                file.blocks = _failing(UserError(f"there is no file {path}"))
            elif path in names:
                self._open_cached(file, names[path])
            yield file

    def _cutter(self):
        return WindowCutter(self.window_samples, overlap=TTA_OVERLAP if self.tta else OVERLAP)

    def _open_cached(self, file, clip):
        """Gives a file the blocks of its stems in the cache, or else what will write them there."""
        try:
            digest = self.cache.hash_source(file.path)  # of what is decoded: taken before
            file.writer = EntryWriter(self.cache, clip, file.path, source_sha256=digest)
            if self.cache.is_current(clip, file.path, hash_source=lambda _: digest):
                blocks = cached_blocks(self.cache.path(clip), samples=self.window_samples)
                file.blocks, file.writer = itertools.chain([next(blocks)], blocks), None
        except CacheError as error:
            log.warning("%s; it is separated again", error)
        except ClipError as error:
            file.blocks, file.writer = _failing(error), None

    def _loaded_separator(self):
        if self._separator is None:
            self._separator = Separator(
                self.separation, sample_rate=self.features.sr, device=self.device
            )
        return self._separator

    def _windows(self, blocks, progress):
        """Yields (_File, _Window) from the stems of each file, and keeps the stems if asked to."""
        for file, value in blocks:
            if not isinstance(value, EndOfFile):
                stems = value.cpu()
                if file.writer:
                    file.writer.add(stems)
                yield from self._cut(file, file.cutter.add(stems))
                progress(stems.shape[1] / self.features.sr)
                continue
            file.error = value.error
            if not file.error:
                yield from self._cut(file, file.cutter.finish())
            if file.writer:
                self._keep(file, value.precision)
            yield file, value

    def _cut(self, file, windows):
        sr = self.features.sr
        for start, stems in windows:
            yield file, _Window(start / sr, (start + stems.shape[1]) / sr, stems)

    def _keep(self, file, precision):
        """Writes the file's stems into the cache, if it was separated."""
        try:
            if file.error:
                file.writer.close()
            else:
                file.writer.finish(precision)
        except ClipError as error:
            file.error = error

    def _classify(self, windows):
        """[WindowResult] of some windows; probabilities are NaN where the logits are not finite."""
        stems = [window.stems for window in windows]
        how = {"tta": self.tta, "micro_batch": self.micro_batch, "amp_dtype": self.amp_dtype}
        logits = [stems_to_logits(m.net, m.frontend, stems, **how).cpu() for m in self.models]
        logits = average_logits(torch.stack(logits, dim=1))  # (windows, classes)
        probabilities = logits.softmax(1)
        probabilities[~logits.isfinite().all(1)] = torch.nan
        frontend = self.models[0].frontend
        peaks = [frontend.select_channels(window.stems).abs().max() for window in windows]
        return [
            WindowResult(window.start, window.end, row, peak.item())
            for window, row, peak in zip(windows, probabilities, peaks, strict=True)
        ]

    def _prediction(self, file):
        """The mean over the windows that are not silent, or over all if all are; a UserError."""
        results = [r for r in file.results if r.peak > SILENT_PEAK] or file.results
        mean = torch.stack([result.probabilities for result in results]).mean(0)
        if not mean.isfinite().all():
            return UserError(f"the model's output for {file.path} is NaN or infinite")
        timeline = [Segment(r.start, r.end, *self._top(r.probabilities)) for r in results]
        return Prediction(*self._top(mean), timeline)

    def _top(self, probabilities):
        """(genre, its probability, {genre: probability}) of probabilities (classes,)."""
        best = probabilities.argmax().item()
        named = dict(zip(self.label_names, probabilities.tolist(), strict=True))
        return self.label_names[best], probabilities[best].item(), named


def _failing(error):
    """An iterator that raises `error`."""
    raise error
    yield
