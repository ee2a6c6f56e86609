"""A page opens from disk, shows what it was given and nothing else, in light and dark."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
import soundfile
from browser import open_page
from helpers import tone
from jinja2 import UndefinedError
from markupsafe import Markup

from stemgenre.html.page import audio_player, render_page, svg_figure

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "R&B $\\frac$ ロック \x01",
)

TEMPLATE = """{% extends "base.html" %}
{% from "macros.html" import stat_card, caption, cards, data_table, progress_bar with context %}
{% block title %}Title{% endblock %}
{% block content %}
<h2 title="{{ name }}">{{ name }}</h2>
{% call cards() %}{{ stat_card(12, name) }}{{ stat_card(name, "meaning") }}{% endcall %}
{{ caption(name) }}{{ progress_bar(0.5) }}{{ data_table(frame, {"fraction": "{:.2f}"}) }}
{% for part in parts %}{{ part }}{% endfor %}
{% endblock %}
"""


@pytest.fixture
def written(tmp_path):
    """A function: the path of a page that holds these parts."""

    def write(*parts, name="name", frame=None, **context):
        (tmp_path / "template.html").write_text(TEMPLATE)
        frame = pd.DataFrame({"a": [1]}) if frame is None else frame
        text = render_page(
            tmp_path / "template.html", parts=parts, name=name, frame=frame, **context
        )
        path = tmp_path / "index.html"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def draw(figure):
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], label=HOSTILE[2])
    axes.imshow(np.eye(3))
    axes.set(title=HOSTILE[0], xlabel=HOSTILE[1], ylabel="in $ and %")
    axes.legend()


def hostile_parts():
    return (
        *HOSTILE,
        "\ud800",
        svg_figure(draw, alt=HOSTILE[1], width=6, height=3),
        audio_player(tone(seconds=2), 8000, label=HOSTILE[0]),
    )


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_is_complete_and_shows_hostile_names_as_text(written, browser, dark):
    rows = {HOSTILE[0]: HOSTILE, "fraction": [0.125, 1, np.nan], "bold": [Markup("<b>x</b>")] * 3}
    path = written(*hostile_parts(), name=HOSTILE[0], frame=pd.DataFrame(rows))
    opened = open_page(browser, path, dark=dark)
    assert opened.problems() == []
    assert (opened.alts, len(opened.durations), opened.scripts) == ([HOSTILE[1]], 1, 0)
    for text in HOSTILE[:2]:
        assert text in opened.text
    assert "R&B $\\frac$ ロック" in opened.text
    assert "\t0.12\tx\n" in opened.text and "nan" not in opened.text
    assert opened.background == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")


def test_a_phone_needs_no_scrolling_sideways(written, browser):
    wide = pd.DataFrame({f"column {i}": [i] for i in range(40)})
    path = written(*hostile_parts(), "x" * 500, frame=wide)
    assert open_page(browser, path, width=390).problems() == []


def test_the_checks_of_these_tests_see_what_is_wrong(written, browser):
    path = written(
        Markup(
            '<script>throw Error("broken")</script><script src="http://localhost/x"></script>'
            '<audio src="data:audio/mpeg;base64,AAAA"></audio><audio></audio>'
            '<img alt="gone" src="gone.png"><img alt="torn" src="data:image/png;base64,iVBORw0KGg">'
            '<div style="width: 3000px">wide</div>'
        )
    )
    path.write_text(re.sub("<meta http-equiv.*", "", path.read_text()))
    opened = open_page(browser, path)
    assert opened.broken[:2] == ["image gone", "image torn"]
    assert len(opened.broken) == 4
    assert opened.overflow > 0
    assert "uncaught: broken" in opened.errors
    assert "http://localhost/x" in opened.requests


def test_scripts_are_forbidden_even_in_markup(written, browser):
    opened = open_page(browser, written(Markup("<script>document.title = 'ran'</script>")))
    assert opened.title == "Title"
    assert "Content Security Policy" in opened.errors[0]


def test_a_player_is_no_longer_than_asked_for_and_never_too_loud(written, browser):
    loud = np.stack([tone(seconds=3, sr=9000, peak=4), tone(seconds=3, sr=9000, peak=2)])
    short = tone(seconds=0.01, sr=96000)
    parts = [
        audio_player(loud, 9000, label="a", seconds=1.5),
        audio_player(short, 96000, label="b"),
    ]
    opened = open_page(browser, written(*parts))
    assert opened.problems() == []
    assert opened.durations[0] == pytest.approx(1.5, abs=0.15)
    assert np.abs(decoded(parts[0])[0]).max() < 1.05
    assert "audio" in audio_player(np.zeros(0), 22050, label="nothing")


def decoded(player):
    data = re.search('base64,([^"]+)', player)[1]
    return soundfile.read(io.BytesIO(base64.b64decode(data)))


def test_a_player_sounds_like_the_wave():
    wave, rate = decoded(
        audio_player(tone(frequency=500, seconds=1, sr=11025, peak=0.4), 11025, label="x")
    )
    assert rate == 11025
    spectrum = np.abs(np.fft.rfft(wave[: rate // 2]))
    assert 2 * spectrum.argmax() == 500
    assert np.abs(wave[2000:8000]).max() == pytest.approx(0.4, abs=0.03)


def test_only_a_page_that_will_change_reloads_itself(written):
    assert 'http-equiv="refresh" content="5"' in written(refresh_seconds=5).read_text()
    assert "refresh" not in written().read_text()


def test_a_variable_that_a_template_was_not_given_is_an_error(tmp_path):
    (tmp_path / "template.html").write_text("{{ missing }}")
    with pytest.raises(UndefinedError, match="missing"):
        render_page(tmp_path / "template.html")
