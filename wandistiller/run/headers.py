"""The files of a run by their headers: the teacher and how it is sampled, text encoder and VAE, refused unless they fit the student."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from wandistiller.errors import UserError
from wandistiller.model.config import CONFIG_NAME, ConfigError, StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.projection.selection import Selection, check_fits
from wandistiller.projection.selection_record import read_made_of
from wandistiller.run.flags import Flags, GuidanceFlags
from wandistiller.students.record import StudentRecord, load_student_config, trained_sizes
from wandistiller.wan.layouts import open_teacher, open_wan_files
from wandistiller.wan.record_kinds import LEVELS
from wandistiller.wan.settings import TeacherSettings, resolve_settings
from wandistiller.wan.text_encoder_files import find_text_encoder
from wandistiller.wan.vae import check_statistics, find_vae, read_vae_config, vae_tensors
from wandistiller.wan.wan_files import WanFiles, merge_loras

SHAPE = ("hidden_size", "depth", "num_heads", "ffn_dim", "num_channels")
ALL_LEVELS = (0.0, 1.0)
# A teacher of so few steps was distilled to them, as lightning LoRAs are, unless its sampler is named.
FEW_TEACHER_STEPS = 8


@dataclass(frozen=True)
class Source:
    """A Wan or student that the run's student is cut from in place of its teacher (--init_from)."""

    wan_files: WanFiles
    expert: str  # which transformer of it
    shape: StudentConfig  # of the Wan that it was cut from itself; a Wan's own
    part: Selection  # what it has of that
    student_steps: int | None = None  # of a student that learnt whole steps
    sizes: Sequence[ImageSize] = ()  # that a student was trained at

    def is_like(self, teacher: StudentConfig) -> bool:
        """Return whether its channels are those of a teacher, by its shape."""
        return all(getattr(self.shape, name) == getattr(teacher, name) for name in SHAPE)


def open_files(flags: Flags, config: StudentConfig) -> dict[str, Any]:
    """Open everything that the run reads weights from, by its headers; return what of `Settings` they tell, by name."""
    wan_files, teacher = open_fitting_teacher(flags, config)
    encoder, given = None, flags.text_encoder_path
    if given or not wan_files.is_mock:  # which has embeddings of its own
        encoder = find_text_encoder(given) if given else wan_files.text_encoder()
        encoder.check_text_dim(config.text_encoder_output_dim)
    wan_files = replace(wan_files, encoder=encoder)  # which is a part of what the teacher is
    source = open_source(flags, config)
    check_levels(flags, teacher, source.student_steps if source and flags.train == "lora" else flags.student_steps)
    vae = find_sample_vae(flags, wan_files, teacher)
    return {"wan_files": wan_files, "teacher": teacher, "encoder": encoder, "vae_location": vae, "source": source}


def open_source(flags: Flags, config: StudentConfig) -> Source | None:
    """Open what the student is cut from; None where that is the teacher, or nothing."""
    place = flags.init_from
    if place in ("teacher", "random"):
        return None
    config.check_is_wan(f"--init_from {place}", "starts from random values")
    wan_files = open_wan_files(place)
    name = flags.init_expert if len(wan_files.experts) > 1 else "high"
    expert = wan_files.expert(name)
    try:
        check_fits(expert.config, config, flags.layers, flags.student_config)
    except ConfigError as error:
        ours, theirs = (", ".join(f"{key} {getattr(shape, key)}" for key in SHAPE) for shape in (config, expert.config))
        raise UserError(f"--init_from {place}: has {theirs}; the student ({ours}) is no part of it: {error}") from None
    try:
        shape, part = read_made_of(expert.location, expert.config)
    except UserError:  # it is no student, or nothing is known of its making
        shape, part = expert.config, Selection(list(range(expert.config.depth)))
    if flags.train == "student":
        return Source(wan_files, name, shape, part)
    if not (Path(expert.location) / CONFIG_NAME).is_file():
        raise UserError(
            f"--train lora: {place} is no trained student; give an --output_dir of this command as --init_from"
        )
    trained = load_student_config(expert.location)
    if replace(trained, image_size=config.image_size, distillation=None) != config:
        raise UserError(
            f"--train lora: the student of {place} has another shape than {flags.student_config}; leave --student_config out"
        )
    return Source(wan_files, name, shape, part, StudentRecord.of(trained).student_steps, trained_sizes(trained))


def open_fitting_teacher(flags: Flags, config: StudentConfig) -> tuple[WanFiles, TeacherSettings]:
    """Open the teacher by its headers, and refuse it unless the student is a part of it."""
    wan_files = open_teacher(flags.teacher_path, config, flags.teacher_path_low)
    if str(flags.preset).startswith("A14B") and len(wan_files.experts) == 1 and not wan_files.is_mock:
        raise UserError(
            f"--preset {flags.preset}: is for the two experts of A14B, and {flags.teacher_path} is one; give the folder of both, or "
            "the low-noise one as --teacher_path_low"
        )
    wan_files = merge_loras(wan_files, flags.teacher_lora, flags.teacher_lora_low)
    if flags.vae_path:
        vae = find_vae(flags.vae_path, flags.teacher_path, wan_files.config.num_channels)
        wan_files = replace(wan_files, record=read_vae_config(vae, wan_files.config.num_channels) | wan_files.record)
    check_fits(wan_files.expert(flags.init_expert).config, config, flags.layers, flags.student_config)
    settings = sampled_as(flags, wan_files)
    config.check_image_size(settings.vae_scale_factor, flags.student_config)
    return wan_files, settings


def sampled_as(flags: Flags, wan_files: WanFiles) -> TeacherSettings:
    typed = {known.name: getattr(flags, known.name) for known in fields(GuidanceFlags)}
    if flags.train == "lora" and (Path(flags.init_from) / CONFIG_NAME).is_file():  # the student stays what it is
        record = StudentRecord.of(StudentConfig.load(flags.init_from))
        if record.shift is not None and typed["shift"] not in (None, record.shift):
            raise UserError(f"--shift: the student of {flags.init_from} draws at shift {record.shift:g}; leave it out")
        names = (name for name in ("shift", "guidance_scale", "guidance_scale_2") if typed[name] is None)
        typed |= {name: getattr(record, name) for name in names}
    if levels := typed["teacher_levels"]:
        if not LEVELS.fits(levels):
            raise UserError(f"--teacher_levels {' '.join(f'{level:g}' for level in levels)}: allowed: {LEVELS.allowed}")
        typed["teacher_sampler"] = "renoise"
    if typed["teacher_sampler"] is None and (typed["teacher_steps"] or math.inf) <= FEW_TEACHER_STEPS:
        typed["teacher_sampler"] = "euler"
    return resolve_settings(wan_files, **typed)


def check_levels(flags: Flags, teacher: TeacherSettings, student_steps: int | None) -> None:
    """Refuse a run that needs other noise levels than a teacher of a few of them has."""
    if not teacher.has_few_levels:
        return
    num_steps = teacher.num_inference_steps
    if teacher.teacher_levels and (student_steps or flags.teacher_steps not in (None, num_steps)):
        name = "student_steps" if student_steps else "teacher_steps"
        raise UserError(f"--{name}: this teacher, and so its student, noises anew at {num_steps} levels; leave it out")
    if student_steps and num_steps % student_steps:
        allowed = ", ".join(str(count) for count in range(1, num_steps + 1) if num_steps % count == 0)
        raise UserError(
            f"--student_steps {student_steps}: does not divide the teacher's {num_steps} steps, and it has no noise levels between "
            f"them; allowed: {allowed}"
        )


def find_sample_vae(flags: Flags, wan_files: WanFiles, teacher: TeacherSettings) -> Path | None:
    """Find the VAE of the sample pictures; None where none can be drawn. A --vae_path without the teacher's VAE is a mistake."""
    given = flags.vae_path
    wants_none = flags.num_samples == 0 and not flags.sample_prompts
    if wants_none or (wan_files.is_mock and given is None):
        return None
    if tuple(flags.sigma_range or ALL_LEVELS) != ALL_LEVELS:
        print("No sample pictures: a student of a part of the noise levels does not draw on its own")
        return None
    try:
        location = find_vae(given, flags.teacher_path, wan_files.config.num_channels)
        check_is_vae_of(teacher, wan_files.config.num_channels, location)
        vae_tensors(location)  # whose headers tell a file that is cut short
    except UserError as error:
        if given is not None:
            raise
        print(f"No sample pictures: {error}")
        return None
    return location


def check_is_vae_of(teacher: TeacherSettings, num_channels: int, place: Path) -> None:
    """Refuse a VAE of other latents than the teacher's, by what it says of them."""
    vae = read_vae_config(place, num_channels)
    if (factor := vae.get("vae_scale_factor")) not in (None, teacher.vae_scale_factor):
        raise UserError(
            f"{place}: is a VAE of factor {factor}; the teacher's latents have factor "
            f"{teacher.vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    check_statistics(teacher.latents_mean, teacher.latents_std, vae, place)
