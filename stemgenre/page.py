"""One self-contained html page: text, tables, pictures and players, with nothing from elsewhere.

Whatever is no Html is escaped, so a clip or a genre may be called what it likes. The page forbids
the browser scripts and every request, and follows its light or dark setting.
"""

import base64
import html
import io
import re
import warnings

import matplotlib
import numpy as np
import soundfile
from cycler import cycler
from matplotlib.figure import Figure

from stemgenre.audio import resample

PLAYER_SECONDS = 10.0  # s of a player at most: 80 kB of mp3 at 22.05 kHz
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
INK = "#0a0b0c"  # stands in a picture for the page's text colour, light or dark
COLORS = ("#3b82f6", "#f97316", "#16a34a", "#d946ef", "#ef4444", "#14b8a6", "#a16207", "#8b8b8b")

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1e21; --soft: #5c6370; --line: #d9dce1;
        --card: #f6f7f9; --mark: #1d5fd1; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14161a; --ink: #e4e6ea; --soft: #9aa1ad; --line: #343942; --card: #1d2026;
          --mark: #6ea0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem 1rem 4rem; background: var(--back);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-top: .8rem;
     border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; margin: .6rem 0; }
.cards { display: grid; gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
        padding: .8rem; min-width: 0; margin: .6rem 0; }
.cards > .card { margin: 0; }
.large { font-size: 1.5rem; font-weight: 600; }
.bar { display: inline-block; height: .7em; min-width: 1px; background: var(--mark);
       border-radius: 2px; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
         vertical-align: top; overflow-wrap: normal; }
th { font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; margin: .6rem 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .85rem; color: var(--soft); }
audio { width: 100%; height: 2.4rem; display: block; }
"""


class Html(str):
    """Markup that stands in a page as it is. Any other text is escaped."""

    __slots__ = ()


def tag(name, /, *parts, **attributes):
    """<name attribute="...">parts</name> as Html; `class_` writes class, None leaves one out."""
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    inside = "".join(map(_escaped, parts))
    closing = "" if name in ("meta", "img") else f"{inside}</{name}>"
    return Html(f"<{name}{''.join(words)}>{closing}")


def _escaped(part):
    return part if isinstance(part, Html) else html.escape(str(part))


def document(title, *parts, refresh_seconds=None):
    """The whole page, a str. With `refresh_seconds` the browser reads it anew each time."""
    metas = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
    ]
    if refresh_seconds:
        metas.append(tag("meta", http_equiv="refresh", content=refresh_seconds))
    head = tag("head", *metas, tag("title", title), tag("style", Html(STYLE)))
    body = tag("body", tag("h1", title), *parts)
    return printable(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")


def printable(text):
    """`text` without what neither a page nor a picture may hold; a file's name may."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def section(heading, *parts):
    """A part of the page under a heading of its own."""
    return tag("section", tag("h2", heading), *parts)


def cards(*parts, least="15rem"):
    """Parts side by side, each on a card, as far as there is room: each is `least` wide or more."""
    columns = f"grid-template-columns: repeat(auto-fill, minmax(min({least}, 100%), 1fr))"
    inside = (tag("div", part, class_="card") for part in parts)
    return tag("div", *inside, class_="cards", style=columns)


def fact(value, meaning):
    """A number of note, large, over what it means."""
    return tag("div", tag("div", value, class_="large"), tag("div", meaning, class_="soft"))


def note(text):
    """A paragraph that explains, in a softer colour."""
    return tag("p", text, class_="soft")


def bar(share):
    """A share from 0 to 1 as a bar of up to 8 letters' height in length."""
    return tag("span", class_="bar", style=f"width: {8 * share:.3f}em")


def table(frame, *, formats=None):
    """A pandas table without its index, scrolled sideways where it is too wide for the screen.

    `formats` has a format string, for example "{:.3f}", for some of the columns. Cells may be Html.
    """
    formats = formats or {}
    numeric = {name: "number" for name in frame.columns if _is_number(frame[name])}
    head = [tag("th", name, class_=numeric.get(name)) for name in frame.columns]
    rows = [
        tag("tr", *(
            tag("td", _cell(value, formats.get(name)), class_=numeric.get(name))
            for name, value in zip(frame.columns, row, strict=True)
        ))
        for row in frame.itertuples(index=False, name=None)
    ]  # fmt: skip
    content = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows))
    return tag("div", content, class_="wide")


def _is_number(column):
    return column.dtype.kind in "iuf"


def _cell(value, form):
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return form.format(value) if form else value


def picture(draw, *, alt, width=9.0, height=4.0):
    """An <img> with what `draw(figure)` puts on a matplotlib Figure of that size, in inches.

    Its text and lines have the page's colour, light or dark. Texts are taken as they are, no
    formulas, in the browser's fonts: any script is shown. They must be printable().
    """
    stream = io.StringIO()
    with matplotlib.rc_context(_drawing_style()), warnings.catch_warnings():
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
    source = _data_uri("image/svg+xml", svg.encode())
    return tag("img", src=source, alt=alt, width=round(96 * width), height=round(96 * height))


def _drawing_style():
    """matplotlib's settings for pictures on a light or dark page."""
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


def wide(draw, *, alt, height):
    """A picture as wide as the page, `height` in inches."""
    return picture(draw, alt=alt, width=10.6, height=height)


def player(wave, rate, *, label, seconds=PLAYER_SECONDS):
    """A player of a float wave, (samples,) or (channels, samples), at `rate` Hz; with a caption.

    Plays the first `seconds` at most. What is louder than full scale is turned down.
    """
    wave = np.atleast_2d(np.asarray(wave, dtype=np.float32))[:2, : round(seconds * rate)]
    playable = min((r for r in MP3_RATES if r >= rate), default=MP3_RATES[-1])
    wave = resample(wave, from_rate=rate, to_rate=playable)
    wave = wave / max(1.0, float(np.abs(wave).max(initial=0.0)))
    data = io.BytesIO()
    soundfile.write(data, wave.T, playable, format="MP3", subtype="MPEG_LAYER_III")
    sound = tag(
        "audio", controls="", preload="metadata", src=_data_uri("audio/mpeg", data.getvalue())
    )
    return tag("figure", tag("figcaption", label), sound)


def _data_uri(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
