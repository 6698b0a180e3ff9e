"""3D -> 2D: a Wan teacher's weights become a 2D model, of its own shape (exact at one frame) or a smaller student's.

The patch kernel of Wan is (1, p, p) and frame 0 has temporal RoPE angle 0, so one frame of the 3D transformer is a 2D
transformer with the same weights and Conv2d = W[:, :, 0]. A smaller student takes a consistent part of them.

    python projection_mapper.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --output_dir outputs/projected

With --selection calibrated the part is chosen, and its layers refitted, by what the teacher does with prompts; --size_ladder
compares shapes of the same number of parameters before one of them is trained:

    python projection_mapper.py --student_config config/demo_student_config.json --teacher_path data/demo_teacher \
        --selection calibrated --calibration_prompts data/demo_prompts.txt --size_ladder 5
"""

import sys

from wandistiller.command_line import FlagParser, int_list, number, path, run_command
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
    group = parser.group("Selection")
    group.flag(
        "--selection",
        choices=["norm", "calibrated"],
        default="norm",
        help="by weight norm, or by what the teacher does with prompts, with every linear layer refitted",
    )
    group.flag("--calibration_prompts", type=path, help="text file, one prompt a line, to calibrate on")
    group.flag("--calibration_paths", type=number(int, low=1), help="the teacher's sampling paths to fit on (48 to 96)")
    group.flag("--calibration_cache", type=path, help="file that keeps the teacher's side of it for another student")
    group.flag("--text_encoder_path", type=path, help="folder or hub id with text_encoder/, where the teacher has none")
    group.flag("--prompt_cache", type=path, default="outputs/prompt_cache", help="folder that keeps prompt embeddings")
    group.flag("--seed", type=number(int, low=0, high=2**62), default=0, help="of the calibration")
    group.flag("--device", help="where it is computed: cpu, cuda, ... (cuda if there is one)")
    group.flag("--size_ladder", type=number(int, low=1, high=100), help="compare so many shapes of as many parameters")
    parser.group("Output").flag(
        "--output_dir", type=path, help="folder for the student and projection_report.json (not with --size_ladder)"
    )
    args = parser.parse(argv)
    if args.output_dir is None and args.size_ladder is None:
        parser.error("the following arguments are required: --output_dir")
    return args


def check_calibration_flags(args, config: StudentConfig | None) -> None:
    """Refuse flags that need each other, before torch loads."""
    from wandistiller.errors import UserError

    if args.size_ladder and args.selection == "norm":
        raise UserError("--size_ladder compares calibrated students; give --selection calibrated")
    if args.size_ladder and (args.output_dir or args.layers):
        raise UserError(
            "--size_ladder prints a table of other shapes and saves none; leave --output_dir and --layers out"
        )
    if args.selection == "norm" and args.calibration_prompts:
        raise UserError("--calibration_prompts is of no use to --selection norm; give --selection calibrated")
    if args.selection == "calibrated" and config is None:
        raise UserError("--selection calibrated makes a smaller student; give its shape with --student_config")
    if args.selection == "calibrated" and not args.calibration_prompts:
        raise UserError("--selection calibrated needs prompts to ask the teacher; give --calibration_prompts FILE")


def calibrate_teacher(args, wan_files, config: StudentConfig):
    """The whole teacher, and what it does with the calibration prompts: asked now, or as --calibration_cache has it."""
    from pathlib import Path

    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.files.output_folder import check_writable
    from wandistiller.files.prompts import load_prompts
    from wandistiller.projection.calibrated import calibrate, check_can_be_calibrated
    from wandistiller.projection.calibration import options_for
    from wandistiller.projection.calibration_file import load_calibration, save_calibration
    from wandistiller.projection.project import project_experts
    from wandistiller.sampling.recorded import embed_with_negative
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.targets.cache import describe_teacher, prompts_digest
    from wandistiller.wan.files import find_text_encoder
    from wandistiller.wan.settings import resolve_settings

    check_can_be_calibrated(config)
    if args.output_dir:
        check_writable(args.output_dir, "--output_dir")
    device = pick_device(args.device)
    dtype = pick_dtype(None, device)
    prompts = load_prompts(args.calibration_prompts).prompts
    settings = resolve_settings(wan_files)
    encoder = find_text_encoder(args.text_encoder_path) if args.text_encoder_path else None
    if encoder is None and not wan_files.is_mock:
        encoder = wan_files.text_encoder()
    negative_prompt = settings.negative_prompt if settings.uses_guidance else None
    embeds, negative = embed_with_negative(prompts, negative_prompt, encoder, config, args.prompt_cache, device)
    experts = project_experts(wan_files, config.text_max_length, dtype, device)
    teacher = Teacher(experts, settings, negative)
    shape = settings.latent_shape(config)
    given = {"num_paths": args.calibration_paths, "seed": args.seed, "compute_dtype": dtype, "device": device}
    options = options_for(shape, wan_files.config.patch_size, **given)
    slots = {"text_max_length": config.text_max_length, "latent_shape": shape}
    about = describe_teacher(wan_files, settings) | slots | {"prompts": prompts_digest(prompts)}
    if args.calibration_cache and Path(args.calibration_cache).exists():
        return teacher, load_calibration(args.calibration_cache, embeds, about, args.expert, options)
    print(f"Asking the teacher: {options.num_paths} paths of {options.num_levels} noise levels", flush=True)
    calibration = calibrate(teacher, embeds, shape, args.expert, options)
    if args.calibration_cache:
        save_calibration(args.calibration_cache, calibration, about)
    return teacher, calibration


def print_ladder(teacher, calibration, wan_files, config: StudentConfig, count: int) -> None:
    """Relative velocity errors before training, a line for each shape."""
    from wandistiller.projection.ladder import measure_rung, rung_line, shapes_of_budget

    print("Relative velocity error before training, on the teacher's paths:")
    print(rung_line())
    for shape in shapes_of_budget(wan_files.config, config, count):
        print(rung_line(measure_rung(wan_files, teacher, calibration, shape)), flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Config first: a typo is answered before torch loads.
    config = StudentConfig.load(args.student_config) if args.student_config else None
    check_calibration_flags(args, config)

    from wandistiller.errors import UserError
    from wandistiller.files.output_folder import prepare_output_folder, set_aside_previous_student
    from wandistiller.projection.calibrated import calibrated_student
    from wandistiller.projection.project import REPORT_NAME, project_teacher
    from wandistiller.projection.selection import check_fits
    from wandistiller.wan.open import open_teacher

    if args.layers and config is None:
        raise UserError("--layers names the layers of a smaller student; give its shape with --student_config")
    wan_files = open_teacher(args.teacher_path, config, args.teacher_path_low)
    if config is not None:
        check_fits(wan_files.expert(args.expert).config, config, args.layers, args.student_config)
        config.check_image_size(wan_files.vae_scale_factor or config.vae_scale_factor, args.student_config)
    calibrated = calibrate_teacher(args, wan_files, config) if args.selection == "calibrated" else None
    if args.size_ladder:
        return print_ladder(*calibrated, wan_files, config, args.size_ladder)
    folder = prepare_output_folder(args.output_dir)
    if calibrated:
        student, report = calibrated_student(wan_files, *calibrated, config, layers=args.layers)
    else:
        student, report = project_teacher(wan_files, config, args.expert, layers=args.layers)
    print(report.summary())
    if aside := set_aside_previous_student(folder):
        print(f"The student that was in {folder} is now in {aside}")
    student.save_pretrained(folder)
    report.save(folder)
    print(f"Saved to {folder}: student_config.json, diffusion_model.safetensors, {REPORT_NAME}")


if __name__ == "__main__":
    sys.exit(run_command(main))
