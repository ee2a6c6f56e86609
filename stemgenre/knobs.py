"""One knob: its rules, and what was written for it -> its value, or what to write instead."""

import ast
import math
import types
import typing
from dataclasses import field

from stemgenre.errors import UserError


def knob(default, **rules):
    """A dataclass field with its default and its rules: low, high, above, choices, words, parts.

    With parts, the value is some of them, each once, with commas between, or one of the words.
    """
    return field(default=default, metadata=rules)


def parse(item, text):
    """The value of a KEY=VALUE string: a literal, or the text itself where the knob takes text."""
    word = text.capitalize() if text.lower() in ("true", "false", "none") else text
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    only_text = item.type in (str, str | None)
    return text if only_text and isinstance(value, (int, float, complex)) else value


def check(item, value):
    """`value` as the knob's type, or UserError with the knob, the value and what to write."""
    rules = item.metadata
    converted = _convert(value, item.type)
    if "parts" in rules and converted is not _WRONG:
        converted = ",".join(part.strip() for part in converted.split(","))
    if converted is _WRONG or not _in_range(converted, rules):
        raise UserError(f"{item.name.upper()}={value!r} does not fit; write {_expected(item)}")
    return converted


_WRONG = object()


def _convert(value, kind):
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, (tuple, list)) or len(value) != len(kinds):
            return _WRONG
        parts = tuple(_convert(part, k) for part, k in zip(value, kinds, strict=True))
        return _WRONG if _WRONG in parts else parts
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None:
        return None if types.NoneType in kinds else _WRONG
    if isinstance(value, bool):
        return value if bool in kinds else _WRONG
    if isinstance(value, int) and float in kinds:
        return float(value) if abs(value) < 1e300 else _WRONG
    if isinstance(value, float):
        return value if float in kinds and math.isfinite(value) else _WRONG
    if isinstance(value, int):
        return value if int in kinds else _WRONG
    fits = isinstance(value, str) and str in kinds and value.strip() and "\0" not in value
    return value if fits else _WRONG


def _in_range(value, rules):
    if "choices" in rules:
        return value in rules["choices"]
    if isinstance(value, str):
        return _is_known(value, words=rules.get("words", ()), parts=rules.get("parts", ()))
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            if number < rules.get("low", -math.inf) or number > rules.get("high", math.inf):
                return False
            if number <= rules.get("above", -math.inf):
                return False
    return list(numbers) == sorted(numbers) or not rules.get("ordered", True)


def _is_known(text, *, words, parts):
    """Whether `text` is one of the words or some of the parts; without these any text is."""
    chosen = text.split(",")
    some_once = set(chosen) <= set(parts) and len(set(chosen)) == len(chosen)
    return text in words or some_once or not (words or parts)


def _expected(item):
    """What a knob takes, in words: 'a whole number from 1 to 1024 or "auto"'."""
    rules = item.metadata
    if "choices" in rules:
        return " or ".join(repr(choice) for choice in rules["choices"])
    kind = item.type
    if typing.get_origin(kind) is tuple:
        order = "(low, high)" if rules.get("ordered", True) else "(first, second)"
        return f"two numbers {order} from {rules['low']} to {rules['high']}"
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    parts = []
    if bool in kinds:
        parts.append("True or False")
    if int in kinds or float in kinds:
        text = "a whole number" if int in kinds else "a number"
        if "low" in rules:
            text += f" from {rules['low']}"
        if "above" in rules:
            text += f" above {rules['above']}"
        if "high" in rules:
            text += f" to {rules['high']}"
        parts.append(text)
    if str in kinds:
        parts.append(" or ".join(f'"{word}"' for word in rules.get("words", ())) or "a text")
    if "parts" in rules:
        parts.append(f"some of {', '.join(rules['parts'])}, with commas between")
    if types.NoneType in kinds:
        parts.append("None")
    return " or ".join(parts)
