"""The ways a run ends early that are not our mistake."""

import signal


class UserError(Exception):
    """Something the user can fix. Shown as one line, no traceback; exits with 2."""


class ClipError(UserError):
    """What is wrong with one clip; a run over many goes on and names it at the end."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived and what was in hand is saved. Exits with 128 + the signal."""

    def __init__(self, signal_number):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


def first_line(error, *, most=200):
    """The first line of an exception's message, cut at `most` characters; its type without one."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__
