"""Flags in a YAML file: read as if they were typed, and written by every run as run.yaml, which repeats it.

    teacher_path: Wan-AI/Wan2.2-T2V-A14B-Diffusers
    image_sizes: ["1:1", "4:3"]
    teacher_lora: [style.safetensors:0.8]
    compile: true

Values are read as text (1e-3, none, 4:3 and no are what a person wrote) and checked by the types of the flags. A value that is
left out, or null, is the default.
"""

import argparse
import os
from typing import Any

import yaml

from wandistiller import __version__
from wandistiller.errors import UserError
from wandistiller.files.clone import CONFIG_FOLDER
from wandistiller.files.output_folder import RUN_MARK
from wandistiller.files.paths import require_file
from wandistiller.flags import FlagParser, groups
from wandistiller.model.config import StudentConfig

MAX_LETTERS = 2**16  # far more than all flags take, far less than a parser suffers from
NO_LETTER = {"\0", *map(chr, range(0xD800, 0xE000))}
DEMO_FILE = CONFIG_FOLDER / "demo.yaml"
# They say how this one command is run, not what it makes.
NOT_KEPT = ("config", "preset", "dry_run", "assume_gpu", "overwrite", "cache_part")


class _Texts(yaml.SafeLoader):
    """Reads every value as the text that a person wrote, but for null and for what is left out."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in kinds if tag.endswith(":null")]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_flags(file: object, parser: FlagParser) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in _entries(str(file)):
        name = str(key).removeprefix("--").replace("-", "_")
        if name in values:
            raise UserError(f"--config {file}: names --{name} twice")
        parts = value if isinstance(value, list) else [value or ""]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"--config {file}: {name} holds lists or keys of its own; allowed: a value or a list")
        if not all(map(NO_LETTER.isdisjoint, [name, *parts])):
            raise UserError(f"--config {file}: {name} holds U+0000 or half of a surrogate pair, which are no letters")
        values[name] = value
    if StudentConfig.__dataclass_fields__.keys() & values.keys():
        raise UserError(f"--config {file}: looks like a student's shape; that is --student_config {file}")
    if "config" in values:
        raise UserError(f"--config {file}: names another file as its config; write the flags into one")
    words = [word for name, value in values.items() for word in words_of(name, value, parser)]
    return parser.given(words, where=f"{file}: ")


def _entries(file: str) -> list[tuple[Any, Any]]:
    try:
        require_file(file)
        with open(file, encoding="utf-8-sig") as opened:
            text = opened.read(MAX_LETTERS + 1)
        if len(text) > MAX_LETTERS:
            raise UserError(f"--config {file}: is longer than {MAX_LETTERS:,} letters, and so no file of flags")
        loader = _Texts(text)
        loader.name = os.path.basename(file)  # as errors call it
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            return loader.construct_pairs(root, deep=True)
        why = "holds no flags"
    # Values that their own tags contradict (!!int abc) fail in the constructors of yaml in ways of their own.
    except (OSError, ValueError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        why = f"cannot be read as YAML ({' '.join(str(error).split())})"
    raise UserError(f"--config {file}: {why}; write one `flag: value` a line, as the run.yaml of a run has them")


def words_of(name: str, value: Any, parser: FlagParser) -> list[str]:
    """Return the words that would be typed for a flag of this value: None, text or a list of texts."""
    action = parser.action_of(name)
    if value is None:
        return [] if action else [f"--{name}"]  # which is answered as unknown
    if not isinstance(value, list):
        return [f"--{name}={value}"]
    if action is None or isinstance(action.nargs, (int, str)):
        return [f"--{name}", *value]
    if isinstance(action, argparse._AppendAction):
        return [f"--{name}={part}" for part in value]
    return [f"--{name}={','.join(value)}"]


def flags_text(flags: Any) -> str:
    """Return the text of run.yaml: every flag of a run that has a value, in the groups of `--help`."""
    parts = [
        f"{RUN_MARK} {__version__}. `--config` with this file repeats the run; what is typed beside it counts instead."
    ]
    for title, own in groups(type(flags)).items():
        kept = {known.name: _plain(getattr(flags, known.name)) for known in own if known.name not in NOT_KEPT}
        values = {name: value for name, value in kept.items() if value is not None}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6) if values else ""
        parts.append(f"# {(title or '').split(' (')[0]}\n{text}")
    return "\n".join(parts)


def _plain(value: Any) -> Any:
    """Return a value as it is typed, or as YAML has it."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if type(value) is tuple:  # a LoRA and its scale
        return ":".join(map(str, value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
