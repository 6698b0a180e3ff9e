"""Prompts: the files that hold them, and how Wan cleans each before it is encoded."""

import hashlib
import heapq
import html
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from wandistiller.errors import UserError
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.prompts.caption_files import CONTROL, TEXT, WrongRow, find_caption_files, kind_of, read_rows
from wandistiller.prompts.templates import TemplatePrompts, Templates, is_template

SLUG_LENGTH = 48  # letters of a prompt in the name of its picture
NUM_OF_TEMPLATES = 4096  # prompts that templates give where nobody says how many
NUM_HELD_OUT = 16  # a run measures on so many prompts


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file or of several, in their order.

    Attributes:
        prompts: those of files, or those that templates give.
        duplicates: number of repeated lines or rows that were left out.
        left_out: of tables, how many other rows were left out, by what is wrong with them.
    """

    prompts: Sequence[str]
    duplicates: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def notice(self) -> str:
        """What was left out of tables, in words; empty where nothing was."""
        return rows_left_out(self.left_out)


def rows_left_out(reasons: Mapping[str, int]) -> str:
    """Return how many rows of tables were left out, and why; empty where none were."""
    if not reasons:
        return ""
    each = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda known: -known[1]))
    return f"{sum(reasons.values())} rows left out: {each}"


def unusable(prompt: str) -> str | None:
    """Return what is wrong with a prompt that was typed, which a file would be refused for as well; None where it is one."""
    if not prompt.split():
        return "is empty"
    if control := CONTROL.search(prompt.replace("\n", " ").replace("\r", " ")):
        return f"holds the control character U+{ord(control[0]):04X}"
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        return "is not UTF-8 text"
    return None


def load_prompts(
    path: str | Path,
    caption_column: str | None = None,
    *,
    seed: int = 0,
    held_out: bool = False,
    keeps_repeats: bool = False,
) -> PromptFile:
    """Read the prompts of a file, of a folder or of a glob (caption_files.py), or those that templates give (templates.py).

    Of a text file every line is a prompt but for blank lines and `#` lines. Repeats are left out, of a table also the rows whose
    caption is empty or no text.

    Args:
        caption_column: the column of tables that holds the prompts, where their names do not tell.
        seed: of what templates give.
        held_out: of templates, the prompts that no run trains on instead of the others.
        keeps_repeats: return a prompt as often as it stands in the files.

    Raises:
        UserError: a file cannot be read, is not what its name says, or holds control characters or no prompt; the line is named.
    """
    if is_template(path):
        return PromptFile(TemplatePrompts(Templates.load(path), seed, held_out))
    prompts: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    given: list[str] = []
    num_rows = 0
    for file in find_caption_files(path):
        is_text = kind_of(file) == TEXT
        for prompt in _lines_of(file) if is_text else _captions_of(file, caption_column, left_out):
            words = " ".join(prompt.split())
            prompts.setdefault(prompt if words == prompt else words, prompt)
            num_rows += 1
            if keeps_repeats:
                given.append(prompt)
    if not prompts:
        nothing = "write one prompt a line (blank lines and # comments do not count)"
        raise UserError(f"{path}: holds no prompt; {rows_left_out(left_out) or nothing}")
    if keeps_repeats:
        return PromptFile(given, 0, left_out)
    return PromptFile(list(prompts.values()), num_rows - len(prompts), left_out)


def _lines_of(file: Path) -> Iterator[str]:
    """Yield the prompts of a text file.

    Raises:
        UserError: a line holds control characters, or the lines are JSON, which would be learnt with its braces.
    """
    has_begun = False
    for number, row in read_rows(file):
        line = str(row).lstrip("\ufeff")  # a byte order mark sits mid-file where files were concatenated
        if not has_begun and line.split():
            has_begun = True
            if _is_json(line):
                raise UserError(
                    f"{file}: is JSONL, whose lines are no prompts; name it .jsonl, and give --caption_column the name of the field "
                    "that holds them"
                )
        prompt = line.strip(" \t")
        if not prompt.isprintable() and (control := CONTROL.search(prompt)):
            raise UserError(
                f"{file}, line {number}: holds the control character U+{ord(control[0]):04X}; a prompts file is plain "
                "UTF-8 text (a file full of U+0000 is UTF-16 or not text at all)"
            )
        if prompt and not prompt.startswith("#") and not prompt.isspace():
            yield prompt


def _captions_of(file: Path, column: str | None, left_out: Counter[str]) -> Iterator[str]:
    """Yield the captions of a table, and count the rows that have none; line breaks in a caption are spaces."""
    for _, row in read_rows(file, column):
        if isinstance(row, WrongRow):
            left_out[row.reason] += 1
        elif row is None or (isinstance(row, str) and (not row or row.isspace())):
            left_out["without a caption"] += 1
        elif not isinstance(row, str):
            left_out["whose caption is no text"] += 1
        elif row.isprintable():
            yield row.strip(" ")
        elif unusable(row):
            left_out["with control characters"] += 1
        else:
            yield " ".join(row.split())


def _is_json(line: str) -> bool:
    """Return whether a line is a JSON object, which no prompt is."""
    try:
        return line.lstrip().startswith("{") and isinstance(parse_json(line), dict)
    except JsonError:
        return False


def slug(prompt: str) -> str:
    """Return a prompt as part of a file name: its letters and digits with hyphens between them."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:SLUG_LENGTH].strip("-") or "prompt"


def clean_prompt(text: str) -> str:
    """Clean a prompt as Wan does: ftfy repairs it, HTML entities are undone twice, whitespace is collapsed."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, drawn up front from files and templates alike.

    Attributes:
        train: prompts that are trained on.
        held_out: prompts that errors are measured on: those of `eval_prompts`, of templates those that no run trains on, else
            the first of `train`.
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
) -> Prompts:
    """Read or draw the prompts of a run.

    Args:
        num_prompts: how many are drawn, by `seed`; a larger number adds to them. None takes all of a file, and NUM_OF_TEMPLATES
            of templates.
        eval_prompts: a file or templates of the prompts that errors are measured on.
    """
    file = load_prompts(path, column, seed=seed)
    own, there = file.prompts, f"{len(file.prompts):,}"
    if isinstance(own, TemplatePrompts) and own.is_endless:
        train = list(dict.fromkeys(own[: num_prompts or NUM_OF_TEMPLATES]))
        held_out = own.of_held_out()[:NUM_HELD_OUT]
        there = f"{len(train):,} drawn from {own.templates.num_templates} templates, with seed {seed}"
    else:
        train = list(own)
        if num_prompts and num_prompts < len(train):
            train = heapq.nsmallest(num_prompts, train, key=lambda prompt: _place(prompt, seed))
            there = f"{num_prompts:,} of {there}, drawn with seed {seed}"
        held_out = train[:NUM_HELD_OUT]
    if eval_prompts:
        held_out = load_prompts(eval_prompts, column, seed=seed, held_out=True).prompts[:NUM_HELD_OUT]
    repeats = f"{file.duplicates} repeated lines left out" if file.duplicates else ""
    left_out = "; ".join(part for part in (repeats, file.notice) if part)
    return Prompts(train, list(held_out), [f"Prompts: {there}" + (f" ({left_out})" if left_out else "")])


def _place(prompt: str, seed: int) -> bytes:
    """Return where a prompt stands in the order of a seed, whatever the others are."""
    return hashlib.sha256(f"{seed} {prompt}".encode()).digest()


class JoinedTexts(Sequence[str]):
    """Texts of one sequence, and after them those of another."""

    def __init__(self, first: Sequence[str], second: Sequence[str]):
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self.first[place] if place < len(self.first) else self.second[place - len(self.first)]


def identity_of(prompts: Sequence[str]) -> Iterator[str]:
    """Yield the texts that tell some prompts from others: they themselves, or the templates that they are drawn from."""
    if isinstance(prompts, JoinedTexts):
        return itertools.chain(identity_of(prompts.first), identity_of(prompts.second))
    return iter(prompts.identity() if isinstance(prompts, TemplatePrompts) else prompts)


def is_endless(prompts: Sequence[str]) -> bool:
    """Return whether prompts are drawn from templates, so that nobody comes to their end."""
    return isinstance(prompts, TemplatePrompts) and prompts.is_endless


@dataclass(frozen=True)
class Texts:
    """The prompts of a run.

    Attributes:
        prompts: prompts that are trained on.
        extra: prompts that --prompt_swap alone trains on.
        held_out: prompts that errors are measured on.
        duplicates: number of repeated lines that were left out of `prompts`.
        notice: what else was left out, in words.
    """

    prompts: Sequence[str]
    extra: Sequence[str]
    held_out: Sequence[str]
    duplicates: int = 0
    notice: str = ""

    @property
    def trained(self) -> Sequence[str]:
        """The prompts, and after them the extra ones."""
        return JoinedTexts(self.prompts, self.extra) if self.extra else self.prompts

    @property
    def is_endless(self) -> bool:
        """Whether the prompts are drawn from templates, so that no run comes to their end."""
        return is_endless(self.prompts)


@dataclass(frozen=True)
class TextPaths:
    """Where the prompts of a run are, as its flags of the same names say."""

    data_path: str
    caption_column: str | None = None
    extra_prompts: str | None = None
    eval_prompts: str | None = None


def read_texts(paths: TextPaths, is_measured: bool, seed: int = 0) -> Texts:
    """Read the prompts of all files of a run.

    Args:
        is_measured: whether held-out prompts are needed; without `eval_prompts` they are the first of `data_path`, or of what its
            templates hold out.
        seed: of what templates give.
    """
    column = paths.caption_column
    file = load_prompts(paths.data_path, column, seed=seed)
    extra = load_prompts(paths.extra_prompts, column, seed=seed).prompts if paths.extra_prompts else []
    if extra and not is_endless(file.prompts) and not is_endless(extra):
        known = set(file.prompts)
        extra = [prompt for prompt in extra if prompt not in known]
    held_out: Sequence[str] = []
    if is_measured and paths.eval_prompts:
        held_out = load_prompts(paths.eval_prompts, column, seed=seed, held_out=True).prompts[:NUM_HELD_OUT]
    elif is_measured:
        own = file.prompts
        held_out = (own.of_held_out() if isinstance(own, TemplatePrompts) else own)[:NUM_HELD_OUT]
    return Texts(file.prompts, extra, held_out, file.duplicates, file.notice)
