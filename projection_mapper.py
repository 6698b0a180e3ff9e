"""3D -> 2D: a Wan teacher's weights become a 2D model, of its own shape (exact at one frame) or a smaller student's.

The patch kernel of Wan is (1, p, p) and frame 0 has temporal RoPE angle 0, so one frame of the 3D transformer is a 2D
transformer with the same weights and Conv2d = W[:, :, 0]. A smaller student takes a consistent part of them.

    python projection_mapper.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --output_dir outputs/projected
"""

import sys

from wandistiller.command_line import FlagParser, int_list, path, run_command
from wandistiller.model.config import StudentConfig

PUBLIC = ("ProjectionReport", "project_teacher")


def __getattr__(name: str):
    """Import the public names on first use: `--help` must not wait for torch (PEP 562)."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'projection_mapper' has no attribute {name!r}")
    from wandistiller.projection import project

    return getattr(project, name)


def parse_args(argv: list[str] | None = None):
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
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Config first: a typo is answered before torch loads.
    config = StudentConfig.load(args.student_config) if args.student_config else None

    from wandistiller.errors import UserError
    from wandistiller.files.output_folder import prepare_output_folder, set_aside_previous_student
    from wandistiller.projection.project import REPORT_NAME, project_teacher
    from wandistiller.projection.selection import check_fits
    from wandistiller.wan.open import open_teacher

    if args.layers and config is None:
        raise UserError("--layers names the layers of a smaller student; give its shape with --student_config")
    wan_files = open_teacher(args.teacher_path, config, args.teacher_path_low)
    if config is not None:
        check_fits(wan_files.expert(args.expert).config, config, args.layers, args.student_config)
        config.check_image_size(wan_files.vae_scale_factor or config.vae_scale_factor, args.student_config)
    folder = prepare_output_folder(args.output_dir)
    student, report = project_teacher(wan_files, config, args.expert, layers=args.layers)
    print(report.summary())
    if aside := set_aside_previous_student(folder):
        print(f"The student that was in {folder} is now in {aside}")
    student.save_pretrained(folder)
    report.save(folder)
    print(f"Saved to {folder}: student_config.json, diffusion_model.safetensors, {REPORT_NAME}")


if __name__ == "__main__":
    sys.exit(run_command(main))
