"""Turn a Wan teacher, a 3D model, into a 2D one: of the teacher's own shape, or a smaller student that inherits a part of it.

`wandistiller/projection/project.py` tells why one frame of a Wan is a 2D model. `project_teacher`, the same from Python, can
be imported from here.

    python projection_mapper.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --output_dir outputs/projected
"""

import sys
from dataclasses import replace

from wandistiller import __version__
from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.flags import LORA_FLAG, flag, group, int_list, parse_flags, path
from wandistiller.model.config import StudentConfig
from wandistiller.students.parts import recorded_path, recorded_teacher

PUBLIC = ("ProjectionReport", "project_teacher")


def __getattr__(name: str):
    """Import the public names on first use (PEP 562), because `--help` must not wait for torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'projection_mapper' has no attribute {name!r}")
    from wandistiller.projection import project

    return getattr(project, name)


@group()
class Flags:
    """The teacher, and the student that is made of it."""

    teacher_path: str = flag("folder, .safetensors or .gguf file, hub id, or mock", required=True, type=path)
    teacher_path_low: str | None = flag("the low-noise expert, where the two are two files or folders", type=path)
    teacher_lora: list[tuple[str, float]] | None = flag("a LoRA to merge into it; several may be given", **LORA_FLAG)
    teacher_lora_low: list[tuple[str, float]] | None = flag("the same for the low-noise expert of two", **LORA_FLAG)
    student_config: str | None = flag("student_config.json; without it the teacher's own shape is kept", type=path)
    expert: str = flag("which expert of a two-expert teacher", "high", choices=["high", "low"])
    layers: list[int] | None = flag("teacher layer of each student block, e.g. 0,2,5,7", type=int_list)
    output_dir: str = flag("folder for the student and projection_report.json", required=True, type=path)


def project(flags: Flags) -> None:
    """Write a student, or the teacher in 2D, with the report of what it inherited."""
    from wandistiller.files.output_folder import prepare_output_folder, removed_if_empty, set_aside_previous_student
    from wandistiller.projection.project import REPORT_NAME, project_teacher
    from wandistiller.projection.selection import check_fits
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
        unguided = replace(
            sampled, guidance_scale=1.0, guidance_scale_2=None if sampled.boundary_ratio is None else 1.0
        )
        record = {**recorded_teacher(wan_files, unguided), "layers": report.layers, "num_train_steps": 0}
        if flags.teacher_path_low:
            record["teacher_path_low"] = recorded_path(flags.teacher_path_low)
        student.config = student.config.replace(distillation=record | {"wandistiller_version": __version__})
        student.save_pretrained(folder)
        report.save(folder)
        print(f"Saved to {folder}: student_config.json, diffusion_model.safetensors, {REPORT_NAME}")
        scale = sampled.guidance_scale_2 if flags.expert == "low" else sampled.guidance_scale
        guided = f" --guidance_scale {scale:g}" if sampled.uses_guidance else ""
        print(f"generate_images.py --student {folder}{guided} draws with it, untrained as it is")


def main(argv: list[str] | None = None) -> None:
    what = "Project a Wan teacher to a 2D student, and say what it inherited."
    flags = parse_flags(Flags, "projection_mapper.py", what, argv)
    if flags.layers and flags.student_config is None:
        raise UserError("--layers names the layers of a smaller student; give its shape with --student_config")
    project(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
