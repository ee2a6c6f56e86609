"""Damage to files, for fuzz.py: to their bytes, or to a value in what they hold."""

import math
import struct
from fractions import Fraction

import torch


def damaged(data, rng):
    """(damaged bytes, how)."""
    data = bytearray(data)
    names = [name for name in DAMAGES for _ in range(DAMAGES[name])]
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(names)
        length = min(len(data), int(2 ** rng.uniform(0, 14)))
        at = position(data, rng)
        rest = data[at:]
        block = rest[:length]
        done.append(f"{name} {at} {length}")
        match name:
            case "flip":
                for _ in range(rng.choice((1, 1, 4, 32))):
                    data[position(data, rng)] ^= 1 << rng.randrange(8)
            case "cut the end":
                del data[at:]
            case "cut the beginning":
                del data[:length]
            case "cut":
                del data[at : at + length]
            case "zero":
                data[at : at + len(block)] = bytes(len(block))
            case "repeat":
                data[at:at] = block
            case "insert":
                data[at:at] = rng.randbytes(length)
            case "move":
                del data[at : at + length]
                to = position(data, rng)
                data[to:to] = block
            case "number":
                form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
                size = struct.calcsize(form)
                top = 2 ** (8 * size)
                value = rng.choice((0, 1, top - 1, top // 2, top // 2 - 1, rng.randrange(top)))
                data[at : at + size] = struct.pack(form, value)
        if not data:
            break
    return bytes(data), ", ".join(done)


DAMAGES = {  # and how often
    "flip": 4, "cut the end": 2, "cut the beginning": 1, "cut": 2, "zero": 2, "repeat": 1,
    "insert": 2, "move": 1, "number": 4,
}  # fmt: skip


def position(data, rng):
    """A place in the data: anywhere, or in the header or the directory at the end."""
    most = max(1, len(data))
    return rng.choice(
        (
            rng.randrange(most),
            rng.randrange(min(most, 200)),
            most - 1 - rng.randrange(min(most, 900)),
        )
    )


LEAVES = (
    None, True, 0, -1, 3, 2**63, 10**400, 1.5, math.nan, math.inf, "", "x", "../x", "é" * 999, b"x",
    [], {}, (), [[]], [1, 2], {"a": 1}, {1: 2}, torch.zeros(0), torch.zeros(2, 4),
    torch.full((2,), math.nan), torch.zeros(2, dtype=torch.int64), Fraction(1, 3),
)  # fmt: skip


def edit(value, rng):
    """`value` with one value in it left out, or replaced by another."""
    if isinstance(value, dict | list | tuple) and len(value) and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {k: edit(v, rng) if k == key else v for k, v in pairs}
        if rng.random() < 0.1:
            del changed[key]
        return changed if isinstance(value, dict) else type(value)(changed.values())
    return rng.choice(LEAVES)
