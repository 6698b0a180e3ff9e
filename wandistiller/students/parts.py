"""The teacher, LoRAs, text encoder and VAE of a student: where flags or its record say, opened and held against the student.

A record may come from a stranger. It leads to files of a Wan on this machine, or in the hub's local cache, and to nothing else;
what it names on the hub is fetched only where a flag names it again. Only the standard library is imported until a file is known
to be right.
"""

import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wandistiller.errors import UserError
from wandistiller.files.clone import CLONE
from wandistiller.files.hub import cached_snapshot, hub_id, is_hub_id
from wandistiller.flags import TeacherFlags
from wandistiller.model.config import StudentConfig
from wandistiller.students.record import StudentRecord

if TYPE_CHECKING:
    from wandistiller.wan.settings import TeacherSettings
    from wandistiller.wan.text_encoder_files import TextEncoderFiles
    from wandistiller.wan.wan_files import WanFiles


def recorded_settings(config: StudentConfig) -> "TeacherSettings":
    """How the teacher was sampled, as the record holds it."""
    from wandistiller.wan.settings import TeacherSettings

    StudentRecord.of(config)
    record = config.distillation or {}
    named = [known.name for known in fields(TeacherSettings) if known.default is MISSING or record.get(known.name)]
    values: dict[str, Any] = {name: record.get(name) for name in named}
    return TeacherSettings(**values)


def recorded_path(path: str | None) -> str | None:
    """Return a path as a student's record holds it, so that it is found from any folder.

    Hub ids and "mock" stay as they are and local paths become absolute; those inside this code's own folder become ./...,
    which no hub id can look like.
    """
    if path is None or path == "mock" or hub_id(path):
        return path
    absolute = Path(os.path.abspath(path))
    return f"./{absolute.relative_to(CLONE)}" if absolute.is_relative_to(CLONE) else str(absolute)


def recorded_teacher(wan_files: "WanFiles", settings: "TeacherSettings") -> dict[str, object]:
    """Return the entries of a student's record for its teacher: where it is, its LoRAs, how it is sampled, a toy teacher's world."""
    place, world = wan_files.location, wan_files.record.get("world")
    loras = [lora.record() | {"path": recorded_path(str(lora.path))} for lora in wan_files.loras]
    return {
        "teacher_path": recorded_path(place),
        **({"base_model": place} if hub_id(place) else {}),
        **({"teacher_loras": loras} if loras else {}),
        **({"world": world} if isinstance(world, str) else {}),
        **settings.recorded(),
    }


def _found(recorded: str, what: str, flag: str, is_of_hub: bool) -> str:
    """Return where a recorded path is now.

    Args:
        is_of_hub: the record says that it was taken from the hub; it is then looked for in the hub's local cache.

    Raises:
        UserError: nothing is there.
    """
    if recorded == "mock":
        return recorded
    if is_of_hub:
        folder = cached_snapshot(recorded)
        if folder is None:
            raise UserError(
                f"{recorded}: this student records that its {what} is this hub repository, which is not in the hub's local cache; "
                f"if you trust it, {flag} {recorded} fetches it, or give {flag} a local copy"
            )
        return str(folder)
    local = CLONE / recorded
    if not local.exists():
        raise UserError(f"{local}: the {what} this student records is not there; give {flag}")
    return str(local)


def teacher_paths(config: StudentConfig, given: TeacherFlags) -> tuple[str, str | None]:
    """Return where the teacher and its low-noise expert are: as flags say, else as recorded.

    A recorded teacher is a hub repository only where the run that made the student took it from there (`base_model`): a
    missing folder must not become somebody else's repository of the same name.
    """
    low = given.teacher_path_low
    if given.teacher_path is not None:
        return given.teacher_path, low
    record = StudentRecord.of(config)
    is_of_hub = record.teacher_path == record.base_model
    teacher = _found(record.teacher_path, "teacher", "--teacher_path", is_of_hub)
    if low is None and record.teacher_path_low is not None:
        low = _found(record.teacher_path_low, "low-noise expert", "--teacher_path_low", is_of_hub=False)
    return teacher, low


def open_recorded_teacher(config: StudentConfig, teacher: tuple[str, str | None], given: TeacherFlags) -> "WanFiles":
    """Open the files of the student's teacher, with the LoRAs that flags name or else the recorded ones. No weight is read yet.

    Args:
        teacher: what `teacher_paths` found.

    Raises:
        UserError: they cannot be opened, or are not those of this student's teacher.
    """
    from wandistiller.wan.layouts import open_teacher
    from wandistiller.wan.wan_files import merge_loras

    wan_files = open_teacher(teacher[0], config, teacher[1])
    for name in ("num_channels", "text_encoder_output_dim"):
        theirs, ours = getattr(wan_files.config, name), getattr(config, name)
        if theirs != ours:
            raise UserError(f"{teacher[0]}: has {name} {theirs}, the student {ours}; it is not this student's teacher")
    record = StudentRecord.of(config)
    if (len(wan_files.experts) > 1) != (record.boundary_ratio is not None):
        was = "one expert" if record.boundary_ratio is None else "two, of which --teacher_path_low is the low-noise one"
        raise UserError(f"{teacher[0]}: has {len(wan_files.experts)} experts; this student's teacher was {was}")
    loras = record.teacher_loras or []
    flag = " ".join(f"--teacher_lora{'_low' * (one['expert'] == 'low')} {one['file']}:{one['scale']}" for one in loras)
    if given.teacher_lora or given.teacher_lora_low:
        wan_files = merge_loras(wan_files, given.teacher_lora, given.teacher_lora_low)
        known = {(lora["expert"], lora["sha256"], lora["scale"]) for lora in loras}
        if {(lora.expert, lora.sha256, lora.scale) for lora in wan_files.loras} != known:
            print(f"Warning: these are not the LoRAs that this student's teacher had: {flag or 'none'}")
        return wan_files
    for lora in loras:
        if lora.get("path") is None:  # as in the record of a published student
            raise UserError(f"this student's teacher had LoRAs, and nothing records where they are; give {flag}")
        file = _found(lora["path"], "LoRA of the teacher that", flag, is_of_hub=False)
        wan_files = merge_loras(wan_files, **{lora["expert"]: [(file, lora["scale"])]})
        if (found := wan_files.experts[lora["expert"]].loras[-1].sha256) != lora["sha256"]:
            raise UserError(
                f"{file}: is another file than the LoRA that this student's teacher had (sha256 {found[:12]}..., recorded "
                f"{lora['sha256'][:12]}...); give {flag} with the right one"
            )
    return wan_files


def find_recorded_encoder(
    config: StudentConfig, text_encoder_path: str | None, teacher_path: str
) -> "TextEncoderFiles | None":
    """Find the text encoder and its tokenizer on disk; None stands for the mock teacher's embeddings.

    Raises:
        UserError: they are not there, or give embeddings of another width than the student takes.
    """
    from wandistiller.wan.text_encoder_files import find_text_encoder

    path, recorded = text_encoder_path, StudentRecord.of(config).text_encoder_path
    if path is None and recorded is not None:
        is_of_hub = is_hub_id(recorded) and not (CLONE / recorded).exists()
        path = _found(recorded, "text encoder", "--text_encoder_path", is_of_hub)
    if path is None and teacher_path == "mock":
        return None
    encoder = find_text_encoder(path or teacher_path)
    encoder.check_text_dim(config.text_encoder_output_dim)
    return encoder
