"""What a student's file records of how it was distilled, checked as it is read; and the student's folder that holds it.

Standard library only, so that a wrong folder is answered before torch loads.
"""

import reprlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wandistiller.errors import UserError
from wandistiller.files.json_files import PATH, RATIO, STEPS, TEXT, Kind, is_number
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.model.image_sizes import MAX_SIZES, ImageSize, is_size, square
from wandistiller.wan.record_kinds import SAMPLING_KINDS, latents_kinds

# Drawing cannot do without these; any other entry may be missing.
NEEDED_TO_DRAW = (
    "teacher_path",
    "shift",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "vae_scale_factor",
)


def _is_lora(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.get("expert") in ("high", "low")
        and TEXT.fits(value.get("file"))
        and TEXT.fits(value.get("sha256"))
        and is_number(value.get("scale"))
        and (value.get("path") is None or PATH.fits(value["path"]))
    )


LORAS = Kind(
    "a list of objects with expert (high or low), file, sha256, scale and mostly path",
    lambda value: isinstance(value, list) and all(map(_is_lora, value)),
)
SIZES = Kind(
    f'a list of 1 to {MAX_SIZES} sizes such as "640x384", no side above 32768',
    lambda value: isinstance(value, list) and 0 < len(value) <= MAX_SIZES and all(map(is_size, value)),
)
LAYERS = Kind(
    "a list of the teacher's layers, whole numbers",
    lambda value: isinstance(value, list) and all(type(layer) is int for layer in value),
)


def entry(kind: Kind | None = None) -> Any:
    """Declare an entry of the record; `kind` says which values it may have, where SAMPLING_KINDS does not."""
    return field(default=None, metadata={"kind": kind})


@dataclass(frozen=True, kw_only=True)
class StudentRecord:
    """The `distillation` record of a student, as far as drawing and exporting read it; None: not recorded.

    Attributes:
        teacher_path, teacher_path_low, text_encoder_path: as `parts.recorded_path` writes them.
        teacher_loras: LoRAs that were merged into the teacher: expert, file, sha256, scale and path of each.
        base_model: hub repository of the teacher, where the run took it from there.
        num_inference_steps: sampling steps of the teacher.
        student_steps: sampling steps of a student that learnt whole steps.
        recommended_steps: those of any other that evaluate_student.py found to be enough.
        teacher_sampler: "euler": the teacher, and so the student, has noise levels of its own only; "renoise": `teacher_levels`.
        sigma_range: noise levels trained at.
        latents_mean, latents_std: per channel; model space is (z - mean) / std.
        layers: teacher layer that each block was cut from.
        image_sizes: sizes trained at, each as 640x384; None: the square of the config's image_size.
    """

    teacher_path: str | None = entry(PATH)
    teacher_path_low: str | None = entry(PATH)
    teacher_loras: list[dict] | None = entry(LORAS)
    base_model: str | None = entry(PATH)
    text_encoder_path: str | None = entry(PATH)
    preset: str | None = entry(TEXT)
    world: str | None = entry(TEXT)
    shift: float | None = entry()
    guidance_scale: float | None = entry()
    guidance_scale_2: float | None = entry()
    boundary_ratio: float | None = entry(RATIO)
    negative_prompt: str | None = entry()
    num_inference_steps: int | None = entry()
    student_steps: int | None = entry()
    recommended_steps: int | None = entry(STEPS)
    teacher_sampler: str | None = entry()
    teacher_levels: list[float] | None = entry()
    sigma_range: tuple[float, float] | None = entry()
    vae_scale_factor: int | None = entry()
    latents_mean: list[float] | None = entry()
    latents_std: list[float] | None = entry()
    layers: list[int] | None = entry(LAYERS)
    image_sizes: list[str] | None = entry(SIZES)

    @classmethod
    def of(cls, config: StudentConfig, where: str | Path = CONFIG_NAME) -> "StudentRecord":
        """Read the record of a student; one that was not trained has none of its entries.

        Raises:
            UserError: an entry has a value that it cannot have; the message begins with `where`.
        """
        record, shared = config.distillation or {}, SAMPLING_KINDS | latents_kinds(config.num_channels)
        for known in fields(cls):
            value, kind = record.get(known.name), known.metadata["kind"] or shared[known.name]
            if value is not None and not kind.fits(value):
                raise UserError(
                    f'{where}: its "distillation" record: {known.name} is {reprlib.repr(value)}; allowed: {kind.allowed}'
                )
        return cls(**{known.name: record.get(known.name) for known in fields(cls)})

    @property
    def sampler(self) -> str:
        """Sampler of the student, a name in `sampling.sampler.SamplingOptions`.

        A student of whole steps follows straight lines, as Euler's method does; any other is sampled as its teacher is.
        """
        return "euler" if self.student_steps else self.teacher_sampler or "unipc"

    @property
    def steps(self) -> int | None:
        """Sampling steps of the student unless another number is asked for."""
        return self.student_steps or self.recommended_steps or self.num_inference_steps

    @property
    def fixed_steps(self) -> int | None:
        """Sampling steps of a student that has noise levels of its own alone; None: it draws in any number."""
        has_levels = self.teacher_sampler in ("euler", "renoise")
        return self.student_steps or (self.num_inference_steps if has_levels else None)

    def warning_of_untrained_levels(self) -> str | None:
        """A warning where the student was trained at a part of the noise levels, else None."""
        low, high = self.sigma_range or (0.0, 1.0)
        if low <= 0.0 and high >= 1.0:
            return None
        return f"trained at sigma {low:g} to {high:g} only; a picture needs all of 0 to 1"


def trained_sizes(config: StudentConfig) -> list[ImageSize]:
    """Sizes that a student was trained at, the one that it draws at by default first: the square, if it is among them."""
    sizes = [ImageSize.parse(size) for size in StudentRecord.of(config).image_sizes or []]
    own = square(config.image_size)
    return sorted(sizes, key=lambda size: size != own) or [own]


def load_shape(folder: str | Path) -> StudentConfig:
    """Load the config of the student in a folder, whether or not it was trained."""
    if not Path(folder).is_dir():
        raise UserError(f"--student {folder}: is not a folder; give the --output_dir of train_distillation.py")
    config = StudentConfig.load(folder)
    StudentRecord.of(config, Path(folder) / CONFIG_NAME)
    return config


def load_student_config(folder: str | Path) -> StudentConfig:
    """Load the config of a trained student; one whose record does not say how to draw with it is refused."""
    config = load_shape(folder)
    where = Path(folder) / CONFIG_NAME
    if config.distillation is None:
        raise UserError(
            f'{where}: has no "distillation" record, so teacher, shift and guidance are unknown; give a student that '
            "train_distillation.py saved"
        )
    missing = [name for name in NEEDED_TO_DRAW if config.distillation.get(name) is None]
    if missing:
        raise UserError(f'{where}: its "distillation" record lacks {", ".join(missing)}; copy the file again')
    return config
