"""Tables of captions: CSV, TSV, JSON lines, JSON and Parquet, a row at a time. pyarrow reads Parquet, the standard library the others."""

import csv
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from wandistiller.errors import UserError, first_line
from wandistiller.files.json_files import JsonError, load_json, parse_json
from wandistiller.files.paths import require_file
from wandistiller.prompts.caption_files import CSV, JSON, JSON_LINES, PARQUET, TSV, CaptionFile, text_lines

USUAL_COLUMNS = ("caption", "captions", "prompt", "prompts", "text", "texts")
DELIMITERS = ",;\t|"
LOOKED_AT_ROWS, LOOKED_AT_LETTERS = 1000, 2**22  # of a file of JSON, whose keys are its columns
# Of a column of Parquet: captions pack to a third or a tenth; what unpacks to far more was made to fill the memory.
MOST_VALUES, MOST_UNPACKED, UNPACKED_BYTES = 20_000_000, 100, 8 * 2**20
SHOWN_COLUMNS, SHOWN_LETTERS = 12, 24  # of a table, in a message


class WrongRow(NamedTuple):
    """A row whose caption cannot be taken, for a reason that is counted."""

    reason: str


class Table(NamedTuple):
    """An open table: its columns, and what a column of it holds, row by row."""

    columns: list[str]
    rows_of: Callable[[str], Iterator[object]]


def table_rows(file: CaptionFile, asked: str | None = None) -> Iterator[object]:
    """Yield what the column of captions holds in each row of a table, whatever it is.

    Args:
        asked: the column that holds the captions. None takes the one with a caption's name, never another: that may hold the names of
            pictures.

    Raises:
        UserError: the file cannot be read, or no column is the one.
    """
    table = TABLES[file.kind](file.path)
    if not table.columns and file.kind in (JSON, JSON_LINES):  # a list of texts, in which nothing has a name
        return table.rows_of("")
    names = _usual(table.columns)
    if asked is not None:
        alike = [name for name in table.columns if name.strip().lower() == asked.strip().lower()]
        names = [asked] if asked in alike else alike[:1]
    if len(names) == 1:
        return table.rows_of(names[0])
    has = _listed(table.columns)
    if asked is not None:
        raise UserError(f"{file.path}: --caption_column {asked!r} is no column of it; {has}")
    raise UserError(
        f"{file.path}: {'more than one' if names else 'no'} column of it is called {', '.join(USUAL_COLUMNS[::2])}; give "
        f"--caption_column the name of the one with the captions, or write it into the first line; {has}"
    )


def _usual(columns: Sequence[str]) -> list[str]:
    return [name for name in columns if name.strip().lower() in USUAL_COLUMNS]


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:SHOWN_LETTERS]) for name in columns[:SHOWN_COLUMNS])
    return f"it has {shown}{' and others' if len(columns) > SHOWN_COLUMNS else ''}"


# ---- CSV ----


def _csv_table(path: Path, usual: str = ",") -> Table:
    """Open a table of cells between commas, semicolons, tabs or bars, whichever its first line has."""
    lines = (f"{line}\n" for _, line in text_lines(path))
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
            for row in filter(None, reader):
                if len(row) == len(header):
                    yield row[index]
                elif len(header) == 1:  # one column, whose captions hold the delimiter
                    yield delimiter.join(row)
                else:
                    yield WrongRow("with more or fewer cells than the first line (commas need quotes)")

    return Table(header, rows_of)


def _delimiter_of(header: str, usual: str) -> str:
    """Return the delimiter by which a first line has a column of captions, or most columns."""

    def cells(delimiter: str) -> list[str]:
        return next(csv.reader([header], delimiter=delimiter), [])

    try:
        return max(usual + DELIMITERS, key=lambda each: (bool(_usual(cells(each))), len(cells(each))))
    except csv.Error:  # told with its line by who reads it next
        return usual


@contextmanager
def _csv_refusals(path: Path, reader: Any) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: is no CSV ({first_line(error)}); quotes in a quoted cell are doubled"
        ) from None


# ---- JSON ----


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the value of each line behind the number of its letters."""
    for number, line in text_lines(path):
        if line.split():
            try:
                yield len(line), parse_json(line)
            except JsonError as error:
                reason = str(error).partition(": ")[2] or str(error)
                raise UserError(f"{path}, line {number}: {reason}; each line is one JSON object") from None


def _json_table(path: Path) -> Table:
    try:
        values = load_json(path)
    except JsonError as error:
        raise UserError(f"{path}: {error}; a large or unusual table is better a .jsonl, an object a line") from None
    if not isinstance(values, list):
        raise UserError(
            f"{path}: holds no list of objects or of texts, but a {type(values).__name__} such as a config's"
        )
    return _of_values((0, value) for value in values)


def _of_values(values: Iterator[tuple[int, object]]) -> Table:
    """Return the table of JSON values: objects have columns, and a text is a row of its own."""
    first: list[object] = []
    num_letters = 0
    for letters, value in values:
        first.append(value)
        num_letters += letters
        if len(first) >= LOOKED_AT_ROWS or num_letters > LOOKED_AT_LETTERS:
            break
    columns = list(dict.fromkeys(key for value in first if isinstance(value, dict) for key in value))
    every = itertools.chain(first, (value for _, value in values))
    return Table(columns, lambda name: (value.get(name) if isinstance(value, dict) else value for value in every))


# ---- Parquet ----


def _parquet_table(path: Path) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: is read by pyarrow, which is not installed: pip install pyarrow") from None
    with _parquet_refusals(path):
        require_file(path)
        with parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata

    def rows_of(name: str) -> Iterator[object]:
        kind = schema.field(schema.names.index(name)).type
        if not _is_text(kind):
            raise UserError(f"{path}: column {name!r} holds {kind}, no text; {_listed(schema.names)}")
        # As a dictionary, a caption that repeats is in memory once, and cleaned once.
        leaves = _checked_leaves(path, metadata, name)
        with _parquet_refusals(path), parquet.ParquetFile(path, read_dictionary=leaves) as same:
            for batch in same.iter_batches(batch_size=4096, columns=[name]):
                yield from _texts(batch.column(0))

    return Table(schema.names, rows_of)


@contextmanager
def _parquet_refusals(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is no whole Parquet file ({first_line(error)[:120]}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def _checked_leaves(path: Path, metadata: Any, name: str) -> list[str]:
    """Return the leaves of a column; what unpacks to far more than the file, or holds too many values, is refused."""
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    leaves = [index for index, leaf in enumerate(paths) if leaf.split(".")[0] == name]
    chunks = [metadata.row_group(group).column(leaf) for group in range(metadata.num_row_groups) for leaf in leaves]
    most = max(UNPACKED_BYTES, MOST_UNPACKED * path.stat().st_size)
    if sum(chunk.total_uncompressed_size for chunk in chunks) > most:
        raise UserError(f"{path}: unpacks to more than {MOST_UNPACKED} times its size, as no captions do")
    if sum(chunk.num_values for chunk in chunks) > MOST_VALUES:
        raise UserError(f"{path}: holds more than {MOST_VALUES:,} captions; give a part of them")
    return [paths[leaf] for leaf in leaves]


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _texts(values: Any) -> Iterator[object]:
    """Yield what each row of a column holds: a text, None, or a list of texts; equal texts of it are one object."""
    from pyarrow import types

    if types.is_list(values.type) or types.is_large_list(values.type):
        inside = _texts(values.flatten())
        for size in values.value_lengths().to_pylist():
            yield list(itertools.islice(inside, size or 0))
        return
    if not types.is_dictionary(values.type):
        values = values.dictionary_encode()
    texts = [_text(value) for value in values.dictionary]
    yield from (None if index is None else texts[index] for index in values.indices.to_pylist())


def _text(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return WrongRow("not UTF-8")


TABLES: dict[str, Callable[[Path], Table]] = {
    CSV: _csv_table,
    TSV: lambda path: _csv_table(path, "\t"),
    JSON_LINES: lambda path: _of_values(_json_lines(path)),
    JSON: _json_table,
    PARQUET: _parquet_table,
}
