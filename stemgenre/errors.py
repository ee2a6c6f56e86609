"""The ways a run ends early that are no internal error."""

import re

CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # in a name: terminals obey it


class UserError(Exception):
    """Something the user can fix. Shown as one line, no traceback; exits with 2."""


class ClipError(UserError):
    """What is wrong with one clip; a run over many continues and names it at the end."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and the current state is saved. Exits with 128 + the signal.

    Its message, what is kept and how to go on, is shown as one line.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


def first_line(error: BaseException, *, max_length: int = 200) -> str:
    """The first line of an exception's message, cut at `max_length`; without one, its type.

    Of torch.load's refusals, which advise how to open the file all the same, what they mean.
    """
    text = str(error).lower()
    if "weights only load failed" in text or "weights_only" in text:
        payload = any(word in text for word in ("global", "unsupported class", "torchscript"))
        return "it holds more than weights and is not opened" if payload else "it is damaged"
    lines = str(error).strip().splitlines()
    return lines[0][:max_length] if lines else type(error).__name__
