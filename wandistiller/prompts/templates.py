r"""Prompt templates with the wildcards that users of Stable Diffusion know.

A file NAME.template.txt holds one template a line; blank lines and lines that begin with # or // do not count.

    {red|blue}          one of these; {3::red|blue} draws red three times as often
    {2$$red|blue|green} two different ones, joined by a comma; {1-2$$ and $$red|blue} one or two, joined by " and "
    __animals/birds__   a line of animals/birds.txt in the folder of the templates, which is a template itself;
                        __animals/*__, __animals/**__ and __b?rds__ a line of any file of such a name; {2$$__animals/birds__} two
    \{ \} \| \_ \$ \\   these letters themselves

A line may begin with a weight too (3::text). What else such templates may hold elsewhere is refused as it is written, never learnt
as text. The library dynamicprompts reads the same syntax and more, but keeps a wildcard without a file as text, and has no bounds.
"""

import hashlib
import heapq
import itertools
import random
import re
from collections.abc import Iterator
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

from wandistiller.errors import UserError
from wandistiller.files.paths import stays_inside
from wandistiller.prompts.caption_files import CONTROL, text_lines

SUFFIX = ".template.txt"
FEW = 1024  # templates of fewer different prompts are a list like any other, of which nothing is held out
# One prompt in so many is held out: its digest says so, so that no run and no seed trains on it.
HELD_OUT_SHARE = 50
MOST_TRIES = 10_000  # draws in a row without a new prompt, after which there are no more
# Bounds on what a stranger's templates cost: letters of a prompt, and on the way to it; steps and passes to draw it; letters of a
# line; lines; braces in braces; options drawn at once
LONGEST_PROMPT, LONGEST_TEXT, MOST_STEPS, MOST_PASSES = 4000, 40_000, 4000, 100
LONGEST_LINE, MOST_LINES, DEEPEST, MOST_OPTIONS = 20_000, 2_000_000, 50, 999

# Letters that a \ before them makes text are these code points, which Unicode keeps free of letters, until a prompt is drawn.
_ESCAPED = "{}|_$\\:#!@~<["
_TO_LETTERS = {0xFDD0 + index: letter for index, letter in enumerate(_ESCAPED)}
_ESCAPE = re.compile(rf"\\([{re.escape(_ESCAPED)}])")
_WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})::")
_SEVERAL = re.compile(r"\s*(?=-?\d)(?P<low>\d{0,3})(?P<high>-\d{0,3})?\$\$(?:(?P<separator>[^|]*?)\$\$)?")
_WILDCARD = re.compile(r"__~?((?=[^\s_])[^{}|$\\<>]{0,199}?[^\s_{}|$\\<>])__")
_PART = re.compile(rf"\{{([^{{}}]*)\}}|{_WILDCARD.pattern}")  # the innermost braces, and wildcards
_UNKNOWN = re.compile(
    r"""\$\{                                                        # variables: ${name=...}
    | (?:\{|__)[!@]                                                 # samplers: {!red|blue}, __@name__
    | __[^\s{}|_][^{}|]{0,99}?\([^(){}|=]{0,99}=[^(){}|]{0,99}\)__  # parameters: __name(size=big)__
    | \d\#__                                                        # numbers: 2#__name__
    | <(?:wildcard|wc|random|alternate|lora|lyco|hypernet|embed|embedding|preset|segment|setvar|var)[:\[]
    | \[[^\[\]|]{0,200}:[^\[\]|]{0,200}:\s*\d*\.?\d+\s*\]           # prompt editing: [from:to:0.5]
    """,
    re.I | re.X,
)


def is_template(path: str | Path) -> bool:
    """Return whether a path is a file of templates, or a folder that has such files."""
    place = Path(path)
    return place.name.lower().endswith(SUFFIX) or (place.is_dir() and bool(_template_files(place)))


def _template_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.lower().endswith(SUFFIX))


def is_held_out(prompt: str) -> bool:
    """Return whether a prompt belongs to the part that is never trained on."""
    digest = hashlib.sha256(" ".join(prompt.split()).encode()).digest()
    return int.from_bytes(digest[:8]) % HELD_OUT_SHARE == 0


# ---- a line ----


class Lines(NamedTuple):
    """Templates of which one or several are drawn; `ends` are the sums of their weights up to each."""

    texts: list[str]
    ends: list[float]

    @classmethod
    def of(cls, written: list[str]) -> "Lines":
        """Read the weights before texts, such as 3:: in 3::red; one of 0 is next to nothing."""
        found = [_WEIGHT.match(text) for text in written]
        ends = list(itertools.accumulate(max(float(weight[1]), 1e-6) if weight else 1.0 for weight in found))
        return cls([text[weight.end() if weight else 0 :] for text, weight in zip(written, found, strict=True)], ends)


class Several(NamedTuple):
    """How many different ones are drawn, at most all that there are, and what joins them."""

    low: int = 1
    high: int = 1
    separator: str = ""


def _options(inside: str) -> tuple[Lines, Several]:
    """Return the options between braces, and how many of them are drawn where a $$ says so: "2$$", "1-3$$", "2$$ and $$"."""
    inside, several = inside.removeprefix("~"), Several()
    if found := _SEVERAL.match(inside):
        low, separator = int(found["low"] or 0), found["separator"]
        high = low if found["high"] is None else int(found["high"][1:] or MOST_OPTIONS)
        several = Several(low, high, ", " if separator is None else separator)
        inside = inside[found.end() :]
    return Lines.of(inside.split("|")), several


def _checked_line(line: str, where: str) -> str:
    """Return a line with its escaped letters hidden, or refuse one that is too long, does not close or holds what is not known here."""
    if len(line) > LONGEST_LINE:
        raise UserError(f"{where}: is longer than {LONGEST_LINE:,} letters, and no template")
    text = _ESCAPE.sub(lambda found: chr(0xFDD0 + _ESCAPED.index(found[1])), line)
    if found := _UNKNOWN.search(text):
        raise UserError(
            f"{where}: {found[0][:40]!r} begins a variable, sampler, parameter, number, tag or edit of other tools, none of which "
            "is known here; docs/files.md has the syntax that is"
        )
    depth = 0
    for mark in re.finditer(r"[{}|]", text):
        is_outside = mark[0] != "{" and depth == 0
        depth += {"{": 1, "}": -1, "|": 0}[mark[0]]
        if is_outside or depth > DEEPEST:
            why = "stands outside of braces" if is_outside else f"is nested more than {DEEPEST} deep"
            raise UserError(
                f"{where}: the {mark[0]} at letter {mark.start() + 1} {why}; write \\{mark[0]} for the letter"
            )
    if depth:
        raise UserError(f"{where}: {depth} of its {{ have no }}; write \\{{ for the letter")
    return text


# ---- a folder of templates ----


class Templates:
    """Templates of a file or folder and the wildcards that they lead to, all of which are there; a line that is wrong is named."""

    def __init__(self, path: str | Path):
        place = Path(path)
        self.folder = place if place.is_dir() else place.parent
        self._num_lines = 0
        self.root, waiting = self._read(_template_files(place) if place.is_dir() else [place])
        self.wildcards: dict[str, Lines] = {}
        while waiting:
            name, where = waiting.popitem()
            if name not in self.wildcards:
                self.wildcards[name], names = self._read(self._files_of(name, where))
                waiting |= names

    def _read(self, files: list[Path]) -> tuple[Lines, dict[str, str]]:
        """Return the lines of some files, and where each wildcard of theirs stands."""
        lines: list[str] = []
        names: dict[str, str] = {}
        for file in files:
            before = len(lines)
            for number, text in text_lines(file):
                line, where = text.lstrip("\ufeff").strip(), f"{file}, line {number}"
                if control := CONTROL.search(line):
                    raise UserError(f"{where}: holds the control character U+{ord(control[0]):04X}")
                if not line or line.startswith(("#", "//")):
                    continue
                self._num_lines += 1
                if self._num_lines > MOST_LINES:
                    raise UserError(f"{where}: there are more than {MOST_LINES:,} lines of templates and wildcards")
                lines.append(_checked_line(line, where))
                names |= dict.fromkeys(_WILDCARD.findall(lines[-1]), where)
            if len(lines) == before:
                raise UserError(f"{file}: holds no line; blank lines and comments do not count")
        return Lines.of(lines), names

    def _files_of(self, name: str, where: str) -> list[Path]:
        """Return the files that a wildcard's lines come from."""
        file, found = self.folder / f"{name}.txt", []
        if stays_inside(name):
            try:
                every = self.folder.glob(re.sub(r"\*\*$", "**/*", name) + ".txt") if has_magic(name) else [file]
                found = sorted(one for one in every if one.is_file() and not one.name.lower().endswith(SUFFIX))
            except (OSError, ValueError):  # a name or pattern that no file can have
                found = []
        if not found:
            raise UserError(f"{where}: there is no wildcard __{name}__; it would be a line of {file}")
        return found

    def draw(self, generator: random.Random) -> str:
        """Draw a prompt: the innermost braces and the wildcards of a line give their texts, until there are none."""
        text, steps = _drawn(self.root, Several(), generator), 0
        for _ in range(MOST_PASSES):
            text, count = _PART.subn(lambda part: self._text_of(part, generator), text)
            steps += count
            if not count and len(text) <= LONGEST_PROMPT:
                return " ".join(text.translate(_TO_LETTERS).split())
            if not count or steps > MOST_STEPS or len(text) > LONGEST_TEXT:
                break
        raise UserError(
            f"{self.folder}: its templates give prompts of more than {LONGEST_PROMPT} letters or parts, or wildcards that lead back "
            "to themselves"
        )

    def _text_of(self, part: re.Match[str], generator: random.Random) -> str:
        inside, name = part.groups()
        options, several = _options(inside or "")
        if len(options.texts) == 1 and (wildcard := _WILDCARD.fullmatch(options.texts[0])):
            name = wildcard[1]
        if name and name not in self.wildcards:
            raise UserError(f"{self.folder}: parts of its templates join to __{name}__, which no line of it holds")
        return _drawn(self.wildcards[name] if name else options, several, generator)


def _drawn(lines: Lines, several: Several, generator: random.Random) -> str:
    """Draw one line by its weight, or several of them, none twice, with the separator between them."""
    texts, ends = lines
    if several.low == several.high == 1:
        return generator.choices(texts, cum_weights=ends)[0]
    low, high = (min(bound, len(texts)) for bound in several[:2])
    size = low + int(generator.random() * (high - low + 1))
    # The largest of u^(1 / weight) are a weighted draw without replacement (Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003).
    weights = (end - before for before, end in itertools.pairwise([0.0, *ends]))
    keys = [(generator.random() ** (1 / (weight or 1e-6)), index) for index, weight in enumerate(weights)]
    return several.separator.join(texts[index] for _, index in heapq.nlargest(size, keys))


# ---- the prompts ----


def different_prompts(templates: Templates, seed: int) -> Iterator[str]:
    """Yield the different prompts that templates give, in the order of a seed, until hardly any new one comes."""
    generator = random.Random(f"prompts of seed {seed}")  # nosec B311 # no secret
    known: set[str] = {""}
    tries = 0
    while tries < MOST_TRIES:
        prompt = templates.draw(generator)
        tries += 1
        if prompt not in known:
            known.add(prompt)
            tries = 0
            yield prompt


def draw_prompts(path: str | Path, seed: int, num_train: int, num_held_out: int) -> tuple[list[str], list[str]]:
    """Draw different prompts to train on and held-out ones; templates that give few give all of them to both sides."""
    templates = Templates(path)
    few = list(itertools.islice(different_prompts(templates, 0), FEW))
    if not few:
        raise UserError(f"{templates.folder}: its templates give no prompt")
    if len(few) < FEW:
        return few, few
    train: list[str] = []
    held_out: list[str] = []
    for prompt in different_prompts(templates, seed):
        (held_out if is_held_out(prompt) else train).append(prompt)
        if len(train) >= num_train and len(held_out) >= num_held_out:
            break
    return train[:num_train], held_out[:num_held_out]
