"""Files of captions: text with one a line or one a file, tables, and the folders and globs of these, read a row at a time.

pyarrow reads Parquet, the standard library all else.
"""

import csv
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wandistiller.errors import UserError, first_line
from wandistiller.files.json_files import JsonError, load_json, parse_json
from wandistiller.files.paths import require_file

LONGEST_PROMPT = 20_000  # letters; Wan reads 512 tokens, some 2,500
LONGEST_LINE = 8 * 2**20  # letters, far more than any caption; what is longer is another kind of file
USUAL_COLUMNS = ("caption", "captions", "prompt", "prompts", "text", "texts")
DELIMITERS = ",;\t|"
LOOKED_AT_ROWS = 100  # of JSON, whose keys are the columns
# Of a column of Parquet: captions pack to a third or a tenth; what unpacks to far more was made to fill the memory.
MOST_VALUES, MOST_UNPACKED, UNPACKED_BYTES = 20_000_000, 100, 8 * 2**20
SHOWN_COLUMNS, SHOWN_LETTERS = 12, 24  # of a table, in a message
MEDIA = [
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "avif", "jxl", "tif", "tiff", "heic", "mp4", "mov", "mkv", "webm", "avi", "m4v",
]  # fmt: skip
PACKED = [".gz", ".bz2", ".xz", ".zst", ".zip"]
NOT_READ = {
    **dict.fromkeys(
        [".toml", ".yaml", ".yml", ".ini", ".cfg"], "a config by its name; give the captions that it names"
    ),
    **dict.fromkeys(PACKED, "packed by its name; unpack it and give what it holds"),
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # not U+0080..9F: those are damaged quotes that ftfy repairs
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is none
_SURROGATE = re.compile("[\ud800-\udfff]")
WHAT_TO_GIVE = "give a text file with one prompt a line, a table (.csv, .tsv, .jsonl, .json, .parquet), or a folder or a glob of these"


class WrongRow(str):
    """Why no caption can be taken from a row, which is left out and counted."""


class CaptionFile(NamedTuple):
    """A file, and what yields its captions: texts, None, lists of these, or what is none; it takes a path and a column's name."""

    path: Path
    read: Callable[[Path, str | None], Iterator[object]]


def unusable(prompt: str) -> str | None:
    """Return what is wrong with a prompt; None where it is one."""
    if not prompt or prompt.isspace():
        return "is empty"
    if len(prompt) > LONGEST_PROMPT:
        return f"is longer than {LONGEST_PROMPT:,} letters"
    if prompt.isprintable():
        return None
    if control := CONTROL.search(prompt.replace("\r", " ")):
        return f"holds the control character U+{ord(control[0]):04X}"
    return "is not UTF-8 text" if _SURROGATE.search(prompt) else None


def find_caption_files(path: str | Path, prompt_per: str | None = None) -> list[CaptionFile]:
    """Return the files that a path stands for: itself, all of a folder and its folders, or those that a glob matches.

    Args:
        prompt_per: "file" where a text file holds one caption, "line" where it holds one a line; None: one where a picture or
            video of its name lies beside it, as trainers of LoRAs have them, or its name ends in .caption.

    Raises:
        UserError: there are none, or one is a config or packed.
    """
    place, found = Path(path), [Path(path)]
    if place.is_dir():
        found = list(_captions_below(place))
    elif not os.path.lexists(place) and glob.has_magic(str(path)):
        found = [file for name in glob.iglob(str(path), recursive=True) if (file := Path(name)).is_file()]
        found = [file for file in found if file.suffix.lower()[1:] not in MEDIA]
    if not found:
        raise UserError(f"{path}: is a directory or pattern without captions; {WHAT_TO_GIVE}")
    beside = (file for folder in {file.parent for file in found} for file in folder.glob("*"))
    media = {file.with_suffix("") for file in beside if file.suffix.lower()[1:] in MEDIA}
    return [CaptionFile(file, _reader_of(file, prompt_per, media)) for file in sorted(found)]


def _captions_below(place: Path) -> Iterator[Path]:
    """Yield the files of captions below a folder, packed ones too, which are refused; what is hidden is left out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); {WHAT_TO_GIVE}")

    kinds = READERS.keys() - {".json"}  # which holds settings more often than captions
    for folder, folders, names in os.walk(place, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names if not name.startswith(".")):
            is_packed = file.suffix.lower() in PACKED and Path(file.stem).suffix.lower() in kinds
            if (is_packed or file.suffix.lower() in kinds) and file.is_file():
                yield file


def _reader_of(file: Path, prompt_per: str | None, media: set[Path]) -> Callable:
    suffix = file.suffix.lower()
    if suffix in NOT_READ:
        raise UserError(f"{file}: is {NOT_READ[suffix]}")
    read = READERS.get(suffix, read_lines)
    if read not in (read_lines, read_whole):
        return read
    bare = file.with_suffix("")
    if prompt_per is None and media & {bare, bare.with_suffix(""), file.parent / file.name.partition(".")[0]}:
        return read_whole
    return {"line": read_lines, "file": read_whole, None: read}[prompt_per]


# ---- text ----


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of UTF-8 text with their numbers, whatever ends them, without their ends; any other file is refused."""
    try:
        require_file(path)
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as text:
            for number in itertools.count(1):
                if not (line := text.readline(LONGEST_LINE)):
                    return
                _check_text(line, f"{path}, line {number}")
                yield number, line.removesuffix("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {WHAT_TO_GIVE}") from None


def _check_text(line: str, where: str) -> None:
    if len(line) == LONGEST_LINE:
        raise UserError(f"{where}: is longer than {LONGEST_LINE:,} letters, so this is no text; {WHAT_TO_GIVE}")
    if line.isascii() or not (found := _NOT_UTF8.search(line)):
        return
    raise UserError(f"{where}: byte 0x{ord(found[0]) - 0xDC00:02X} is not UTF-8; save the file as UTF-8")


def read_lines(path: Path, asked: str | None = None) -> Iterator[str]:
    """Yield the prompts of a text file, one a line, none of which may be wrong; blank lines and `#` lines do not count."""
    for number, row in text_lines(path):
        prompt, where = row.lstrip("\ufeff").strip(), f"{path}, line {number}"  # files were concatenated
        if not prompt or prompt.startswith("#"):
            continue
        if reason := unusable(prompt):
            raise UserError(f"{where}: {reason}; a prompts file is plain UTF-8 text, one prompt a line")
        if prompt.startswith("--"):
            raise UserError(f"{where}: begins with an option, {prompt[:40]!r}; write the prompt alone")
        yield prompt


def read_whole(path: Path, asked: str | None = None) -> Iterator[str]:
    """Yield the one caption of a file; of a long one hardly more than is taken."""
    caption = ""
    for _, line in text_lines(path):
        caption += line.strip("\ufeff") + "\n"
        if len(caption) > LONGEST_PROMPT:
            break
    yield caption.strip()


# ---- tables ----


def _column(path: Path, columns: Sequence[str], asked: str | None) -> str:
    """Return the column of captions: the one that is asked for or has a caption's name, never another: that may hold names of pictures."""
    names = USUAL_COLUMNS if asked is None else (asked.strip().lower(),)
    found = [name for name in columns if name.strip().lower() in names]
    if asked in columns:
        return str(asked)
    if len(found) == 1:
        return found[0]
    shown = ", ".join(repr(name[:SHOWN_LETTERS]) for name in columns[:SHOWN_COLUMNS])
    raise UserError(
        f"{path}: {'more than one' if found else 'no'} column of it is called {' or '.join(names)}; give --caption_column the name "
        f"of the one with the captions; it has {shown or 'none'}{' and others' if len(columns) > SHOWN_COLUMNS else ''}"
    )


def read_csv(path: Path, asked: str | None, usual: str = ",") -> Iterator[str]:
    """Yield the captions of cells between commas, semicolons, tabs or bars, whichever the first line has most of."""
    lines = (f"{line}\n" for _, line in text_lines(path))
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(usual + DELIMITERS, key=first.count)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        index = header.index(_column(path, header, asked))
        for row in filter(None, reader):
            if len(row) == len(header):
                yield row[index]
            elif len(header) == 1:  # one column, whose captions hold the delimiter
                yield delimiter.join(row)
            else:
                yield WrongRow("with more or fewer cells than the first line (commas need quotes)")
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: is no CSV ({first_line(error)}); quotes in a quoted cell are doubled"
        ) from None


def read_json_lines(path: Path, asked: str | None) -> Iterator[object]:

    def values() -> Iterator[object]:
        for number, line in text_lines(path):
            if line.strip():
                try:
                    yield parse_json(line)
                except JsonError as error:
                    reason = str(error).split(": ", 1)[-1]
                    raise UserError(f"{path}, line {number}: {reason}; each line is one JSON object") from None

    return _of_values(path, values, asked)


def read_json(path: Path, asked: str | None) -> Iterator[object]:
    try:
        values = load_json(path)
    except JsonError as error:
        raise UserError(f"{path}: {error}; a large or unusual table is better a .jsonl, an object a line") from None
    return _of_values(path, lambda: iter(values if isinstance(values, list) else [values]), asked)


def _of_values(path: Path, values: Callable[[], Iterator[object]], asked: str | None) -> Iterator[object]:
    """Yield the captions of JSON values: objects have columns, a text is a row by itself, and which part of a list is one nobody knows."""
    objects = (value for value in itertools.islice(values(), LOOKED_AT_ROWS) if isinstance(value, dict))
    columns = list(dict.fromkeys(key for value in objects for key in value))
    name = _column(path, columns, asked) if columns else None
    no_row = WrongRow("that are lists (a row is an object or a text)")
    return (no_row if isinstance(row, list) else row.get(name) if isinstance(row, dict) else row for row in values())


def read_parquet(path: Path, asked: str | None) -> Iterator[object]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: is read by pyarrow, which is not installed: pip install pyarrow") from None
    try:
        require_file(path)
        with ParquetFile(path) as file:
            name = _column(path, file.schema_arrow.names, asked)
            leaves = _checked_leaves(path, file.metadata, name)
        # As a dictionary, a caption that repeats is in memory once, and cleaned once.
        with ParquetFile(path, read_dictionary=leaves) as file:
            for batch in file.iter_batches(batch_size=4096, columns=[name]):
                yield from _texts(batch.column(0))
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: is no whole Parquet file with text in its column of captions ({first_line(error)[:120]}); copy it again, or "
            "give --caption_column the name of another"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def _checked_leaves(path: Path, metadata: Any, name: str) -> list[str]:
    """Return the leaves of a column; what unpacks to far more than the file, or holds too many values, is refused."""
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    leaves = [index for index, leaf in enumerate(paths) if leaf == name or leaf.startswith(f"{name}.")]
    chunks = [metadata.row_group(group).column(leaf) for group in range(metadata.num_row_groups) for leaf in leaves]
    most = max(UNPACKED_BYTES, MOST_UNPACKED * path.stat().st_size)
    if sum(chunk.total_uncompressed_size for chunk in chunks) > most:
        raise UserError(f"{path}: unpacks to more than {MOST_UNPACKED} times its size, as no captions do")
    if sum(chunk.num_values for chunk in chunks) > MOST_VALUES:
        raise UserError(f"{path}: holds more than {MOST_VALUES:,} captions; give a part of them")
    return [paths[leaf] for leaf in leaves]


def _texts(values: Any) -> Iterator[str | None]:
    """Yield the texts of a column, and those of lists in it; equal texts are one object, no list is None."""
    from pyarrow import binary, types

    if types.is_list(values.type) or types.is_large_list(values.type):
        yield from (None for size in values.value_lengths().to_pylist() if not size)
        values = values.flatten()
    if not types.is_dictionary(values.type):
        values = values.dictionary_encode()
    texts = [
        None if raw is None else raw.decode(errors="surrogateescape")
        for raw in values.dictionary.cast(binary()).to_pylist()
    ]
    yield from (None if index is None else texts[index] for index in values.indices.to_pylist())


# By the suffix; any other file is text
READERS: dict[str, Callable[[Path, str | None], Iterator[object]]] = {
    ".txt": read_lines,
    ".caption": read_whole,
    ".csv": read_csv,
    ".tsv": lambda path, asked: read_csv(path, asked, "\t"),
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
}
