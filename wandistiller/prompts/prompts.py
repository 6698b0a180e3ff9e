"""Prompts: those that files hold or templates give, and how Wan cleans each before it is encoded."""

import hashlib
import heapq
import html
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.prompts.caption_files import CONTROL, MEDIA, TEXT, WHOLE, CaptionFile, find_caption_files, text_lines
from wandistiller.prompts.tables import DELIMITERS, USUAL_COLUMNS, WrongRow, table_rows
from wandistiller.prompts.templates import draw_prompts, is_template

SLUG_LENGTH = 48  # letters of a prompt in the name of its picture
NUM_HELD_OUT = 16  # prompts that a run measures on
NUM_OF_TEMPLATES = 4096  # prompts that templates give where nobody says how many
LONGEST_PROMPT = 20_000  # letters; Wan reads 512 tokens, some 2,500
LOOKED_AT = 100  # prompts that tell what a file holds
_SURROGATE = re.compile("[\ud800-\udfff]")
_MEDIA = "|".join(MEDIA)
_SYNTAX = re.compile(
    r"\{[^{}|]{0,99}\|[^{}]{0,99}\}|__\w[\w/ *-]{0,99}?__|<(?:lora|lyco|hypernet):|\([^()]{1,99}:\d*\.?\d+\)"
)
# What at least half of the first prompts are where a file holds no captions, the kinds of files that may, and what is told
_NO_CAPTIONS = [
    (rf"(?:https?://\S+|.*\.(?:{_MEDIA}|txt|caption|json|npz|npy|pt|safetensors))", "", "names of files or addresses; give the captions"),
    (
        rf"\S+\.(?:{_MEDIA})[\s,;|:]+\S.*|.*\.(?:{_MEDIA})[\t,;|:]\s*\S.*", "",
        "captions behind names of files; make it a .tsv or .csv whose first line names the columns",
    ),
    (r"\w+\s*=\s*\S.*|\[+[\w.-]+\]+", TEXT, "a config; give the captions that it names"),
    (r"(?:version https://git-lfs|oid sha256:|size \d+$|<!doctype html|<html).*", TEXT, "what stands for a file that was not fetched"),
]  # fmt: skip
# What the first line of a text file is where the file is something else
_JSON = re.compile(r'[\[{][\[{]?\s*(?:"|$)')
_HEADER = re.compile(
    rf"(?=.*[{DELIMITERS}])(?:\w+[{DELIMITERS}])*(?:{'|'.join(USUAL_COLUMNS)})(?:[{DELIMITERS}]\w+)*", re.I
)
# What kohya's and musubi's sample prompts, or Midjourney's, have behind a prompt
_OPTIONS = re.compile(
    r"\s--(?:[wdhslngfiovq]|fs|ar|am|ci|no|iw|ow|cfg|seed|niji|style|stylize|chaos|tile|raw)(?:\s.*|$)", re.S
)


@dataclass(frozen=True)
class PromptFile:
    """The different prompts of files in their order, or those that templates give.

    Attributes:
        notice: what was left out, or read otherwise than a person may think; empty where nothing was.
    """

    prompts: list[str]
    notice: str = ""


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


def load_prompts(
    path: str | Path,
    caption_column: str | None = None,
    *,
    num_drawn: int | None = None,
    seed: int = 0,
    held_out: bool = False,
    prompt_per: str | None = None,
) -> PromptFile:
    """Read the prompts of a file, of a folder or of a glob (caption_files.py), or draw those of templates (templates.py).

    Of a text file every line is a prompt but for blank lines and `#` lines. Repeats are left out, of a table also the rows whose
    caption is empty or no text.

    Args:
        caption_column: the column of tables that holds the prompts, where their names do not tell.
        num_drawn: how many prompts templates give, by `seed`; None for NUM_OF_TEMPLATES.
        held_out: of templates, draw prompts that no run trains on instead of the others.
        prompt_per: "file" where a text file is one prompt, "line" where each of its lines is; None as `find_caption_files` has it.

    Raises:
        UserError: a file cannot be read, is not what its name says, or holds control characters or no prompt; the line is named.
    """
    if is_template(path):
        count = num_drawn or NUM_OF_TEMPLATES
        drawn = draw_prompts(path, seed, *((0, count) if held_out else (count, 0)))
        return PromptFile(drawn.held_out if held_out else drawn.train)
    prompts: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    num_rows = 0
    files = find_caption_files(path, prompt_per)
    for file in files:
        for text in _looked_at(file, READERS.get(file.kind, _captions)(file, caption_column, left_out)):
            key, prompt, notes_of_it = _prompt_of(text)
            prompts.setdefault(key, prompt)
            noted.update(notes_of_it)
            num_rows += 1
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    rows = f"{left_out.total()} rows left out: {reasons}" if left_out else ""
    if not prompts:
        raise UserError(
            f"{path}: holds no prompt; {rows or 'write one prompt a line (blank lines and # comments do not count)'}"
        )
    repeats = f"{num_rows - len(prompts)} repeated lines left out" if num_rows > len(prompts) else ""
    changes = [f"{count} {what}" for what, count in noted.items()]
    notes = [repeats, rows, *_how_read(files, num_rows), *changes]
    return PromptFile(list(prompts.values()), "; ".join(filter(None, notes)))


def _how_read(files: Sequence[CaptionFile], num_rows: int) -> Iterator[str]:
    """Say where text files could be meant the other way, a prompt each or a prompt a line."""
    kinds = Counter(file.kind for file in files)
    if kinds[WHOLE]:
        yield f"{kinds[WHOLE]} caption files taken whole, a prompt each (--prompt_per line: a prompt a line)"
    if kinds[TEXT] > 1 and num_rows > len(files):
        yield f"{kinds[TEXT]} files read a prompt a line (--prompt_per file: a prompt each)"


@lru_cache(maxsize=1024)  # a packed table may hold a long caption a million times
def _prompt_of(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Return what tells repeats, a prompt without what other tools take for options, and notes on that and on syntax learnt as it is."""
    notes: tuple[str, ...] = (f"cut to {LONGEST_PROMPT:,} letters",) if len(text) > LONGEST_PROMPT else ()
    text = text[:LONGEST_PROMPT]
    if " --" in text and (options := _OPTIONS.search(text)) and options.start():
        notes += ("cut before options such as --w 832",)
        text = text[: options.start()].rstrip()
    if any(mark in text for mark in "{_<(") and _SYNTAX.search(text):
        notes += (
            "hold {a|b}, __name__, <lora:...> or (word:1.2), learnt as they stand (NAME.template.txt draws the first two)",
        )
    return " ".join(text.split()), text, notes


def _looked_at(file: CaptionFile, prompts: Iterator[str]) -> Iterator[str]:
    """Refuse prompts whose first ones are something else, which would be learnt as it is."""
    first = list(itertools.islice(prompts, LOOKED_AT))
    for pattern, kind, what in _NO_CAPTIONS if first else ():
        found = [prompt for prompt in first if re.fullmatch(pattern, prompt, re.I)]
        if len(found) * 2 >= len(first) and kind in ("", file.kind):
            raise UserError(f"{file.path}: holds no captions, and lines such as {found[0][:60]!r}: {what}")
    if first and file.kind == TEXT and (_JSON.match(first[0]) or _HEADER.fullmatch(first[0])):
        raise UserError(
            f"{file.path}: is a table or JSON, whose first line is {first[0][:60]!r}; name it .csv, .tsv, .jsonl (a line each) or .json, "
            "and give --caption_column the name of the column with the captions"
        )
    return itertools.chain(first, prompts)


def _lines(file: CaptionFile, column: str | None, left_out: Counter[str]) -> Iterator[str]:
    """Yield the prompts of a text file, one a line.

    Raises:
        UserError: a line is no prompt.
    """
    for number, row in text_lines(file.path):
        prompt, where = row.lstrip("\ufeff").strip(" \t"), f"{file.path}, line {number}"  # files were concatenated
        if not prompt or prompt.startswith("#") or prompt.isspace():
            continue
        if reason := unusable(prompt):
            raise UserError(f"{where}: {reason}; a prompts file is plain UTF-8 text, one prompt a line")
        if prompt.startswith("--"):
            raise UserError(f"{where}: begins with an option, {prompt[:40]!r}; write the prompt alone")
        yield prompt


def _whole(file: CaptionFile, column: str | None, left_out: Counter[str]) -> Iterator[str]:
    """Yield the one caption of a file, whose line breaks are spaces."""
    lines: list[str] = []
    num_letters = 0
    for _, line in text_lines(file.path):
        lines.append(line.strip("\ufeff \t"))
        num_letters += len(line)
        if num_letters > LONGEST_PROMPT:
            break
    yield from _usable(" ".join(filter(None, lines)), left_out)


def _captions(file: CaptionFile, asked: str | None, left_out: Counter[str]) -> Iterator[str]:
    """Yield the captions of a table, each of a list of them, and count the rows that have none."""
    for row in table_rows(file, asked):
        for caption in row if isinstance(row, list) and row else [row]:
            yield from _usable(caption, left_out)


def _usable(caption: object, left_out: Counter[str]) -> Iterator[str]:
    """Yield a caption with its line breaks as spaces, or count what is wrong with it; of a long one hardly more than is taken."""
    if isinstance(caption, WrongRow):
        left_out[caption.reason] += 1
    elif not isinstance(caption, str | None):
        left_out["whose caption is no text"] += 1
    else:
        caption = caption or ""
        reason, text = _on_one_line(caption if len(caption) <= LONGEST_PROMPT else caption[: LONGEST_PROMPT + 1])
        if reason:
            left_out[f"whose caption {reason}"] += 1
        else:
            yield text


@lru_cache(maxsize=1024)
def _on_one_line(caption: str) -> tuple[str | None, str]:
    return unusable(caption[:LONGEST_PROMPT]), " ".join(caption.split())


READERS: dict[str, Callable[[CaptionFile, str | None, Counter[str]], Iterator[str]]] = {TEXT: _lines, WHOLE: _whole}


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
        drawn = draw_prompts(path, seed, num_prompts or NUM_OF_TEMPLATES, NUM_HELD_OUT)
        train, held_out = drawn.train, drawn.held_out[:NUM_HELD_OUT]
        line = f"{len(train):,} drawn from {drawn.num_templates} templates, with seed {seed}"
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
        found = load_prompts(
            eval_prompts, column, num_drawn=NUM_HELD_OUT, seed=seed, held_out=True, prompt_per=prompt_per
        )
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
