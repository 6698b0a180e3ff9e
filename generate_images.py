"""Draw prompts with a trained student (or with its teacher, from the same noise): a PNG each and a grid.

    python generate_images.py --student outputs/demo --prompt "a large red circle on a white background"
    python generate_images.py --student outputs/demo --prompts_file data/static_prompts.txt --model teacher --output outputs/teacher

Steps, shift, guidance and size default to what the student's own record holds.
"""

import argparse
import math
import sys
from typing import TYPE_CHECKING

from wandistiller.command_line import FlagParser, number, path, run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import check_output_folder, prepare_output_folder
from wandistiller.files.prompts import load_prompts
from wandistiller.model.config import StudentConfig
from wandistiller.sampling.recorded import (
    check_is_teacher,
    check_size,
    embed_with_negative,
    find_recorded_encoder,
    load_student_config,
    recorded_settings,
    student_sampling,
    teacher_paths,
)

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    import torch
    from torch import Tensor

    from wandistiller.sampling.sampler import SamplingOptions
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.files import WanFiles
    from wandistiller.wan.settings import TeacherSettings

MAX_GRID = 100  # pictures in grid.png


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(
        "generate_images.py",
        "Draw prompts with a trained student, or with its teacher. Flags are accepted with underscores or hyphens.",
        "Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted, 1 anything else.",
    )
    model = parser.group("Model")
    model.flag(
        "--student", "folder of a trained student (--output_dir of train_distillation.py)", required=True, type=path
    )
    model.flag(
        "--model", "who draws: the student, or the teacher it records", "student", choices=["student", "teacher"]
    )
    model.flag("--teacher_path", "the teacher, where it is no longer where the student's record says", type=path)
    model.flag("--teacher_path_low", "its low-noise expert, where the two experts are two files or folders", type=path)
    model.flag(
        "--text_encoder_path",
        "folder or hub id with text_encoder/ and tokenizer/, where the teacher has none",
        type=path,
    )
    model.flag("--vae_path", "folder or hub id of a diffusers AutoencoderKLWan, where the teacher has none", type=path)

    prompts = parser.group("Prompts")
    prompts.flag("--prompt", "one or more prompts, each in quotes", nargs="+", metavar="PROMPT")
    prompts.flag("--prompts_file", "text file, one prompt a line", type=path)
    prompts.flag(
        "--prompt_cache", "folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path
    )

    sampling = parser.group("Sampling (left out: as the student records)")
    sampling.flag("--num_inference_steps", "steps of the sampler", type=number(int, low=1, high=1000))
    sampling.flag(
        "--guidance_scale",
        "g of v_uncond + g (v_cond - v_uncond); a student has learnt its teacher's guided velocity, so for it 1",
        type=number(float, low=0),
    )
    sampling.flag(
        "--allow_double_guidance", "guide a student whose teacher was guided already", False, action="store_true"
    )
    sampling.flag(
        "--seed", "of the first picture's noise; each next one has one more", 0, type=number(int, low=0, high=2**62)
    )
    sampling.flag("--height", "pixels", type=number(int, low=1))
    sampling.flag("--width", "pixels", type=number(int, low=1))

    performance = parser.group("Performance")
    performance.flag("--batch_size", "pictures drawn at once", 4, type=number(int, low=1))
    performance.flag("--device", "cpu, cuda, cuda:1, ... (cuda if there is one)")
    performance.flag("--dtype", "of matrix products (bf16 on cuda, else fp32)", choices=["fp32", "bf16"])

    parser.group("Output").flag("--output", "folder for the pictures", "outputs/images", type=path)
    return parser.parse(argv)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of --prompt, then those of the file."""
    if not args.prompt and not args.prompts_file:
        raise UserError("nothing to draw: give --prompt or --prompts_file")
    prompts = list(args.prompt or [])
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty; write what to draw, in quotes")
    return prompts + (load_prompts(args.prompts_file).prompts if args.prompts_file else [])


def choose_guidance(args: argparse.Namespace, settings: "TeacherSettings") -> "TeacherSettings":
    """The settings to draw with; a student's own guidance is 1 and the teacher's is in what it learnt."""
    from dataclasses import replace

    if args.model == "teacher":
        if args.guidance_scale is None:
            return settings
        low = None if settings.boundary_ratio is None else args.guidance_scale
        return replace(settings, guidance_scale=args.guidance_scale, guidance_scale_2=low)
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    if scale != 1.0 and settings.uses_guidance and not args.allow_double_guidance:
        raise UserError(
            f"--guidance_scale {scale:g}: this student learnt its teacher's guided velocity (guidance_scale "
            f"{settings.guidance_scale:g}), and guiding it again overdoes it; leave the flag out, or add "
            "--allow_double_guidance"
        )
    return replace(settings, guidance_scale=scale, guidance_scale_2=None, boundary_ratio=None)


def warn_of_untrained(config: StudentConfig, options: "SamplingOptions") -> None:
    record = config.distillation or {}
    low, high = record.get("sigma_range") or (0.0, 1.0)
    if low > 0.0 or high < 1.0:
        print(f"Warning: this student was trained at sigma {low:g} to {high:g} only; a picture needs all of 0 to 1")
    steps = record.get("student_steps") or options.num_inference_steps
    if steps != options.num_inference_steps:
        print(f"Warning: this student learnt to draw in {steps} steps, not in {options.num_inference_steps}")


def build_field(
    args: argparse.Namespace,
    config: StudentConfig,
    settings: "TeacherSettings",
    wan_files: "WanFiles | None",
    negative: "Tensor | None",
    dtype: "torch.dtype",
    device: str,
) -> "Teacher":
    """Who answers with velocities: the teacher's experts, or the student."""
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.project import project_experts
    from wandistiller.sampling.sampler import student_field
    from wandistiller.sampling.teacher import Teacher

    if wan_files is not None:
        return Teacher(project_experts(wan_files, config.text_max_length, dtype, device), settings, negative)
    student = WanLiteStudent.from_pretrained(args.student, device)
    return student_field(student, settings, settings.guidance_scale, negative)


def describe(args: argparse.Namespace, settings: "TeacherSettings", options: "SamplingOptions") -> dict[str, object]:
    """What a picture's metadata says beside prompt and seed."""
    from wandistiller import __version__

    values = {
        "model": args.model,
        "student": args.student,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "guidance_scale_2": settings.guidance_scale_2,
        "shift": options.shift,
        "height": args.height,
        "width": args.width,
        "Software": f"WanDistiller {__version__}",
    }
    return {name: value for name, value in values.items() if value is not None}


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    args = parse_args(argv)
    config = load_student_config(args.student)
    prompts = read_prompts(args)
    paths = teacher_paths(config, args.teacher_path, args.teacher_path_low)
    args.height, args.width = args.height or config.image_size, args.width or config.image_size
    for name in ("height", "width"):
        check_size(f"--{name}", getattr(args, name), config, config.patch_size)
    check_output_folder(args.output, "--output")

    from dataclasses import replace

    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.files.pictures import labelled_grid, save_png, slug
    from wandistiller.sampling.flow import seeded_noise
    from wandistiller.sampling.sampler import sample_in_batches
    from wandistiller.wan.open import open_teacher
    from wandistiller.wan.vae import decode, find_vae, load_vae

    # Every file, before a weight is read:
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    settings = choose_guidance(args, recorded_settings(config))
    options = student_sampling(config, args.num_inference_steps, dtype, device)
    wan_files = None
    if args.model == "teacher":
        steps = args.num_inference_steps or settings.num_inference_steps
        options = replace(options, sampler="unipc", num_inference_steps=steps)
        wan_files = open_teacher(paths[0], config, paths[1])
        check_is_teacher(wan_files.config, config, paths[0])
        for name in ("height", "width"):
            check_size(f"--{name}", getattr(args, name), config, wan_files.config.patch_size)
    else:
        warn_of_untrained(config, options)
    vae_location = find_vae(args.vae_path, paths[0])
    encoder = find_recorded_encoder(config, args.text_encoder_path, paths[0])
    vae = load_vae(vae_location, config.num_channels, config.vae_scale_factor, device)
    folder = prepare_output_folder(args.output, "--output")

    # Text first: its encoder leaves memory before the model comes:
    negative_prompt = settings.negative_prompt if settings.uses_guidance else None
    embeds, negative = embed_with_negative(prompts, negative_prompt, encoder, config, args.prompt_cache, device)
    field = build_field(args, config, settings, wan_files, negative, dtype, device)

    # Draw, a batch at a time:
    shape = (config.num_channels, args.height // config.vae_scale_factor, args.width // config.vae_scale_factor)
    about = describe(args, settings, options)
    shown = []
    for start in range(0, len(prompts), args.batch_size):
        indices = list(range(start, min(start + args.batch_size, len(prompts))))
        noise = seeded_noise([args.seed + index for index in indices], shape)
        latents = sample_in_batches(field, noise, embeds, indices, options, args.batch_size)
        pictures = decode(vae, latents, settings.latents_mean, settings.latents_std)
        for index, picture in zip(indices, pictures, strict=True):
            file = folder / f"{index:03d}_{slug(prompts[index])}.png"
            save_png(picture, file, {"prompt": prompts[index], "seed": args.seed + index, **about})
            print(file, flush=True)
        shown.extend(pictures[: MAX_GRID - len(shown)])

    # All on one sheet:
    columns = math.ceil(math.sqrt(len(shown)))
    starts = range(0, len(shown), columns)
    captions = [prompts[: len(shown)][start : start + columns] for start in starts]
    grid = labelled_grid([shown[start : start + columns] for start in starts], captions)
    save_png(grid, folder / "grid.png", about | {"seed": args.seed})
    print(f"{len(prompts)} pictures by the {args.model} and grid.png in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
