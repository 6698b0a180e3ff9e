"""Tables of captions: CSV, TSV, JSON lines, JSON and Parquet, a row at a time. pyarrow reads Parquet, the standard library the others."""

import csv
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wandistiller.errors import UserError, first_line
from wandistiller.files.json_files import JsonError, json_list, parse_json
from wandistiller.files.paths import require_file
from wandistiller.prompts.caption_files import (
    CSV,
    JSON,
    JSON_LINES,
    LONGEST_LINE,
    MOST_UNPACKED,
    PARQUET,
    TSV,
    UNPACKED_BYTES,
    CaptionFile,
    check_utf8,
    lines_of,
    open_text,
    pyarrow_for,
    text_lines,
)  # fmt: skip

USUAL_COLUMNS = ("caption", "captions", "prompt", "prompts", "text", "texts")
DELIMITERS = ",;\t|"
LOOKED_AT_ROWS, LOOKED_AT_LETTERS = 1000, 2**22  # of a file of JSON, whose keys are its columns
MOST_VALUES = 100_000_000
SHOWN_COLUMNS, SHOWN_LETTERS = 12, 24  # of a table, in a message
LONGEST_NAME = 3  # words; a first line of more is a caption, not the name of a column


@dataclass(frozen=True)
class WrongRow:
    """A row whose caption cannot be taken, for a reason that is counted."""

    reason: str


class Table(NamedTuple):
    """An open table: its columns, those of them that hold text, and what a column of it holds, row by row."""

    columns: list[str]
    texts: list[str]
    rows_of: Callable[[str], Iterator[object]]


def table_rows(file: CaptionFile, asked: str | None = None) -> Iterator[object]:
    """Yield what the column of captions holds in each row of a table, whatever it is.

    Args:
        asked: the column that holds the captions. None takes the one with a caption's name, or the only one of text.

    Raises:
        UserError: the file cannot be read, or no column is the one.
    """
    with TABLES[file.kind](file.path) as table:
        # Of JSON that is a list of texts nothing has a name.
        name = _choose_column(file.path, table, asked) if table.columns or file.kind not in (JSON, JSON_LINES) else ""
        rows = table.rows_of(name)
        if name and asked is None and not _is_usual(name):
            first = list(itertools.islice(rows, LOOKED_AT_ROWS))
            words = [row for row in first if isinstance(row, str)]
            if words and all(word.isascii() and len(word.split()) < 2 for word in words):
                raise UserError(
                    f"{file.path}: column {name!r} holds single words such as {words[0][:SHOWN_LETTERS]!r}, and no column has the "
                    f"name of captions; give --caption_column {name} to take it as it is"
                )
            rows = itertools.chain(first, rows)
        yield from rows


def _choose_column(path: Path, table: Table, asked: str | None) -> str:
    """Return the column of the captions: the one that is asked for, else the one with a usual name, else the only one of text.

    The name decides before the values: a column called caption is the one whatever its first rows hold.

    Raises:
        UserError: there is no such column, or more than one could be it.
    """
    columns, texts = table.columns, table.texts
    if asked is not None:
        known = {name.strip().lower(): name for name in reversed(columns)} | {name: name for name in columns}
        if (name := known.get(asked, known.get(asked.strip().lower()))) is not None:
            return name
        raise UserError(f"{path}: --caption_column {asked!r} is no column of it; {_listed(columns)}")
    found = [name for name in columns if _is_usual(name)] or texts
    if not found:
        raise UserError(f"{path}: no column of it holds text; {_listed(columns)}")
    if len(found) > 1:
        raise UserError(f"{path}: give --caption_column the name of the column with the captions; {_listed(columns)}")
    if not _is_usual(found[0]) and len(found[0].split()) > LONGEST_NAME:
        raise UserError(
            f"{path}: its first line must name the column, and is {found[0][:60]!r}; write caption above it, or name the file .txt"
        )
    return found[0]


def _is_usual(name: str) -> bool:
    return name.strip().lower() in USUAL_COLUMNS


def _listed(columns: Sequence[str]) -> str:
    if not columns:
        return "it has none of text"
    shown = ", ".join(repr(name[:SHOWN_LETTERS]) for name in columns[:SHOWN_COLUMNS])
    return f"it has {shown}{' and others' if len(columns) > SHOWN_COLUMNS else ''}"


# ---- CSV ----


@contextmanager
def _csv_table(path: Path, usual: str = ",") -> Iterator[Table]:
    """Open a table of cells between commas, semicolons, tabs or bars, whichever its first line has."""
    with open_text(path) as text:
        lines = (f"{line}\n" for _, line in lines_of(path, text))
        first = next((line for line in lines if line.strip()), "")
        delimiter = None
        if named := re.fullmatch(r"\s*sep=(.)\s*", first):  # as Excel writes it
            delimiter, first = named[1], next(lines, "")
        if not first.strip():
            raise UserError(f"{path}: is empty; its first line names the columns, such as caption")
        delimiter = delimiter or _delimiter_of(first, usual)
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        with _csv_refusals(path, reader):
            header = next(reader)

        def rows_of(name: str) -> Iterator[object]:
            index = header.index(name)
            with _csv_refusals(path, reader):
                for row in reader:
                    if len(row) == len(header):
                        yield row[index]
                    elif row and len(header) == 1:  # one column, whose captions hold the delimiter
                        yield delimiter.join(row)
                    elif row:
                        yield WrongRow("with more or fewer cells than the first line (commas need quotes)")

        yield Table(header, header, rows_of)


def _delimiter_of(header: str, usual: str) -> str:
    """Return the delimiter by which a first line has a column of captions, or most columns."""

    def cells(delimiter: str) -> list[str]:
        try:
            return next(csv.reader([header], delimiter=delimiter), [])
        except csv.Error:
            return []

    return max(usual + DELIMITERS, key=lambda delimiter: (any(map(_is_usual, cells(delimiter))), len(cells(delimiter))))


@contextmanager
def _csv_refusals(path: Path, reader: Any) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: is no CSV ({first_line(error)}); quotes in a quoted cell are doubled"
        ) from None


# ---- JSON ----


def _of_values(path: Path, values: Iterator[tuple[int, object]]) -> Table:
    """Return the table of JSON values, each behind the number of its letters: objects have columns, and a text is a row by itself."""
    first: list[object] = []
    num_letters = 0
    for letters, value in values:
        first.append(value)
        num_letters += letters
        if len(first) >= LOOKED_AT_ROWS or num_letters > LOOKED_AT_LETTERS:
            break
    objects = [value for value in first if isinstance(value, dict)]
    columns = list(dict.fromkeys(key for value in objects for key in value))
    texts = [key for key in columns if any(_holds_text(value.get(key)) for value in objects)]
    every = itertools.chain(first, (value for _, value in values))
    return Table(
        columns, texts, lambda name: (value.get(name) if isinstance(value, dict) else value for value in every)
    )


def _holds_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(inner, str) for inner in value))


@contextmanager
def _json_lines_table(path: Path) -> Iterator[Table]:
    def values() -> Iterator[tuple[int, object]]:
        for number, line in text_lines(path):
            if line.split():
                try:
                    yield len(line), parse_json(line)
                except JsonError as error:
                    reason = str(error).partition(": ")[2] or str(error)
                    raise UserError(f"{path}, line {number}: {reason}; each line is one JSON object") from None

    yield _of_values(path, values())


@contextmanager
def _json_table(path: Path) -> Iterator[Table]:
    with open_text(path) as text:

        def blocks() -> Iterator[str]:
            number = 1
            while block := text.read(2**18):
                check_utf8(path, block, number)
                number += block.count("\n")
                yield block

        def values() -> Iterator[tuple[int, object]]:
            try:
                yield from json_list(blocks(), LONGEST_LINE)
            except JsonError as error:
                raise UserError(
                    f"{path}: {error}; a list of objects or of texts is taken, not a config or an object of file names"
                ) from None

        yield _of_values(path, values())


# ---- Parquet ----


@contextmanager
def _parquet_table(path: Path) -> Iterator[Table]:
    pyarrow = pyarrow_for(path)
    import pyarrow.parquet as parquet

    try:
        require_file(path)
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [field.name for field in schema if _is_text(pyarrow.types, field.type)]

            def rows_of(name: str) -> Iterator[object]:
                if name not in texts:
                    kind = schema.field(name).type
                    raise UserError(f"{path}: column {name!r} holds {kind}, no text; {_listed(texts)}")
                leaves = _checked_leaves(path, file.metadata, name)
                # As a dictionary, a caption that repeats is in memory once.
                with parquet.ParquetFile(path, read_dictionary=leaves) as same:
                    for batch in same.iter_batches(batch_size=4096, columns=[name]):
                        yield from _texts(pyarrow, batch.column(0))

            yield Table(schema.names, texts, rows_of)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is no whole Parquet file ({first_line(error)[:120]}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def _checked_leaves(path: Path, metadata: Any, name: str) -> list[str]:
    """Return the leaves of a column; what unpacks to far more than the file, or holds too many values, is refused."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    leaves = [
        index for index in range(metadata.num_columns) if metadata.schema.column(index).path.split(".")[0] == name
    ]
    chunks = [group.column(index) for group in groups for index in leaves]
    if sum(chunk.total_uncompressed_size for chunk in chunks) > max(
        UNPACKED_BYTES, MOST_UNPACKED * path.stat().st_size
    ):
        raise UserError(f"{path}: unpacks to more than {MOST_UNPACKED} times its size, as no captions do")
    if sum(chunk.num_values for chunk in chunks) > MOST_VALUES:
        raise UserError(f"{path}: holds more than {MOST_VALUES:,} captions; give a part of them")
    return [metadata.schema.column(index).path for index in leaves]


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _texts(pyarrow: Any, values: Any) -> Iterator[object]:
    """Yield the texts, or lists of texts, of a column; equal ones of a dictionary are one object."""
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        inner, ends = list(_texts(pyarrow, values.values)), values.offsets.to_pylist()
        for (start, end), is_there in zip(itertools.pairwise(ends), values.is_valid().to_pylist(), strict=True):
            yield inner[start:end] if is_there else None
    elif pyarrow.types.is_dictionary(values.type):
        words = [_text(word) for word in values.dictionary]
        yield from (None if index is None else words[index] for index in values.indices.to_pylist())
    else:
        try:
            yield from values.to_pylist()
        except UnicodeDecodeError:
            yield from map(_text, values)


def _text(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return WrongRow("not UTF-8")


TABLES: dict[str, Callable[[Path], AbstractContextManager[Table]]] = {
    CSV: _csv_table,
    TSV: lambda path: _csv_table(path, "\t"),
    JSON_LINES: _json_lines_table,
    JSON: _json_table,
    PARQUET: _parquet_table,
}
