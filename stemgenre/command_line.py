"""What the scripts share of a command line: KEY=VALUE overrides and the knobs in --help."""

import argparse
import ast
import io
import tokenize
from pathlib import Path


def parser(description, config):
    """An ArgumentParser whose --help ends with every knob of the config module."""
    knobs = describe_knobs(Path(config.__file__).read_text(encoding="utf-8"))
    return argparse.ArgumentParser(
        description=description,
        epilog=f"knobs, from config.py; KEY=VALUE sets one for this run:\n{knobs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def split_overrides(words):
    """(KEY=VALUE words, the others) of a command line."""
    overrides = [
        word for word in words if word.partition("=")[1] and word.partition("=")[0].isupper()
    ]
    return overrides, [word for word in words if word not in overrides]


def describe_knobs(config_source):
    """config.py's text as help: per knob its name, value and comment."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(config_source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    lines = []
    for node in ast.parse(config_source).body:
        if isinstance(node, ast.Assign):
            value = ast.unparse(node.value)
            meaning = " ".join(  # of all its lines: a long one stands in parentheses
                comments[line]
                for line in range(node.lineno, node.end_lineno + 1)
                if line in comments
            )
            lines.append(f"  {node.targets[0].id + ' = ' + value:<42} {meaning}")
    return "\n".join(lines)
