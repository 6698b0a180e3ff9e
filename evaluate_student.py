"""Hold a student against its teacher on prompts it was not trained on: a table, evaluation.json, teacher_vs_student.png.

    python evaluate_student.py --student outputs/demo --prompts_file data/demo_heldout_prompts.txt --num_prompts 100

Both draw from the same noise with the teacher's recorded shift and guidance; wandistiller/evaluation/measures.py defines every measure.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import FlagParser, number, path, run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import (
    COMPARISON_NAME,
    EVALUATION_NAME,
    check_output_folder,
    prepare_output_folder,
)
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
    weights_digest,
)

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    import numpy as np

    from wandistiller.evaluation.experiment import Experiment


NUM_COLUMNS = 8  # prompts in the picture


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(
        "evaluate_student.py",
        "Hold a student against its teacher on held-out prompts. Flags are accepted with underscores or hyphens.",
        "Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted, 1 anything else.",
    )
    model = parser.group("Model")
    model.flag(
        "--student", "folder of a trained student (--output_dir of train_distillation.py)", required=True, type=path
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
    prompts.flag("--prompts_file", "text file, one prompt a line, none of them trained on", required=True, type=path)
    prompts.flag("--num_prompts", "how many of them, from the first", 32, type=number(int, low=1))
    prompts.flag(
        "--prompt_cache", "folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path
    )

    sampling = parser.group("Sampling")
    sampling.flag("--num_seeds", "pictures of each prompt", 2, type=number(int, low=1))
    sampling.flag("--seed", "of the first noise", 0, type=number(int, low=0, high=2**62))
    sampling.flag(
        "--num_inference_steps",
        "steps of the sampler (as recorded; a student of few steps keeps to its own)",
        type=number(int, low=1, high=1000),
    )

    performance = parser.group("Performance")
    performance.flag("--batch_size", "pictures drawn at once", 16, type=number(int, low=1))
    performance.flag("--device", "cpu, cuda, cuda:1, ... (cuda if there is one)")
    performance.flag("--dtype", "of matrix products (bf16 on cuda, else fp32)", choices=["fp32", "bf16"])

    parser.group("Output").flag(
        "--output", f"folder for {EVALUATION_NAME} and {COMPARISON_NAME} (the student's own)", type=path
    )

    args = parser.parse(argv)
    args.output = args.output or args.student
    return args


def world_judge_of(wan_files, prompts: list[str]):
    """The judge of the world that the checkpoint names, or None; prompts it cannot read are refused before any work."""
    from wandistiller.evaluation import demo_judge, icon_judge

    world, folder = wan_files.record.get("world"), Path(wan_files.location)
    if world == "shapes":
        judge = demo_judge
    elif world == "icons" and (folder / icon_judge.SHEET_NAME).is_file():
        judge = icon_judge.open_judge(folder)
    else:  # an exported student of pictographs knows its world by name alone
        return None
    for prompt in prompts:
        try:
            judge.read_prompt(prompt)
        except ValueError as err:
            raise UserError(f"--prompts_file: {err}; this teacher is judged on prompts of its own world") from None
    return judge.judge


def prepare(args: argparse.Namespace, config: StudentConfig, prompts: list[str]):
    """The experiment and the judge; every file is checked before a weight is read."""
    from dataclasses import replace

    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.evaluation.experiment import Experiment
    from wandistiller.evaluation.measures import sample_plan
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.project import project_experts
    from wandistiller.sampling.flow import seeded_noise
    from wandistiller.sampling.sampler import student_field
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.open import open_teacher
    from wandistiller.wan.vae import find_vae, load_vae

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    settings = recorded_settings(config)
    teacher_path, low_noise_path = teacher_paths(config, args.teacher_path, args.teacher_path_low)
    wan_files = open_teacher(teacher_path, config, low_noise_path)
    check_is_teacher(wan_files.config, config, teacher_path)
    check_size("the student's image_size", config.image_size, config, wan_files.config.patch_size)
    vae_location = find_vae(args.vae_path, teacher_path)
    encoder = find_recorded_encoder(config, args.text_encoder_path, teacher_path)
    judge = world_judge_of(wan_files, prompts)
    vae = load_vae(*vae_location, config.num_channels, config.vae_scale_factor, device)

    negative_prompt = settings.negative_prompt if settings.uses_guidance else None
    embeds, negative = embed_with_negative(prompts, negative_prompt, encoder, config, args.prompt_cache, device)
    steps = args.num_inference_steps or settings.num_inference_steps
    is_few = config.distillation.get("student_steps") is not None  # it draws in the steps it learnt
    student_options = student_sampling(config, None if is_few else steps, dtype, device)
    prompt_indices, seeds = sample_plan(len(prompts), args.num_seeds, args.seed)
    experiment = Experiment(
        student=student_field(WanLiteStudent.from_pretrained(args.student, device), settings),
        teacher=Teacher(project_experts(wan_files, config.text_max_length, dtype, device), settings, negative),
        embeds=embeds,
        prompts=[prompts[index] for index in prompt_indices],
        prompt_indices=prompt_indices,
        noise=seeded_noise(seeds, (config.num_channels, config.latent_size, config.latent_size)),
        options=replace(student_options, sampler="unipc", num_inference_steps=steps),
        student_options=student_options,
        settings=settings,
        vae=vae,
        num_seeds=args.num_seeds,
        batch_size=args.batch_size,
    )
    return experiment, judge


def save_picture(file: Path, experiment: "Experiment", teacher: "np.ndarray", student: "np.ndarray") -> None:
    """The first seed of the first prompts: teacher above, student below, from the same noise."""
    from wandistiller.files.pictures import labelled_grid, save_png

    chosen = range(0, len(experiment.prompts), experiment.num_seeds)[:NUM_COLUMNS]
    captions = [[experiment.prompts[index] for index in chosen], [""] * len(chosen)]
    grid = labelled_grid(
        [[part[index] for index in chosen] for part in (teacher, student)], captions, ["teacher", "student"]
    )
    options = experiment.options
    save_png(grid, file, {"num_inference_steps": options.num_inference_steps, "shift": options.shift})


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    args = parse_args(argv)
    config = load_student_config(args.student)
    prompts = load_prompts(args.prompts_file).prompts[: args.num_prompts]
    teacher_paths(config, args.teacher_path, args.teacher_path_low)
    check_output_folder(args.output, "--output")

    from wandistiller.evaluation.experiment import measure, measure_cost
    from wandistiller.files.atomic import atomic_path
    from wandistiller.reports.cards import try_to_write_model_card
    from wandistiller.reports.tables import finite, table_lines

    digest = weights_digest(args.student)  # before they are read: a run may be writing new ones
    experiment, judge = prepare(args, config, prompts)
    folder = prepare_output_folder(args.output, "--output")
    options, settings = experiment.options, experiment.settings
    print(
        f"{len(prompts)} prompts x {args.num_seeds} seeds, teacher {options.num_inference_steps} steps, student "
        f"{experiment.student_options.num_inference_steps}, shift {options.shift:g}, "
        f"teacher's guidance_scale {settings.guidance_scale:g}"
    )

    # Measure:
    results, pictures_teacher, pictures_student = measure(experiment, judge)
    results["cost"] = measure_cost(experiment)
    print("\n".join(table_lines(results)))

    # Save:
    about = {
        "student": args.student,
        "student_sha256": digest,
        "teacher": args.teacher_path or config.distillation["teacher_path"],
        "prompts_file": args.prompts_file,
        "num_prompts": len(prompts),
        "num_seeds": args.num_seeds,
        "seed": args.seed,
        "num_inference_steps": options.num_inference_steps,
        "student_steps": experiment.student_options.num_inference_steps,
        "shift": options.shift,
        "guidance_scale": settings.guidance_scale,
        "guidance_scale_2": settings.guidance_scale_2,
        "image_size": config.image_size,
        "device": options.device,
        "dtype": str(options.compute_dtype).removeprefix("torch."),
    }
    save_picture(folder / COMPARISON_NAME, experiment, pictures_teacher, pictures_student)
    with atomic_path(folder / EVALUATION_NAME) as beside:  # last: it says which student the picture is of, too
        beside.write_text(
            json.dumps(finite(about | results), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
    print(f"Saved {EVALUATION_NAME} and {COMPARISON_NAME} in {folder}")
    if folder.resolve() == Path(args.student).resolve() and (card := try_to_write_model_card(folder)):
        print(f"The model card holds them: {card}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
