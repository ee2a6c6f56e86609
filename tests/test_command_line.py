"""--help explains every knob, from config.py's own comments; KEY=VALUE words are told apart."""

import re
from pathlib import Path

import pytest

import config
from stemgenre import command_line
from stemgenre.settings import KNOBS

SOURCE = Path(config.__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("knob", KNOBS)
def test_help_gives_every_knob_with_its_value_and_its_meaning(knob):
    text = command_line.parser("what it does", config).format_help()
    (line,) = re.findall(rf"^  {knob} = .*$", text, flags=re.MULTILINE)
    start = f"  {knob} = {getattr(config, knob)!r} "
    assert line.startswith(start)
    meaning = line.removeprefix(start).strip()
    assert re.match(r"[\w+(<]", meaning), f"{knob} is not explained"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("LR = 2e-4  # AdamW's", ["LR = 0.0002", "AdamW's"]),
        ("A = (\n    'x'  # in parentheses\n)\n", ["A = 'x'", "in parentheses"]),
        ("A = (0.8, 1.2)  # slow, fast", ["A = (0.8, 1.2)", "slow, fast"]),
        ("A = '#1'  # a number sign", ["A = '#1'", "a number sign"]),
        ("A = 3\n# a heading\n", ["A = 3"]),
        ("A = 0.1  # 10 % of it, %s", ["A = 0.1", "10 % of it, %s"]),
    ],
)
def test_an_edited_config_is_described_as_it_stands(source, expected):
    (line,) = command_line.describe_knobs(source).splitlines()
    assert [part for part in re.split(r"  +", line.strip()) if part] == expected


def test_help_shows_the_values_of_this_config():
    described = command_line.describe_knobs(SOURCE.replace("EPOCHS = 50", "EPOCHS = 7"))
    assert "  EPOCHS = 7 " in described


def test_overrides_are_told_from_clip_names():
    words = ["train_0", "SR=11025", "data/a=b.npz", "DATA_DIR=x=y", "x.npz"]
    overrides, others = command_line.split_overrides(words)
    assert overrides == ["SR=11025", "DATA_DIR=x=y"]
    assert others == ["train_0", "data/a=b.npz", "x.npz"]
