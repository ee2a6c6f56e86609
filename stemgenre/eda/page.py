"""EDA_DIR/index.html: what is in the data, to look at and to listen to."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from stemgenre.data import audio
from stemgenre.eda.dataset_summary import DatasetSummary
from stemgenre.eda.stem_stats import MAX_CLIPS_PER_GENRE, StemStats
from stemgenre.errors import UserError
from stemgenre.files import write_text
from stemgenre.html import charts
from stemgenre.html.page import audio_player, full_width_figure, printable, render_page
from stemgenre.settings import STEMS, FeatureSettings

TEMPLATE = Path(__file__).with_name("eda.html")
MAX_ROWS = 200  # of a table on the page; the csv has all
PLAYER_SECONDS = 8.0  # of each player: fifty of them stay below 5 MB
ENVELOPE_POINTS = 600  # of a waveform
UNITS = {"_seconds": " s", "_loudness_lufs": " LUFS", "_db": " dB"}  # in the names of columns
HISTOGRAMS = {  # column of clips: title, unit
    "seconds": ("duration", "s"),
    "loudness_lufs": ("loudness", "LUFS"),
    "peak_db": ("peak", "dBFS"),
}


def write_page(
    path: Path, summary: DatasetSummary, stem_stats: StemStats | None, features: FeatureSettings
) -> None:
    """Writes the page of a DatasetSummary and its StemStats (None before separation)."""
    clips = summary.clips[summary.clips["error"] == ""]
    different = np.where(summary.duplicates["different_labels"], "yes", "")
    html = render_page(
        TEMPLATE,
        max_rows=MAX_ROWS,
        summary=summary,
        num_clips=dict.fromkeys(("train", "test"), 0) | dict(summary.clips["split"].value_counts()),
        duplicates=_headings(summary.duplicates.assign(different_labels=different)),
        genres_figure=_genres_figure(summary.genres),
        genres=_headings(summary.genres),
        files_figure=_files_figure(clips) if len(clips) else "",
        formats=_formats_table(clips),
        unusual=_headings(clips[clips["notes"] != ""][["split", "file_name", "label", "notes"]]),
        unreadable=_headings(summary.unreadable[["split", "file_name", "error"]]),
        unlisted=pd.DataFrame({"file": [str(path) for path in summary.unlisted]}),
        examples=_examples(summary, stem_stats, features),
        stems=_stems_context(stem_stats, features) if stem_stats else None,
    )
    write_text(path, html)


def _headings(table):
    """The table with its columns named in words, with units."""

    def in_words(name):
        for suffix, unit in UNITS.items():
            name = name.replace(suffix, unit)
        return name.replace("_", " ")

    return table.rename(columns=in_words)


def _genres_figure(genres):
    def draw(figure):
        axes = figure.subplots()
        names = [printable(name) for name in genres["genre"]]
        axes.barh(names, genres["train_clips"], height=0.7, label="training clips")
        axes.plot(genres["train_recordings"], names, "|C1", ms=16, mew=3, label="recordings")
        axes.invert_yaxis()
        axes.set_xlabel("training clips")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return full_width_figure(
        draw, alt="training clips of each genre", height=1 + 0.32 * len(genres)
    )


def _files_figure(clips):
    def draw(figure):
        all_axes = figure.subplots(1, len(HISTOGRAMS))
        for axes, (name, (title, unit)) in zip(all_axes, HISTOGRAMS.items(), strict=True):
            values = [
                clips.loc[clips["split"] == split, name].dropna().to_numpy()
                for split in ("train", "test")
            ]
            axes.hist(values, bins=20, stacked=True, label=("train", "test"))
            axes.set(title=title, xlabel=unit, ylabel="clips")
        axes.legend()

    return full_width_figure(draw, alt="durations, loudness and peaks", height=2.8)


def _formats_table(clips):
    """The number of clips of each split and file format."""
    table = clips.groupby(["split", "codec", "sample_rate", "channels"], as_index=False).size()
    table = table.astype({"sample_rate": int, "channels": int})
    return table.rename(columns={"sample_rate": "Hz", "size": "clips"})


def _examples(summary, stem_stats, features):
    """One clip of each genre as {genre, file_name, mix, waveform, image, stems}.

    Without separated stems of that genre, image is "" and stems is empty.
    """
    clips, examples = summary.readable("train"), []
    for genre in summary.genres["genre"]:
        of_genre = clips[clips["label"] == genre]
        name, stems, image = of_genre["clip"].iloc[0] if len(of_genre) else None, (), None
        if stem_stats and genre in stem_stats.examples:
            name, stems, image = stem_stats.examples[genre]
        if name is None:
            continue
        clip = of_genre[of_genre["clip"] == name].iloc[0]
        try:
            wave, rate = audio.decode(clip["path"], seconds=features.clip_seconds)
        except UserError:  # deleted since its statistics were computed
            continue
        players = [
            audio_player(stem.float().numpy(), features.sr, label=label, seconds=PLAYER_SECONDS)
            for label, stem in zip(features.cached_waves, stems, strict=False)
            if label != "mix"  # which has its player from the file
        ]
        examples.append(
            {
                "genre": genre,
                "file_name": clip["file_name"],
                "mix": audio_player(wave, rate, label="mix", seconds=PLAYER_SECONDS),
                "waveform": _waveform(wave, rate, alt=f"waveform of {clip['file_name']}"),
                "image": "" if image is None else _image(image, features, alt=f"image of {genre}"),
                "stems": players,
            }
        )
    return examples


def _waveform(wave, rate, *, alt):
    """The envelope of (channels, samples) over time."""
    width = max(1, wave.shape[1] // ENVELOPE_POINTS)
    count = wave.shape[1] // width
    parts = wave.mean(axis=0)[: count * width].reshape(count, width)

    def draw(figure):
        axes = figure.subplots()
        seconds = np.arange(count) * width / rate
        axes.fill_between(seconds, parts.min(axis=1), parts.max(axis=1), linewidth=0.4)
        axes.set(xlabel="s", xlim=(0, seconds[-1] + width / rate), yticks=[0])
        axes.spines["left"].set_visible(False)

    return full_width_figure(draw, alt=alt, height=1.3)


def _image(image, features, *, alt, limits=None) -> Markup:
    """The channels of an image (C, S, S); without `limits`, with a colour scale of its own."""
    channels = image.numpy()
    limits = charts.colour_limits([channels]) if limits is None else limits
    return full_width_figure(
        lambda figure: charts.image(figure, channels, features.channel_names, limits=limits),
        alt=alt,
        height=3,
    )


def _stems_context(stem_stats, features) -> dict[str, Any]:
    """What the page shows of StemStats besides the examples."""
    images, energy = stem_stats.mean_images, stem_stats.energy
    limits = charts.colour_limits([image.numpy() for image in images.values()])
    channel_stats = zip(features.channel_names, *stem_stats.channel_stats, strict=True)
    return {
        "max_clips": MAX_CLIPS_PER_GENRE,
        "image_size": features.image_size,
        "channel_stats": ", ".join(
            f"{name} {mean:.0f} and {std:.0f} dB" for name, mean, std in channel_stats
        ),
        "mean_images": [
            (genre, clips, _image(images[genre], features, alt=f"mean of {genre}", limits=limits))
            for genre, clips in zip(energy["genre"], energy["clips"], strict=True)
        ],
        "energy_figure": _energy_figure(energy) if features.cached_waves == STEMS else "",
        "energy": energy,
        "names": STEMS,
    }


def _energy_figure(energy):
    def draw(figure):
        axes = figure.subplots()
        left = np.zeros(len(energy))
        names = [printable(name) for name in energy["genre"]]
        for stem in STEMS:
            axes.barh(names, energy[stem], left=left, height=0.7, label=stem)
            left += energy[stem].to_numpy()
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="mean fraction of the energy")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return full_width_figure(
        draw, alt="energy of the stems by genre", height=1 + 0.32 * len(energy)
    )
