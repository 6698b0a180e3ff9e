"""The flags of train_distillation.py: what they are called, what they default to, and which of them go together.

Standard library only, so that `--help` and mistakes are answered before torch loads.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from wandistiller.command_line import FlagParser, int_list, number, path
from wandistiller.files.clone import DEMO_TEACHER
from wandistiller.run.config_help import READY_CONFIGS

# What a flag that is left out stands for: (in general, with the demo teacher)
DEFAULTS = {
    "data_path": ("data/static_prompts.txt", "data/demo_prompts.txt"),
    "num_epochs": (1, 40),
    "batch_size": (4, 64),
    "lr": (1e-5, 3e-3),
    "replay": (1, 4),
    "lr_warmup_steps": (0, 50),
    "eval_prompts": (None, "data/demo_heldout_prompts.txt"),
    "sample_every": (0, 200),
}
REPORTS = ["none", "wandb", "trackio"]
# What won on two teachers (docs/experiments.md), for flags that are left out and where they apply
RENOISE_FRACTION = {"trajectory": 0.25, "renoise": 0.75}
STUDENT_ROLLOUT = (0.0, 1.0)
FEATURE_LOSS_WEIGHT = 1.0
# With experts that take turns on the device: spreads the time to move one in (28 GB in bf16 of A14B) over many answers
OFFLOAD_CALLS_PER_EXPERT = 64
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
        "trajectory: the teacher's own sampling paths; renoise: fresh noise mixed into the samples those end in; "
        "noise: pure noise at every noise level",
        "trajectory",
        choices=["trajectory", "renoise", "noise"],
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
        "--renoise_fraction",
        f"share of each batch that is renoised samples (default: {RENOISE_FRACTION['trajectory']}; with --states renoise "
        f"{RENOISE_FRACTION['renoise']}; 0 where paths do not finish)",
        type=number(float, low=0, high=1),
    )
    states.flag(
        "--student_rollout",
        "share of the paths that follow the student's own velocity, at the start and at the end of training (default: 0 1; "
        "with --teacher_cache 0 0)",
        nargs=2,
        type=number(float, low=0, high=1),
        metavar=("START", "END"),
    )
    states.flag(
        "--prompt_swap",
        "probability that a state of pure noise is given another prompt; it falls with the noise",
        0.0,
        type=number(float, low=0, high=1),
    )
    states.flag("--extra_prompts", "text file of further prompts, which come by --prompt_swap alone", type=path)
    states.flag(
        "--calls_per_expert",
        "batches in a row for one expert of a two-expert teacher; 0: both in every batch (default: 0; with "
        f"--teacher_offload on trajectories {OFFLOAD_CALLS_PER_EXPERT}, unless --renoise_fraction is given)",
        type=number(int, low=0),
    )
    states.flag(
        "--replay", f"steps that learn from each of the teacher's answers {shown('replay')}", type=number(int, low=1)
    )
    states.flag(
        "--teacher_cache", "folder for the teacher's answers: all are asked for first, then learnt from", type=path
    )
    states.flag(
        "--offline_teacher",
        "with --teacher_cache: no teacher in memory while the student trains",
        False,
        action="store_true",
    )

    objective = parser.group("Objective")
    objective.flag(
        "--feature_loss_weight",
        "of the error of hidden states beside that of velocities; falls to 0 over training (default: "
        f"{FEATURE_LOSS_WEIGHT:g}; 0 with --teacher_cache, --student_steps and --states noise)",
        type=number(float, low=0),
    )
    objective.flag(
        "--sigma_weighting",
        "of the squared velocity error; x0: sigma squared; endpoint: how far a sampling step moves there",
        "none",
        choices=["none", "x0", "endpoint"],
    )
    objective.flag(
        "--student_steps",
        "a student that draws in so many steps, each over a whole segment of the teacher's path (left out: in as many as "
        "the teacher)",
        type=number(int, low=1, high=100),
    )

    optimization = parser.group("Optimization")
    optimization.flag("--num_epochs", f"passes over the prompts {shown('num_epochs')}", type=number(int, low=1))
    optimization.flag("--max_steps", "optimiser steps; overrides --num_epochs", type=number(int, low=1))
    optimization.flag(
        "--batch_size",
        f"samples a GPU (or process) learns from at a time {shown('batch_size')}; a step takes this times "
        "--grad_accum_steps times the processes",
        type=number(int, low=1),
    )
    optimization.flag(
        "--grad_accum_steps", "such batches whose gradients add up to one optimiser step", 1, type=number(int, low=1)
    )
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
    optimization.flag(
        "--optimizer",
        "adamw; adamw8bit: its two moments in 8 bits, a quarter of the memory (needs pip install bitsandbytes)",
        "adamw",
        choices=["adamw", "adamw8bit"],
    )
    optimization.flag("--max_grad_norm", "gradients are clipped to this norm", 1.0, type=number(float, above=0))
    optimization.flag("--weight_decay", "weight decay of AdamW", 0.0, type=number(float, low=0))
    optimization.flag("--seed", "of prompt order, noise and initial values", 0, type=number(int, low=0, high=2**63 - 1))

    performance = parser.group("Performance")
    performance.flag("--device", "cpu, cuda, cuda:1, ... (cuda if there is one)")
    performance.flag(
        "--dtype", "of matrix products and of the teacher's weights (bf16 on cuda, else fp32)", choices=["fp32", "bf16"]
    )
    performance.flag(
        "--teacher_dtype",
        "how the frozen teacher's weights are kept (that of --dtype); fp8: those of its blocks at a byte each, products in "
        "--dtype",
        choices=["fp32", "bf16", "fp8"],
    )
    performance.flag(
        "--teacher_offload",
        "of a two-expert teacher only the expert in use is on the device, both are in host memory",
        False,
        action="store_true",
    )

    performance.flag(
        "--shard",
        "under torchrun: spread the weights of the student (with its gradients, average and optimiser), of the teacher or, "
        "without a value, of both over the processes (FSDP2); left out: a whole copy in each (DDP)",
        nargs="?",
        const="both",
        choices=["student", "teacher", "both"],
    )
    performance.flag(
        "--gradient_checkpointing",
        "compute the student's blocks again in the backward pass instead of keeping what they hold",
        False,
        action="store_true",
    )
    performance.flag("--compile", "torch.compile for the student and the teacher", False, action="store_true")

    output = parser.group("Output")
    output.flag("--output_dir", "folder for the student", "outputs/demo", type=path)
    output.flag(
        "--save_every",
        "steps between checkpoints, and one at the end; the same command goes on from the newest. 0: none",
        500,
        type=number(int, low=0),
    )
    output.flag("--keep_checkpoints", "how many of the newest stay", 2, type=number(int, low=1))
    output.flag(
        "--overwrite",
        "start anew where the output folder holds checkpoints; what is there is kept beside",
        False,
        action="store_true",
    )
    output.flag(
        "--eval_every",
        "steps between measurements on held-out states: velocity error at the teacher's and at the student's; 0: none",
        0,
        type=number(int, low=0),
    )
    output.flag(
        "--eval_prompts",
        "text file of prompts for --eval_every (default: those of --data_path, with noise of their own; with the demo "
        f"teacher {DEFAULTS['eval_prompts'][1]})",
        type=path,
    )
    output.flag(
        "--num_samples",
        "prompts drawn by teacher and student after training; 0: none",
        8,
        type=number(int, low=0, high=64),
    )
    output.flag(
        "--dry_run",
        "check everything, print what the run will take of memory, disk and computing, and whether it fits; write nothing",
        False,
        action="store_true",
    )
    output.flag(
        "--assume_gpu_gib",
        "with --dry_run: memory of the GPU to plan for, where it is not the one here",
        type=number(float, above=0),
    )
    output.flag(
        "--sample_every",
        f"steps between such pictures while it trains; 0: none {shown('sample_every')}",
        type=number(int, low=0),
    )
    output.flag(
        "--report",
        "send losses and pictures to wandb or trackio as well (pip install the one you name)",
        "none",
        choices=REPORTS,
    )
    output.flag(
        "--verbose",
        "print where the time until the first step went",
        False,
        action="store_true",
    )
    output.flag(
        "--print_config",
        "print a student_config.json for this teacher, and on stderr what its keys mean; nothing else is done",
        type=lambda text: next((name for name in READY_CONFIGS if name.lower() == text.lower()), text),
        choices=list(READY_CONFIGS),
    )

    args = parser.parse(argv)
    is_demo = Path(args.teacher_path).resolve() == Path(DEMO_TEACHER).resolve()
    for name, (general, demo) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, demo if is_demo else general)
    fill_recipe(args)
    args.sigma_range, args.student_rollout = tuple(args.sigma_range), tuple(args.student_rollout)
    for flag, message in mistakes(args):
        parser.error(f"argument {flag}: {message}")
    return args


def num_processes() -> int:
    """How many torchrun has started; 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def samples_a_step(args: argparse.Namespace) -> int:
    """Of all processes."""
    return args.batch_size * args.grad_accum_steps * num_processes()


def fill_recipe(args: argparse.Namespace) -> None:
    """The recipe that won, for what was left out and where it can be had."""
    has_paths, is_live = args.states != "noise", args.teacher_cache is None
    finishes = has_paths and tuple(args.sigma_range) == (0.0, 1.0) and samples_a_step(args) > 1
    if args.calls_per_expert is None:
        takes_turns = args.teacher_offload and args.states == "trajectory" and not args.student_steps
        args.calls_per_expert = OFFLOAD_CALLS_PER_EXPERT if takes_turns and not args.renoise_fraction else 0
    if args.renoise_fraction is None:
        applies = finishes and not args.student_steps and not args.calls_per_expert
        args.renoise_fraction = RENOISE_FRACTION[args.states] if applies else 0.0
    if args.student_rollout is None:
        args.student_rollout = STUDENT_ROLLOUT if has_paths and is_live else (0.0, 0.0)
    if args.feature_loss_weight is None:
        args.feature_loss_weight = FEATURE_LOSS_WEIGHT if has_paths and is_live and not args.student_steps else 0.0


def mistakes(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Flags that contradict each other, with what would be right."""
    low, high = args.sigma_range
    if low >= high:
        yield "--sigma_range", f"LOW {low} must be below HIGH {high}"
    if args.states != "noise" and high != 1.0:
        yield "--sigma_range", "a trajectory begins at sigma 1, so HIGH must be 1 (or use --states noise)"
    if args.extra_prompts and not args.prompt_swap:
        yield "--extra_prompts", "these prompts come by --prompt_swap alone; give it a probability above 0"
    if args.offline_teacher and not args.teacher_cache:
        yield "--offline_teacher", "the teacher's answers must come from somewhere; add --teacher_cache FOLDER"
    is_rolled_out = max(args.student_rollout) > 0
    if args.states == "noise":
        for flag, is_given in (
            ("--student_steps", args.student_steps is not None),
            ("--renoise_fraction", args.renoise_fraction > 0),
            ("--student_rollout", is_rolled_out),
        ):
            if is_given:
                yield flag, "needs sampling paths, and --states noise has none; use --states trajectory"
    is_narrow = args.sigma_range != (0.0, 1.0)
    if args.renoise_fraction:
        if is_narrow:
            yield "--renoise_fraction", "needs finished samples, and paths of a --sigma_range above 0 do not finish"
        if args.calls_per_expert:
            yield "--renoise_fraction", "mixes all noise levels in every batch, which --calls_per_expert keeps apart"
        if samples_a_step(args) < 2:
            yield "--renoise_fraction", "shares a batch with states of paths; needs --batch_size 2 or more"
    if args.eval_every and is_narrow:
        yield "--eval_every", "measures at all noise levels; leave it out with a --sigma_range"
    if args.student_steps:
        for flag, is_given in (
            ("--states", args.states != "trajectory"),
            ("--sigma_range", is_narrow),
            ("--renoise_fraction", args.renoise_fraction > 0),
            ("--prompt_swap", args.prompt_swap > 0),
            ("--calls_per_expert", args.calls_per_expert > 0),
            ("--feature_loss_weight", args.feature_loss_weight > 0),
            ("--teacher_cache", args.teacher_cache is not None),
            ("--eval_every", args.eval_every > 0),
        ):
            if is_given:
                yield flag, "does not go together with --student_steps, which teaches whole segments of trajectories"
    if args.shard in ("teacher", "both"):
        for flag, is_given in (
            ("--teacher_dtype", args.teacher_dtype == "fp8"),
            ("--teacher_offload", args.teacher_offload),
        ):
            if is_given:
                yield flag, "does not go together with a teacher that is spread; give --shard student"
    if args.teacher_cache and num_processes() > 1 and args.shard in ("teacher", "both"):
        yield "--shard", "with --teacher_cache the teacher answers before training; give --shard student"
    if args.shard in ("student", "both") and args.optimizer == "adamw8bit":
        yield "--optimizer", "adamw8bit does not know weights that are spread; --shard spreads adamw's moments too"
    if args.teacher_cache:
        for flag, is_given, why in (
            ("--student_rollout", is_rolled_out, "answers at the student's own states cannot be asked for beforehand"),
            ("--feature_loss_weight", args.feature_loss_weight > 0, "hidden states are too large to keep"),
        ):
            if is_given:
                yield flag, f"does not go together with --teacher_cache: {why}"
    if args.assume_gpu_gib is not None and not args.dry_run:
        yield "--assume_gpu_gib", "plans for a GPU that is not here; it goes with --dry_run"
    if args.offline_teacher and args.eval_every:
        yield "--eval_every", "asks the teacher, which --offline_teacher leaves out of memory"
