"""Flags in a YAML file: read as if they were typed, and written by every run as run.yaml, which repeats it.

    teacher_path: Wan-AI/Wan2.2-T2V-A14B-Diffusers
    image_sizes: ["1:1", "4:3"]
    teacher_lora: [style.safetensors:0.8]
    compile: true

Values are read as text (1e-3, none, 4:3 and no are what a person wrote) and checked by the types of the flags. A value that is
left out, or null, is the default.
"""

import argparse
from dataclasses import fields
from typing import Any

from wandistiller import __version__
from wandistiller.errors import UserError
from wandistiller.files.clone import CONFIG_FOLDER
from wandistiller.files.output_folder import RUN_MARK
from wandistiller.files.paths import require_file
from wandistiller.flags import FlagParser
from wandistiller.model.config import StudentConfig

MAX_BYTES = 2**16  # far more than all flags take, far less than a parser suffers from
DEMO_FILE = CONFIG_FOLDER / "demo.yaml"
# They say how this one command is run, not what it makes.
NOT_KEPT = ("config", "preset", "dry_run", "assume_gpu", "overwrite", "cache_part")
SWITCHED = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
HOW_TO_WRITE = "write one `flag: value` a line, such as `batch_size: 8`"


def read_flags(file: object, parser: FlagParser) -> dict[str, Any]:
    """Return the values of a file's flags, by name.

    Raises:
        UserError: the file cannot be read, is no YAML, or is no list of flags with values.
    """
    values = _entries(str(file))
    if StudentConfig.__dataclass_fields__.keys() & values.keys():
        raise UserError(f"--config {file}: looks like a student's shape; that is --student_config {file}")
    if "config" in values:
        raise UserError(f"--config {file}: names another file as its config; write the flags into one")
    words = [word for name, value in values.items() for word in words_of(name, value, parser)]
    return parser.given(words, where=f"{file}: ")


def _entries(file: str) -> dict[str, Any]:
    """Return the entries of a YAML file: each is text, a list of texts, or None."""
    import yaml

    try:
        require_file(file)
        with open(file, "rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UserError(f"--config {file}: is larger than {MAX_BYTES:,} bytes, and so no file of flags")
        root = yaml.compose(raw.decode("utf-8-sig"), yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {file}: is no UTF-8 text; {HOW_TO_WRITE}") from None
    except RecursionError:
        raise UserError(f"--config {file}: is nested too deep; {HOW_TO_WRITE}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or "it holds letters that YAML does not allow"
        raise UserError(f"--config {file}{line}: is not valid YAML ({why}); {HOW_TO_WRITE}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {file}: holds no flags; {HOW_TO_WRITE}")
    values: dict[str, Any] = {}
    for key, node in root.value:
        where = f"--config {file}, line {key.start_mark.line + 1}"
        name = str(key.value).removeprefix("--").replace("-", "_")
        if not isinstance(key, yaml.ScalarNode) or name in values:
            raise UserError(
                f"{where}: {'names a flag twice' if name in values else 'begins with no flag'}; {HOW_TO_WRITE}"
            )
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise UserError(f"{where}: {name} holds lists or keys of its own; allowed: one value, or a list of values")
        is_null = node.tag == "tag:yaml.org,2002:null"
        values[name] = None if is_null else [part.value for part in parts] if parts is node.value else node.value
    return values


def words_of(name: str, value: Any, parser: FlagParser) -> list[str]:
    """Return the words that would be typed for a flag of this value: None, text or a list of texts."""
    action = parser.action_of(name)
    if value is None:
        return [] if action else [f"--{name}"]  # which is answered as unknown
    if action is not None and action.nargs in (0, "?") and str(value).lower() in SWITCHED:
        return [f"--{name}"] if SWITCHED[str(value).lower()] else []
    if action is not None and action.nargs == 0:
        raise UserError(f"--{name} {value}: allowed in a file: true or false")
    if not isinstance(value, list):
        return [f"--{name}={value}"]
    if action is None or isinstance(action.nargs, (int, str)):
        return [f"--{name}", *value]
    if isinstance(action, argparse._AppendAction):
        return [f"--{name}={part}" for part in value]
    return [f"--{name}={','.join(value)}"]


def flags_text(flags: Any) -> str:
    """Return the text of run.yaml: every flag of a run that has a value, in the groups of `--help`."""
    import yaml

    parts = [
        f"{RUN_MARK} {__version__}. `--config` with this file repeats the run; what is typed beside it counts instead."
    ]
    for group in fields(flags):
        kept = {name: _plain(value) for name, value in vars(getattr(flags, group.name)).items() if name not in NOT_KEPT}
        values = {name: value for name, value in kept.items() if value is not None}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6) if values else ""
        parts.append(f"# {group.metadata['title'].split(' (')[0]}\n{text}")
    return "\n".join(parts)


def flags_line(flags: Any) -> str:
    """Return the flags of a run that have another value than their general default, in one line."""
    values = {name: _plain(value) for name, value in flags.changed().items() if name not in NOT_KEPT}
    listed = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return " ".join(f"--{name} {' '.join(map(str, parts))}" for name, parts in listed.items())


def _plain(value: Any) -> Any:
    """Return a value as it is typed, or as YAML has it."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if type(value) is tuple:  # a LoRA and its scale
        return ":".join(map(str, value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
