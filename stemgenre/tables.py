"""Small tables as people send them: any separator, encoding, order of columns, header or none."""

import csv
import io
from dataclasses import dataclass

import pandas as pd

from stemgenre.audio import SUFFIXES
from stemgenre.errors import UserError


@dataclass(frozen=True)
class SubmissionForm:
    """sample_submit as it was found: what a submission has to look like."""

    rows: list[list[str]]  # every cell, without the header
    header: list[str] | None
    separator: str
    line_end: str
    file_column: int
    label_column: int


def whole_numbers(cells, master):
    numbers = pd.to_numeric(cells, errors="coerce")
    wrong = numbers.isna() | (numbers % 1 != 0) | (numbers.abs() > 2**53)
    if wrong.any():
        raise UserError(
            f"{master} row {wrong.idxmax() + 2}: label_id {cells[wrong.idxmax()]!r} "
            "is not a whole number"
        )
    return numbers.astype("int64")


def read_master(master, columns):
    """The named columns of a master with a header, as stripped text; others are left out."""
    rows, _, _ = _read_rows(master)
    header = [cell.strip().lower() for cell in rows[0]]
    for column in columns:
        if header.count(column) != 1:
            raise UserError(
                f"{master} needs one column {column} in its header; it has {', '.join(rows[0])}"
            )
    if len(rows) == 1:
        raise UserError(f"{master} has a header but no rows")
    cells = [header.index(column) for column in columns]
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header) or not all(row[cell].strip() for cell in cells):
            raise UserError(f"{master} row {number}: a {' or '.join(columns)} is missing")
    data = [[row[cell].strip() for cell in cells] for row in rows[1:]]
    return pd.DataFrame(data, columns=list(columns))


def read_form(sample_submit):
    """The SubmissionForm of a sample_submit, with or without a header or an index column.

    The labels' column is label_id, or without that name the last one.
    """
    rows, separator, line_end = _read_rows(sample_submit)
    rows = [[cell.strip() for cell in row] for row in rows]
    columns = [
        column for column in range(len(rows[-1])) if rows[-1][column].lower().endswith(SUFFIXES)
    ]
    if not columns:
        raise UserError(f"{sample_submit} has no column of audio file names in its last row")
    file_column = columns[0]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[-1]) or not (row[file_column] or number == 1):
            raise UserError(
                f"{sample_submit} row {number}: {len(row)} cells where the last row has "
                f"{len(rows[-1])}, or no file name"
            )
    header = None if rows[0][file_column].lower().endswith(SUFFIXES) else rows[0]
    rows = rows if header is None else rows[1:]
    others = [column for column in range(len(rows[-1])) if column != file_column]
    if not others:
        rows, others = [[*row, ""] for row in rows], [1]
    names = [cell.lower() for cell in header or ()]
    label_column = names.index("label_id") if "label_id" in names else others[-1]
    return SubmissionForm(rows, header, separator, line_end, file_column, label_column)


def _read_rows(path):
    """(rows of cells, separator, line end) of a small table whose separator is sniffed."""
    text = _read_text(path)
    lines = [line for line in text.splitlines()[:50] if line.strip()]
    if not text.strip("\t,; \r\n"):
        raise UserError(f"{path} is empty")
    try:
        widths = {s: {len(row) for row in csv.reader(lines, delimiter=s)} for s in "\t,;"}
        separator = max(
            widths, key=lambda s: (len(widths[s]) == 1 and max(widths[s]) > 1, max(widths[s]))
        )
        rows = [
            row
            for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator)
            if any(cell.strip() for cell in row)
        ]
    except csv.Error as error:
        raise UserError(f"{path} is not a table: {error}") from None
    return rows, separator, "\r\n" if "\r\n" in text else "\n"


def _read_text(path):
    """The file's text: UTF-16 with a mark, UTF-8 with or without one, else Shift-JIS."""
    data = path.read_bytes()
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp932"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise UserError(f"{path} is not a text file in UTF-8, UTF-16 or Shift-JIS")
