"""Small tables as people write them: any separator, encoding, column order, header or none."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from stemgenre.data.find_files import AUDIO_SUFFIXES
from stemgenre.errors import CONTROL_CHARACTER, UserError

log = logging.getLogger(__name__)

MAX_LINE = 2**17  # characters
LABEL_COLUMNS = ("label_id", "label", "label_name", "genre", "class", "target", "category")
CELL = {s: re.compile(rf'"((?:[^"]|"")*+)"(?={s}|$)|([^{s}]*)') for s in "\t,;"}


@dataclass(frozen=True)
class SubmissionTemplate:
    """sample_submit as it was found: what a submission has to look like."""

    rows: list[list[str]]  # every cell, without the header
    header: list[str] | None
    separator: str
    line_end: str
    file_column: int
    label_column: int


def read_master(
    master: Path, columns: Sequence[str], *, optional: str | None = None
) -> pd.DataFrame:
    """The named columns of a master with a header, as stripped text; others are left out.

    The column `optional`, if there is one, may have empty cells. Raises UserError for a column
    that is missing or there twice, and for a missing cell of `columns`.
    """
    rows, _, _ = _read_rows(master)
    header = [cell.lower() for cell in rows[0]]
    wanted = [*columns, *([optional] if optional in header else [])]
    for column in wanted:
        if header.count(column) != 1:
            raise UserError(
                f"{master} needs one column {column} in its header; it has {', '.join(rows[0])}"
            )
    if len(rows) == 1:
        raise UserError(f"{master} has a header but no rows")
    positions = [header.index(column) for column in columns]
    for number, row in enumerate(rows[1:], start=2):
        if len(row) > len(header):
            raise UserError(
                f"{master} row {number} has {len(row)} cells, the header has {len(header)}; put a "
                "cell with separators in it into quotes"
            )
        if len(row) < len(header) or not all(row[position] for position in positions):
            raise UserError(f"{master} row {number}: a {' or '.join(columns)} is missing")
    positions = [header.index(column) for column in wanted]
    data = [[row[position] for position in positions] for row in rows[1:]]
    return pd.DataFrame(data, columns=wanted)


def parse_label_ids(cells: pd.Series, master: Path) -> pd.Series:
    """The label ids in a column of `master` as int64. Raises UserError for what is no integer."""
    numbers = pd.to_numeric(cells, errors="coerce")
    invalid = numbers.isna() | (numbers % 1 != 0) | (numbers.abs() > 2**53)
    if invalid.any():
        row = invalid.idxmax()
        raise UserError(f"{master} row {row + 2}: label_id {cells[row]!r} is not an integer")
    return numbers.astype("int64")


def read_template(sample_submit: Path) -> SubmissionTemplate:
    """The SubmissionTemplate of a sample_submit, with or without a header or an index column.

    The label column has one of the names LABEL_COLUMNS, or without them is the last one. Raises
    UserError if no column has audio file names, or rows differ in length.
    """
    rows, separator, line_end = _read_rows(sample_submit)
    width = len(rows[-1])
    file_columns = [column for column, cell in enumerate(rows[-1]) if _is_audio_name(cell)]
    if not file_columns:
        raise UserError(
            f"{sample_submit} has no column of audio file names, with their suffixes, in its last "
            "row"
        )
    file_column = file_columns[0]
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise UserError(
                f"{sample_submit} row {number} has {len(row)} cells, the last row has {width}"
            )
        if not row[file_column] and number > 1:
            raise UserError(f"{sample_submit} row {number} has no file name")
    header = None if _is_audio_name(rows[0][file_column]) else rows[0]
    rows = rows if header is None else rows[1:]
    other_columns = [column for column in range(width) if column != file_column]
    if not other_columns:  # file names alone: the labels become a second column
        rows, other_columns = [[*row, ""] for row in rows], [1]
        header = header and [*header, "label_id"]
        separator = "\t" if sample_submit.suffix.lower() == ".tsv" else ","
    names = [cell.lower() for cell in header or ()]
    named = [names.index(name) for name in LABEL_COLUMNS if name in names]
    label_column = next((c for c in named if c in other_columns), other_columns[-1])
    if header and not named and len(other_columns) > 1:
        log.warning(
            "%s has no column %s: the predictions replace its last one, %s",
            *(sample_submit, " or ".join(LABEL_COLUMNS[:4]), header[label_column]),
        )
    return SubmissionTemplate(rows, header, separator, line_end, file_column, label_column)


def _is_audio_name(cell):
    return cell.lower().endswith(AUDIO_SUFFIXES)


def _read_rows(path):
    """(rows of stripped cells, separator, line end) of a small table whose separator is sniffed.

    A row is a line: a cell with a line break cannot be told from a quote that does not pair, which
    must not swallow the rows behind it.
    """
    text = _read_text(path)
    lines = [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if not text.strip("\t,; \r\n"):
        raise UserError(f"{path} is empty")
    if max(map(len, lines)) > MAX_LINE:
        raise UserError(
            f"{path} is not a table: it has a line of {max(map(len, lines))} characters"
        )
    widths = {s: {len(_split_cells(line, s)[0]) for line in lines[:50]} for s in "\t,;"}
    separator = max(  # the one that gives all rows the same number of cells, else the most
        widths, key=lambda s: (len(widths[s]) == 1 and max(widths[s]) > 1, max(widths[s]))
    )
    rows, in_quotes = [], False
    for line in lines:
        cells, opens_quotes = _split_cells(line, separator)
        if not any(cells):
            continue
        if rows and in_quotes and len(cells) != len(rows[0]):
            raise UserError(
                f"{path} row {len(rows)} has a cell with a line break, or a quote that does not "
                "pair; write the cell in one line"
            )
        if unprintable := CONTROL_CHARACTER.search("".join(cells)):
            raise UserError(
                f"{path} row {len(rows) + 1} has a control character, {unprintable[0]!r}"
            )
        rows.append(cells)
        in_quotes = opens_quotes
    return rows, separator, "\r\n" if "\r\n" in text else "\n"


def _split_cells(line, separator):
    """(stripped cells of a line, whether one begins with a quote that does not pair).

    Quotes pair if they enclose a whole cell; others are text.
    """
    if '"' not in line:
        return [cell.strip() for cell in line.split(separator)], False
    cells, opens_quotes, end = [], False, -1
    while end < len(line):
        match = CELL[separator].match(line, end + 1)
        quoted, plain = match.groups()
        cells.append((plain if quoted is None else quoted.replace('""', '"')).strip())
        opens_quotes |= quoted is None and plain.startswith('"')
        end = match.end()
    return cells, opens_quotes


def _read_text(path):
    """The file's text: UTF-16 with a byte order mark, UTF-8 with or without one, or Shift-JIS."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp932"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise UserError(f"{path} is not a text file in UTF-8, UTF-16 or Shift-JIS")
