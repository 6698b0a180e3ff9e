"""Prompts: the files that hold them, and how Wan cleans each before it is encoded."""

import html
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.paths import require_file

SLUG_LENGTH = 48  # letters of a prompt in the name of its picture
NUM_HELD_OUT = 16  # a run measures on so many prompts
_LINE_END = re.compile(r"\r\n|\n|\r")  # not str.splitlines: a prompt may hold U+2028 or U+0085
_TABLES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
# For each kind of table the modules that read it, and its rows from standard input
_ROWS = {
    "csv": ("csv, sys", "csv.DictReader(sys.stdin)"),
    "tsv": ("csv, sys", "csv.DictReader(sys.stdin, dialect='excel-tab')"),
    "jsonl": ("json, sys", "map(json.loads, sys.stdin)"),
    "json": ("json, sys", "json.load(sys.stdin)"),
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # not U+0080..9F: those are damaged quotes that ftfy repairs


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file in its order, and the number of repeated lines that were left out."""

    prompts: list[str]
    duplicates: int


def unusable(prompt: str) -> str | None:
    """Return what is wrong with a prompt that was typed, which a file would be refused for as well; None where it is one."""
    if not prompt.split():
        return "is empty"
    if control := _CONTROL.search(prompt.replace("\n", " ").replace("\r", " ")):
        return f"holds the control character U+{ord(control[0]):04X}"
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        return "is not UTF-8 text"
    return None


def load_prompts(path: str | Path, *, keeps_repeats: bool = False) -> PromptFile:
    """Read a UTF-8 file with one prompt on each line; blank lines, `#` lines and repeats are left out.

    Args:
        keeps_repeats: return a prompt as often as it stands in the file.

    Raises:
        UserError: the file cannot be read, is not UTF-8, is a table, or holds control characters or no prompt; the line is named.
    """
    prompts: dict[str, str] = {}
    given: list[str] = []
    lines = _LINE_END.split(_read_text(Path(path)))
    _refuse_table(path, lines)
    for number, line in enumerate(lines, start=1):
        prompt = line.lstrip("\ufeff").strip(" \t")  # a byte order mark sits mid-file where files were concatenated
        if control := _CONTROL.search(prompt):
            raise UserError(
                f"{path}, line {number}: holds the control character U+{ord(control[0]):04X}; a prompts file is plain "
                "UTF-8 text (a file full of U+0000 is UTF-16 or not text at all)"
            )
        if prompt.split() and not prompt.startswith("#"):
            prompts.setdefault(" ".join(prompt.split()), prompt)
            given.append(prompt)
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one prompt a line (blank lines and # comments do not count)")
    if keeps_repeats:
        return PromptFile(given, 0)
    return PromptFile(list(prompts.values()), len(given) - len(prompts))


def _refuse_table(path: str | Path, lines: list[str]) -> None:
    """Refuse CSV and JSON, whose lines would be learnt with their commas and braces; say how a text file is made of one."""
    kind = _TABLES.get(Path(path).suffix.lower()) or ("jsonl" if _is_json(lines) else None)
    if kind is None:
        return
    modules, rows = _ROWS[kind]
    command = f"import {modules}; [print(*row['prompt'].split()) for row in {rows}]"
    raise UserError(
        f"{path}: is {kind.upper()}, whose lines are no prompts; write its prompts to a text file, one a line. Where they are "
        f'called "prompt": python -c "{command}" < {shlex.quote(str(path))} > prompts.txt'
    )


def _is_json(lines: list[str]) -> bool:
    """Return whether the first line that is not blank is a JSON object, which no prompt is."""
    first = next((line.lstrip("\ufeff") for line in lines if line.split()), "")
    try:
        return first.lstrip().startswith("{") and isinstance(parse_json(first), dict)
    except JsonError:
        return False


def _read_text(path: Path) -> str:
    try:
        require_file(path)
        raw = path.read_bytes()
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror}); give a text file with one prompt a line") from err
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}, line 1: starts with a UTF-16 byte order mark; save the file as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        number = len(_LINE_END.split(err.object[: err.start].decode("utf-8")))
        bad_byte = err.object[err.start]
        raise UserError(f"{path}, line {number}: byte 0x{bad_byte:02X} is not UTF-8; save the file as UTF-8") from err


def slug(prompt: str) -> str:
    """Return a prompt as part of a file name: its letters and digits with hyphens between them."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:SLUG_LENGTH].strip("-") or "prompt"


def clean_prompt(text: str) -> str:
    """Clean a prompt as Wan does: ftfy repairs it, HTML entities are undone twice, whitespace is collapsed."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


@dataclass(frozen=True)
class Texts:
    """The prompts of a run.

    Attributes:
        prompts: prompts that are trained on.
        extra: prompts that --prompt_swap alone trains on.
        held_out: prompts that errors are measured on.
        duplicates: number of repeated lines that were left out of `prompts`.
    """

    prompts: list[str]
    extra: list[str]
    held_out: list[str]
    duplicates: int = 0


def read_texts(data_path: str, extra_prompts: str | None, eval_prompts: str | None, is_measured: bool) -> Texts:
    """Read the prompts of all files of a run.

    Args:
        is_measured: whether held-out prompts are needed; without `eval_prompts` they are the first of `data_path`.
    """
    file = load_prompts(data_path)
    extra = load_prompts(extra_prompts).prompts if extra_prompts else []
    held_out = (load_prompts(eval_prompts) if eval_prompts else file).prompts[:NUM_HELD_OUT] if is_measured else []
    known = set(file.prompts)
    return Texts(file.prompts, [prompt for prompt in extra if prompt not in known], held_out, file.duplicates)
