"""One self-contained HTML page: text, tables, pictures and audio players, nothing from elsewhere.

Pages are Jinja2 templates that extend templates/base.html. Autoescape is always on, so a clip or a
genre may have any name; base.html forbids the browser scripts and every request.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import soundfile
from cycler import cycler
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from stemgenre.data.audio import resample

TEMPLATES = Path(__file__).parent / "templates"
PLAYER_SECONDS = 10.0  # s, the most that a player plays: 80 kB of mp3 at 22.05 kHz
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
INK = "#0a0b0c"  # in a figure, replaced by the page's text colour, light or dark
COLORS = ("#3b82f6", "#f97316", "#16a34a", "#d946ef", "#ef4444", "#14b8a6", "#a16207", "#8b8b8b")


def render_page(template: Path, **context: Any) -> str:
    """The HTML text of a Jinja2 template file with the variables `context`.

    The template extends "base.html" and may import from "macros.html". Values are escaped unless
    they are Markup; an undefined variable is an error. {{ 0.876|percent }} is "88 %".
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return printable(environment.get_template(template.name).render(context))


def percent(fraction: float, digits: int = 0) -> str:
    """A fraction as text: 0.876 as "88 %", or with digits=1 as "87.6 %"."""
    return f"{100 * fraction:.{digits}f} %"


def printable(text: str) -> str:
    """`text` without characters that HTML and SVG forbid, which a file's name may have."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def svg_figure(
    draw: Callable[[Figure], None], *, alt: str, width: float = 9.0, height: float = 4.0
) -> Markup:
    """An <img> of what `draw(figure)` puts on a matplotlib Figure of that size, in inches.

    Its text and lines have the page's colour, light or dark. Text is taken literally, without
    math, and shown in the browser's fonts, in any script. It must be printable().
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_figure_style()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has others
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(stream, format="svg", dpi=144, metadata={"Date": None})
    svg = printable(stream.getvalue())
    style = (
        "<style>svg { color: #1c1e21 }"
        "@media (prefers-color-scheme: dark) { svg { color: #e4e6ea } }</style>"
    )
    start = svg.index(">", svg.index("<svg")) + 1
    svg = svg[:start] + style + svg[start:].replace(INK, "currentColor")
    return Markup('<img src="{}" alt="{}" width="{}" height="{}">').format(
        _data_uri("image/svg+xml", svg.encode()), alt, round(96 * width), round(96 * height)
    )


def full_width_figure(draw: Callable[[Figure], None], *, alt: str, height: float) -> Markup:
    """An svg_figure as wide as the page; `height` in inches."""
    return svg_figure(draw, alt=alt, width=10.6, height=height)


def _figure_style():
    """matplotlib's settings for a figure on a light or dark page."""
    inked = (
        "text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color",
        "grid.color", "patch.edgecolor", "hatch.color",
    )  # fmt: skip
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {
        **dict.fromkeys(inked, INK),
        **dict.fromkeys(clear, "none"),
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.alpha": 0.2,
        "legend.edgecolor": "none",
        "svg.fonttype": "none",
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
        "text.usetex": False,
    }


def audio_player(
    wave: np.ndarray, rate: float, *, label: str, seconds: float = PLAYER_SECONDS
) -> Markup:
    """A captioned <audio> of a float wave, (samples,) or (channels, samples), at `rate` Hz.

    It plays at most the first `seconds`. A wave above full scale is scaled down to it.
    """
    wave = np.atleast_2d(np.asarray(wave, dtype=np.float32))[:2, : round(seconds * rate)]
    mp3_rate = min((r for r in MP3_RATES if r >= rate), default=MP3_RATES[-1])
    wave = resample(wave, from_rate=rate, to_rate=mp3_rate)
    wave = wave / max(1.0, float(np.abs(wave).max(initial=0.0)))
    data = io.BytesIO()
    soundfile.write(data, wave.T, mp3_rate, format="MP3", subtype="MPEG_LAYER_III")
    return Markup(
        "<figure><figcaption>{}</figcaption>"
        '<audio controls preload="metadata" src="{}"></audio></figure>'
    ).format(label, _data_uri("audio/mpeg", data.getvalue()))


def _data_uri(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
