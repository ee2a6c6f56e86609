"""The parts of eda.py's page that need separated stems, or go with them."""

import numpy as np

from stemgenre import audio, charts
from stemgenre.cache import STEMS
from stemgenre.errors import UserError
from stemgenre.page import cards, note, player, printable, table, tag, wide
from stemgenre.stem_views import SAMPLE

PLAYED = 8.0  # s of each player: fifty of them stay below 5 MB
COLUMNS = 600  # of a waveform's outline


def examples(overview, views, features):
    """Per genre one clip: how it sounds, its waveform, and the image the network gets."""
    if views:
        yield tag(
            "p",
            "Each image is what the network gets: four channels, loudness standardised with the"
            f" mean and deviation over up to {SAMPLE} separated training clips of each genre"
            f" ({_channels(views, features)}), {features.img_size} x {features.img_size} pixels.",
        )
    else:
        yield note("No clips are separated yet. The stems come with train.py.")
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
            wide(_waveform(wave, rate), alt=f"waveform of {row['file_name']}", height=1.3),
        ]
        if stems is not None:
            players = [
                player(stem.float().numpy(), features.sr, label=label, seconds=PLAYED)
                for label, stem in zip(STEMS, stems, strict=True)
            ]
            parts += [_image(image, features, alt=f"image of {genre}"), cards(*players)]
        yield tag("div", *parts, class_="card")


def _channels(views, features):
    return ", ".join(
        f"{stem} {mean:.0f} and {std:.0f} dB"
        for stem, mean, std in zip(features.channel_names, *views.channels, strict=True)
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


def _image(image, features, *, alt, limits=None):
    """The picture of an image's (4, S, S) channels; without `limits`, colours of its own."""
    channels = image.numpy()
    limits = charts.colour_limits([channels]) if limits is None else limits
    return wide(
        lambda figure: charts.image(figure, channels, features.channel_names, limits=limits),
        alt=alt,
        height=3,
    )


def means(views, features):
    """The mean image of each genre."""
    if not views:
        yield note("No clips are separated yet.")
        return
    yield tag(
        "p",
        "The mean of the images of each genre: time from left to right, pitch from bottom to top."
        " The colours of all are on one scale.",
    )
    limits = charts.colour_limits([image.numpy() for image in views.means.values()])
    for genre, image in views.means.items():
        count = int(views.energy.set_index("genre")["clips"][genre])
        heading = tag("h3", genre, " ", tag("span", f"{count} clips", class_="soft"))
        mean = _image(image, features, alt=f"mean of {genre}", limits=limits)
        yield tag("div", heading, mean)


def energy(views):
    """The share of each stem in the energy of each genre."""
    if not views:
        yield note("No clips are separated yet.")
        return
    shares = views.energy

    def draw(figure):
        axes = figure.subplots()
        left = np.zeros(len(shares))
        names = [printable(name) for name in shares["genre"]]
        for stem in STEMS:
            axes.barh(names, shares[stem], left=left, height=0.7, label=stem)
            left += shares[stem].to_numpy()
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="mean share of the energy")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    yield wide(draw, alt="energy of the stems by genre", height=1 + 0.32 * len(shares))
    yield table(shares, formats=dict.fromkeys(STEMS, "{:.0%}"))
