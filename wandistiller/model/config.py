"""StudentConfig: the shape of a student, and the checks on the file that people edit by hand.

Standard library only, so that a typo in student_config.json is answered before torch is loaded.
"""

import difflib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args

from wandistiller.errors import UserError
from wandistiller.files.json_files import JsonError, load_json, parse_json

CONFIG_NAME = "student_config.json"
WEIGHTS_NAME = "diffusion_model.safetensors"
STUDENT_ADVICE = "a student is the --output_dir of train_distillation.py, its .safetensors file, or a hub id owner/name"

# These lie far beyond any Wan: a larger value is a slip of the keyboard that would fill the memory or take for ever.
LARGEST, LARGEST_BY_NAME = 1_000_000, {"depth": 1000, "patch_size": 1000}
MAX_PATCHES = 1024  # patches along a side: Wan's rope_max_seq_len


class ConfigError(UserError):
    """A student config that cannot work; the message names the key, the value, what is allowed and the nearest choice."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The shape of a student; `student_config.json` holds exactly these keys.

    Attributes:
        block: "wan" for Wan's own block in 2D, "lite" for a small plain one.
        ffn_dim: neurons of a block's FFN; a lite block always has 4 * hidden_size.
        num_channels: latent channels.
        image_size: side in pixels of the square images that the student is trained on. Images of other sizes, where it has any
            (students/record.py), have about as many pixels.
        patch_size: latent pixels along a token's side; a lite student has no patches.
        text_max_length: text slots of the run, for teacher and student alike.
        freq_dim: width of the sinusoidal time embedding; a lite student always has hidden_size.
        distillation: how a trained student was made, as the trainer records it.

    Raises:
        ConfigError: a value cannot work.
    """

    model_type: str = "WanLiteStudent"
    block: str
    hidden_size: int
    depth: int
    num_heads: int
    ffn_dim: int | None = None
    num_channels: int
    image_size: int
    patch_size: int | None = None
    text_max_length: int = 512
    text_encoder_output_dim: int = 4096
    freq_dim: int | None = None
    eps: float = 1e-6
    distillation: dict | None = field(default=None, hash=False)

    def __post_init__(self):
        self._check_types()
        self._check_choice("model_type", ["WanLiteStudent"])
        self._check_choice("block", ["wan", "lite"])
        self._fill_block_defaults()
        self._check_range()
        self._check_shape()
        if self.recorded_vae_scale_factor:
            self.check_image_size(self.recorded_vae_scale_factor)
        else:  # only the teacher knows the VAE's factor
            self._check_multiple("image_size", self.patch_size, f"patch_size={self.patch_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def is_wan(self) -> bool:
        """Whether it is a Wan in 2D: then it has Wan's embedders and blocks, can be cut from a Wan, and other tools read it as one."""
        return self.block == "wan"

    def check_is_wan(self, where: str | Path, otherwise: str) -> None:
        """Refuse a student that is no Wan; the message begins with `where` and says what therefore cannot be."""
        if not self.is_wan:
            raise ConfigError(f'{where}: a student of block "{self.block}" is no Wan, and {otherwise}')

    @property
    def recorded_vae_scale_factor(self) -> int | None:
        return (self.distillation or {}).get("vae_scale_factor")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, as the run recorded it, or else as the released VAE with these channels has it."""
        return self.recorded_vae_scale_factor or (16 if self.num_channels == 48 else 8)

    @property
    def latent_size(self) -> int:
        return self.image_size // self.vae_scale_factor

    def check_image_size(self, vae_scale_factor: int, where: str | Path | None = None) -> None:
        """Refuse an image_size that does not fill whole patches behind a VAE of this factor; the message begins with `where`."""
        unit = vae_scale_factor * self.patch_size
        reason = f"{unit} = VAE factor {vae_scale_factor} x patch_size {self.patch_size}"
        with _errors_from(where):
            self._check_multiple("image_size", unit, reason)
            if self.image_size > MAX_PATCHES * unit:
                raise ConfigError(
                    f"image_size={self.image_size} is too large; allowed: at most {MAX_PATCHES * unit}, {MAX_PATCHES} "
                    f"patches a side, with {reason}"
                )

    def _check_types(self) -> None:
        nouns = {str: "text in quotes", int: "a whole number", float: "a number", dict: "an object"}
        for known in fields(self):
            value, allowed = getattr(self, known.name), get_args(known.type) or (known.type,)
            wanted = allowed[0]
            if value is None and NoneType in allowed:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
                raise ConfigError(
                    f"{known.name}={value!r} is of type {type(value).__name__}; it must be {nouns[wanted]}"
                )
        factor = (self.distillation or {}).get("vae_scale_factor", 8)
        if type(factor) is not int or factor < 1:
            raise ConfigError(
                f"distillation.vae_scale_factor={factor!r} must be a whole number above 0, such as 8 or 16"
            )

    def _check_choice(self, name: str, allowed: list[str]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            near = (difflib.get_close_matches(value.lower(), [a.lower() for a in allowed], 1, 0.0) or [""])[0]
            nearest = next((choice for choice in allowed if choice.lower() == near), allowed[0])
            choices = ", ".join(f'"{choice}"' for choice in allowed)
            raise ConfigError(f'{name}={value!r} is not known; allowed: {choices} (nearest: "{nearest}")')

    def _fill_block_defaults(self) -> None:
        """Fill in the keys that may be left out, since the block has a value for them."""
        fixed = {} if self.is_wan else {"ffn_dim": 4 * self.hidden_size, "patch_size": 1}
        for name, value in fixed.items():
            if getattr(self, name) not in (None, value):
                raise ConfigError(
                    f'{name}={getattr(self, name)} does not fit block "lite", which always has {name} {value} here; '
                    f"use {value} or leave the key out"
                )
        defaults = {
            "ffn_dim": 4 * self.hidden_size,
            "patch_size": 2,
            "freq_dim": 256 if self.is_wan else self.hidden_size,
        }
        for name, value in (defaults | fixed).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check_range(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            if isinstance(value, (int, float)) and not (0 < value < math.inf):
                raise ConfigError(f"{known.name}={value} cannot work; it must be above 0 and finite")
            largest = LARGEST_BY_NAME.get(known.name, LARGEST)
            if isinstance(value, int) and value > largest:
                raise ConfigError(f"{known.name}={value} is too large; allowed: at most {largest}")

    def _check_shape(self) -> None:
        if self.is_wan:
            self._check_wan_heads()
        unit = math.lcm(2, self.num_heads)
        self._check_multiple(
            "hidden_size", unit, f"{unit} (it must be even and a multiple of num_heads={self.num_heads})"
        )
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim={self.freq_dim} must be even; use {self.freq_dim - 1} or {self.freq_dim + 1}")
        if self.eps >= 0.1:
            raise ConfigError(
                f"eps={self.eps} is too large for a norm; allowed: above 0 and below 0.1 (Wan's is 1e-06)"
            )

    def _check_wan_heads(self) -> None:
        """Refuse heads that RoPE cannot turn: it rotates pairs of channels, and splits a head between frame, row and column."""
        unit = 2 * self.num_heads
        self._check_multiple("hidden_size", unit, f"{unit} = 2 x num_heads (RoPE turns pairs of channels)")
        if self.head_dim < 6:
            raise ConfigError(
                f"hidden_size={self.hidden_size} with num_heads={self.num_heads} gives heads of {self.head_dim} channels; "
                f"RoPE needs at least 6: use num_heads={max(1, self.hidden_size // 6)} or fewer (Wan's heads have 128)"
            )

    def _check_multiple(self, name: str, unit: int, reason: str) -> None:
        value = getattr(self, name)
        if value % unit:
            lower, upper = value // unit * unit, (value // unit + 1) * unit
            choices = f"{lower} or {upper}" if lower else f"{upper}"
            raise ConfigError(f"{name}={value} is not divisible by {reason}; use {choices}")

    @classmethod
    def from_dict(cls, values: object, where: str | Path = CONFIG_NAME) -> "StudentConfig":
        """Return the checked config that a JSON value holds; errors begin with `where`."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: holds a {type(values).__name__}; it must hold one JSON object {{...}}")
        known = [each.name for each in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0.0)
                raise ConfigError(
                    f'{where}: unknown key "{key}"; did you mean "{near[0]}"? Known keys: {", ".join(known)}'
                )
        block_fixed = {"ffn_dim", "patch_size", "freq_dim"} if values.get("block") == "lite" else set()
        missing = [f'"{key}"' for key in known if key not in values and key not in block_fixed | {"distillation"}]
        if missing:
            raise ConfigError(f"{where}: missing key {', '.join(missing)}")
        for key, value in values.items():
            if value is None and key != "distillation":
                raise ConfigError(f"{where}: {key} is null; give it a value")
        with _errors_from(where):
            return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "StudentConfig":
        """Read and check a student_config.json; `path` may also be the folder that holds it."""
        advice = "give a student_config.json (see config/)"
        if os.path.isdir(path):
            path, advice = Path(path) / CONFIG_NAME, f"what export_student.py writes is no student; {STUDENT_ADVICE}"
        path = Path(path)
        if not os.path.lexists(path):  # unlike Path.exists it also answers for a name longer than names may be
            raise ConfigError(f"{path}: there is no such file; {advice}")
        with _errors_from(path):
            values = load_json(path, _each_key_once)
        return cls.from_dict(values, path)

    @classmethod
    def from_json(cls, text: str, where: str = CONFIG_NAME) -> "StudentConfig":
        """Return the checked config that JSON text holds; errors begin with `where`."""
        with _errors_from(where):
            values = parse_json(text, _each_key_once)
        return cls.from_dict(values, where)

    def to_dict(self) -> dict:
        values = asdict(self)
        if self.distillation is None:
            del values["distillation"]
        return values

    def to_json(self) -> str:
        """Return JSON with one line for each key, so that lists of statistics do not bury the lines that people edit."""
        return _json_object(self.to_dict()) + "\n"

    def replace(self, **changes) -> "StudentConfig":
        return replace(self, **changes)


@contextmanager
def _errors_from(where: str | Path | None) -> Iterator[None]:
    """Let the messages of errors inside begin with a place."""
    try:
        yield
    except (ConfigError, JsonError) as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f'the key "{twice}" is there twice; keep one of the two lines')
    return values


def _json_object(values: dict, indent: str = "") -> str:
    lines = []
    for key, value in values.items():
        text = _json_object(value, indent + "  ") if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{indent}  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
