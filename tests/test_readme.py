"""What the documentation says is so: settings, commands, files, messages."""

import ast
import functools
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.image import imread

from stemgenre import cli
from stemgenre.settings import load_settings

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "README.ja.md",
        "data/README.md",
        "docs/predict.md",
        "docs/reliability.md",
        "docs/score.md",
        "docs/speed.md",
        "docs/troubleshooting.md",
    )
}
README, JAPANESE = PAGES["README.md"], PAGES["README.ja.md"]
WRITTEN = ("train_log.txt", "settings_used.py")  # by a run
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(heading):
    """The README's text below the heading "## `heading`"."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def sections(text):
    """What stands below each "## heading" and before the first, without the headings."""
    return re.split(r"^## .+\n", text, flags=re.MULTILINE)


def block(name, text):
    """The code block directly after the line <!-- name -->."""
    return re.search(rf"^<!-- {name} -->\n```\w*\n(.*?)^```$", text, re.M | re.S)[1].strip()


def spans(text):
    """What stands in backticks outside code blocks, lines joined."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands(text):
    """Command lines that run a script of ours, as lists of words from the script on."""
    fences = [fence.replace("\\\n", " ") for fence in FENCE.findall(text)]  # continued lines
    lines = [line for fence in fences for line in fence.splitlines()]
    for line in [*lines, *spans(text)]:
        for command in re.findall(r"(?:^|&& )((?:python|torchrun) .*?\.py\b.*)", line):
            words = shlex.split(command)
            yield words[[word.endswith(".py") for word in words].index(True) :]


def test_two_commands_can_be_extracted():
    for text in (README, JAPANESE):
        assert block("run", text) == "pip install -r requirements.txt && python train.py --demo"
        assert block("test", text) == "pip install -r requirements-dev.txt && python -m pytest"
    assert len(FENCE.findall(section("Installation and demo"))) == 2


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_options_and_settings_that_exist(page):
    found = list(commands(PAGES[page]))
    assert len(found) >= (5 if page.startswith("README") else 0)
    for script, *words in found:
        source = (ROOT / script).read_text(encoding="utf-8")
        options = [word for word in words if word.startswith("-") and word != "--help"]
        assert all(f'"{option}"' in source for option in options), (script, options)
        load_settings([word for word in cli.split_words(words)[0] if "settings_used" not in word])


@pytest.mark.parametrize("page", PAGES)
def test_every_key_value_is_a_setting_with_a_valid_value(page):
    found = [span for span in spans(PAGES[page]) if re.fullmatch(r"[A-Z_0-9]+=\S+", span)]
    assert len(found) >= (5 if page.startswith("README") else 0)
    for span in found:
        if span != "KEY=VALUE" and not span.startswith("WANDB_"):  # the environment's
            load_settings([span])


def test_the_settings_in_the_readme_have_the_defaults_of_config():
    defaults = {name: value for _, name, value, _ in cli.describe_settings()}
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(.+?)` \|", section("Settings"), re.M)
    assert 8 <= len(rows) <= 12
    assert all(defaults[name] == value for name, value in rows)


def test_the_readme_is_read_in_ten_minutes():
    assert len(README.split()) <= 2500


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_linked_or_named_is_there(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    assert len(links) >= (5 if page.startswith("README") else 0)
    for link in links:
        assert (folder / link).exists(), link
    for span in spans(PAGES[page]):
        if re.fullmatch(r"[\w./-]+\.(py|md|toml|txt)", span) and span not in WRITTEN:
            assert (folder / span).exists() or (ROOT / span).exists(), span


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_every_link_within_the_readme_has_its_heading(page):
    headings = re.findall(r"^##+ (.+)$", PAGES[page], re.M)
    anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
    assert len(anchors) >= 5
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGES[page])) <= anchors


def test_pictures_are_shown_once_and_quick_to_load():
    files = sorted((ROOT / "docs" / "pictures").iterdir())
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert sorted(ROOT / name for name in shown) == files
    for file in files:
        assert imread(file).shape[1] >= 600  # pixels across
        assert file.stat().st_size < 150_000


def shape(text):
    """What a translation leaves as it is, of each section of `text`."""
    for part in sections(text):
        prose = FENCE.sub("", part)
        tables = re.findall(r"(?:^\|.*\n)+", part, re.M)
        yield {
            "code blocks": FENCE.findall(part),
            "names": set(spans(part)),
            "figures": Counter(re.findall(r"\d+\.\d+", prose)),
            "groups": len(re.findall(r"^### ", part, re.M)),
            "pictures": re.findall(r"!\[[^\]]+\]\(([^)]+)\)", part),
            "links to files": re.findall(r"\]\((?!README)([^)#]+)\)", part),
            "links to sections": len(re.findall(r"\]\(#", part)),
            "cells": [[row.count("|") for row in table.splitlines()] for table in tables],
            "first cells": re.findall(r"^\| (`[^|]+`) \|", part, re.M),
            "list": len(re.findall(r"^- ", part, re.M)),
        }


def test_the_japanese_readme_has_the_same_commands_names_figures_and_tables():
    ours, theirs = list(shape(README)), list(shape(JAPANESE))
    assert len(ours) == len(theirs)
    for english, japanese in zip(ours, theirs, strict=True):
        assert english == japanese


def test_the_readmes_link_to_each_other():
    assert "](README.ja.md)" in README.split("\n## ")[0]
    assert "](README.md)" in JAPANESE.split("\n## ")[0]


@functools.cache
def messages():
    """Every text in the code of more than a few letters, with "..." where something is put in."""
    return {text for text in _texts() if len(text.replace("...", "")) > 12}


def _texts():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("stemgenre/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    part.value if isinstance(part, ast.Constant) else "..." for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def covers(pattern, text):
    """Whether `text` holds `pattern`, in which "..." stands for anything."""
    position = 0
    for part in pattern.split("..."):
        found = text.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return True


@pytest.mark.parametrize("page", ["README.md", "docs/troubleshooting.md"])
def test_the_messages_that_are_explained_are_the_codes(page):
    text = section("Common errors") if page == "README.md" else PAGES[page]
    quoted = re.findall(r"^\| `(.+?)` \|", text, re.M)
    assert len(quoted) >= 8
    for message in quoted:
        assert any(covers(message, text) or covers(text, message) for text in messages()), message
