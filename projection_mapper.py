"""Turn a Wan teacher, a 3D model, into a 2D one: of the teacher's own shape, or a smaller student that inherits a part of it.

`wandistiller/projection/project.py` tells why one frame of a Wan is a 2D model. `project_teacher`, the same from Python, can
be imported from here.

    python projection_mapper.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --output_dir outputs/projected

With --selection calibrated the part is chosen, and its layers refitted, by what the teacher does with prompts; --size_ladder
compares shapes of the same number of parameters before one of them is trained:

    python projection_mapper.py --student_config config/demo_student_config.json --teacher_path data/demo_teacher \
        --selection calibrated --calibration_prompts data/demo_prompts.txt --size_ladder 5
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import FlagParser, int_list, number, path, run_command
from wandistiller.errors import UserError
from wandistiller.model.config import StudentConfig

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from wandistiller.projection.calibrated import Calibration
    from wandistiller.projection.project import ProjectionReport
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.wan_files import WanFiles

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
    selection: str
    calibration_prompts: str | None
    calibration_paths: int | None
    calibration_cache: str | None
    text_encoder_path: str | None
    prompt_cache: str
    seed: int
    device: str | None
    size_ladder: int | None
    output_dir: str | None


def parse_args(argv: list[str] | None = None) -> Flags:
    parser = FlagParser("projection_mapper.py", "Project a Wan teacher to a 2D student, and say what it inherited.")
    group = parser.group("Input")
    group.flag("--teacher_path", required=True, type=path, help="folder, .safetensors or .gguf file, hub id, or mock")
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
    group.flag("--seed", type=number(int, low=0, high=2**62), default=0, help="seed of the calibration")
    group.flag("--device", help="where it is computed: cpu, cuda, ... (cuda if there is one)")
    group.flag("--size_ladder", type=number(int, low=1, high=100), help="compare so many shapes of as many parameters")
    parser.group("Output").flag(
        "--output_dir", type=path, help="folder for the student and projection_report.json (not with --size_ladder)"
    )
    flags = Flags(**vars(parser.parse(argv)))
    if flags.output_dir is None and flags.size_ladder is None:
        parser.error("the following arguments are required: --output_dir")
    return flags


def check_flags(flags: Flags) -> None:
    """Refuse flags that need each other, before torch loads."""
    is_calibrated, has_shape = flags.selection == "calibrated", flags.student_config is not None
    if flags.layers and not has_shape:
        raise UserError("--layers names the layers of a smaller student; give its shape with --student_config")
    if flags.size_ladder and not is_calibrated:
        raise UserError("--size_ladder compares calibrated students; give --selection calibrated")
    if flags.size_ladder and (flags.output_dir or flags.layers):
        raise UserError(
            "--size_ladder prints a table of other shapes and saves none; leave --output_dir and --layers out"
        )
    if flags.calibration_prompts and not is_calibrated:
        raise UserError("--calibration_prompts is of no use to --selection norm; give --selection calibrated")
    if is_calibrated and not has_shape:
        raise UserError("--selection calibrated makes a smaller student; give its shape with --student_config")
    if is_calibrated and not flags.calibration_prompts:
        raise UserError("--selection calibrated needs prompts to ask the teacher; give --calibration_prompts FILE")


def calibrate_teacher(flags: Flags, wan_files: "WanFiles", config: StudentConfig) -> "tuple[Teacher, Calibration]":
    """Load the whole teacher, and ask it what it does with the prompts, unless --calibration_cache has that already."""
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
    from wandistiller.wan.settings import resolve_settings
    from wandistiller.wan.text_encoder_files import find_text_encoder

    # Everything is checked before the teacher is asked:
    check_can_be_calibrated(config)
    if flags.output_dir:
        check_writable(flags.output_dir, "--output_dir")
    device = pick_device(flags.device)
    dtype = pick_dtype(None, device)
    prompts = load_prompts(flags.calibration_prompts or "").prompts
    settings = resolve_settings(wan_files)
    encoder = find_text_encoder(flags.text_encoder_path) if flags.text_encoder_path else None
    if encoder is None and not wan_files.is_mock:
        encoder = wan_files.text_encoder()

    # The text encoder leaves memory before the teacher comes:
    embeds, negative = embed_with_negative(prompts, settings, encoder, config, flags.prompt_cache, device)
    experts = project_experts(wan_files, config.text_max_length, dtype, device)
    teacher = Teacher(experts, settings, negative)
    shape = settings.latent_shape(config)
    options = options_for(
        shape,
        wan_files.config.patch_size or 1,
        num_paths=flags.calibration_paths,
        seed=flags.seed,
        compute_dtype=dtype,
        device=device,
    )
    about = describe_teacher(wan_files, settings) | {
        "text_max_length": config.text_max_length,
        "latent_shape": shape,
        "prompts": prompts_digest(prompts),
    }
    if flags.calibration_cache and Path(flags.calibration_cache).exists():
        return teacher, load_calibration(flags.calibration_cache, embeds, about, flags.expert, options)
    print(f"Asking the teacher: {options.num_paths} paths of {options.num_levels} noise levels", flush=True)
    calibration = calibrate(teacher, embeds, shape, flags.expert, options)
    if flags.calibration_cache:
        save_calibration(flags.calibration_cache, calibration, about)
    return teacher, calibration


def print_ladder(
    teacher: "Teacher", calibration: "Calibration", wan_files: "WanFiles", config: StudentConfig, count: int
) -> None:
    """Print the relative velocity errors before training, a line for each shape."""
    from wandistiller.projection.ladder import measure_rung, rung_line, shapes_of_budget

    print("Relative velocity error before training, on the teacher's paths:")
    print(rung_line())
    for shape in shapes_of_budget(wan_files.config, config, count):
        print(rung_line(measure_rung(wan_files, teacher, calibration, shape)), flush=True)


def main(argv: list[str] | None = None) -> None:
    # What a person typed is checked before torch loads:
    flags = parse_args(argv)
    config = StudentConfig.load(flags.student_config) if flags.student_config else None
    check_flags(flags)

    from wandistiller.files.output_folder import prepare_output_folder, set_aside_previous_student
    from wandistiller.projection.calibrated import calibrated_student
    from wandistiller.projection.project import REPORT_NAME, project_teacher
    from wandistiller.projection.selection import check_fits
    from wandistiller.wan.layouts import open_teacher

    # The teacher's files and the output folder are checked before a weight is read:
    wan_files = open_teacher(flags.teacher_path, config, flags.teacher_path_low)
    if config is not None and flags.student_config is not None:
        check_fits(wan_files.expert(flags.expert).config, config, flags.layers, flags.student_config)
        config.check_image_size(wan_files.vae_scale_factor or config.vae_scale_factor, flags.student_config)

    # Project:
    teacher_and_calibration = None
    if flags.selection == "calibrated" and config is not None:
        teacher_and_calibration = calibrate_teacher(flags, wan_files, config)
        if flags.size_ladder:
            return print_ladder(*teacher_and_calibration, wan_files, config, flags.size_ladder)
    folder = prepare_output_folder(flags.output_dir or "")
    report: ProjectionReport
    if teacher_and_calibration is not None and config is not None:
        student, report = calibrated_student(wan_files, *teacher_and_calibration, config, layers=flags.layers)
    else:
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
