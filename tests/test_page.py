"""A page opens from disk, shows what it was given and nothing else, in light and dark."""

import base64
import html
import io
import re

import numpy as np
import pandas as pd
import pytest
import soundfile
from browser import look
from helpers import tone

from stemgenre import page
from stemgenre.page import Html, document, picture, player, section, table, tag

EVIL = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "R&B $\\frac$ ロック \x01")


def draw(figure):
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], label=EVIL[2])
    axes.imshow(np.eye(3))
    axes.set(title=EVIL[0], xlabel=EVIL[1], ylabel="in $ and %")
    axes.legend()


@pytest.fixture
def written(tmp_path):
    """A function: the path of a page with these parts."""

    def write(*parts, **options):
        path = tmp_path / "index.html"
        path.write_text(document("Title", *parts, **options), encoding="utf-8")
        return path

    return write


def full_page():
    rows = pd.DataFrame(
        {EVIL[0]: EVIL, "share": [0.125, 1, np.nan], "play": [Html("<b>x</b>")] * 3}
    )
    return (
        section(EVIL[1], table(rows, formats={"share": "{:.2f}"})),
        section("Picture", picture(draw, alt=EVIL[1], width=6, height=3)),
        section("Player", player(tone(seconds=2), 8000, label=EVIL[0])),
        tag("p", *EVIL, "\ud800", title=EVIL[1]),
    )


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_is_whole_and_shows_hostile_names_as_text(written, dark):
    seen = look(written(*full_page()), dark=dark)
    assert seen.faults() == []
    assert (seen.pictures, seen.players, seen.scripts) == (1, 1, 0)
    assert seen.alts == [EVIL[1]]
    for text in EVIL[:2]:
        assert text in seen.text
    assert "R&B $\\frac$ ロック" in seen.text
    assert "0.12" in seen.text and "nan" not in seen.text
    assert seen.background == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")


def test_a_phone_needs_no_scrolling_sideways(written):
    wide = pd.DataFrame({f"column {i}": [i] for i in range(40)})
    parts = (*full_page(), table(wide), tag("p", "x" * 500))
    assert look(written(*parts), width=390).faults() == []


def test_faults_are_seen(written):
    broken = Html(
        '<script>console.log("ran"); throw Error("broken")</script><script src="http://localhost/x">'
        '</script><audio src="data:audio/mpeg;base64,AAAA"></audio><audio></audio>'
        '<img alt="gone" src="gone.png"><img alt="torn" src="data:image/png;base64,iVBORw0KGgo=">'
        '<div style="width: 3000px">wide</div>'
    )
    path = written(broken)
    path.write_text(path.read_text().replace(html.escape(page.POLICY), ""))
    seen = look(path)
    assert seen.broken_pictures == ["gone", "torn"]
    assert len(seen.broken_players) == 2
    assert seen.overflow > 0
    assert any("Uncaught" in error for error in seen.errors)
    assert "http://localhost/x" in seen.requests


def test_the_page_forbids_what_escaping_should_have_stopped(written):
    seen = look(written(Html("<script>document.title = 'ran'</script>")))
    assert seen.title == "Title"
    assert "Content Security Policy" in seen.errors[0]


def test_a_player_is_no_longer_than_asked_for_and_never_too_loud(written):
    loud = np.stack([tone(seconds=3, sr=9000, peak=4), tone(seconds=3, sr=9000, peak=2)])
    short = tone(seconds=0.01, sr=96000)
    parts = [player(loud, 9000, label="a", seconds=1.5), player(short, 96000, label="b")]
    parts.append(player(np.zeros(0), 22050, label="nothing"))
    seen = look(written(*parts[:2]))
    assert seen.faults() == []
    assert seen.seconds[0] == pytest.approx(1.5, abs=0.15)
    assert "audio" in parts[2]


def test_a_player_sounds_like_the_wave():
    wave = tone(frequency=500, seconds=1, sr=11025, peak=0.4)
    data = re.search('base64,([^"]+)', player(wave, 11025, label="x"))[1]
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 11025
    spectrum = np.abs(np.fft.rfft(heard[: rate // 2]))
    assert 2 * spectrum.argmax() == 500
    assert np.abs(heard[2000:8000]).max() == pytest.approx(0.4, abs=0.03)


def test_only_a_page_in_the_making_reads_itself_anew():
    assert 'http-equiv="refresh" content="5"' in document("x", refresh_seconds=5)
    assert "refresh" not in document("x")
