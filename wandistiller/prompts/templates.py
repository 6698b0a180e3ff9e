r"""Prompt templates with the wildcards that users of Stable Diffusion know, from which prompts without end are drawn.

A file NAME.template.txt holds one template a line; blank lines and lines that begin with # do not count. A template is text with

    {red|blue}          one of these; {3::red|blue} draws red three times as often
    {2$$red|blue|green} two different ones, joined by a comma; {1-2$$ and $$red|blue} one or two, joined by " and "
    __animals/birds__   a line of animals/birds.txt in the folder of the templates, which is a template itself
    \{ \} \| \_ \$ \\   these letters themselves

A line may begin with a weight too (3::text). Prompt i is a function of the seed and of i alone, so that nothing is kept.
Standard library only.
"""

import hashlib
import itertools
import os
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from wandistiller.errors import UserError
from wandistiller.files.paths import stays_inside
from wandistiller.prompts.caption_files import CONTROL, read_rows

SUFFIX = ".template.txt"
NUM_DRAWN = 2**20  # prompts that a run draws from; fewer where the templates give only FEW or fewer
FEW = 4096
# One prompt in so many is held out: its digest says so, so that no run and no seed trains on it.
HELD_OUT_SHARE = 50
LONGEST_PROMPT = 4000  # letters; templates that repeat each other could fill the memory otherwise
MOST_COUNTED = 10**18
MOST_TRIES = 10_000
DEEPEST = 50  # braces in braces
_WILDCARD = re.compile(r"__([A-Za-z0-9](?:[\w./-]*?[A-Za-z0-9])?)__", re.ASCII)
_WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?)::")
_SEVERAL = re.compile(r"\s*(\d{1,3})?(-)?(\d{1,3})?\$\$(?:([^{}|]*?)\$\$)?")
_ESCAPED = "{}|_$\\:#"


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


# ---- the parts of a template ----


@dataclass(frozen=True)
class Wildcard:
    """A line of another file."""

    name: str
    where: str


@dataclass(frozen=True)
class Choice:
    """One or more of some options, each a template.

    Attributes:
        ends: sums of the weights up to each option.
        low, high: how many of them are drawn.
    """

    options: "list[Template]"
    ends: list[float]
    low: int = 1
    high: int = 1
    separator: str = ""


Template = list[str | Wildcard | Choice]


def _choice(options: "list[tuple[float, Template]]", low: int = 1, high: int = 1, separator: str = "") -> Choice:
    ends = list(itertools.accumulate(weight for weight, _ in options))
    return Choice([option for _, option in options], ends, low, high, separator)


@dataclass
class _Parser:
    """Reads one line; `where` is its file and number, for messages."""

    text: str
    where: str
    position: int = 0
    depth: int = 0

    def refuse(self, reason: str) -> UserError:
        return UserError(f"{self.where}: {reason}")

    def line(self) -> tuple[float, Template]:
        weight, template = self.option()
        if self.position < len(self.text):
            letter = self.text[self.position]
            what = (
                "a } that closes nothing"
                if letter == "}"
                else "a | outside of braces; write {a|b}, or \\| for the letter"
            )
            raise self.refuse(what)
        return weight, template

    def option(self) -> tuple[float, Template]:
        """Read up to a | or } of this depth; return its weight and its parts."""
        weight = 1.0
        if found := _WEIGHT.match(self.text, self.position):
            weight, self.position = float(found[1]), found.end()
            if not weight:
                raise self.refuse("a weight of 0; leave the option out, or give it a number above 0")
        parts: Template = []
        letters: list[str] = []

        def close_text() -> None:
            if letters:
                parts.append("".join(letters))
                letters.clear()

        while self.position < len(self.text) and self.text[self.position] not in "|}":
            letter = self.text[self.position]
            if letter == "\\" and self.text[self.position + 1 : self.position + 2] in tuple(_ESCAPED):
                letters.append(self.text[self.position + 1])
                self.position += 2
            elif letter == "{":
                close_text()
                parts.append(self.braces())
            elif found := _WILDCARD.match(self.text, self.position):
                close_text()
                parts.append(Wildcard(found[1], self.where))
                self.position = found.end()
            elif self.text.startswith("${", self.position):
                raise self.refuse("variables such as ${name=...} are not known here; write \\$ for the letter")
            else:
                letters.append(letter)
                self.position += 1
        close_text()
        return weight, parts

    def braces(self) -> Choice:
        """Read from a { to its }."""
        start = self.position
        self.position, self.depth = self.position + 1, self.depth + 1
        if self.depth > DEEPEST:
            raise self.refuse(f"braces are nested more than {DEEPEST} deep")
        low, high, separator = self.several()
        options = [self.option()]
        while self.text[self.position : self.position + 1] == "|":
            self.position += 1
            options.append(self.option())
        if self.text[self.position : self.position + 1] != "}":
            raise self.refuse(f"the {{ at letter {start + 1} has no }}; write \\{{ for the letter itself")
        self.position, self.depth = self.position + 1, self.depth - 1
        high = len(options) if high is None else high
        if not 0 <= low <= high <= len(options):
            raise self.refuse(f"{low} to {high} of {len(options)} options cannot be drawn")
        return _choice(options, low, high, separator)

    def several(self) -> tuple[int, int | None, str]:
        """Read how many options are drawn, where a $$ says so: "2$$", "1-3$$", "2$$ and $$"."""
        found = _SEVERAL.match(self.text, self.position)
        if not found or not (found[1] or found[3]):
            return 1, 1, ""
        self.position = found.end()
        first, last = found[1], found[3]
        if not found[2]:
            first = last = first + (last or "")
        return int(first or 0), int(last) if last else None, ", " if found[4] is None else found[4]


# ---- a folder of templates ----


@dataclass
class Templates:
    """Templates and the wildcards that they lead to, all of which are there and lead to no circle.

    Attributes:
        root: the choice among the templates.
        wildcards: by name, the choice among the lines of each.
        sources: text that changes whenever a file does.
    """

    folder: Path
    root: Choice
    wildcards: dict[str, Choice] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    num_templates: int = 0
    _counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> "Templates":
        """Read a file of templates, or all those of a folder, and every wildcard that they lead to.

        Raises:
            UserError: a file is missing or empty, a line cannot be read, or wildcards lead back to themselves; the line is named.
        """
        place = Path(path)
        files = _template_files(place) if place.is_dir() else [place]
        own = cls(place if place.is_dir() else place.parent, Choice([], []))
        lines = [line for file in files for line in own._lines(file)]
        own.root = _choice(lines)
        own.num_templates = len(lines)
        own._follow(own.root.options, [])
        return own

    def _lines(self, file: Path) -> list[tuple[float, Template]]:
        found = []
        for number, row in read_rows(file):
            line = str(row).lstrip("\ufeff").strip()
            if control := CONTROL.search(line):
                raise UserError(f"{file}, line {number}: holds the control character U+{ord(control[0]):04X}")
            if line and not line.startswith("#"):
                self.sources.append(f"{os.path.relpath(file, self.folder)}: {line}")
                found.append(_Parser(line, f"{file}, line {number}").line())
        if not found:
            raise UserError(f"{file}: holds no line; blank lines and # comments do not count")
        return found

    def _follow(self, templates: Iterable[Template], path: list[str]) -> None:
        """Read the wildcards behind some templates; `path` are those that lead here."""
        for wildcard in _wildcards(templates):
            name = wildcard.name
            if name in path:
                circle = " -> ".join([*path[path.index(name) :], name])
                raise UserError(f"{wildcard.where}: __{name}__ leads back to itself ({circle})")
            if name in self.wildcards:
                continue
            if len(path) > DEEPEST:
                raise UserError(f"{wildcard.where}: wildcards lead more than {DEEPEST} files deep")
            file = self.folder / f"{name}.txt"
            if not stays_inside(name) or not file.is_file():
                raise UserError(f"{wildcard.where}: there is no wildcard __{name}__; it would be a line of {file}")
            choice = _choice(self._lines(file))
            self._follow(choice.options, [*path, name])
            self.wildcards[name] = choice

    # How many there are

    @property
    def count(self) -> int:
        """How many ways there are to draw a prompt, MOST_COUNTED at most. Two ways may give the same prompt."""
        return self._count(self.root)

    def _count(self, part: str | Wildcard | Choice) -> int:
        if isinstance(part, str):
            return 1
        if isinstance(part, Wildcard):
            if part.name not in self._counts:
                self._counts[part.name] = self._count(self.wildcards[part.name])
            return self._counts[part.name]
        ways = [1] + [0] * part.high  # of taking so many options, in any order
        for option in part.options:
            own = self._product(option)
            for taken in range(part.high, 0, -1):
                ways[taken] = min(MOST_COUNTED, ways[taken] + ways[taken - 1] * own)
        orders = itertools.accumulate(range(1, part.high + 1), lambda number, factor: number * factor, initial=1)
        return min(MOST_COUNTED, sum(way * order for way, order in list(zip(ways, orders, strict=True))[part.low :]))

    def _product(self, template: Template) -> int:
        product = 1
        for part in template:
            product = min(MOST_COUNTED, product * self._count(part))
        return product

    def all(self) -> Iterator[str]:
        """Yield every prompt, some perhaps more than once; only sensible where `count` is small."""
        return (" ".join(text.split()) for text in self._every(self.root))

    def _every(self, part: str | Wildcard | Choice) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        elif isinstance(part, Wildcard):
            yield from self._every(self.wildcards[part.name])
        else:
            for size in range(part.low, part.high + 1):
                for options in itertools.permutations(part.options, size):
                    yield from map(part.separator.join, itertools.product(*map(self._every_of, options)))

    def _every_of(self, template: Template) -> list[str]:
        return list(map("".join, itertools.product(*map(self._every, template))))

    # One of them

    def draw(self, generator: random.Random) -> str:
        """Draw a prompt.

        Raises:
            UserError: it is too long.
        """
        written: list[str] = []
        self._write(self.root, generator, written)
        return " ".join("".join(written).split())

    def _write(self, part: str | Wildcard | Choice, generator: random.Random, written: list[str]) -> None:
        if isinstance(part, str):
            written.append(part)
            if len(written) > LONGEST_PROMPT or len(part) > LONGEST_PROMPT:
                raise UserError(f"{self.folder}: its templates give prompts of more than {LONGEST_PROMPT} letters")
            return
        if isinstance(part, Wildcard):
            part = self.wildcards[part.name]
        for number, option in enumerate(_pick(part, generator)):
            if number:
                written.append(part.separator)
            for inner in option:
                self._write(inner, generator, written)


def _wildcards(templates: Iterable[Template]) -> Iterator[Wildcard]:
    for template in templates:
        for part in template:
            if isinstance(part, Wildcard):
                yield part
            elif isinstance(part, Choice):
                yield from _wildcards(part.options)


def _pick(choice: Choice, generator: random.Random) -> list[Template]:
    """Draw options of a choice by their weights, none of them twice."""
    if choice.low == choice.high == 1:
        return [choice.options[_index(choice.ends, generator)]]
    size = choice.low + int(generator.random() * (choice.high - choice.low + 1))
    left = [
        (end - before, option)
        for before, end, option in zip([0.0, *choice.ends], choice.ends, choice.options, strict=False)
    ]
    picked = []
    for _ in range(size):
        index = _index(list(itertools.accumulate(weight for weight, _ in left)), generator)
        picked.append(left.pop(index)[1])
    return picked


def _index(ends: list[float], generator: random.Random) -> int:
    return min(bisect_right(ends, generator.random() * ends[-1]), len(ends) - 1)


# ---- the prompts ----


class TemplatePrompts(Sequence[str]):
    """The prompts that templates give: drawn when they are asked for, or all of them where there are few.

    Args:
        seed: the prompts of another seed are others.
        held_out: whether these are the prompts that no run trains on. Few prompts are not divided.
    """

    def __init__(self, templates: Templates, seed: int = 0, held_out: bool = False):
        self.templates, self.seed, self.held_out = templates, seed, held_out
        few = dict.fromkeys(prompt for prompt in templates.all() if prompt) if templates.count <= FEW else None
        self.few = None if few is None else list(few)
        if self.few == []:
            raise UserError(f"{templates.folder}: its templates give no prompt")

    @property
    def is_endless(self) -> bool:
        """Whether prompts are drawn, so that a pass over all of them means nothing."""
        return self.few is None

    def __len__(self) -> int:
        return NUM_DRAWN if self.few is None else len(self.few)

    def of_held_out(self) -> "TemplatePrompts":
        """Return the prompts of the same templates that no run trains on; the same ones where these are few."""
        return TemplatePrompts(self.templates, self.seed, held_out=True)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # which also knows what is outside
        return self.drawn(place) if self.few is None else self.few[place]

    def drawn(self, index: int) -> str:
        """Return the prompt of an index, whatever its size, of templates without end."""
        key = hashlib.sha256(f"{self.seed} {index}".encode()).digest()
        generator = random.Random(int.from_bytes(key))  # nosec B311 # no secret: prompts of a seed
        for _ in range(MOST_TRIES):
            prompt = self.templates.draw(generator)
            if prompt and is_held_out(prompt) == self.held_out:
                return prompt
        raise UserError(f"{self.templates.folder}: its templates hardly give any prompt that is not empty")

    def identity(self) -> list[str]:
        """Return what makes these prompts what they are, whatever number of them is drawn."""
        return [f"drawn with seed {self.seed}", *self.templates.sources]
