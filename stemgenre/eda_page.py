"""The page of eda.py: what is in the data, to be looked at and listened to."""

import numpy as np
import pandas as pd

from stemgenre import audio
from stemgenre.cache import STEMS
from stemgenre.errors import UserError
from stemgenre.files import replacing
from stemgenre.page import (
    INK,
    cards,
    document,
    fact,
    picture,
    player,
    printable,
    section,
    table,
    tag,
)
from stemgenre.stem_views import SAMPLE

MOST_ROWS = 200  # of a table on the page; the csv has all
PLAYED = 8.0  # s of each player: fifty of them stay below 5 MB
COLUMNS = 600  # of a waveform's outline


def write(path, overview, views, features):
    """Writes the page about an Overview and its StemViews (None before separation) to `path`."""
    parts = [
        _headlines(overview),
        section("Copies and leaks", *_copies(overview)),
        section("Genres", *_genres(overview)),
        section("Files", *_files(overview)),
        section("One clip of each genre", *_examples(overview, views, features)),
        section("What the network sees on average", *_means(views, features)),
        section("Energy of the stems", *_energy(views)),
        section("Files that are left over", *_leftovers(overview)),
    ]
    with replacing(path, "w", encoding="utf-8") as file:
        file.write(document("What is in the data", *parts))


def _headlines(overview):
    splits = overview.clips["split"].value_counts()
    figures = [
        (splits.get("train", 0), "training clips"),
        (splits.get("test", 0), "test clips"),
        (len(overview.genres), "genres"),
        (f"{overview.clips['seconds'].sum() / 3600:.1f} h", "of music"),
        (len(overview.copies), "pairs of one recording"),
        (len(overview.contradictions), "of them with two labels"),
        (len(overview.leaks), "of them between train and test"),
        (len(overview.unreadable), "files that cannot be read"),
    ]
    return cards(*(fact(number, text) for number, text in figures))


def _rows(frame, *, file, formats=None):
    """The first rows of a table, and where the others are."""
    parts = [table(frame.head(MOST_ROWS), formats=formats)]
    if len(frame) > MOST_ROWS:
        parts.append(
            tag("p", f"{MOST_ROWS} of {len(frame)} rows; {file} has all of them.", class_="soft")
        )
    return parts


def _copies(overview):
    yield tag(
        "p",
        "Clips that hold the same recording, found from the sound: the same file, another encoding,"
        " or overlapping cuts. Offset: where the second clip begins within the first. Similarity:"
        " the share of small cells of time and pitch whose waves are alike once the clips are"
        " aligned.",
    )
    if not len(overview.copies):
        yield tag("p", "None were found.")
        return
    shown = overview.copies.copy()
    shown["different_labels"] = np.where(shown["different_labels"], "two labels", "")
    shown.columns = [name.removesuffix("_seconds").replace("_", " ") for name in shown]
    shown = shown.rename(columns={"different labels": "", "offset": "offset s"})
    shown = shown.rename(columns={"overlap": "overlap s"})
    formats = {"offset s": "{:.3f}", "overlap s": "{:.1f}", "similarity": "{:.3f}"}
    if len(overview.contradictions):
        yield tag("p", tag("strong", "One recording, two labels: "), "decide which is right.")
    yield from _rows(shown, file="copies.csv", formats=formats)
    yield tag(
        "p",
        "With SPLIT_BY_GROUP=True, train.py keeps each group of groups.csv on one side of the"
        " validation split. Without it, the validation hears recordings it was trained on.",
    )


def _genres(overview):
    genres = overview.genres

    def draw(figure):
        axes = figure.subplots()
        names = [printable(name) for name in genres["genre"]]
        axes.barh(names, genres["train_clips"], height=0.7, label="training clips")
        axes.plot(genres["train_groups"], names, "|", color=INK, ms=16, mew=2, label="recordings")
        axes.invert_yaxis()
        axes.set_xlabel("training clips")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    yield _wide(draw, alt="training clips of each genre", height=1 + 0.32 * len(genres))
    shown = genres.rename(
        columns={
            "label_id": "label id",
            "train_clips": "training clips",
            "test_clips_known": "test clips, if known",
            "train_groups": "recordings",
            "train_minutes": "minutes",
            "median_loudness_lufs": "median LUFS",
            "median_peak_db": "median peak dB",
        }
    )
    formats = dict.fromkeys(("minutes", "median LUFS", "median peak dB"), "{:.1f}")
    yield table(shown, formats=formats)


def _files(overview):
    clips = overview.clips[overview.clips["error"] == ""]
    if not len(clips):
        return
    wanted = {
        "seconds": ("duration", "s"),
        "loudness_lufs": ("loudness", "LUFS"),
        "peak_db": ("peak", "dB of full scale"),
    }

    def draw(figure):
        for axes, (name, (title, unit)) in zip(
            figure.subplots(1, len(wanted)), wanted.items(), strict=True
        ):
            values = [
                clips.loc[clips["split"] == split, name].dropna().astype(float).to_numpy()
                for split in ("train", "test")
            ]
            axes.hist(values, bins=20, stacked=True, label=("train", "test"))
            axes.set(title=title, xlabel=unit, ylabel="clips")
        axes.legend()

    yield _wide(draw, alt="durations, loudness and peaks", height=2.8)
    kinds = clips.groupby(["split", "codec", "sample_rate", "channels"], as_index=False).size()
    kinds = kinds.astype({"sample_rate": int, "channels": int})
    yield table(kinds.rename(columns={"sample_rate": "Hz", "size": "clips"}))
    noted = clips[clips["notes"] != ""]
    if not len(noted):
        yield tag("p", "Nothing unusual in any file.")
        return
    yield tag("h3", f"{len(noted)} clips are unusual")
    shown = noted[["split", "file_name", "label", "notes"]]
    yield from _rows(shown.rename(columns={"file_name": "file"}), file="clips.csv")


def _examples(overview, views, features):
    """Per genre one clip: how it sounds, its waveform, and the image the network gets."""
    if views:
        yield tag(
            "p",
            "Each image is what the network gets: four channels, loudness standardised with the"
            f" mean and deviation over up to {SAMPLE} separated training clips of each genre"
            f" ({_channels(views, features)}), {features.img_size} x {features.img_size} pixels.",
        )
    else:
        yield tag("p", "No clips are separated yet. The stems come with train.py.", class_="soft")
    clips = overview.readable("train")
    for genre in overview.genres["genre"]:
        mine = clips[clips["label"] == genre]
        if views and genre in views.examples:
            name, stems, image = views.examples[genre]
        elif len(mine):
            name, stems, image = mine["clip"].iloc[0], None, None
        else:
            continue
        row = mine[mine["clip"] == name].iloc[0]
        try:
            wave, rate = audio.decode(row["path"])
        except UserError:  # gone since it was measured
            continue
        parts = [
            tag("h3", genre, " ", tag("span", row["file_name"], class_="soft")),
            player(wave, rate, label="mix", seconds=PLAYED),
            _wide(_waveform(wave, rate), alt=f"waveform of {row['file_name']}", height=1.3),
        ]
        if stems is not None:
            players = [
                player(stem.float().numpy(), features.sr, label=label, seconds=PLAYED)
                for label, stem in zip(STEMS, stems, strict=True)
            ]
            draw = _image(image, _limits([image]), _names(features))
            parts += [_wide(draw, alt=f"image of {genre}", height=3), cards(*players)]
        yield tag("div", *parts, class_="card")


def _wide(draw, *, alt, height):
    """A picture as wide as a card."""
    return picture(draw, alt=alt, width=10.6, height=height)


def _channels(views, features):
    return ", ".join(
        f"{stem} {mean:.0f} and {std:.0f} dB"
        for stem, mean, std in zip(_names(features), *views.channels, strict=True)
    )


def _waveform(wave, rate):
    """Draws the outline of (channels, samples) over seconds."""
    width = max(1, wave.shape[1] // COLUMNS)
    count = wave.shape[1] // width
    parts = wave.mean(axis=0)[: count * width].reshape(count, width)

    def draw(figure):
        axes = figure.subplots()
        seconds = np.arange(count) * width / rate
        axes.fill_between(seconds, parts.min(axis=1), parts.max(axis=1), linewidth=0.4)
        axes.set(xlabel="s", xlim=(0, seconds[-1] + width / rate), yticks=[0])
        axes.spines["left"].set_visible(False)

    return draw


def _limits(images):
    """The values between which the colours of some images (4, S, S) lie."""
    return np.quantile(np.stack([image.numpy() for image in images]), [0.01, 0.995])


def _names(features):
    """What each channel of the image shows: CHANNELS, in turn if they are fewer."""
    names = features.channels.split(",")
    return [names[i % len(names)] for i in range(features.num_channels)]


def _image(image, limits, names):
    """Draws an image's (4, S, S) channels side by side, with colours between two values."""

    def draw(figure):
        all_axes = figure.subplots(1, len(names), sharey=True)
        low, high = limits
        for axes, name, channel in zip(all_axes, names, image.numpy(), strict=True):
            shown = axes.imshow(channel, origin="lower", cmap="magma", vmin=low, vmax=high)
            axes.set(title=name, xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        figure.colorbar(shown, ax=all_axes, label="deviations", shrink=0.8)

    return draw


def _means(views, features):
    if not views:
        yield tag("p", "No clips are separated yet.", class_="soft")
        return
    yield tag(
        "p",
        "The mean of the images of each genre: time from left to right, pitch from bottom to top."
        " The colours of all are on one scale.",
    )
    limits = _limits(views.means.values())
    for genre, image in views.means.items():
        count = int(views.energy.set_index("genre")["clips"][genre])
        heading = tag("h3", genre, " ", tag("span", f"{count} clips", class_="soft"))
        mean = _wide(_image(image, limits, _names(features)), alt=f"mean of {genre}", height=3)
        yield tag("div", heading, mean)


def _energy(views):
    if not views:
        yield tag("p", "No clips are separated yet.", class_="soft")
        return
    energy = views.energy

    def draw(figure):
        axes = figure.subplots()
        left = np.zeros(len(energy))
        names = [printable(name) for name in energy["genre"]]
        for stem in STEMS:
            axes.barh(names, energy[stem], left=left, height=0.7, label=stem)
            left += energy[stem].to_numpy()
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="mean share of the energy")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    yield _wide(draw, alt="energy of the stems by genre", height=1 + 0.32 * len(energy))
    yield table(energy, formats=dict.fromkeys(STEMS, "{:.0%}"))


def _leftovers(overview):
    if len(overview.unreadable):
        yield tag("h3", "Files that cannot be read")
        shown = overview.unreadable[["split", "file_name", "error"]]
        yield from _rows(shown.rename(columns={"file_name": "file"}), file="unreadable.csv")
    if overview.unnamed:
        yield tag("h3", "Audio that no master names")
        paths = pd.DataFrame({"file": [str(path) for path in overview.unnamed]})
        yield from _rows(paths, file="unnamed.csv")
    if not len(overview.unreadable) and not overview.unnamed:
        yield tag("p", "Every file can be read, and every file has a row in the masters.")
