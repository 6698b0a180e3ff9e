"""Prompts: the files that hold them, and how Wan cleans each before it is encoded."""

import html
import re
from dataclasses import dataclass
from pathlib import Path

from wandistiller.errors import UserError

NUM_HELD_OUT = 16  # a run measures on so many prompts
_LINE_END = re.compile(r"\r\n|\n|\r")  # not str.splitlines: a prompt may hold U+2028 or U+0085
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # not U+0080..9F: those are damaged quotes that ftfy repairs


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file in its order, and the number of repeated lines that were left out."""

    prompts: list[str]
    duplicates: int


def load_prompts(path: str | Path) -> PromptFile:
    """Read a UTF-8 file with one prompt on each line; blank lines, `#` lines and repeats are left out.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds control characters or no prompt; the line is named.
    """
    prompts: dict[str, str] = {}
    num_lines = 0
    for number, line in enumerate(_LINE_END.split(_read_text(Path(path))), start=1):
        prompt = line.lstrip("\ufeff").strip(" \t")  # a byte order mark sits mid-file where files were concatenated
        if control := _CONTROL.search(prompt):
            raise UserError(
                f"{path}, line {number}: holds the control character U+{ord(control[0]):04X}; a prompts file is plain "
                "UTF-8 text (a file full of U+0000 is UTF-16 or not text at all)"
            )
        if prompt.split() and not prompt.startswith("#"):
            prompts.setdefault(" ".join(prompt.split()), prompt)
            num_lines += 1
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one prompt a line (blank lines and # comments do not count)")
    return PromptFile(list(prompts.values()), num_lines - len(prompts))


def _read_text(path: Path) -> str:
    try:
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
