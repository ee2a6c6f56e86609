"""What the scripts share: arguments, the console and log file, exit codes.

Imports neither torch nor anything that does: --help and a misspelt setting answer at once.
"""

import argparse
import ast
import contextlib
import io
import logging
import os
import re
import signal
import sys
import tokenize
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from stemgenre.errors import CONTROL_CHARACTER, Interrupted, UserError, first_line
from stemgenre.settings import (
    CONFIG_FILE,
    FIELDS,
    Settings,
    expected,
    is_settings_file,
    load_settings,
    parse_assignments,
)

log = logging.getLogger("stemgenre")

DEMO_RECIPE = str(CONFIG_FILE.parent / "recipes" / "demo.py")
LOGGERS = (log, logging.getLogger("py.warnings"))
CONTROL = re.compile(CONTROL_CHARACTER.pattern + "|[\ud800-\udfff]")  # and bytes that are no UTF-8


def parser(description: str, *, names: Collection[str] = FIELDS) -> argparse.ArgumentParser:
    """An ArgumentParser whose --help ends with the settings of these names, and their comments."""
    raw = argparse.RawDescriptionHelpFormatter
    return _Parser(description=description, formatter_class=raw, names=names)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *, names, **options):
        super().__init__(**options)
        self.names = names

    def format_help(self):
        """The help; the settings take 0.1 s, and are only described when they are asked for."""
        settings = settings_help(self.names)
        self.epilog = f"settings, from config.py; KEY=VALUE sets one for this run:\n{settings}"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Ends with a message; of a setting that is given as an option, how it is given."""
        if found := re.search("--([A-Z][A-Z0-9_]*=[^ ]*)", message):
            message = f"a setting has no dashes: {found[1]}"
        super().error(message)


def parse_settings(words: list[str], *, demo: bool = False) -> Settings:
    """Settings of config.py, settings files and KEY=VALUE words; with `demo`, the demo's first."""
    return load_settings([*([DEMO_RECIPE] if demo else []), *words])


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(settings files and KEY=VALUE words, the others) of a command line."""
    setting = re.compile(r"\s*[A-Z][A-Z0-9_]*\s*=")
    chosen = [word for word in words if is_settings_file(word) or setting.match(word)]
    return chosen, [word for word in words if word not in chosen]


def check_data_dir(settings: Settings) -> None:
    """Raises UserError if there is no DATA_DIR, before anything slow is imported."""
    if not Path(settings.paths.data_dir).is_dir():
        raise UserError(
            f"there is no data folder {settings.paths.data_dir}; put the competition's files there "
            "(see data/README.md), or try python train.py --demo, which needs none"
        )


def describe_settings(path: Path = CONFIG_FILE) -> list[tuple[str, str, str, str]]:
    """(section, name, value as text, comment) of each setting of a config file, in its order."""
    comments, headings = {}, {}
    assignments = parse_assignments(path)
    source = path.read_text(encoding="utf-8-sig")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found = headings if token.line.startswith("#") else comments
            found[token.start[0]] = token.string.lstrip("# ")
    rows = []
    for name, node in assignments:
        above = [line for line in headings if line < node.lineno]
        section = headings[max(above)] if above else ""
        lines = range(node.lineno, node.end_lineno + 1)
        comment = " ".join(comments[line] for line in lines if line in comments)
        rows.append((section, name, ast.get_source_segment(source, node.value), comment))
    return rows


def settings_help(names: Collection[str] = FIELDS) -> str:
    """The settings of these names, each in a line: name, value, comment."""
    return "\n".join(
        f"  {f'{name} = {value}':<42} {comment}"
        for _, name, value, comment in describe_settings()
        if name in names
    )


def settings_markdown() -> str:
    """docs/settings.md: every setting with its default, what it accepts, and what it does."""
    lines = [
        "# Settings",
        "",
        "Made from `config.py` by `python -m stemgenre.cli > docs/settings.md`. Edit `config.py`,",
        "or set some for one run: `python train.py recipes/quick.py IMG_SIZE=224`.",
    ]
    previous = None
    for section, name, value, comment in describe_settings():
        if section != previous:
            lines += ["", f"## {section}", "", "| setting | default | accepts | what it does |",
                      "| --- | --- | --- | --- |"]  # fmt: skip
            previous = section
        cells = (f"`{name}`", f"`{value}`", expected(name), comment)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


class _Console:
    """stdout or stderr, but a failing write ends no run: the console is silent from then on."""

    def __init__(self, stream):
        self._stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no text stream of a file
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except ValueError:  # it was closed
            pass
        except OSError:  # a closed pipe, a full disk, a lost terminal
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())  # takes what is buffered, too
                os.close(null)


def protect_console() -> None:
    """Makes stdout and stderr writable whatever they are: closed, full, or of an ASCII locale."""
    for descriptor in range(3):  # else the next file that is opened becomes the console
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        setattr(sys, name, _Console(stream))


def printable(text: str) -> str:
    """`text` with control characters, and bytes of names that are not UTF-8, escaped."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr if record.levelno >= 40 else sys.stdout)


class _FileHandler(logging.FileHandler):
    """Appends to a file; says so once when the file can no longer be written."""

    failed = False

    def handleError(self, record):  # noqa: N802
        if not isinstance(error := sys.exception(), OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            log.warning(
                "%s can no longer be written (%s); the run continues without it",
                self.baseFilename,
                error.strerror,
            )

    def emit(self, record):
        if not self.failed:
            super().emit(record)


def _format(record):
    prefix = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
    return prefix + printable(record.getMessage().rstrip())


def log_to_console() -> None:
    """Sends the project's log and Python's warnings to the console."""
    logging.captureWarnings(True)
    handler = _ConsoleHandler()
    handler.format = _format
    for logger in LOGGERS:
        logger.handlers = [handler]
        logger.propagate = False
    log.setLevel(logging.INFO)


def log_to_file(path: Path, *, is_main: bool = True) -> None:
    """From now on appends what the console shows to `path`, each line with its time.

    Only the main process writes. run_script closes the file, after the last error is in it.
    Raises UserError if the file cannot be opened.
    """
    if not is_main:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}); set OUTPUT_DIR elsewhere"
        ) from None
    stamp = logging.Formatter("%(asctime)s").formatTime
    handler.format = lambda record: f"{stamp(record, '%Y-%m-%d %H:%M:%S')}  {_format(record)}"
    for logger in LOGGERS:
        logger.addHandler(handler)


def close_log_file() -> None:
    """Ends what log_to_file began."""
    for logger in LOGGERS:
        for handler in [h for h in logger.handlers if isinstance(h, _FileHandler)]:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk
                handler.close()


def run_script(main: Callable[[], None]) -> None:
    """Runs main() and exits: 0, 2 for what the user can fix, 128 + signal when stopped.

    A terminal that is closed (SIGHUP) stops it as SIGTERM does, unless started by nohup.
    """
    # Idle threads soon sleep instead of spinning, which makes a step on a busy CPU much slower
    # (benchmarks/cpu.py). Read when torch is imported, which main() does after its arguments.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    protect_console()
    log_to_console()
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        code = _exit_code(main)
    finally:
        close_log_file()
        sys.stdout.flush()
        sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():  # a failed rank, see start_runtime()
        os._exit(code)
    if code:
        sys.exit(code)


def _exit_code(main):
    """The exit code of main(), whose error is logged."""
    try:
        main()
        return 0
    except UserError as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        log.error("%s%s", where, error.strerror or first_line(error))
        return 2
    except MemoryError:
        log.error("not enough memory; close other programs, or set NUM_THREADS=1")
        return 2
    except Interrupted as stopped:
        log.info("%s", stopped)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        log.error("stopped immediately")
        return 128 + signal.SIGINT
    except Exception:
        log.error("internal error, please report it:\n%s", traceback.format_exc())
        return 1


if __name__ == "__main__":
    print(settings_markdown(), end="")
