"""Turn a Wan teacher, a 3D model, into a 2D one: of the teacher's own shape, or a smaller student that inherits a part of it.

`wandistiller/projection/project.py` tells why one frame of a Wan is a 2D model. `project_teacher`, the same from Python, can
be imported from here.

    python projection_mapper.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --output_dir outputs/projected

With --lora a LoRA of the teacher is cut for a student of it, which diffusers and ComfyUI then load onto the student's export:

    python projection_mapper.py --lora my_lora.safetensors --student outputs/demo --output outputs/demo_lora.safetensors
"""

import os
import sys
from dataclasses import fields
from pathlib import Path

from wandistiller import __version__
from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.flags import LORA_FLAG, flag, group, int_list, parse_flags, path
from wandistiller.model.config import StudentConfig
from wandistiller.students.parts import recorded_teacher

PUBLIC = ("ProjectionReport", "project_teacher")


def __getattr__(name: str):
    """Import the public names on first use (PEP 562), because `--help` must not wait for torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'projection_mapper' has no attribute {name!r}")
    from wandistiller.projection import project

    return getattr(project, name)


@group("Project a teacher (needs --teacher_path and --output_dir)")
class ProjectFlags:
    """The teacher, and the student that is made of it."""

    teacher_path: str = flag("folder, .safetensors or .gguf file, hub id, or mock", type=path)
    teacher_path_low: str | None = flag("the low-noise expert, where the two are two files or folders", type=path)
    teacher_lora: list[tuple[str, float]] | None = flag(
        "a Wan LoRA that is merged into the teacher; may be given several times", **LORA_FLAG
    )
    teacher_lora_low: list[tuple[str, float]] | None = flag("the same for the low-noise expert of two", **LORA_FLAG)
    student_config: str | None = flag("student_config.json; without it the teacher's own shape is kept", type=path)
    expert: str = flag("which expert of a two-expert teacher", "high", choices=["high", "low"])
    layers: list[int] | None = flag("teacher layer of each student block, e.g. 0,2,5,7", type=int_list)
    output_dir: str = flag("folder for the student and projection_report.json", type=path)


@group("Cut a LoRA of the teacher for a student (needs --lora, --student and --output)")
class LoraFlags:
    """The LoRA of a teacher, and the student that it is cut for."""

    lora: list[tuple[str, float]] | None = flag(
        "a LoRA of the student's teacher, to be cut for it; several are added up", **LORA_FLAG
    )
    student: str = flag("folder of the student, with its projection_report.json", type=path)
    format: str = flag("original is for ComfyUI", "diffusers", choices=["diffusers", "original"])
    output: str = flag("file for the student's LoRA (.safetensors)", type=path)


@group()
class Flags(ProjectFlags, LoraFlags):
    """The flags of this command, as `--help` describes them."""


def check_flags(flags: Flags) -> None:
    """Refuse flags that are missing, and flags of the two jobs together, before torch loads."""
    others: type
    if flags.lora:
        others, needed, why = ProjectFlags, ("student", "output"), "makes a student, and --lora cuts a LoRA for one"
    else:
        others, needed, why = LoraFlags, ("teacher_path", "output_dir"), "belongs to --lora FILE"
    for known in fields(others):
        if getattr(flags, known.name) not in (None, known.default):
            raise UserError(f"--{known.name}: {why}; leave it out")
    if missing := [f"--{name}" for name in needed if getattr(flags, name) is None]:
        raise UserError(f"the following arguments are required: {', '.join(missing)}")
    if flags.layers and flags.student_config is None:
        raise UserError("--layers names the layers of a smaller student; give its shape with --student_config")
    if output := flags.output:
        if Path(output).suffix != ".safetensors":
            raise UserError(f"--output {output}: give a file name that ends in .safetensors")
        if os.path.lexists(output):
            raise UserError(f"--output {output}: is there already and is not replaced; give another name")


def cut_lora(flags: LoraFlags) -> None:
    """Write the part of a teacher's LoRA that a student has, and print what is left out."""
    from wandistiller.projection.lora import cut_loras, write_lora
    from wandistiller.projection.selection_record import read_made_of
    from wandistiller.students.record import load_shape
    from wandistiller.wan.lora import open_lora
    from wandistiller.wan.transformer_files import teacher_tensor_shapes

    config, output = load_shape(flags.student), Path(flags.output)
    teacher, selection = read_made_of(flags.student, config)
    shapes = teacher_tensor_shapes(teacher)
    loras = [open_lora(path, scale, shapes) for path, scale in flags.lora or []]
    student_lora = cut_loras(loras, selection, config)
    if not student_lora.names():
        raise UserError(
            f"{loras[0].path}: changes only layers that the student does not have, so nothing of it is left"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    left_out = write_lora(student_lora, output, flags.format)
    print(f"Wrote {output}: {len(student_lora.names())} tensors of the student are changed, names of {flags.format}")
    if student_lora.dropped:
        print(f"Left out: {len(student_lora.dropped)} tensors of layers that the student does not have")
    if left_out:
        print(
            f"Left out: {len(left_out)} changes that are no product of two matrices, such as that of {left_out[0]}; --format "
            "original has them for ComfyUI"
        )


def project(flags: ProjectFlags) -> None:
    """Write a student, or the teacher in 2D, with the report of what it inherited."""
    from wandistiller.files.output_folder import prepare_output_folder, removed_if_empty, set_aside_previous_student
    from wandistiller.projection.project import REPORT_NAME, project_teacher
    from wandistiller.projection.selection import check_fits
    from wandistiller.sampling.sampler import alone
    from wandistiller.wan.layouts import open_teacher
    from wandistiller.wan.settings import resolve_settings
    from wandistiller.wan.wan_files import merge_loras

    # The teacher's files and the output folder are checked before a weight is read:
    config = StudentConfig.load(flags.student_config) if flags.student_config else None
    wan_files = open_teacher(flags.teacher_path, config, flags.teacher_path_low)
    wan_files = merge_loras(wan_files, flags.teacher_lora, flags.teacher_lora_low)
    if config is not None and flags.student_config is not None:
        check_fits(wan_files.expert(flags.expert).config, config, flags.layers, flags.student_config)
        factor = wan_files.record.get("vae_scale_factor") or config.vae_scale_factor
        config.check_image_size(factor, flags.student_config)
    with removed_if_empty(flags.output_dir):
        folder = prepare_output_folder(flags.output_dir)

        # Project and save:
        student, report = project_teacher(wan_files, config, flags.expert, layers=flags.layers)
        print(report.summary())
        if aside := set_aside_previous_student(folder):
            print(f"The student that was in {folder} is now in {aside}")
        sampled = resolve_settings(wan_files)
        # It knows no guidance, and is drawn with as its teacher is:
        record = {**recorded_teacher(wan_files, alone(sampled, 1.0)), "layers": report.layers, "num_train_steps": 0}
        student.config = student.config.replace(distillation=record | {"wandistiller_version": __version__})
        student.save_pretrained(folder)
        report.save(folder)
        print(f"Saved to {folder}: student_config.json, diffusion_model.safetensors, {REPORT_NAME}")
        guided = f" --guidance_scale {sampled.guidance_scale:g}" if sampled.uses_guidance else ""
        print(f"generate_images.py --student {folder}{guided} draws with it, untrained as it is")


def main(argv: list[str] | None = None) -> None:
    what = "Project a Wan teacher to a 2D student, and say what it inherited."
    flags = parse_flags(Flags, "projection_mapper.py", what, argv)
    check_flags(flags)
    (cut_lora if flags.lora else project)(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
