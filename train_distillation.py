"""Distil a Wan text-to-video checkpoint into a small 2D image student, from a text file of prompts.

    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt \
        --output_dir ./outputs/wan_t2i --num_epochs 100 --batch_size 4 --lr 1e-5

The demo, on a CPU in minutes and with no download, needs no flags:

    python train_distillation.py
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import FlagParser, int_list, number, path, run_command
from wandistiller.output_folder import (
    METRICS_NAME,
    SAMPLES_NAME,
    check_output_folder,
    prepare_output_folder,
    set_aside_previous_student,
)
from wandistiller.prompts import PromptFile, load_prompts
from wandistiller.student_config import CONFIG_NAME, StudentConfig

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from torch import Tensor

    from wandistiller.prompt_embeds import PromptEmbeds
    from wandistiller.student import WanLiteStudent
    from wandistiller.teacher import Teacher, TeacherSettings
    from wandistiller.training import TrainingOptions
    from wandistiller.wan_checkpoint import WanCheckpoint


DEMO_TEACHER = "data/demo_teacher"
# What a flag that is left out stands for: (in general, with the demo teacher)
DEFAULTS = {
    "data_path": ("data/static_prompts.txt", "data/demo_prompts.txt"),
    "num_epochs": (1, 40),
    "batch_size": (4, 64),
    "lr": (1e-5, 3e-3),
    "replay": (1, 4),
    "lr_warmup_steps": (0, 50),
}
LR_SCHEDULERS = ["constant", "linear", "cosine"]


def shown(name: str) -> str:
    """The default of a flag in its help text."""
    general, demo = DEFAULTS[name]
    return f"(default: {general}; with the demo teacher {demo})"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(
        "train_distillation.py",
        "Distil a Wan checkpoint into a small 2D image student. Flags are accepted with underscores or hyphens.",
        "Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted after saving, 1 anything else.",
    )
    data = parser.group("Data")
    data.flag(
        "--teacher_path",
        "folder, .safetensors file, hub id, or mock (random weights, no download)",
        DEMO_TEACHER,
        type=path,
    )
    data.flag("--teacher_path_low", "the low-noise expert, where the two experts are two files or folders", type=path)
    data.flag(
        "--text_encoder_path",
        "folder or hub id with text_encoder/ and tokenizer/, where the teacher has none",
        type=path,
    )
    data.flag("--vae_path", "folder or hub id of a diffusers AutoencoderKLWan, where the teacher has none", type=path)
    data.flag("--data_path", f"text file, one prompt a line {shown('data_path')}", type=path)
    data.flag("--prompt_cache", "folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)

    model = parser.group("Student")
    model.flag("--student_config", "shape of the student", "config/demo_student_config.json", type=path)
    model.flag(
        "--init",
        "what the student starts from: the teacher's projected weights, or random values",
        "projection",
        choices=["projection", "random"],
    )
    model.flag(
        "--init_expert",
        "the expert that initialises the student, of a two-expert teacher",
        "high",
        choices=["high", "low"],
    )
    model.flag(
        "--layers", "teacher layer of each student block, e.g. 0,2,5,7 (evenly spread if left out)", type=int_list
    )

    teacher = parser.group("Teacher (left out: the released model's own values, or what the checkpoint records)")
    teacher.flag("--guidance_scale", "g of v_uncond + g (v_cond - v_uncond); 1 is off", type=number(float, low=0))
    teacher.flag("--guidance_scale_2", "g of the low-noise expert", type=number(float, low=0))
    teacher.flag(
        "--boundary_ratio", "sigma from which the high-noise expert answers", type=number(float, low=0, high=1)
    )
    teacher.flag("--negative_prompt", "what guidance pushes away from (Wan's own, less the words against stills)")
    teacher.flag("--shift", "warp of the noise levels, shift u / (1 + (shift - 1) u)", type=number(float, above=0))

    states = parser.group("Training states")
    states.flag(
        "--states",
        "trajectory: the teacher's own sampling paths; noise: pure noise at every noise level",
        "trajectory",
        choices=["trajectory", "noise"],
    )
    states.flag(
        "--sigma_range",
        "noise levels trained on",
        (0.0, 1.0),
        nargs=2,
        type=number(float, low=0, high=1),
        metavar=("LOW", "HIGH"),
    )

    states.flag(
        "--replay", f"steps that learn from each of the teacher's answers {shown('replay')}", type=number(int, low=1)
    )

    optimization = parser.group("Optimization")
    optimization.flag("--num_epochs", f"passes over the prompts {shown('num_epochs')}", type=number(int, low=1))
    optimization.flag("--max_steps", "optimiser steps; overrides --num_epochs", type=number(int, low=1))
    optimization.flag("--batch_size", f"prompts per optimiser step {shown('batch_size')}", type=number(int, low=1))
    optimization.flag("--lr", f"learning rate of AdamW {shown('lr')}", type=number(float, above=0, high=1e9))
    optimization.flag(
        "--lr_scheduler", "the learning rate after its warm-up: kept, or down to zero", "cosine", choices=LR_SCHEDULERS
    )
    optimization.flag(
        "--lr_warmup_steps", f"steps of a linear rise from zero {shown('lr_warmup_steps')}", type=number(int, low=0)
    )
    optimization.flag(
        "--ema_decay",
        "the saved weights are a moving average with this memory a step; 0: the last weights",
        0.999,
        type=number(float, low=0, high=0.999999),
    )
    optimization.flag("--max_grad_norm", "gradients are clipped to this norm", 1.0, type=number(float, above=0))
    optimization.flag("--weight_decay", "weight decay of AdamW", 0.0, type=number(float, low=0))
    optimization.flag("--seed", "of prompt order, noise and initial values", 0, type=number(int, low=0, high=2**63 - 1))

    performance = parser.group("Performance")
    performance.flag("--device", "cpu, cuda, cuda:1, ... (cuda if there is one)")
    performance.flag(
        "--dtype", "of matrix products and of the teacher's weights (bf16 on cuda, else fp32)", choices=["fp32", "bf16"]
    )

    output = parser.group("Output")
    output.flag("--output_dir", "folder for the student", "outputs/demo", type=path)
    output.flag(
        "--num_samples",
        "prompts drawn by teacher and student after training; 0: none",
        8,
        type=number(int, low=0, high=64),
    )

    args = parser.parse(argv)
    is_demo = Path(args.teacher_path).resolve() == Path(DEMO_TEACHER).resolve()
    for name, (general, demo) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, demo if is_demo else general)
    if args.sigma_range[0] >= args.sigma_range[1]:
        parser.error(f"argument --sigma_range: LOW {args.sigma_range[0]} must be below HIGH {args.sigma_range[1]}")
    if args.states == "trajectory" and args.sigma_range[1] != 1.0:
        parser.error(
            "argument --sigma_range: a trajectory begins at sigma 1, so HIGH must be 1 (or use --states noise)"
        )
    args.sigma_range = tuple(args.sigma_range)
    return args


def open_fitting_teacher(args: argparse.Namespace, config: StudentConfig) -> "tuple[WanCheckpoint, TeacherSettings]":
    """The teacher by its headers, refused unless the student is a part of it; no weight is read yet."""
    from projection_mapper import open_teacher
    from wandistiller.selection import check_fits
    from wandistiller.teacher import resolve_settings

    checkpoint = open_teacher(args.teacher_path, config, args.teacher_path_low)
    check_fits(checkpoint.expert(args.init_expert).config, config, args.layers, args.student_config)
    settings = resolve_settings(
        checkpoint,
        shift=args.shift,
        guidance_scale=args.guidance_scale,
        guidance_scale_2=args.guidance_scale_2,
        boundary_ratio=args.boundary_ratio,
        negative_prompt=args.negative_prompt,
    )
    config.check_image_size(settings.vae_scale_factor)
    return checkpoint, settings


def print_run(
    prompts: "PromptFile", checkpoint: "WanCheckpoint", settings: "TeacherSettings", config: StudentConfig
) -> None:
    from wandistiller.teacher import warnings_about

    duplicates = f" ({prompts.duplicates} repeated lines left out)" if prompts.duplicates else ""
    print(f"Prompts: {len(prompts.prompts)}{duplicates}")
    print(f"Teacher: {checkpoint.location} ({' + '.join(checkpoint.experts)}), {settings.summary()}")
    latent = config.image_size // settings.vae_scale_factor
    print(
        f"Student: {config.block}, hidden_size {config.hidden_size}, depth {config.depth}, num_heads {config.num_heads}; "
        f"{config.image_size} px = {config.num_channels}x{latent}x{latent} latents"
    )
    for warning in warnings_about(checkpoint, settings, config):
        print(f"Warning: {warning}")


def find_encoder(
    args: argparse.Namespace, checkpoint: "WanCheckpoint", config: StudentConfig
) -> "tuple[Path, Path] | None":
    """Folders of the text encoder and its tokenizer; None where the mock teacher's stand-in embeddings will do."""
    from wandistiller.errors import UserError
    from wandistiller.prompt_embeds import text_encoder_dim
    from wandistiller.wan_checkpoint import find_text_encoder

    if checkpoint.is_mock and args.text_encoder_path is None:
        return None
    encoder, tokenizer = (
        find_text_encoder(args.text_encoder_path) if args.text_encoder_path else checkpoint.text_encoder()
    )
    if (text_dim := text_encoder_dim(encoder)) != config.text_encoder_output_dim:
        raise UserError(
            f"{encoder}: gives embeddings of width {text_dim}, teacher and student take "
            f"{config.text_encoder_output_dim}; point --text_encoder_path at the teacher's own encoder"
        )
    return encoder, tokenizer


def embed_prompts(
    args: argparse.Namespace,
    prompts: list[str],
    encoder: "tuple[Path, Path] | None",
    settings: "TeacherSettings",
    config: StudentConfig,
    device: str,
) -> "tuple[PromptEmbeds, Tensor | None]":
    """Text tokens of every prompt, and of the negative prompt where guidance needs it."""
    from wandistiller.prompt_embeds import encode_prompts, mock_prompt_embeds

    texts = [*prompts, settings.negative_prompt] if settings.uses_guidance else prompts
    if encoder is None:
        embeds = mock_prompt_embeds(texts, config.text_encoder_output_dim, config.text_max_length)
    else:
        embeds = encode_prompts(
            texts, *encoder, args.prompt_cache, config.text_max_length, device, progress=print_encoding
        )
    if embeds.truncated:
        print(f"Warning: {embeds.truncated} prompts are longer than {config.text_max_length} tokens and were cut")
    negative = embeds.read(len(prompts)) if settings.uses_guidance else None
    return embeds.first(len(prompts)), negative


def find_sample_vae(args: argparse.Namespace, checkpoint: "WanCheckpoint") -> "tuple[str, str | None] | None":
    """Where the VAE of the sample pictures is, or None where none can be drawn; a --vae_path without one is a mistake."""
    from wandistiller.errors import UserError
    from wandistiller.pictures import find_vae

    if not args.num_samples or (checkpoint.is_mock and args.vae_path is None):
        return None
    if args.sigma_range != (0.0, 1.0):
        print("No sample pictures: a student of a part of the noise levels does not draw by itself")
        return None
    try:
        return find_vae(args.vae_path, args.teacher_path)
    except UserError as error:
        if args.vae_path is not None:
            raise
        print(f"No sample pictures: {error}")
        return None


def draw_samples(
    args: argparse.Namespace,
    student: "WanLiteStudent",
    teacher: "Teacher",
    prompts: "PromptFile",
    prompt_embeds: "PromptEmbeds",
    vae_location: "tuple[str, str | None]",
    options: "TrainingOptions",
    file: "Path",
) -> None:
    """The side-by-side picture; what it needs beyond training (a VAE) must not turn a finished run into a failed one."""
    from wandistiller.errors import UserError
    from wandistiller.samples import save_samples
    from wandistiller.sampling import SamplingOptions

    chosen = prompts.prompts[: args.num_samples]
    settings = teacher.settings
    sampling = SamplingOptions(
        shift=settings.shift,
        num_inference_steps=settings.num_inference_steps,
        compute_dtype=options.compute_dtype,
        device=options.device,
    )
    print(f"Drawing {len(chosen)} prompts with teacher and student, {settings.num_inference_steps} steps", flush=True)
    try:
        save_samples(file, student, teacher, chosen, prompt_embeds, vae_location, sampling)
    except UserError as error:
        print(f"No sample pictures: {error}")
    else:
        print(f"Teacher above, student below: {file}")


def print_encoding(done: int, total: int) -> None:
    if done == total or done % 500 == 0:
        print(f"Encoding prompts: {done}/{total}", flush=True)


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads, and every file before anything is written or a weight is read:
    args = parse_args(argv)
    config = StudentConfig.load(args.student_config)
    prompts = load_prompts(args.data_path)
    check_output_folder(args.output_dir)

    from projection_mapper import fresh_student, project_experts, project_teacher
    from wandistiller.answers import ReplayedAnswers, TeacherAnswers
    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.optimization import OptimizationOptions
    from wandistiller.record import distillation_record, save_student
    from wandistiller.reporting import Progress
    from wandistiller.states import build_states
    from wandistiller.teacher import Teacher
    from wandistiller.training import TrainingOptions, steps_of_epochs, train

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    checkpoint, settings = open_fitting_teacher(args, config)
    encoder = find_encoder(args, checkpoint, config)
    vae_location = find_sample_vae(args, checkpoint)
    print_run(prompts, checkpoint, settings, config)
    folder = prepare_output_folder(args.output_dir)

    # Text first: its encoder leaves memory before the teacher comes:
    prompt_embeds, negative = embed_prompts(args, prompts.prompts, encoder, settings, config, device)

    # Student and teacher are projections of one checkpoint, a part of it and all of it:
    if args.init == "random":
        student, report = fresh_student(checkpoint, config, args.init_expert, device=device, seed=args.seed)
    else:
        student, report = project_teacher(
            checkpoint, config, args.init_expert, layers=args.layers, device=device, seed=args.seed
        )
    print(report.summary())
    teacher = Teacher(project_experts(checkpoint, config.text_max_length, dtype, device), settings, negative)

    # Train:
    options = TrainingOptions(
        batch_size=args.batch_size,
        num_steps=args.max_steps or steps_of_epochs(args.num_epochs, len(prompts.prompts), args.batch_size),
        optimization=OptimizationOptions(
            lr=args.lr,
            lr_scheduler=args.lr_scheduler,
            lr_warmup_steps=args.lr_warmup_steps,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            ema_decay=args.ema_decay,
        ),
        compute_dtype=dtype,
        device=device,
        seed=args.seed,
    )
    if aside := set_aside_previous_student(folder):
        print(f"The student that was in {folder} is now in {aside}")
    states = build_states(
        args.states,
        config,
        settings,
        len(prompts.prompts),
        args.batch_size,
        sigma_range=args.sigma_range,
        seed=args.seed,
        device=device,
    )
    answers = TeacherAnswers(teacher, states, prompt_embeds, device, dtype)
    if args.replay > 1:
        answers = ReplayedAnswers(answers, args.replay, args.batch_size, args.seed)
    with Progress(options.num_steps, folder / METRICS_NAME) as progress:
        result = train(student, answers, prompt_embeds, options, progress.step)

    # Save:
    record = distillation_record(
        args.teacher_path,
        settings,
        options,
        result,
        states=args.states,
        replay=args.replay,
        num_teacher_batches=answers.num_calls,
        sigma_range=args.sigma_range,
        init=args.init,
        init_expert=args.init_expert,
        layers=report.layers,
        num_prompts=len(prompts.prompts),
        teacher_path_low=args.teacher_path_low,
        text_encoder_path=args.text_encoder_path,
    )
    save_student(student, record, folder)
    report.save(folder)
    state = "Interrupted after" if result.interrupted else "Done:"
    print(
        f"{state} {result.num_steps} steps, loss {result.losses[0]:.4g} at the first and {result.losses[-1]:.4g} at the last. "
        f"Saved {CONFIG_NAME} and diffusion_model.safetensors in {folder}"
    )
    if result.interrupted:
        return 130
    if vae_location is not None:
        picture = folder / SAMPLES_NAME / f"step_{result.num_steps:06d}.png"
        draw_samples(args, student, teacher, prompts, prompt_embeds, vae_location, options, picture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
