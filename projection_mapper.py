"""Turn a Wan teacher, a 3D model, into a 2D one: of the teacher's own shape, or a smaller student that inherits a part of it.

`wandistiller/projection/project.py` tells why one frame of a Wan is a 2D model. `project_teacher`, the same from Python, can
be imported from here.

    python projection_mapper.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --output_dir outputs/projected

With --selection calibrated the part is chosen, and its layers refitted, by what the teacher does with prompts; --size_ladder
compares shapes of the same number of parameters before one of them is trained:

    python projection_mapper.py --student_config config/demo_student_config.json --teacher_path data/demo_teacher \
        --selection calibrated --calibration_prompts data/demo_prompts.txt --size_ladder 5

With --lora a LoRA of the teacher is cut for a student of it, which diffusers and ComfyUI then load onto the student's export:

    python projection_mapper.py --lora my_lora.safetensors --student outputs/demo --output outputs/demo_lora.safetensors \
        --calibration_prompts data/demo_prompts.txt
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.flags import LORA_FLAG, FlagParser, int_list, number, path
from wandistiller.model.config import StudentConfig

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from wandistiller.projection.calibrated import Calibration
    from wandistiller.projection.calibration import CalibrationOptions
    from wandistiller.projection.lora import StudentLora
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

    teacher_path: str | None
    teacher_path_low: str | None
    teacher_lora: list[tuple[str, float]] | None
    teacher_lora_low: list[tuple[str, float]] | None
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
    lora: list[tuple[str, float]] | None
    student: str | None
    format: str
    lora_steps: int
    output: str | None


def parse_args(argv: list[str] | None = None) -> Flags:
    parser = FlagParser("projection_mapper.py", "Project a Wan teacher to a 2D student, and say what it inherited.")
    group = parser.group("Input")
    group.flag(
        "--teacher_path",
        type=path,
        help="folder, .safetensors or .gguf file, hub id, or mock (required without --lora)",
    )
    group.flag("--teacher_path_low", type=path, help="the low-noise expert, where the two are two files or folders")
    group.flag(
        "--teacher_lora", help="a Wan LoRA that is merged into the teacher; may be given several times", **LORA_FLAG
    )
    group.flag("--teacher_lora_low", help="the same for the low-noise expert of two", **LORA_FLAG)
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
    group.flag(
        "--calibration_prompts",
        type=path,
        help="prompts to calibrate on, in any file that --data_path of train_distillation.py takes",
    )
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
    group = parser.group(
        "A LoRA for a student (with --calibration_prompts it is fitted to what the teacher does with it)"
    )
    group.flag("--lora", help="a LoRA of the student's teacher, to be cut for it; several are added up", **LORA_FLAG)
    group.flag("--student", type=path, help="folder of the student, with its projection_report.json")
    group.flag("--format", choices=["diffusers", "original"], default="diffusers", help="original is for ComfyUI")
    group.flag("--lora_steps", type=number(int, low=1), default=200, help="steps of that fit")
    group.flag("--output", type=path, help="file for the student's LoRA (.safetensors)")
    flags = Flags(**vars(parser.parse(argv)))
    needed = ("student", "output") if flags.lora else ("teacher_path", "output_dir")
    missing = [f"--{name}" for name in needed if getattr(flags, name) is None]
    if flags.size_ladder is not None:
        missing = [name for name in missing if name != "--output_dir"]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
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


def check_lora_flags(flags: Flags) -> None:
    """Refuse flags of the two jobs, to project a teacher and to cut a LoRA, that are given together."""
    projecting = ("student_config", "layers", "size_ladder", "output_dir", "calibration_cache")
    fitting = ("teacher_lora", "teacher_lora_low", "calibration_paths")
    for name in projecting if flags.lora else ("student", "output"):
        if getattr(flags, name) is not None:
            why = "makes a student, and --lora cuts a LoRA for one" if flags.lora else "belongs to --lora FILE"
            raise UserError(f"--{name}: {why}; leave it out")
    for name in fitting if flags.lora and not flags.calibration_prompts else ():
        if getattr(flags, name) is not None:
            raise UserError(f"--{name}: is for a LoRA that is fitted too; give --calibration_prompts FILE with it")
    output = Path(flags.output or "")
    if flags.lora and output.suffix != ".safetensors":
        raise UserError(f"--output {output}: give a file name that ends in .safetensors")
    if flags.lora and os.path.lexists(output):
        raise UserError(f"--output {output}: is there already and is not replaced; remove it, or give another name")


def cut_lora(flags: Flags) -> None:
    """Write the part of a teacher's LoRA that a student has, fitted where prompts are given, and say what became of the rest."""
    from wandistiller.projection.lora import cut_loras, write_lora
    from wandistiller.projection.selection_record import read_made_of
    from wandistiller.sampling.recorded import load_shape
    from wandistiller.wan.layouts import open_teacher
    from wandistiller.wan.lora import open_lora
    from wandistiller.wan.transformer_files import teacher_tensor_shapes

    config, output = load_shape(flags.student or ""), Path(flags.output or "")
    wan_files = open_teacher(flags.teacher_path, config, flags.teacher_path_low) if flags.teacher_path else None
    made_of = read_made_of(flags.student or "", config, wan_files)
    shapes = teacher_tensor_shapes(made_of.teacher)
    loras = [open_lora(path, scale, shapes) for path, scale in flags.lora or []]
    student_lora = cut_loras(loras, made_of.selection, config)
    if not student_lora.names():
        raise UserError(
            f"{loras[0].path}: changes only layers that the student does not have, so nothing of it is left"
        )
    if flags.calibration_prompts:
        student_lora = fitted_lora(flags, config, made_of.expert, student_lora)
    output.parent.mkdir(parents=True, exist_ok=True)
    left_out = write_lora(student_lora, output, flags.format)
    print(f"Wrote {output}: {len(student_lora.names())} tensors of the student are changed, names of {flags.format}")
    if student_lora.dropped:
        print(f"Left out: {len(student_lora.dropped)} tensors of layers that the student does not have")
    if left_out:
        print(
            f"Left out: {len(left_out)} differences of norms and modulation tables, such as {left_out[0]}, which diffusers does "
            "not load; --format original has them for ComfyUI"
        )


def fitted_lora(flags: Flags, config: StudentConfig, expert: str, student_lora: "StudentLora") -> "StudentLora":
    """Train the cut LoRA on what the teacher answers to the prompts with the LoRA in it, and print what that brings."""
    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.calibration import draw_states, options_for
    from wandistiller.projection.lora_fit import fit_lora
    from wandistiller.projection.project import project_experts
    from wandistiller.sampling.recorded import (
        embed_with_negative,
        find_recorded_encoder,
        load_student_config,
        open_recorded_teacher,
        recorded_settings,
        teacher_paths,
        teacher_sampling,
        trained_sizes,
    )
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.lora import merge_loras

    # Everything is checked before the teacher is asked:
    student_folder = flags.student or ""
    load_student_config(student_folder)
    if (config.distillation or {}).get("student_steps"):
        raise UserError(
            "--calibration_prompts: a student of few steps answers for whole steps, which this fit does not; leave it out"
        )
    teacher_path, low = teacher_paths(config, flags.teacher_path, flags.teacher_path_low)
    wan_files = open_recorded_teacher(config, teacher_path, low)
    wan_files = merge_loras(wan_files, **{expert: flags.lora})
    wan_files = merge_loras(wan_files, flags.teacher_lora, flags.teacher_lora_low)
    device, settings = pick_device(flags.device), recorded_settings(config)
    dtype = pick_dtype(None, device)
    shape, patch = settings.latent_shape(config, trained_sizes(config)[0]), wan_files.config.patch_size or 1
    options = options_for(shape, patch, flags.calibration_paths, seed=flags.seed, compute_dtype=dtype, device=device)
    if settings.has_few_levels:  # and is asked at no others
        sampling = teacher_sampling(config, None, dtype, device)
        options = replace(options, num_levels=sampling.num_inference_steps, sampler=sampling.sampler)
    prompts = prompts_of_paths(flags, options)
    encoder = find_recorded_encoder(config, flags.text_encoder_path, teacher_path)

    # The text encoder leaves memory before the teacher comes:
    embeds, negative = embed_with_negative(prompts, settings, encoder, config, flags.prompt_cache, device)
    teacher = Teacher(project_experts(wan_files, config.text_max_length, dtype, device), settings, negative)
    print(
        f"Asking the teacher with the LoRA: {options.num_paths} paths of {options.num_levels} noise levels", flush=True
    )
    states = draw_states(teacher, embeds, shape, options)
    student = WanLiteStudent.from_pretrained(student_folder)
    fitted = fit_lora(student, student_lora, states, embeds, options, num_steps=flags.lora_steps)
    print(
        f"Relative velocity error to the teacher with the LoRA: student alone {fitted.before:.3f}, with the cut LoRA "
        f"{fitted.cut:.3f}, with the fitted one {fitted.fitted:.3f}"
    )
    return fitted.lora


def prompts_of_paths(flags: Flags, options: "CalibrationOptions") -> Sequence[str]:
    """Read the prompts to ask the teacher; of templates, which give them without end, one for each path."""
    from wandistiller.prompts.prompts import is_endless, load_prompts

    found = load_prompts(flags.calibration_prompts or "").prompts
    return found[: options.num_paths + options.num_held_back] if is_endless(found) else found


def calibrate_teacher(flags: Flags, wan_files: "WanFiles", config: StudentConfig) -> "tuple[Teacher, Calibration]":
    """Load the whole teacher, and ask it what it does with the prompts, unless --calibration_cache has that already."""
    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.files.output_folder import check_writable
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
    settings = resolve_settings(wan_files)
    shape = settings.latent_shape(config)
    options = options_for(
        shape,
        wan_files.config.patch_size or 1,
        num_paths=flags.calibration_paths,
        seed=flags.seed,
        compute_dtype=dtype,
        device=device,
    )
    prompts = prompts_of_paths(flags, options)
    encoder = find_text_encoder(flags.text_encoder_path) if flags.text_encoder_path else None
    if encoder is None and not wan_files.is_mock:
        encoder = wan_files.text_encoder()

    # The text encoder leaves memory before the teacher comes:
    embeds, negative = embed_with_negative(prompts, settings, encoder, config, flags.prompt_cache, device)
    experts = project_experts(wan_files, config.text_max_length, dtype, device)
    teacher = Teacher(experts, settings, negative)
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
    check_lora_flags(flags)
    if flags.lora:
        return cut_lora(flags)
    check_flags(flags)

    from wandistiller.files.output_folder import prepare_output_folder, set_aside_previous_student
    from wandistiller.projection.calibrated import calibrated_student
    from wandistiller.projection.project import REPORT_NAME, project_teacher
    from wandistiller.projection.selection import check_fits
    from wandistiller.wan.layouts import open_teacher
    from wandistiller.wan.lora import merge_loras

    # The teacher's files and the output folder are checked before a weight is read:
    wan_files = open_teacher(flags.teacher_path or "", config, flags.teacher_path_low)
    wan_files = merge_loras(wan_files, flags.teacher_lora, flags.teacher_lora_low)
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
