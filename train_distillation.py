"""Distil a Wan text-to-video checkpoint into a small 2D image student, from a text file of prompts.

    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt \
        --output_dir ./outputs/wan_t2i --num_epochs 100 --batch_size 4 --lr 1e-5

On a CPU, with no download:

    python train_distillation.py --teacher_path mock --student_config config/demo_student_config.json
"""

import argparse
import sys
from typing import TYPE_CHECKING

from wandistiller.command_line import FlagParser, int_list, number, path, run_command
from wandistiller.output_folder import (
    METRICS_NAME,
    check_output_folder,
    prepare_output_folder,
    set_aside_previous_student,
)
from wandistiller.prompts import PromptFile, load_prompts
from wandistiller.student_config import CONFIG_NAME, StudentConfig

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from pathlib import Path

    from torch import Tensor

    from wandistiller.prompt_embeds import PromptEmbeds
    from wandistiller.teacher import TeacherSettings
    from wandistiller.wan_checkpoint import WanCheckpoint


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(
        "train_distillation.py",
        "Distil a Wan checkpoint into a small 2D image student. Flags are accepted with underscores or hyphens.",
        "Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted after saving, 1 anything else.",
    )
    data = parser.group("Data")
    data.flag(
        "--teacher_path", "folder, .safetensors file, hub id, or mock (random weights, no download)", "mock", type=path
    )
    data.flag("--teacher_path_low", "the low-noise expert, where the two experts are two files or folders", type=path)
    data.flag(
        "--text_encoder_path",
        "folder or hub id with text_encoder/ and tokenizer/, where the teacher has none",
        type=path,
    )
    data.flag("--data_path", "text file, one prompt a line", "data/static_prompts.txt", type=path)
    data.flag("--prompt_cache", "folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)

    model = parser.group("Student")
    model.flag("--student_config", "shape of the student", "config/demo_student_config.json", type=path)
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

    optimization = parser.group("Optimization")
    optimization.flag("--num_epochs", "passes over the prompts", 1, type=number(int, low=1))
    optimization.flag("--max_steps", "optimiser steps; overrides --num_epochs", type=number(int, low=1))
    optimization.flag("--batch_size", "prompts per optimiser step", 4, type=number(int, low=1))
    optimization.flag("--lr", "learning rate of AdamW", 1e-5, type=number(float, above=0, high=1e9))
    optimization.flag("--max_grad_norm", "gradients are clipped to this norm", 1.0, type=number(float, above=0))
    optimization.flag("--weight_decay", "weight decay of AdamW", 0.0, type=number(float, low=0))
    optimization.flag("--seed", "of prompt order, noise and initial values", 0, type=number(int, low=0, high=2**63 - 1))

    performance = parser.group("Performance")
    performance.flag("--device", "cpu, cuda, cuda:1, ... (cuda if there is one)")
    performance.flag(
        "--dtype", "of matrix products and of the teacher's weights (bf16 on cuda, else fp32)", choices=["fp32", "bf16"]
    )

    parser.group("Output").flag("--output_dir", "folder for the student", "outputs/demo", type=path)

    args = parser.parse(argv)
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


def print_encoding(done: int, total: int) -> None:
    if done == total or done % 100 == 0:
        print(f"Encoding prompts: {done}/{total}", flush=True)


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads, and every file before anything is written or a weight is read:
    args = parse_args(argv)
    config = StudentConfig.load(args.student_config)
    prompts = load_prompts(args.data_path)
    check_output_folder(args.output_dir)

    from projection_mapper import project_experts, project_teacher
    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.record import distillation_record, save_student
    from wandistiller.reporting import Progress
    from wandistiller.states import build_states
    from wandistiller.teacher import Teacher
    from wandistiller.training import TrainingOptions, steps_of_epochs, train

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    checkpoint, settings = open_fitting_teacher(args, config)
    encoder = find_encoder(args, checkpoint, config)
    print_run(prompts, checkpoint, settings, config)
    folder = prepare_output_folder(args.output_dir)

    # Text first: its encoder leaves memory before the teacher comes:
    prompt_embeds, negative = embed_prompts(args, prompts.prompts, encoder, settings, config, device)

    # Student and teacher are projections of one checkpoint, a part of it and all of it:
    student, report = project_teacher(
        checkpoint, config, args.init_expert, layers=args.layers, device=device, seed=args.seed
    )
    print(report.summary())
    teacher = Teacher(project_experts(checkpoint, config.text_max_length, dtype, device), settings, negative)

    # Train:
    options = TrainingOptions(
        batch_size=args.batch_size,
        num_steps=args.max_steps or steps_of_epochs(args.num_epochs, len(prompts.prompts), args.batch_size),
        lr=args.lr,
        max_grad_norm=args.max_grad_norm,
        weight_decay=args.weight_decay,
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
    with Progress(options.num_steps, folder / METRICS_NAME) as progress:
        result = train(student, teacher, states, prompt_embeds, options, progress.step)

    # Save:
    record = distillation_record(
        args.teacher_path,
        settings,
        options,
        result,
        states=args.states,
        sigma_range=args.sigma_range,
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
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
