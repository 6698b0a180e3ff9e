"""Files of captions: a file, a folder or a glob; how they are unpacked, and the lines or the one caption of a text.

A file is read a piece at a time, so that one of millions of rows takes no more memory than its longest row.
"""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from wandistiller.errors import UserError, first_line
from wandistiller.files.paths import require_file

TEXT, WHOLE, CSV, TSV, JSON_LINES, JSON, PARQUET = "text", "one caption", "CSV", "TSV", "JSONL", "JSON", "Parquet"
KINDS = {
    ".txt": TEXT, ".caption": WHOLE, ".csv": CSV, ".tsv": TSV, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON,
    ".parquet": PARQUET,
}  # fmt: skip
# Of a folder a .json is left out: it holds settings more often than captions.
KINDS_OF_FOLDER = set(KINDS) - {".json"}
CONFIGS = {".toml", ".yaml", ".yml", ".ini", ".cfg"}
MEDIA = [
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "avif", "jxl", "tif", "tiff", "heic", "mp4", "mov", "mkv", "webm", "avi", "m4v",
]  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # not U+0080..9F: those are damaged quotes that ftfy repairs
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is none
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
LONGEST_LINE = 8 * 2**20  # letters, far more than any caption; what is longer is another kind of file
MOST_FILES = 5_000_000  # names in a folder that are looked at
# Captions pack to a third or a tenth. What unpacks to far more was made to fill the memory.
MOST_UNPACKED, UNPACKED_BYTES = 100, 8 * 2**20
WHAT_TO_GIVE = "give a text file with one prompt a line, a table (.csv, .tsv, .jsonl, .json, .parquet), or a folder or a glob of these"


def pyarrow_for(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: is read by pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow


# By the suffix, what opens a file to be read
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pyarrow_for(path).input_stream(str(path), compression="zstd"),
}


# ---- which files ----


@dataclass(frozen=True)
class CaptionFile:
    """A file and what it holds: TEXT a caption a line, WHOLE one caption, else the kind of its table."""

    path: Path
    kind: str


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix of a file's kind and that of its compression, each empty where there is none that is known."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def find_caption_files(path: str | Path, prompt_per: str | None = None) -> list[CaptionFile]:
    """Return the files that a path stands for: itself, all of a folder and its folders, or those that a glob matches.

    Args:
        prompt_per: "file" where a text file holds one caption, "line" where it holds one a line; None: one where a picture or
            video of its name lies beside it, as trainers of LoRAs have them, or its name ends in .caption.

    Raises:
        UserError: there are none.
    """
    place = Path(path)
    if place.is_dir():
        found = [file for file in _files_below(place) if _suffixes(file)[0] in KINDS_OF_FOLDER]
        if not found:
            raise UserError(f"{path}: cannot be read (Is a directory without captions); {WHAT_TO_GIVE}")
    elif not os.path.lexists(place) and glob.has_magic(str(path)):
        found = [file for name in glob.iglob(str(path), recursive=True) if (file := Path(name)).is_file()]
        found = [file for file in found if file.suffix.lower().lstrip(".") not in MEDIA]
        if not found:
            raise UserError(f"{path}: no file matches; {WHAT_TO_GIVE}")
    else:
        found = [place]
    beside = _MediaBeside()
    return [CaptionFile(file, _kind_of(file, prompt_per, beside)) for file in sorted(found)]


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its folders, but for what is hidden."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); {WHAT_TO_GIVE}")

    num_names = 0
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        num_names += len(folders) + len(names)
        if num_names > MOST_FILES:
            raise UserError(f"{folder}: holds more than {MOST_FILES:,} files; give the folder of the captions alone")
        yield from (file for name in names if not name.startswith(".") and (file := Path(place, name)).is_file())


class _MediaBeside:
    """Knows which files have a picture or a video of their name beside them; each folder is listed once."""

    def __init__(self) -> None:
        self._stems: dict[Path, set[str]] = {}

    def __call__(self, file: Path) -> bool:
        folder = file.parent
        if folder not in self._stems:
            try:
                names = [name.rpartition(".") for name in os.listdir(folder)]
            except OSError:
                names = []
            self._stems[folder] = {stem for stem, _, suffix in names if suffix.lower() in MEDIA}
        return file.name.partition(".")[0] in self._stems[folder] or file.stem in self._stems[folder]


def _kind_of(file: Path, prompt_per: str | None, has_media: Callable[[Path], bool]) -> str:
    suffix, compression = _suffixes(file)
    if suffix in CONFIGS:
        raise UserError(
            f"{file}: is a config by its name; give the captions that it names, or rename it where it holds prompts"
        )
    kind = KINDS.get(suffix, TEXT)
    if kind == PARQUET and compression:
        raise UserError(f"{file}: a Parquet file is compressed by itself; unpack it and give the .parquet")
    if kind not in (TEXT, WHOLE):
        return kind
    is_whole = kind == WHOLE or has_media(file) if prompt_per is None else prompt_per == "file"
    return WHOLE if is_whole else TEXT


# ---- what is in them ----


class _Unpacked(io.RawIOBase):
    """What a packed file unpacks to, up to a bound."""

    def __init__(self, path: Path, stream: BinaryIO):
        self._path, self._stream, self._num_bytes = path, stream, 0
        self._most = max(UNPACKED_BYTES, MOST_UNPACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        self._num_bytes += len(block)
        if self._num_bytes > self._most:
            raise UserError(
                f"{self._path}: unpacks to more than {MOST_UNPACKED} times its size, as no captions do; unpack it first"
            )
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file as text, unpacked where its name says so; a byte that is not UTF-8 becomes one of U+DC80..DCFF.

    Raises:
        UserError: it cannot be read, also inside.
    """
    compression = _suffixes(path)[1]
    try:
        require_file(path)
        with COMPRESSIONS[compression](path) if compression else open(path, "rb") as stream:
            unpacked = io.BufferedReader(_Unpacked(path, stream), 2**20) if compression else stream
            yield io.TextIOWrapper(unpacked, "utf-8-sig", errors="surrogateescape", newline=None)
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if compression and not getattr(error, "errno", None):
            raise UserError(f"{path}: is damaged, or not packed as its name says ({reason}); copy it again") from None
        raise UserError(f"{path}: cannot be read ({reason}); {WHAT_TO_GIVE}") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of UTF-8 text with their numbers, whatever ends them, without their ends.

    Raises:
        UserError: the file cannot be read, or a line is no text.
    """
    with open_text(path) as text:
        yield from lines_of(path, text)


def lines_of(path: Path, text: TextIO) -> Iterator[tuple[int, str]]:
    number = 0
    while line := text.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise UserError(
                f"{path}, line {number}: is longer than {LONGEST_LINE:,} letters, so this is no text; {WHAT_TO_GIVE}"
            )
        check_utf8(path, line, number)
        yield number, line.removesuffix("\n")


def check_utf8(path: Path, text: str, number: int) -> None:
    """Refuse text that `open_text` gave for bytes that are not UTF-8; `number` is that of its first line."""
    if text.isascii() or not (found := _NOT_UTF8.search(text)):
        return
    number += text.count("\n", 0, found.start())
    if number == 1 and text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise UserError(f"{path}, line 1: starts with a UTF-16 byte order mark; save the file as UTF-8")
    raise UserError(f"{path}, line {number}: byte 0x{ord(found[0]) - 0xDC00:02X} is not UTF-8; save the file as UTF-8")
