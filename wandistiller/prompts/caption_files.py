"""Files of captions: text, CSV, TSV, JSON lines, JSON and Parquet, compressed or not, one of them, a folder or a glob.

A file is read a piece at a time, so that one of millions of rows takes no more memory than its longest row. Standard library
only, but for Parquet and zstandard, which pyarrow reads.
"""

import bz2
import csv
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from wandistiller.errors import UserError, first_line
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.paths import require_file

TEXT, CSV, TSV, JSON_LINES, JSON, PARQUET = "text", "CSV", "TSV", "JSONL", "JSON", "Parquet"
KINDS = {
    ".txt": TEXT, ".csv": CSV, ".tsv": TSV, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON, ".parquet": PARQUET,
}  # fmt: skip
# Of a folder a .json is left out: it holds settings more often than captions.
KINDS_OF_FOLDER = {suffix for suffix in KINDS if suffix != ".json"}
USUAL_COLUMNS = ("caption", "prompt", "text")
SHOWN_COLUMNS, SHOWN_LETTERS = 12, 24  # of a table, in a message
LONGEST_NAME = 3  # words; a first line of more is a caption, not the name of a column
BLOCK = 2**20
LONGEST_LINE = 8 * 2**20  # bytes, far more than any caption; what is longer is another kind of file
LONGEST_JSON = 2**30
_LINE_END = re.compile(r"\r\n|\n|\r")  # not str.splitlines: a prompt may hold U+2028 or U+0085
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # not U+0080..9F: those are damaged quotes that ftfy repairs
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
WHAT_TO_GIVE = "give a text file with one prompt a line, a table (.csv, .tsv, .jsonl, .json, .parquet), or a folder or a glob of these"


@dataclass(frozen=True)
class WrongRow:
    """A row whose caption cannot be taken, for a reason that is counted."""

    reason: str


Row = tuple[int, object]  # the number of a row and its caption, which may be anything


def _open_zstandard(path: Path) -> Any:
    return _pyarrow(path).input_stream(str(path), compression="zstd")


# By the suffix, what opens a file to be read
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: is read by pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow


# ---- which files ----


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix of a file's kind and that of its compression, each empty where there is none that is known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def kind_of(path: Path) -> str:
    """Return what a file holds by its name; a file of any other name holds text."""
    return KINDS.get(_suffixes(path)[0], TEXT)


def find_caption_files(path: str | Path) -> list[Path]:
    """Return the files that a path stands for: itself, all of a folder and its folders, or those that a glob matches.

    Raises:
        UserError: there are none.
    """
    place = Path(path)
    if place.is_dir():
        found = [file for file in place.rglob("*") if _is_of_folder(file.relative_to(place)) and file.is_file()]
        if not found:
            raise UserError(f"{path}: cannot be read (Is a directory without captions); {WHAT_TO_GIVE}")
        return sorted(found)
    if not _is_there(place) and glob.has_magic(str(path)):
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not (files := [file for file in matches if file.is_file()]):
            raise UserError(f"{path}: no file matches; {WHAT_TO_GIVE}")
        return files
    return [place]


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # a name that is too long, which reading tells of
        return True


def _is_of_folder(name: Path) -> bool:
    return _suffixes(name)[0] in KINDS_OF_FOLDER and not any(part.startswith(".") for part in name.parts)


# ---- rows ----


def read_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """Yield the caption of every row of a file; of text, every line.

    Args:
        column: name of the column that holds the captions. None takes the only one of text, or one of USUAL_COLUMNS.

    Raises:
        UserError: the file cannot be read, or no column is the one.
    """
    kind, compression = kind_of(path), _suffixes(path)[1]
    if kind == PARQUET and compression:
        raise UserError(f"{path}: a Parquet file is compressed by itself; unpack it and give the .parquet")
    try:
        require_file(path)
        if kind == PARQUET:
            yield from _parquet_rows(path, column)
            return
        with COMPRESSIONS[compression](path) if compression else open(path, "rb") as stream:
            yield from READERS[kind](path, stream, column)
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if compression and not getattr(error, "errno", None):
            raise UserError(f"{path}: is damaged, or not packed as its name says ({reason}); copy it again") from None
        raise UserError(f"{path}: cannot be read ({reason}); {WHAT_TO_GIVE}") from None


def _text_rows(path: Path, stream: BinaryIO, column: str | None) -> Iterator[Row]:
    return enumerate(_lines(path, stream), start=1)


def _lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    """Yield the lines of UTF-8 text, whatever ends them, without their ends."""
    number = 0  # of lines that came before
    for piece in _whole_lines(path, stream):
        if number == 0 and piece.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path}, line 1: starts with a UTF-16 byte order mark; save the file as UTF-8")
        try:
            lines = _LINE_END.split(piece.decode("utf-8" if number else "utf-8-sig"))
        except UnicodeDecodeError as error:
            number += len(_LINE_END.split(error.object[: error.start].decode("utf-8")))
            bad_byte = error.object[error.start]
            raise UserError(
                f"{path}, line {number}: byte 0x{bad_byte:02X} is not UTF-8; save the file as UTF-8"
            ) from error
        yield from lines
        number += len(lines)


def _whole_lines(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Yield pieces of a file, each of whole lines without the end of its last one."""
    rest = b""
    while block := stream.read(BLOCK):
        rest += block
        # The \n after a \r may come with the next block, so that the last byte is no end of a line yet:
        end = max(rest.rfind(b"\n", 0, -1), rest.rfind(b"\r", 0, -1))
        if end >= 0:
            start = end - 1 if rest[end - 1 : end + 1] == b"\r\n" else end
            if rest[end : end + 2] == b"\r\n":
                start, end = end, end + 1
            yield rest[:start]
            rest = rest[end + 1 :]
        elif len(rest) > LONGEST_LINE:
            raise UserError(f"{path}: a line is longer than {LONGEST_LINE:,} bytes, so this is no text; {WHAT_TO_GIVE}")
    if rest:
        yield rest


def _csv_rows(path: Path, stream: BinaryIO, column: str | None, dialect: str = "excel") -> Iterator[Row]:
    reader = csv.reader((f"{line}\n" for line in _lines(path, stream)), dialect)
    try:
        header = next((row for row in reader if row), [])
        if not header:
            raise UserError(f"{path}: is empty; its first line names the columns, such as caption")
        index = header.index(_choose_column(path, header, header, column))
        for row in reader:
            if len(row) == len(header):
                yield reader.line_num, row[index]
            elif row:
                yield reader.line_num, WrongRow("with more or fewer cells than the first line (commas need quotes)")
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: is no CSV ({first_line(error)}); write the table anew"
        ) from None


def _tsv_rows(path: Path, stream: BinaryIO, column: str | None) -> Iterator[Row]:
    return _csv_rows(path, stream, column, "excel-tab")


def _json_line_rows(path: Path, stream: BinaryIO, column: str | None) -> Iterator[Row]:
    def values() -> Iterator[tuple[int, object]]:
        for number, line in enumerate(_lines(path, stream), start=1):
            if line.split():
                try:
                    yield number, parse_json(line)
                except JsonError as error:
                    reason = str(error).partition(": ")[2] or str(error)
                    raise UserError(f"{path}, line {number}: {reason}; each line is one JSON object") from None

    return _of_objects(path, values(), column)


def _json_rows(path: Path, stream: BinaryIO, column: str | None) -> Iterator[Row]:
    raw = stream.read(LONGEST_JSON + 1)
    if len(raw) > LONGEST_JSON:
        raise UserError(f"{path}: is larger than {LONGEST_JSON:,} bytes; write it as .jsonl, an object a line")
    try:
        values = parse_json("\n".join(_lines(path, io.BytesIO(raw))))
    except JsonError as error:
        raise UserError(f"{path}: {error}; a list of objects or of texts is taken") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: holds no list; a list of objects or of texts is taken")
    return _of_objects(path, enumerate(values, start=1), column)


def _of_objects(path: Path, values: Iterable[tuple[int, object]], column: str | None) -> Iterator[Row]:
    """Yield the caption of JSON values: of an object that in its column, and a text as it is."""
    name: str | None = None
    for number, value in values:
        if not isinstance(value, dict):
            yield number, value
            continue
        if name is None:
            texts = [key for key, inner in value.items() if isinstance(inner, str)]
            name = _choose_column(path, list(value), texts, column)
        yield number, value.get(name)


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [field.name for field in schema if _is_text(pyarrow.types, field.type)]
            name = _choose_column(path, schema.names, texts, column)
            if name not in texts:
                raise UserError(f"{path}: column {name!r} holds {schema.field(name).type}, no text; {_listed(texts)}")
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=[name]):
                for caption in _captions(batch.column(0)):
                    number += 1
                    yield number, caption
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is no whole Parquet file ({first_line(error)[:120]}); copy it again") from None


def _is_text(types: Any, kind: Any) -> bool:
    inner = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)


def _captions(values: Any) -> list[object]:
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        return [_caption(value) for value in values]


def _caption(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return WrongRow("not UTF-8")


READERS: dict[str, Callable[[Path, BinaryIO, str | None], Iterator[Row]]] = {
    TEXT: _text_rows,
    CSV: _csv_rows,
    TSV: _tsv_rows,
    JSON_LINES: _json_line_rows,
    JSON: _json_rows,
}


# ---- columns ----


def _choose_column(path: Path, columns: Sequence[str], texts: Sequence[str], asked: str | None) -> str:
    """Return the column of the captions: the one that is asked for, else the only one of text, else a usual one.

    Raises:
        UserError: there is no such column, or more than one could be it.
    """
    if asked is not None:
        known = {name.strip().lower(): name for name in reversed(columns)} | {name: name for name in columns}
        if (name := known.get(asked, known.get(asked.strip().lower()))) is not None:
            return name
        raise UserError(f"{path}: --caption_column {asked!r} is no column of it; {_listed(columns)}")
    usual = [name for name in texts if name.strip().lower() in USUAL_COLUMNS]
    if len(texts) == 1 and not usual and len(texts[0].split()) > LONGEST_NAME:
        raise UserError(
            f"{path}: its first line must name the column, and is {texts[0][:60]!r}; write caption above it, or name the file .txt"
        )
    if len(texts) == 1 or len(usual) == 1:
        return usual[0] if usual else texts[0]
    if not texts:
        raise UserError(f"{path}: no column of it holds text; {_listed(columns)}")
    raise UserError(f"{path}: give --caption_column the name of the column with the captions; {_listed(texts)}")


def _listed(columns: Sequence[str]) -> str:
    if not columns:
        return "it has none of text"
    shown = ", ".join(repr(name[:SHOWN_LETTERS]) for name in columns[:SHOWN_COLUMNS])
    return f"it has {shown}{' and others' if len(columns) > SHOWN_COLUMNS else ''}"
