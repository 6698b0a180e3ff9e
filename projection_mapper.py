"""Turn a Wan teacher, a 3D model, into a 2D one: of the teacher's own shape, or a smaller student that inherits a part of it.

`wandistiller/projection/project.py` tells why one frame of a Wan is a 2D model. `project_teacher`, the same from Python, can
be imported from here.

    python projection_mapper.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --output_dir outputs/projected
"""

import sys
from dataclasses import dataclass

from wandistiller.command_line import FlagParser, int_list, path, run_command
from wandistiller.errors import UserError
from wandistiller.model.config import StudentConfig

PUBLIC = ("ProjectionReport", "project_teacher")


def __getattr__(name: str):
    """Import the public names on first use (PEP 562), because `--help` must not wait for torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'projection_mapper' has no attribute {name!r}")
    from wandistiller.projection import project

    return getattr(project, name)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them."""

    teacher_path: str
    teacher_path_low: str | None
    student_config: str | None
    expert: str
    layers: list[int] | None
    output_dir: str


def parse_args(argv: list[str] | None = None) -> Flags:
    parser = FlagParser("projection_mapper.py", "Project a Wan teacher to a 2D student, and say what it inherited.")
    group = parser.group("Input")
    group.flag("--teacher_path", required=True, type=path, help="folder, .safetensors file, hub id, or mock")
    group.flag("--teacher_path_low", type=path, help="the low-noise expert, where the two are two files")
    group.flag("--student_config", type=path, help="student_config.json; without it the teacher's own shape is kept")
    group.flag("--expert", choices=["high", "low"], default="high", help="which expert of a two-expert teacher")
    group.flag("--layers", type=int_list, help="teacher layer of each student block, e.g. 0,2,5,7")
    parser.group("Output").flag(
        "--output_dir", required=True, type=path, help="folder for the student and projection_report.json"
    )
    return Flags(**vars(parser.parse(argv)))


def main(argv: list[str] | None = None) -> None:
    # What a person typed is checked before torch loads:
    flags = parse_args(argv)
    config = StudentConfig.load(flags.student_config) if flags.student_config else None
    if flags.layers and config is None:
        raise UserError("--layers names the layers of a smaller student; give its shape with --student_config")

    from wandistiller.files.output_folder import prepare_output_folder, set_aside_previous_student
    from wandistiller.projection.project import REPORT_NAME, project_teacher
    from wandistiller.projection.selection import check_fits
    from wandistiller.wan.layouts import open_teacher

    # The teacher's files and the output folder are checked before a weight is read:
    wan_files = open_teacher(flags.teacher_path, config, flags.teacher_path_low)
    if config is not None and flags.student_config is not None:
        check_fits(wan_files.expert(flags.expert).config, config, flags.layers, flags.student_config)
        config.check_image_size(wan_files.vae_scale_factor or config.vae_scale_factor, flags.student_config)
    folder = prepare_output_folder(flags.output_dir)

    # Project:
    student, report = project_teacher(wan_files, config, flags.expert, layers=flags.layers)
    print(report.summary())

    # Save:
    if aside := set_aside_previous_student(folder):
        print(f"The student that was in {folder} is now in {aside}")
    student.save_pretrained(folder)
    report.save(folder)
    print(f"Saved to {folder}: student_config.json, diffusion_model.safetensors, {REPORT_NAME}")


if __name__ == "__main__":
    sys.exit(run_command(main))
