"""What the README says is so: knobs, commands, files, messages."""

import ast
import io
import re
import shlex
import tokenize
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.image import imread

import config
from stemgenre.settings import load_settings

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "README.ja.md", "data/README.md")
}
README, JAPANESE = PAGES["README.md"], PAGES["README.ja.md"]
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
    lines = [line for fence in FENCE.findall(text) for line in fence.splitlines()]
    for line in [*lines, *spans(text)]:
        for command in re.findall(r"(?:^|&& )((?:python|torchrun) .*?\.py\b.*)", line):
            words = shlex.split(command)
            yield words[[word.endswith(".py") for word in words].index(True) :]


def knobs_in_order(lines):
    """[(heading, [(knob, value), ...]), ...] from lines of ("heading" or "knob", ...)."""
    groups = []
    for kind, *content in lines:
        if kind == "heading":
            groups.append((content[0], []))
        else:
            groups[-1][1].append(tuple(content))
    return groups


def config_knobs():
    source = Path(config.__file__).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = [
        (token.start[0], "heading", token.string.lstrip("# "))
        for token in tokens
        if token.type == tokenize.COMMENT and token.start[1] == 0
    ]
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
            lines.append((node.lineno, "knob", name, getattr(config, name)))
    return knobs_in_order(line[1:] for line in sorted(lines, key=lambda line: line[0]))


def readme_knobs(text):
    """The groups of the knob tables in `text`, as knobs_in_order() gives them."""
    row = re.compile(
        r"^(?:### (?P<heading>.+)|\| `(?P<knob>[A-Z_0-9]+)` \| `(?P<value>.+?)` \|.*)$"
    )
    found = [match for line in text.splitlines() if (match := row.match(line))]
    return knobs_in_order(
        ("heading", match["heading"])
        if match["heading"]
        else ("knob", match["knob"], ast.literal_eval(match["value"]))
        for match in found
    )


def test_the_table_of_knobs_is_config_py():
    assert readme_knobs(README) == config_knobs()


def test_two_commands_can_be_extracted():
    for text in (README, JAPANESE):
        assert block("run", text) == "pip install -r requirements.txt && python train.py --demo"
        assert block("test", text) == "pip install -r requirements-dev.txt && python -m pytest"
    assert len(FENCE.findall(section("Set-up and first run"))) == 2


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_options_and_knobs_that_are_there(page):
    found = list(commands(PAGES[page]))
    assert found
    for script, *words in found:
        source = (ROOT / script).read_text(encoding="utf-8")
        options = [word for word in words if word.startswith("-") and word != "--help"]
        assert all(f'"{option}"' in source for option in options), (script, options)
        load_settings(config, [word for word in words if re.match(r"[A-Z_0-9]+=", word)])


@pytest.mark.parametrize("page", PAGES)
def test_every_key_value_is_a_knob_with_a_value_that_fits(page):
    found = [span for span in spans(PAGES[page]) if re.fullmatch(r"[A-Z_0-9]+=\S+", span)]
    assert "NUM_CLASSES=auto" in found  # each page has that one at least
    for span in found:
        if span != "KEY=VALUE":
            load_settings(config, [span])


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_linked_or_named_is_there(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    assert links
    for link in links:
        assert (folder / link).exists(), link
    for span in spans(PAGES[page]):
        if re.fullmatch(r"[\w./-]+\.(py|md|toml|txt)", span) and span != config.LOG_FILE:
            assert (folder / span).exists() or (ROOT / span).exists(), span


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_every_link_within_the_readme_has_its_heading(page):
    headings = re.findall(r"^##+ (.+)$", PAGES[page], re.M)
    anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
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


def test_the_japanese_readme_has_the_same_commands_names_figures_tables_and_messages():
    ours, theirs = list(shape(README)), list(shape(JAPANESE))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == other


def test_the_japanese_readme_has_the_same_knobs_and_defaults():
    groups = [knobs for _, knobs in readme_knobs(JAPANESE)]
    assert groups == [knobs for _, knobs in config_knobs()]


def test_the_readmes_link_to_each_other():
    assert "](README.ja.md)" in README.split("\n## ")[0]
    assert "](README.md)" in JAPANESE.split("\n## ")[0]


def messages():
    """Every text in the code, with "..." where something is put in."""
    for path in ROOT.glob("stemgenre/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    part.value if isinstance(part, ast.Constant) else "..." for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def covers(pattern, text):
    """Whether `text` holds `pattern`, in which "..." stands for anything."""
    return re.search(".*".join(map(re.escape, pattern.split("..."))), text, re.DOTALL)


def test_the_messages_of_the_troubleshooting_table_are_the_codes():
    known = [text for text in messages() if len(text.replace("...", "")) > 12]
    quoted = re.findall(r"^\| `(.+?)` \|", section("Troubleshooting"), re.M)
    assert quoted
    for message in quoted:
        assert any(covers(message, text) or covers(text, message) for text in known), message
