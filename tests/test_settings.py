"""Every knob is checked before any work: a wrong one is named, with its value and what to write.

The accepted and the refused values are made from each knob's own rules (type, bounds, choices).
"""

import importlib.util
import math
import shutil
import subprocess
import types
import typing
from pathlib import Path

import pytest
from helpers import ROOT

import config
from stemgenre.errors import UserError
from stemgenre.settings import KNOBS, load_settings


def kinds_of(name):
    """The plain types a knob takes: {int, str}."""
    kind = KNOBS[name].type
    return set(typing.get_args(kind)) if isinstance(kind, types.UnionType) else {kind}


def just_past(value, direction, whole):
    """The next number that the knob could hold, up (1) or down (-1)."""
    return value + int(direction) if whole else math.nextafter(value, direction * math.inf)


def bounds():
    """(knob, value, whether it is accepted) at and just past every bound."""
    for name, item in KNOBS.items():
        rules, whole = item.metadata, int in kinds_of(name)
        pair = typing.get_origin(item.type) is tuple
        wrap = (lambda low, high: (low, high)) if pair else (lambda low, high: low)
        low, high = rules.get("low"), rules.get("high")
        if low is not None:
            yield name, wrap(low, high), True
            yield name, wrap(just_past(low, -1, whole), high), False
        if high is not None:
            yield name, (low, high) if pair else high, True
            past = just_past(high, 1, whole)
            yield name, (low, past) if pair else past, False
        if "above" in rules:
            yield name, rules["above"], False
            yield name, just_past(float(rules["above"]), 1, False), True
        if pair:
            yield name, (high, low), not rules.get("ordered", True)
        for word in (*rules.get("words", ()), *rules.get("choices", ())):
            yield name, word, True


def wrong_types():
    """(knob, value) of types that the knob does not take."""
    for name, item in KNOBS.items():
        kinds = kinds_of(name)
        wrong = [[], {}, (1,), b"x", math.nan, math.inf]
        wrong += [10**400] if float in kinds else []
        wrong += [True] if bool not in kinds else [1, 0, "True", "yes"]
        wrong += [None] if types.NoneType not in kinds else []
        wrong += [1.5] if not kinds & {float} else []
        wrong += ["", "  ", "many\nlines"] if "words" in item.metadata or str not in kinds else [3]
        for value in wrong:
            yield name, value


def refusal(name, value):
    with pytest.raises(UserError) as caught:
        load_settings(types.SimpleNamespace(**{name: value}))
    return str(caught.value)


def show(value):
    return str(value)[:20].replace("\n", " ")


@pytest.mark.parametrize(("name", "value", "accepted"), list(bounds()), ids=show)
def test_bounds_themselves_are_accepted_and_nothing_past_them(name, value, accepted):
    others = {"HOP_LENGTH": 16, "N_FFT": 64, "LR": 10.0, "MIN_LR": 0.0, "CLIP_SECONDS": 600.0}
    others |= {"HOP_LENGTH": {"N_FFT": 65536}, "N_FFT": {"HOP_LENGTH": 16}}.get(name, {})
    if name == "LR":
        others["MIN_LR"] = 0.0
    if accepted:
        settings = load_settings(types.SimpleNamespace(**(others | {name: value})))
        assert settings.knobs()[name] == value
    else:
        message = refusal(name, value)
        assert f"{name}={value!r}" in message
        assert "write " in message
        assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), list(wrong_types()), ids=show)
def test_a_wrong_type_is_refused_in_one_line(name, value):
    message = refusal(name, value)
    assert message.startswith(f"{name}={value!r} does not fit; write ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("TEST_SIZE", 0, "above 0"),
        ("TEST_SIZE", 1.0, "to 0.9"),
        ("BATCH_SIZE", 0, "from 1"),
        ("SEED", -1, "from 0"),
        ("IMG_SIZE", 299.5, "a whole number"),
        ("NUM_CLASSES", "many", '"auto"'),
        ("NUM_CHANNELS", 3, "4"),
        ("USE_AMP", "yes", "True or False"),
        ("DB_REFERENCE", "loud", "'clip' or 'stem'"),
        ("CHANNELS", "vocal", '"mix" or some of vocals, drums, bass, other, with commas between'),
        ("CHANNELS", "vocals,drums,vocals", '"mix" or some of vocals'),
        ("CHANNELS", "vocals,", '"mix" or some of vocals'),
        ("CHANNELS", "mix,vocals", '"mix" or some of vocals'),
        ("TIME_STRETCH_RATES", (1.2, 0.8), "(low, high)"),
        ("SEPARATION_REPO", 3, "a text or None"),
    ],
)
def test_the_message_says_what_to_write_instead(name, value, hint):
    assert hint in refusal(name, value).partition("write ")[2]


@pytest.mark.parametrize(
    ("value", "channels"),
    [
        ("mix", "mix"),
        ("bass", "bass"),
        ("other,drums", "other,drums"),
        ("bass, other", "bass,other"),
    ],
)
def test_some_of_the_stems_in_any_order_or_the_mix_are_channels(value, channels):
    assert load_settings(config, [f"CHANNELS={value}"]).features.channels == channels


@pytest.mark.parametrize(
    ("knobs", "hint"),
    [
        ({"HOP_LENGTH": 4096}, "HOP_LENGTH=4096"),
        ({"N_FFT": 8192, "CLIP_SECONDS": 0.5, "SR": 8000}, "N_FFT=8192"),
        ({"MIN_LR": 1e-3}, "MIN_LR=0.001"),
    ],
)
def test_knobs_that_contradict_each_other_are_named(knobs, hint):
    with pytest.raises(UserError, match="write at most") as caught:
        load_settings(types.SimpleNamespace(**knobs))
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("IMG_SIZ", "IMG_SIZE"),
        ("BATCHSIZE", "BATCH_SIZE"),
        ("EPOCH", "EPOCHS"),
        ("SEPERATION_MODEL", "SEPARATION_MODEL"),
        ("AUGMENT_PITCHSHIFT", "AUGMENT_PITCH_SHIFT"),
    ],
)
def test_a_misspelt_knob_suggests_the_nearest(wrong, right):
    for attempt in (
        lambda: load_settings(types.SimpleNamespace(**{wrong: 1})),
        lambda: load_settings(config, [f"{wrong}=1"]),
        lambda: load_settings(config, [f"{wrong.lower()}=1"]),
    ):
        with pytest.raises(UserError, match=f"did you mean {right}\\?"):
            attempt()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("IMG_SIZE=300", 300),
        ("LR=1e-3", 1e-3),
        ("CLIP_SECONDS=10", 10.0),
        ("USE_AMP=false", False),
        ("USE_AMP=True", True),
        ("NUM_WORKERS=auto", "auto"),
        ("NUM_WORKERS=3", 3),
        ("TIME_STRETCH_RATES=(0.9, 1.1)", (0.9, 1.1)),
        ("SEPARATION_REPO=none", None),
        ("SEPARATION_MODEL=955717e8", "955717e8"),
        ("SEPARATION_MODEL=0d19c1c6", "0d19c1c6"),
        ("DATA_DIR=2024", "2024"),
        ("DATA_DIR=1_0", "1_0"),
        ("DATA_DIR=true", "true"),
        ("DATA_DIR=runs/a=b", "runs/a=b"),
        ("DATA_DIR=C:\\music", "C:\\music"),
        ("DEVICE=cuda:1", "cuda:1"),
    ],
)
def test_the_command_line_sets_a_knob(override, value):
    name = override.partition("=")[0]
    found = load_settings(config, [override]).knobs()[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["IMG_SIZE", "IMG_SIZE=", "IMG_SIZE=big", "LR={[]:1}", "LR=((("])
def test_what_is_no_value_is_refused_on_the_command_line(word):
    with pytest.raises(UserError, match="IMG_SIZE|LR"):
        load_settings(config, [word])


def test_the_last_word_for_a_knob_counts():
    assert load_settings(config, ["EPOCHS=3", "EPOCHS=4"]).train.epochs == 4


def test_config_has_every_knob_and_no_other():
    assert {name for name in vars(config) if name.isupper()} == set(KNOBS)


def test_the_shipped_config_holds_the_defaults():
    changed = ["git", "diff", "--quiet", "HEAD", "--", "config.py"]
    if shutil.which("git") and subprocess.run(changed, cwd=ROOT, check=False).returncode == 1:
        pytest.skip("config.py has been edited, as it is meant to be")
    assert load_settings(config).knobs() == load_settings(types.SimpleNamespace()).knobs()


def test_an_older_config_without_the_new_knobs_reads(tmp_path):
    path = tmp_path / "old_config.py"
    path.write_text(
        'SEED = 7\nN_MELS = 64\nSR = 22050\nIMG_SIZE = 300\nLR = 2e-4\nSUBMIT_FILE = "mine.csv"\n'
        'SEPARATION_CACHE_DIR = "cache"\nAUGMENT_ADD_NOISE = False\nRESUME_FROM_CHECKPOINT = True\n'
    )
    spec = importlib.util.spec_from_file_location("old_config", path)
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    settings = load_settings(old)
    assert (settings.machine.seed, settings.features.n_mels, settings.train.lr) == (7, 64, 2e-4)
    assert settings.cache_folder == Path("data/cache")
    assert settings.train.resume_from_checkpoint
    assert not settings.augment.augment_add_noise
    assert settings.paths.data_dir == "data"


@pytest.mark.parametrize(
    ("given", "folder"),
    [("separated", "music/separated"), ("/big/stems", "/big/stems"), ("a/b", "music/a/b")],
)
def test_the_cache_is_below_the_data_unless_absolute(given, folder):
    settings = load_settings(config, ["DATA_DIR=music", f"SEPARATION_CACHE_DIR={given}"])
    assert settings.cache_folder == Path(folder)


@pytest.mark.parametrize(
    ("channels", "names"),
    [
        ("mix", ["mix"] * 4),
        ("drums,vocals", ["drums", "vocals", "drums", "vocals"]),
        ("vocals,drums,bass,other", ["vocals", "drums", "bass", "other"]),
    ],
)
def test_every_channel_of_the_image_has_the_name_of_what_it_shows(channels, names):
    settings = load_settings(config, [f"CHANNELS={channels}"])
    assert settings.features.channel_names == names
