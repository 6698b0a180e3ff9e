"""Prompts: those that files hold or templates give, and how Wan cleans each before it is encoded."""

import hashlib
import heapq
import html
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from wandistiller.errors import UserError
from wandistiller.flags import TextFlags
from wandistiller.prompts.caption_files import (
    DELIMITERS,
    LONGEST_PROMPT,
    MEDIA,
    USUAL_COLUMNS,
    CaptionFile,
    WrongRow,
    find_caption_files,
    read_lines,
    read_whole,
    unusable,
)
from wandistiller.prompts.templates import draw_prompts, is_template

SLUG_LENGTH = 48  # letters of a prompt in the name of its picture
NUM_HELD_OUT = 16  # prompts that a run measures on
NUM_OF_TEMPLATES = 4096  # prompts that templates give where nobody says how many
LOOKED_AT = 100  # prompts that tell what a file holds
_SYNTAX = re.compile(
    r"\{[^{}|]{0,99}\|[^{}]{0,99}\}|__\w[\w/ *-]{0,99}?__|<(?:lora|lyco|hypernet):|\([^()]{1,99}:\d*\.?\d+\)"
)
_MEDIA = "|".join(MEDIA)
_TABLE = rf'[\[{{][\[{{]?\s*(?:["\'].*)?|(?=.*[{DELIMITERS}])(?:\w+[{DELIMITERS}])*(?:{"|".join(USUAL_COLUMNS)})(?:[{DELIMITERS}]\w+)*'
# What the first prompts are where a file holds no captions: how many are looked at, half of which is enough, and what is told
_NO_CAPTIONS = [
    (
        _TABLE, 1,
        "a table or JSON; name it .csv, .tsv, .jsonl (a line each) or .json, and give --caption_column the name of the column with the captions",
    ),
    (
        rf"\w+://\S+(?:\s.*)?|.*\.(?:txt|caption|json|npz|npy|pt|safetensors|(?:{_MEDIA})(?:\W.*)?)", LOOKED_AT,
        "names of files or addresses; give the captions, those behind names as a .tsv or .csv whose first line names the columns",
    ),
    (r"\w+\s*=\s*\S.*|\[+[\w.-]+\]+", LOOKED_AT, "a config; give the captions that it names"),
    (r"(?:version https://git-lfs|oid sha256:|size \d+$|<!doctype html|<html).*", LOOKED_AT, "what stands for a file that was not fetched"),
]  # fmt: skip
_NO_TEXT = ("nan", "none", "null", "n/a")  # as tables write an empty cell
# What kohya's and musubi's sample prompts, or Midjourney's, have behind a prompt
_OPTIONS = re.compile(
    r"\s--(?:[wdhslngfiovq]|fs|ar|am|ci|no|iw|ow|cfg|seed|niji|style|stylize|chaos|tile|raw)(?:\s.*|$)", re.S
)


class PromptFile(NamedTuple):
    """Different prompts in their order, each on one line; the notice tells what was left out, or read otherwise than a person may think."""

    prompts: list[str]
    notice: str = ""


def load_prompts(
    path: str | Path,
    caption_column: str | None = None,
    *,
    num_drawn: int | None = None,
    seed: int = 0,
    prompt_per: str | None = None,
) -> PromptFile:
    """Read the prompts of a file, of a folder or of a glob (caption_files.py), or draw those of templates that no run trains on.

    Repeats are left out, of a table also the rows whose caption is empty or no text.

    Args:
        caption_column: the column of tables that holds the prompts, where their names do not tell.
        num_drawn: how many prompts templates give, by `seed`; None for NUM_OF_TEMPLATES.
        prompt_per: "file" where a text file is one prompt, "line" where each of its lines is; None as `find_caption_files` has it.

    Raises:
        UserError: a file cannot be read, is not what its name says, or holds control characters or no prompt; the line is named.
    """
    if is_template(path):
        return PromptFile(draw_prompts(path, seed, 0, num_drawn or NUM_OF_TEMPLATES)[1])
    files = find_caption_files(path, prompt_per)
    left_out: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    prompts: dict[str, None] = {}
    num_rows = 0
    for file in files:
        found = _prompts_of(file, caption_column, left_out, noted)
        first = list(itertools.islice(found, LOOKED_AT))
        _refuse_other_things(file.path, [caption for caption, _ in first])
        for _, prompt in itertools.chain(first, found):
            prompts[prompt] = None
            num_rows += 1
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    rows = f"{left_out.total()} rows left out: {reasons}" if left_out else ""
    if not prompts:
        raise UserError(
            f"{path}: holds no prompt; {rows or 'write one prompt a line (blank lines and # comments do not count)'}"
        )
    repeats = f"{num_rows - len(prompts)} repeated lines left out" if num_rows > len(prompts) else ""
    notes = [repeats, rows, *_how_read(files, num_rows), *(f"{count} {what}" for what, count in noted.items())]
    return PromptFile(list(prompts), "; ".join(filter(None, notes)))


def prompts_to_draw(path: str, count: int | None, flags: TextFlags) -> list[str]:
    """Read the first `count` prompts for a command that draws them, and print what was left out or read otherwise than expected."""
    file = load_prompts(path, flags.caption_column, num_drawn=count, prompt_per=flags.prompt_per)
    if file.notice:
        print(f"{path}: {file.notice}")
    return file.prompts[:count]


def _how_read(files: Sequence[CaptionFile], num_rows: int) -> Iterator[str]:
    """Say where text files could be meant the other way, a prompt each or a prompt a line."""
    kinds = Counter(file.read for file in files)
    if kinds[read_whole]:
        yield f"{kinds[read_whole]} caption files taken whole, a prompt each (--prompt_per line: a prompt a line)"
    if kinds[read_lines] > 1 and num_rows > len(files):
        yield f"{kinds[read_lines]} files read a prompt a line (--prompt_per file: a prompt each)"


def _prompts_of(
    file: CaptionFile, column: str | None, left_out: Counter[str], noted: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yield each caption of a file and its prompt; rows without one, and changes of others, are counted."""
    for row in file.read(file.path, column):
        for caption in row if isinstance(row, list) and row else [row]:
            if not isinstance(caption, str | None):
                caption = WrongRow("whose caption is no text")
            prompt, notes = ("", (caption,)) if isinstance(caption, WrongRow) else _prompt_of(caption or "")
            (noted if prompt else left_out).update(notes)
            if prompt:
                yield str(caption), prompt


@lru_cache(maxsize=1024)  # a packed table may hold a long caption a million times
def _prompt_of(caption: str) -> tuple[str, tuple[str, ...]]:
    """Return a caption on one line, without what other tools take for options, and notes; no text and the reason where it is none."""
    notes: tuple[str, ...] = (f"cut to {LONGEST_PROMPT:,} letters",) if len(caption) > LONGEST_PROMPT else ()
    caption = caption[:LONGEST_PROMPT]
    if reason := unusable(caption):
        return "", (f"whose caption {reason}",)
    text = " ".join(caption.split())
    if text.lower() in _NO_TEXT:
        return "", (f"whose caption is {text}",)
    if " --" in text and (options := _OPTIONS.search(text)):
        notes += ("cut before options such as --w 832",)
        text = text[: options.start()]
    if any(mark in text for mark in "{_<(") and _SYNTAX.search(text):
        notes += (
            "hold {a|b}, __name__, <lora:...> or (word:1.2), learnt as they stand (NAME.template.txt draws the first two)",
        )
    return text, notes


def _refuse_other_things(path: Path, first: list[str]) -> None:
    """Refuse a file whose first prompts are something else, which would be learnt as it is."""
    for pattern, num_looked_at, what in _NO_CAPTIONS:
        looked_at = first[:num_looked_at]
        found = [prompt for prompt in looked_at if re.fullmatch(pattern, prompt, re.I)]
        if found and len(found) * 2 >= len(looked_at):
            raise UserError(f"{path}: holds no captions, and lines such as {found[0][:60]!r}: {what}")


# ---- the prompts of a run ----


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, drawn up front from files and templates alike.

    Attributes:
        train: prompts that are trained on.
        held_out: prompts that errors are measured on: those of `eval_prompts`, of templates those that no run trains on, of a file
            some that were not drawn, or where all are trained on the first of them.
        lines: for the screen: how many there are and where from, what was left out.
    """

    train: list[str]
    held_out: list[str]
    lines: list[str]


def read_prompts(
    path: str | Path,
    column: str | None = None,
    *,
    num_prompts: int | None = None,
    seed: int = 0,
    eval_prompts: str | Path | None = None,
    prompt_per: str | None = None,
) -> Prompts:
    """Read or draw the prompts of a run.

    Args:
        num_prompts: how many are drawn, by `seed`; a larger number adds to them. None takes all of a file, and NUM_OF_TEMPLATES
            of templates.
        eval_prompts: a file or templates of the prompts that errors are measured on.
        prompt_per: as `load_prompts` takes it.
    """
    if is_template(path):
        train, held_out = draw_prompts(path, seed, num_prompts or NUM_OF_TEMPLATES, NUM_HELD_OUT)
        held_out, line = held_out[:NUM_HELD_OUT], f"{len(train):,} drawn from templates, with seed {seed}"
    else:
        file = load_prompts(path, column, prompt_per=prompt_per)
        train, line = file.prompts, f"{len(file.prompts):,}"
        if file.notice:
            line += f" ({file.notice})"
        held_out = train[:NUM_HELD_OUT]
    if num_prompts and num_prompts < len(train):
        drawn_of = heapq.nsmallest(num_prompts + NUM_HELD_OUT, train, key=lambda prompt: _place(prompt, seed))
        train, held_out = drawn_of[:num_prompts], drawn_of[num_prompts:]
        line = f"{num_prompts:,} drawn with seed {seed} of {line}"
    if eval_prompts:
        found = load_prompts(eval_prompts, column, num_drawn=NUM_HELD_OUT, seed=seed, prompt_per=prompt_per)
        held_out = found.prompts[:NUM_HELD_OUT]
    return Prompts(train, held_out, [f"Prompts: {line}"])


def _place(prompt: str, seed: int) -> bytes:
    """Return where a prompt stands in the order of a seed, whatever the others are."""
    return hashlib.sha256(f"{seed} {prompt}".encode()).digest()


# ---- one prompt ----


def slug(prompt: str) -> str:
    """Return a prompt as part of a file name: its letters and digits with hyphens between them."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:SLUG_LENGTH].strip("-") or "prompt"


def clean_prompt(text: str) -> str:
    """Clean a prompt as Wan does: ftfy repairs it, HTML entities are undone twice, whitespace is collapsed."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
