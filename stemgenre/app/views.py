"""Runs and predictions as HTML, in which every name and message is escaped text."""

import base64
import functools
import itertools
from urllib.parse import quote

from markupsafe import Markup
from matplotlib.figure import Figure

from stemgenre.app.form import FILE_SETTINGS, as_text
from stemgenre.app.runs import Run, remaining_seconds
from stemgenre.html import charts
from stemgenre.html.page import percent, printable, svg_figure

STAGES = {  # of status.json -> in words
    "starting": "starting",
    "loading": "loading the tables and models",
    "separation": "separating clips into stems",
    "channel statistics": "channel statistics",
    "training": "training",
    "prediction": "predicting",
    "finished": "finished",
    "stopped": "stopped, can be resumed",
    "failed": "failed",
    "killed": "killed, can be resumed",
    "": "has not run",
}
MAX_GENRES = 10  # bars of a prediction
CSS = """  /* Gradio splits selectors at each comma: none within brackets */
.bar-row { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr minmax(3.5rem, auto);
           gap: .6rem; align-items: center; margin: .25rem 0; }
.bar-row > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.bar-row .track { background: var(--border-color-primary); border-radius: 4px; height: .6rem; }
.bar-row .track > div { background: var(--color-accent); border-radius: 4px; height: 100%; }
.stage { font-size: 1.15rem; font-weight: 600; }
.soft, .note { opacity: .75; font-size: .85rem; }
.note.changed { color: var(--link-text-color); opacity: 1; }
.wrong { color: var(--error-text-color, #b91c1c); font-weight: 600; overflow-wrap: anywhere; }
.curves, .players { display: grid; gap: .6rem;
                    grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
.curves img, .sound img { width: 100%; height: auto; }
.players figure { margin: 0; } .players audio { width: 100%; }
.sound { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .8rem;
         overflow-wrap: anywhere; }
.sound h3 { margin: 0 0 .4rem; }
.scroll { overflow-x: auto; }
.scroll table { border-collapse: collapse; font-size: .9rem; }
.scroll table, .scroll tr, .scroll thead, .scroll tbody { border: 0 !important; }
.scroll th, .scroll td { padding: .25rem .7rem; text-align: left; vertical-align: top;
    border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
[id^=note-]:not(:has(.note)):not(:has(.wrong)) { display: none; }
[id$=-message]:not(:has(.soft)):not(:has(.wrong)) { display: none; }
.field { min-width: min(19rem, 100%) !important; gap: .2rem; }
"""


def message(text: str, kind: str = "wrong") -> Markup:
    """A line of text; empty for an empty one. `kind`: wrong, note or soft."""
    return Markup('<div class="{}">{}</div>').format(kind, printable(text)) if text else Markup()


def bar(label: str, fraction: float, shown: str) -> Markup:
    """A labelled bar of a fraction from 0 to 1."""
    width = 100 * min(1.0, max(0.0, fraction))
    return Markup(
        '<div class="bar-row"><span>{}</span><div class="track"><div style="width: {:.1f}%">'
        "</div></div><span>{}</span></div>"
    ).format(printable(label), width, shown)


def progress(run: Run) -> Markup:
    """What a run is doing now: its stage, bars and time left."""
    content, histories = run.status(), run.histories()
    stage = content.get("stage") or ("finished" if run.summary() else "")
    parts = [Markup('<div class="stage">{}: {}</div>').format(run.name, STAGES.get(stage, stage))]
    parts += [message(content.get("message", ""))]
    if content.get("networks", 0) > 1:
        number, count = content["network_number"], content["networks"]
        parts += [bar(f"network {content['network']}", number / count, f"{number} of {count}")]
    if content.get("epochs"):
        epoch, epochs = content["epoch"], content["epochs"]
        parts += [bar("epoch", epoch / epochs, f"{epoch} of {epochs}")]
        step, steps = content["step"], max(1, content["steps"])
        parts += [bar("step", step / steps, f"{step} of {steps}")]
    if content.get("total"):
        done, total = content["done"], content["total"]
        parts += [bar("clips", done / total, f"{done} of {total}")]
    history = histories.get(content.get("network", ""), [])
    seconds = remaining_seconds(content, history)
    if seconds is not None:
        parts += [message(f"about {duration(seconds)} left", "soft")]
    parts += [_networks(histories)]
    if "test_accuracy" in (summary := run.summary()) and stage == "finished":
        accuracies = f"validation accuracy {percent(summary['valid_accuracy'], 1)}"
        if summary["test_accuracy"] is not None:
            accuracies += f", test accuracy {percent(summary['test_accuracy'], 1)}"
        parts += [message(accuracies, "soft")]
    return Markup("\n").join(parts) + links(run)


def _networks(histories):
    """A table of the networks, if there are several."""
    if len(histories) < 2:
        return Markup()
    rows = []
    for name, history in histories.items():
        best = max(row["valid_accuracy"] for row in history)
        rows.append([name, len(history), percent(best, 1)])
    return table(["network", "epochs", "best validation accuracy"], rows)


def links(run: Run) -> Markup:
    """Links to what a run has written."""
    found = []
    if run.file("report/index.html"):
        url = f"report/{quote(run.name)}/report/index.html"
        found.append(Markup('<a href="{}" target="_blank">report</a>').format(url))
    if run.file(run.settings().get("SUBMIT_FILE", "submit.csv")):
        url = f"submit?run={quote(run.name)}"
        found.append(Markup('<a href="{}" download>submit.csv</a>').format(url))
    return Markup("<div>{}</div>").format(Markup(" · ").join(found))


def duration(seconds: float) -> str:
    """Seconds in words: "2 h 05 min", "3 min", "40 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def curves(run: Run) -> Markup:
    """The curves of each network, the last one opened."""
    histories = run.histories()
    current = run.status().get("network", "")
    parts = []
    for name, history in histories.items():
        rows = tuple(tuple(row.items()) for row in history)
        drawn = Markup('<div class="curves">{}</div>').format(_draw_curves(rows))
        if len(histories) > 1:
            opened = Markup(" open") if name == current else ""
            drawn = Markup("<details{}><summary>{}</summary>{}</details>").format(
                opened, name, drawn
            )
        parts.append(drawn)
    return Markup().join(parts)


@functools.lru_cache(maxsize=64)
def _draw_curves(rows):
    """The pictures of all charts.CURVES; drawn once for all that look at them."""
    history = [dict(row) for row in rows]
    figures = []
    for ylabel, lines in charts.CURVES.items():

        def draw(figure: Figure, ylabel=ylabel, lines=lines) -> None:
            charts.curves(figure, history, lines, best_epoch=0, ylabel=ylabel)

        figures.append(svg_figure(draw, alt=f"{ylabel} by epoch", width=4.6, height=3.0))
    return Markup().join(figures)


def table(header: list[str], rows: list[list]) -> Markup:
    """A table that scrolls sideways where the screen is too narrow; cells are text or Markup."""
    row = Markup("<tr>{}</tr>")
    head = Markup().join(Markup("<th>{}</th>").format(text) for text in header)
    body = [
        row.format(Markup().join(Markup("<td>{}</td>").format(_cell(cell)) for cell in cells))
        for cells in rows
    ]
    return Markup(
        '<div class="scroll"><table><thead>{}</thead><tbody>{}</tbody></table></div>'
    ).format(row.format(head), Markup().join(body))


def _cell(cell):
    return cell if isinstance(cell, Markup) else printable(str(cell))


def results(runs: list[Run], *, exposed: bool) -> Markup:
    """The runs side by side: accuracies, the settings in which they differ, links."""
    if not runs:
        return message("there is no run yet", "soft")
    settings = [run.settings() for run in runs]
    hidden = FILE_SETTINGS if exposed else {"OUTPUT_DIR"}
    known = [used for used in settings if used]  # a run that just begins has none yet
    names = [name for name in dict.fromkeys(itertools.chain(*known)) if name not in hidden]
    differing = [name for name in names if len({repr(used.get(name)) for used in known}) > 1]
    rows = []
    for run, used in zip(runs, settings, strict=True):
        summary, content = run.summary(), run.status()
        stage = content.get("stage") or ("finished" if summary else "")
        if stage != "finished":  # it is an earlier run's in this folder
            summary = {}
        accuracies = [summary.get(key) for key in ("valid_accuracy", "test_accuracy")]
        rows.append(
            [run.name, STAGES.get(stage, stage)]
            + ["" if value is None else percent(value, 1) for value in accuracies]
            + [duration(sum(summary["seconds"].values())) if "seconds" in summary else ""]
            + [links(run)]
            + [as_text(used[name]) if name in used else "" for name in differing]
        )
    return table(["run", "stage", "validation", "test", "time", "files", *differing], rows)


def genres(ranked: list[tuple[str, float]]) -> Markup:
    """Bars of the most probable genres."""
    bars = [bar(genre, value, percent(value, 1)) for genre, value in ranked[:MAX_GENRES]]
    return Markup().join(bars)


def download(name: str, data: bytes) -> Markup:
    """A link that saves `data`, which is in the link itself, as a csv file."""
    content = base64.b64encode(data).decode()
    return Markup('<a download="{}" href="data:text/csv;base64,{}">{}</a>').format(
        name, content, f"download {name}"
    )


def data_page(is_running: bool, names: list[str]) -> Markup:
    """Whether eda.py runs, and links to its pages."""
    parts = [message("eda.py is running" if is_running else "eda.py does not run now", "stage")]
    for name in names:
        link = Markup('<div><a href="eda?of={}" target="_blank">findings of {}</a></div>')
        parts.append(link.format(quote(name), name))
    return Markup().join(parts)
