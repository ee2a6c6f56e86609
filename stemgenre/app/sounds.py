"""Uploaded sounds -> genres, pictures and players, as HTML."""

import tempfile
from pathlib import Path

import torch
from markupsafe import Markup

from stemgenre.app import views
from stemgenre.app.runs import Run
from stemgenre.data import audio
from stemgenre.errors import UserError
from stemgenre.features.augmentation import NO_AUGMENT
from stemgenre.html import charts
from stemgenre.html.page import audio_player, printable, svg_figure
from stemgenre.predict.classifier import Classifier
from stemgenre.predict.inputs import total_seconds
from stemgenre.predict.outputs import format_time, write_csv
from stemgenre.predict.prediction import Prediction
from stemgenre.runtime import pick_device, thread_count
from stemgenre.separation.cache import StemCache
from stemgenre.separation.entry_reader import cached_blocks
from stemgenre.settings import STEMS, Settings

PLAYER_SECONDS = 30.0  # s, the first ones of a sound: a player takes 0.3 MB


def device_for(device: torch.device, runs: list[Run]) -> tuple[torch.device, str]:
    """(device, why) to predict on: not the GPU while one of `runs` is running on it."""
    busy = [r.name for r in runs if r.settings().get("DEVICE") != "cpu" and r.holder()]
    if device.type == "cpu" or not busy:
        return device, ""
    return torch.device("cpu"), f"{busy[0]} is using the GPU: predicted on the CPU meanwhile"


class SoundClassifier:
    """A Classifier of some models for uploaded files, on the GPU only while no run uses it.

    It predicts sounds of up to `max_seconds`. To be closed, so that the next run finds the GPU's
    memory free. Raises UserError for models that cannot be averaged.
    """

    def __init__(
        self, settings: Settings, models: list[Path], runs: list[Run], *, max_seconds: float
    ) -> None:
        self.max_seconds = max_seconds
        device, self.reason = device_for(pick_device(settings.machine.device), runs)
        size = settings.train.micro_batch
        self.classifier = Classifier.load(
            *models,
            device=device,
            separation=settings.separation,
            batch_size=8 if size == "auto" else size,
            use_amp=settings.train.use_amp,
            tta=settings.train.tta,
            threads=thread_count(settings.machine),
        )

    def close(self) -> None:
        """Frees the memory of the models."""
        self.classifier = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def predict(self, path: Path) -> tuple[Prediction | None, Markup]:
        """(Prediction, HTML) of an upload, or (None, what is wrong with it)."""
        try:
            result, html = self._predict(path)
        except UserError as error:
            result, html = None, views.message(str(error).replace(str(path), path.name))
        section = Markup('<section class="sound"><h3>{}</h3>{}{}</section>')
        return result, section.format(
            printable(path.name), views.message(self.reason, "soft"), html
        )

    def as_csv(self, predictions: list[tuple[str, Prediction]]) -> bytes:
        """The table of predict.py --csv."""
        names, ids = self.classifier.label_names, self.classifier.label_ids
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "genres.csv"
            write_csv(path, predictions, dict(zip(names, ids, strict=True)))
            return path.read_bytes()

    def _predict(self, path):
        """(Prediction, its HTML) of a file. Its stems are kept on disk meanwhile."""
        classifier, seconds = self.classifier, 0.0
        too_long = UserError(f"{path} is longer than {self.max_seconds / 60:g} minutes")
        if (total_seconds([path]) or 0.0) > self.max_seconds:
            raise too_long

        def progress(more):  # where the header does not tell its length
            nonlocal seconds
            seconds += more
            if seconds > self.max_seconds:
                raise too_long

        with tempfile.TemporaryDirectory() as folder:
            sr, waves = classifier.features.sr, classifier.features.cached_waves
            model = classifier.separation.separation_model
            classifier.cache = StemCache(folder, model=model, sample_rate=sr, waves=waves)
            prediction = classifier.predict(path, progress=progress)
            (entry,) = Path(folder).glob("*.npz")
            samples = round(PLAYER_SECONDS * sr)
            stems = next(cached_blocks(entry, samples=samples, waves=waves)).float()
        parts = [views.genres(prediction.top_k()), _timeline(prediction)]
        stems_to_play = dict(zip(waves, stems.numpy(), strict=True)) if waves == STEMS else {}
        parts += [_image(classifier, stems), _players(path, stems_to_play, sr)]
        return prediction, Markup().join(parts)


def _timeline(prediction):
    """A picture of the genres over time, of a sound of several windows."""
    segments = prediction.timeline
    if len(segments) < 2:
        return Markup()
    ranked = [genre for genre, _ in prediction.top_k(6)]
    times = [(segment.start + segment.end) / 2 for segment in segments]

    def draw(figure):
        axes = figure.subplots()
        for genre in ranked:
            values = [segment.probabilities[genre] for segment in segments]
            axes.plot(times, values, marker="o", ms=3, label=printable(genre))
        axes.set(xlabel="minutes", ylabel="probability", ylim=(0, 1))
        axes.xaxis.set_major_formatter(format_time)
        axes.grid()
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return svg_figure(draw, alt="the genre over time", height=3.0)


def _image(classifier, stems):
    """A picture of the image that the first model gets of the first window."""
    frontend = classifier.models[0].frontend
    image = frontend([stems[:, : frontend.clip_samples]], [NO_AUGMENT])[0].cpu().numpy()
    names, limits = classifier.features.channel_names, charts.colour_limits([image])

    def draw(figure):
        charts.image(figure, image, names, limits=limits)

    return svg_figure(draw, alt="the channels of the image", height=2.6)


def _players(path, stems, sr):
    """Players of the first seconds of the file itself and of its stems."""
    wave, rate = audio.decode(path, seconds=PLAYER_SECONDS)
    players = [audio_player(wave, rate, label="sound", seconds=PLAYER_SECONDS)]
    for name, stem in stems.items():
        players.append(audio_player(stem, sr, label=name, seconds=PLAYER_SECONDS))
    return Markup('<div class="players">{}</div>').format(Markup().join(players))
