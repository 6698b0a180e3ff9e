"""Files of captions that a path stands for, a file, a folder or a glob, and the lines of a text file."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.paths import require_file

TEXT, WHOLE, CSV, TSV, JSON_LINES, JSON, PARQUET = "text", "one caption", "CSV", "TSV", "JSONL", "JSON", "Parquet"
KINDS = {
    ".txt": TEXT, ".caption": WHOLE, ".csv": CSV, ".tsv": TSV, ".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".json": JSON,
    ".parquet": PARQUET,
}  # fmt: skip
# Of a folder a .json is left out: it holds settings more often than captions.
KINDS_OF_FOLDER = set(KINDS) - {".json"}
CONFIGS = {".toml", ".yaml", ".yml", ".ini", ".cfg"}
PACKED = {".gz", ".bz2", ".xz", ".zst", ".zip"}
MEDIA = [
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "avif", "jxl", "tif", "tiff", "heic", "mp4", "mov", "mkv", "webm", "avi", "m4v",
]  # fmt: skip
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # not U+0080..9F: those are damaged quotes that ftfy repairs
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is none
LONGEST_LINE = 8 * 2**20  # letters, far more than any caption; what is longer is another kind of file
WHAT_TO_GIVE = "give a text file with one prompt a line, a table (.csv, .tsv, .jsonl, .json, .parquet), or a folder or a glob of these"


@dataclass(frozen=True)
class CaptionFile:
    """A file and what it holds: TEXT a caption a line, WHOLE one caption, else the kind of its table."""

    path: Path
    kind: str


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
        found = list(_captions_below(place))
        if not found:
            raise UserError(f"{path}: cannot be read (Is a directory without captions); {WHAT_TO_GIVE}")
    elif not os.path.lexists(place) and glob.has_magic(str(path)):
        found = [file for name in glob.iglob(str(path), recursive=True) if (file := Path(name)).is_file()]
        found = [file for file in found if file.suffix.lower().lstrip(".") not in MEDIA]
        if not found:
            raise UserError(f"{path}: no file matches; {WHAT_TO_GIVE}")
    else:
        found = [place]
    media_in = cache(_media_in)
    return [CaptionFile(file, _kind_of(file, prompt_per, media_in)) for file in sorted(found)]


def _captions_below(folder: Path) -> Iterator[Path]:
    """Yield the files of captions in a folder and its folders, but for what is hidden."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); {WHAT_TO_GIVE}")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
            kind = suffixes[0] if len(suffixes) == 2 and suffixes[1] in PACKED else file.suffix.lower()
            if kind in KINDS_OF_FOLDER and file.is_file():
                yield file


def _media_in(folder: Path) -> set[str]:
    """Return the names of the pictures and videos in a folder, without their suffixes."""
    try:
        names = [name.rpartition(".") for name in os.listdir(folder)]
    except OSError:
        return set()
    return {stem for stem, _, suffix in names if suffix.lower() in MEDIA}


def _kind_of(file: Path, prompt_per: str | None, media_in: Callable[[Path], set[str]]) -> str:
    suffix = file.suffix.lower()
    if suffix in CONFIGS:
        raise UserError(
            f"{file}: is a config by its name; give the captions that it names, or rename it where it holds prompts"
        )
    if suffix in PACKED:
        raise UserError(f"{file}: is packed by its name; unpack it and give what it holds")
    kind = KINDS.get(suffix, TEXT)
    if kind not in (TEXT, WHOLE):
        return kind
    if prompt_per is None:
        is_whole = kind == WHOLE or bool(media_in(file.parent) & {file.stem, file.name.partition(".")[0]})
    else:
        is_whole = prompt_per == "file"
    return WHOLE if is_whole else TEXT


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of UTF-8 text with their numbers, whatever ends them, without their ends.

    Raises:
        UserError: the file cannot be read, or a line is no text.
    """
    number = 0
    try:
        require_file(path)
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as text:
            while line := text.readline(LONGEST_LINE):
                number += 1
                _check_text(line, f"{path}, line {number}")
                yield number, line.removesuffix("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {WHAT_TO_GIVE}") from None


def _check_text(line: str, where: str) -> None:
    if len(line) == LONGEST_LINE:
        raise UserError(f"{where}: is longer than {LONGEST_LINE:,} letters, so this is no text; {WHAT_TO_GIVE}")
    if line.isascii() or not (found := _NOT_UTF8.search(line)):
        return
    if line.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise UserError(f"{where}: starts with a UTF-16 byte order mark; save the file as UTF-8")
    raise UserError(f"{where}: byte 0x{ord(found[0]) - 0xDC00:02X} is not UTF-8; save the file as UTF-8")
