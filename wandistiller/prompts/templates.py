r"""Prompt templates with the wildcards that users of Stable Diffusion know.

A file NAME.template.txt holds one template a line; blank lines and lines that begin with # or // do not count.

    {red|blue}          one of these; {3::red|blue} draws red three times as often
    {2$$red|blue|green} two different ones, joined by a comma; {1-2$$ and $$red|blue} one or two, joined by " and "
    __animals/birds__   a line of animals/birds.txt in the folder of the templates, which is a template itself;
                        __animals/*__, __animals/**__ and __b?rds__ a line of any file of such a name; {2$$__animals/birds__} two
    \{ \} \| \_ \$ \\   these letters themselves

A line may begin with a weight too (3::text). What else such templates may hold elsewhere is refused by its name, never learnt as text.
"""

import hashlib
import heapq
import itertools
import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.paths import stays_inside
from wandistiller.prompts.caption_files import CONTROL, text_lines

SUFFIX = ".template.txt"
FEW = 1024  # templates of fewer different prompts are a list like any other, of which nothing is held out
# One prompt in so many is held out: its digest says so, so that no run and no seed trains on it.
HELD_OUT_SHARE = 50
MOST_TRIES = 10_000  # draws in a row without a new prompt, after which there are no more
# Bounds on what a stranger's templates cost: letters of a prompt, steps to draw it, letters of a line, lines, nesting
LONGEST_PROMPT, MOST_STEPS = 4000, 4000
LONGEST_LINE, MOST_LINES = 20_000, 2_000_000
DEEPEST, DEEPEST_BRACES = 50, 200  # braces in braces of a line, or files behind files; braces over all files on the way

_WEIGHT = re.compile(r"\s*(\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})::")
_SEVERAL = re.compile(r"\s*(\d{1,3})?(-)?(\d{1,3})?\$\$(?:([^{}|]*?)\$\$)?")
_WILDCARD = re.compile(r"__~?((?=[^\s_])[^{}|$\\<>]{0,199}?[^\s_{}|$\\<>])__")
_ESCAPED = "{}|_$\\:#!@~<["
_UNKNOWN = [
    (re.compile(r"(?<!\\)\$\{"), r"variables such as ${name=...} are not known here; write \$ for the letter"),
    (re.compile(r"(?<!\\)(?:\{|__)[!@]"), "the samplers ! (each in turn, combined) and @ (each in turn) are not known here"),
    (re.compile(r"__[^\s{}|_][^{}|]{0,99}?\([^(){}|=]{0,99}=[^(){}|]{0,99}\)__"), "parameters of a wildcard are not known here"),
    (re.compile(r"\d#__"), "a number with # before a wildcard is not known here; write {2$$__name__}"),
    (
        re.compile(r"(?<!\\)<(?:wildcard|wc|random|alternate|lora|lyco|hypernet|embed|embedding|preset|segment|setvar|var)[:\[]", re.I),
        r"tags such as <wildcard:name> and <lora:name:1> are not known here; write \< for the letter",
    ),
    (
        re.compile(r"(?<!\\)\[[^\[\]|]{0,200}:[^\[\]|]{0,200}:\s*\d*\.?\d+\s*\]"),
        r"prompt editing such as [from:to:0.5] is not known here; write \[ for the letter",
    ),
]  # fmt: skip


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
class Several:
    """How many different options are drawn, and what joins them; `high` None is all that there are."""

    low: int = 1
    high: int | None = 1
    separator: str = ""


ONE = Several()


@dataclass(frozen=True)
class Wildcard:
    """Lines of other files."""

    name: str
    several: Several = ONE


@dataclass(frozen=True)
class Choice:
    """Some of several options, each a template; `ends` are the sums of their weights up to each."""

    options: "list[Template]"
    ends: list[float]
    several: Several = ONE


Template = list[str | Wildcard | Choice]


def _choice(options: "list[tuple[float, Template]]", several: Several = ONE) -> Choice:
    return Choice(
        [option for _, option in options], list(itertools.accumulate(weight for weight, _ in options)), several
    )


@dataclass
class _Parser:
    """Reads one line; `where` is its file and number, and `names` become its wildcards."""

    text: str
    where: str
    position: int = 0
    depth: int = 0
    deepest: int = 0
    names: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> UserError:
        return UserError(f"{self.where}: {reason}")

    def line(self) -> tuple[float, Template]:
        if len(self.text) > LONGEST_LINE:
            raise self.refuse(f"is longer than {LONGEST_LINE:,} letters, and no template")
        for construct, words in _UNKNOWN:
            if found := construct.search(self.text):
                raise self.refuse(f"{found[0][:40]!r}: {words}")
        option = self.option()
        if self.position < len(self.text):
            closes = self.text[self.position] == "}"
            raise self.refuse(
                "a } that closes nothing" if closes else "a | outside of braces; write {a|b}, or \\| for the letter"
            )
        return option

    def option(self) -> tuple[float, Template]:
        """Read up to a | or } of this depth; return its weight and its parts."""
        weight = 1.0
        if found := _WEIGHT.match(self.text, self.position):
            weight, self.position = float(found[1]), found.end()
            if not weight:
                raise self.refuse("a weight of 0; leave the option out, or give it a number above 0")
        parts: Template = []
        while self.position < len(self.text) and self.text[self.position] not in "|}":
            part = self.part()
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                part = parts.pop() + part  # type: ignore[operator] # both are text
            parts.append(part)
        return weight, parts

    def part(self) -> str | Wildcard | Choice:
        letter, self.position = self.text[self.position], self.position + 1
        if letter == "{":
            return self.braces()
        if letter == "\\" and self.text[self.position : self.position + 1] in tuple(_ESCAPED):
            letter, self.position = self.text[self.position], self.position + 1
        elif letter == "_" and (found := _WILDCARD.match(self.text, self.position - 1)):
            self.position = found.end()
            self.names.append(found[1])
            return Wildcard(found[1])
        return letter

    def braces(self) -> Wildcard | Choice:
        """Read from behind a { to its }."""
        start = self.position
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        if self.depth > DEEPEST:
            raise self.refuse(f"braces are nested more than {DEEPEST} deep")
        if self.text[start : start + 1] == "~":  # a random sampler, as every choice here is one
            self.position += 1
        several = self.several()
        options = [self.option()]
        while self.text[self.position : self.position + 1] == "|":
            self.position += 1
            options.append(self.option())
        if self.text[self.position : self.position + 1] != "}":
            raise self.refuse(f"the {{ at letter {start} has no }}; write \\{{ for the letter itself")
        self.position, self.depth = self.position + 1, self.depth - 1
        first = options[0][1]
        if len(options) == 1 and several is not ONE and len(first) == 1 and isinstance(first[0], Wildcard):
            return Wildcard(first[0].name, several)
        self.check(several, len(options))
        return _choice(options, several)

    def check(self, several: Several, count: int) -> None:
        high = count if several.high is None else several.high
        if not several.low <= high <= count:
            raise self.refuse(f"{several.low} to {high} of {count} options cannot be drawn")

    def several(self) -> Several:
        """Read how many options are drawn, where a $$ says so: "2$$", "1-3$$", "2$$ and $$"."""
        found = _SEVERAL.match(self.text, self.position)
        if not found or not (found[1] or found[3]):
            return ONE
        self.position = found.end()
        first, dash, last, separator = found.groups()
        if not dash:
            first = last = first + (last or "")
        return Several(int(first or 0), int(last) if last else None, ", " if separator is None else separator)


# ---- a folder of templates ----


@dataclass
class Templates:
    """Templates and the wildcards that they lead to, all of which are there and lead to no circle."""

    folder: Path
    root: Choice = field(default_factory=lambda: Choice([], []))
    wildcards: dict[str, Choice] = field(default_factory=dict)
    num_lines: int = 0

    @classmethod
    def load(cls, path: str | Path) -> "Templates":
        """Read a file of templates, or all those of a folder, and every wildcard that they lead to.

        Raises:
            UserError: a file is missing or empty, a line cannot be read, or wildcards lead back to themselves; the line is named.
        """
        place = Path(path)
        own = cls(place if place.is_dir() else place.parent)
        own.root, names, depth = own._read(_template_files(place) if place.is_dir() else [place])
        own._follow(names, [], depth)
        return own

    def _read(self, files: list[Path]) -> tuple[Choice, dict[str, str], int]:
        """Return the choice among the lines of some files, where each wildcard of theirs stands first, and their deepest braces."""
        lines: list[tuple[float, Template]] = []
        names: dict[str, str] = {}
        deepest = 0
        for file in files:
            before = len(lines)
            for number, text in text_lines(file):
                line, where = text.lstrip("\ufeff").strip(), f"{file}, line {number}"
                if control := CONTROL.search(line):
                    raise UserError(f"{where}: holds the control character U+{ord(control[0]):04X}")
                if not line or line.startswith(("#", "//")):
                    continue
                self.num_lines += 1
                if self.num_lines > MOST_LINES:
                    raise UserError(f"{where}: there are more than {MOST_LINES:,} lines of templates and wildcards")
                parser = _Parser(line, where)
                lines.append(parser.line())
                deepest = max(deepest, parser.deepest)
                for name in parser.names:
                    names.setdefault(name, where)
            if len(lines) == before:
                raise UserError(f"{file}: holds no line; blank lines and comments do not count")
        return _choice(lines), names, deepest

    def _follow(self, names: dict[str, str], path: list[str], depth: int) -> None:
        """Read the wildcards of these names; `path` are those that lead here, through so many braces."""
        for name, where in names.items():
            if name in path:
                circle = " -> ".join([*path[path.index(name) :], name])
                raise UserError(f"{where}: __{name}__ leads back to itself ({circle})")
            if name in self.wildcards:
                continue
            if len(path) > DEEPEST or depth > DEEPEST_BRACES:
                raise UserError(
                    f"{where}: wildcards lead more than {DEEPEST} files deep, or through {DEEPEST_BRACES} braces"
                )
            choice, inner, own_depth = self._read(self._files_of(name, where))
            self._follow(inner, [*path, name], depth + own_depth)
            self.wildcards[name] = choice

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
            others = [*self.folder.glob("*.y*ml"), *self.folder.glob("*.json")]
            hint = f"; those of {others[0].name} are not read, only .txt files are" if others else ""
            raise UserError(f"{where}: there is no wildcard __{name}__; it would be a line of {file}{hint}")
        return found

    def draw(self, generator: random.Random) -> str:
        """Draw a prompt.

        Raises:
            UserError: it is too long, or takes too many steps.
        """
        letters: list[str] = []
        waiting: list[str | Wildcard | Choice] = [self.root]
        length = steps = 0
        while waiting and length <= LONGEST_PROMPT and steps <= MOST_STEPS:
            part = waiting.pop()
            if isinstance(part, str):
                letters.append(part)
                length, steps = length + len(part), steps + 1
                continue
            choice = self.wildcards[part.name] if isinstance(part, Wildcard) else part
            steps += 1 if part.several is ONE else len(choice.options)
            waiting.extend(reversed(self._picked(choice, part.several, generator)))
        if waiting or length > LONGEST_PROMPT:
            raise UserError(f"{self.folder}: its templates give prompts of more than {LONGEST_PROMPT} letters or parts")
        return " ".join("".join(letters).split())

    def _picked(self, choice: Choice, several: Several, generator: random.Random) -> Template:
        """Draw options of a choice by their weights, none of them twice, with the separator between them."""
        options, ends = choice.options, choice.ends
        if several is ONE:
            return options[min(bisect_right(ends, generator.random() * ends[-1]), len(ends) - 1)]
        high = len(options) if several.high is None else min(several.high, len(options))
        if several.low > high:
            raise UserError(
                f"{self.folder}: {several.low} different lines are asked for of a wildcard of {len(options)}"
            )
        size = several.low + int(generator.random() * (high - several.low + 1))
        # The largest of u^(1 / weight) are a weighted draw without replacement (Efraimidis and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003).
        weights = (end - before for before, end in itertools.pairwise([0.0, *ends]))
        keys = [(generator.random() ** (1 / weight), index) for index, weight in enumerate(weights)]
        picked: Template = []
        for number, (_, index) in enumerate(heapq.nlargest(size, keys)):
            picked += ([several.separator] if number else []) + options[index]
        return picked


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


@dataclass(frozen=True)
class Drawn:
    """What templates gave: prompts to train on, and prompts that no run trains on."""

    train: list[str]
    held_out: list[str]
    num_templates: int


def draw_prompts(path: str | Path, seed: int, num_train: int, num_held_out: int) -> Drawn:
    """Draw different prompts of a file or folder of templates; templates that give few give all of them to both sides.

    Raises:
        UserError: they cannot be read, or give no prompt at all.
    """
    templates = Templates.load(path)
    few = list(itertools.islice(different_prompts(templates, 0), FEW))
    if not few:
        raise UserError(f"{templates.folder}: its templates give no prompt")
    if len(few) < FEW:
        return Drawn(few, few, len(templates.root.options))
    train: list[str] = []
    held_out: list[str] = []
    for prompt in different_prompts(templates, seed):
        (held_out if is_held_out(prompt) else train).append(prompt)
        if len(train) >= num_train and len(held_out) >= num_held_out:
            break
    return Drawn(train[:num_train], held_out[:num_held_out], len(templates.root.options))
