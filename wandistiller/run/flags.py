"""The flags of train_distillation.py, grouped as `--help` shows them: names, meanings, types and general defaults.

`Flags` holds what was typed; a flag that was left out has the value of --config, of --preset, its general default, or None. What None
stands for is decided in resolve.py, and which flags contradict each other in inputs.py. Standard library only, so that `--help` and
mistakes are answered before torch loads.
"""

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from wandistiller.budget.cards import CARDS, Card, card
from wandistiller.errors import UserError
from wandistiller.files.clone import CONFIG_FOLDER, DEMO_TEACHER
from wandistiller.flags import (
    LORA_FLAG,
    ComputeFlags,
    FlagParser,
    TeacherFlags,
    TextFlags,
    choice,
    flag,
    group,
    int_list,
    number,
    path,
    switch,
)
from wandistiller.model.config import CONFIG_NAME
from wandistiller.model.image_sizes import AspectRatio, ImageSize, size_or_ratio

PRESETS = {file.stem: file for file in sorted((CONFIG_FOLDER / "presets").glob("*.yaml"))}
REPORTS = ["none", "wandb", "trackio"]
LR_SCHEDULERS = ["constant", "linear", "cosine"]
SAMPLERS = ["unipc", "euler"]
PEFT_FILE = "adapter_model.safetensors"  # of a folder that is one LoRA
MAX_SAMPLES = 64  # prompts of a sample picture
COUNT, COUNT_OR_0 = number(int, 1), number(int, 0)
SHARE, NOT_NEGATIVE = number(float, 0, 1), number(float, 0)
RANGE: dict[str, Any] = {"nargs": 2, "type": SHARE, "metavar": ("LOW", "HIGH")}
SIZES: dict[str, Any] = {"nargs": "+", "type": size_or_ratio, "metavar": "SIZE"}


def cache_part(text: str) -> tuple[int, int]:
    """Read I/N, part I of N, as an argparse type."""
    from argparse import ArgumentTypeError

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= 1000):
        raise ArgumentTypeError(f"{text!r} must be I/N with I from 1 to N, such as 1/4 for the first of four parts")
    return int(index), int(count)


def steps_or_none(text: str) -> int:
    """Read a number of sampling steps, or none (0), as an argparse type."""
    return int(number(int, low=0, high=100)("0" if text.lower() == "none" else text))


@group("Prompts")
class PromptFlags(TextFlags):
    """What is trained on, and measured on."""

    data_path: str = flag(
        "prompts: text file, table (.csv, .tsv, .jsonl, .json, .parquet), folder or glob of these, or folder of templates",
        "data/static_prompts.txt",
        type=path,
    )
    num_prompts: int | None = flag("prompts to draw (all of a file, 4096 of templates)", type=number(int, 1, 2**20))
    eval_prompts: str | None = flag("held-out prompts (of templates their own, else some of --data_path)", type=path)
    seed: int = flag("seed of prompts, noise and initial values", 0, type=number(int, 0, 2**63 - 1), neutral=0)


@group("Data")
class DataFlags(PromptFlags, TeacherFlags):
    """What is read: the teacher, its text encoder and VAE, and the prompts."""

    teacher_path: str = flag("folder, .safetensors or .gguf file, hub id, or mock (random)", DEMO_TEACHER, type=path)
    teacher_lora: list[tuple[str, float]] | None = flag(
        "a Wan LoRA to merge into the teacher, the high-noise expert of two; may be given several times", **LORA_FLAG
    )


@group("Student")
class StudentFlags:
    """What the student looks like, and what it starts from."""

    student_config: str = flag("shape of the student", "config/demo_student_config.json", type=path)
    init_from: str = flag(
        "what it is cut from: teacher, random (nothing), or a student or Wan of its shape or larger",
        "teacher",
        type=path,
        neutral="teacher",
    )
    init_expert: str = flag("expert of two that it is cut from", "high", choices=["high", "low"], neutral="high")
    image_sizes: Sequence[ImageSize | AspectRatio] | None = flag(
        "sizes to train at in turn: WxH in pixels, or W:H of image_size^2 pixels (image_size alone)", **SIZES
    )
    train: str = flag(
        "student, or lora: a LoRA of the student of --init_from, which stays as it is, for what --teacher_lora changes",
        "student",
        choices=["student", "lora"],
        neutral="student",
    )
    lora_rank: int | None = flag("of --train lora (16)", type=number(int, 1, 4096), neutral=None)
    lora_alpha: float | None = flag(
        "of --train lora: its output counts alpha / rank (the rank)", type=number(float, above=0), neutral=None
    )
    layers: list[int] | None = flag("teacher layer of each block: 0,2,5 (evenly spread)", type=int_list, neutral=None)


@group("Teacher (left out: the released model's own values, or what the checkpoint records)")
class GuidanceFlags:
    """How the teacher is sampled."""

    guidance_scale: float | None = flag("g of v_uncond + g (v_cond - v_uncond); 1 is off", type=NOT_NEGATIVE)
    guidance_scale_2: float | None = flag("g of the low-noise expert", type=NOT_NEGATIVE)
    boundary_ratio: float | None = flag("lowest sigma of the high-noise expert", type=SHARE)
    negative_prompt: str | None = flag("negative prompt (Wan's own, less the words against stills)")
    shift: float | None = flag("warp of the noise levels, shift u / (1 + (shift - 1) u)", type=number(float, above=0))
    teacher_steps: int | None = flag("sampling steps of the teacher", type=number(int, low=1, high=1000))
    teacher_levels: list[float] | None = flag(
        "noise levels (1000 sigma) of a teacher of few steps that noises its x_0 anew at each, such as 1000 757 522",
        nargs="+",
        type=number(float, above=0, high=1000),
        metavar="LEVEL",
    )
    teacher_sampler: str | None = flag(
        "unipc; euler: a teacher distilled to its few levels (default for --teacher_steps up to 8)", choices=SAMPLERS
    )


@group("Training states")
class StatesFlags:
    """The states that the student learns at, and the teacher's answers there."""

    sigma_range: Sequence[float] | None = flag("noise levels to train on, HIGH 1 (all)", **RANGE, neutral=(0.0, 1.0))
    calls_per_expert: int | None = flag("batches in a row for one expert; 0: both in each", type=COUNT_OR_0, neutral=0)
    replay: int | None = flag("optimizer steps per teacher batch (4 to 8, by what each costs)", type=COUNT, neutral=1)
    teacher_cache: str | None = flag("folder for the teacher's answers: filled first, then trained from", type=path)
    offline_teacher: bool = switch("with --teacher_cache: no teacher in memory while the student trains")
    cache_part: tuple[int, int] | None = flag(
        "with --teacher_cache: fill part I of N and end, so that N can share it", type=cache_part, metavar="I/N"
    )


@group("Objective")
class ObjectiveFlags:
    """What the student is asked to match."""

    feature_loss_weight: float | None = flag(
        "weight of the feature loss; falls to 0 (1)", type=NOT_NEGATIVE, neutral=0.0
    )
    student_steps: int | None = flag(
        "steps that a second stage teaches the student to draw in; none: no such stage (4)",
        type=steps_or_none,
        metavar="N",
        neutral=None,
    )


@group("Optimization")
class OptimizationFlags:
    """How long and how fast the student learns."""

    max_steps: int | None = flag("optimizer steps of the run", type=COUNT)
    num_epochs: int | None = flag("passes over the prompts, where --max_steps is left out (1)", type=COUNT)
    teacher_calls: int | None = flag("teacher batches of the run, where both are left out", type=COUNT)
    batch_size: int = flag("samples per process and micro-batch", 4, type=COUNT)
    grad_accum_steps: int = flag("micro-batches per optimizer step (gradient accumulation)", 1, type=COUNT)
    lr: float | None = flag("peak learning rate (by optimizer, width, samples)", type=number(float, above=0, high=1e9))
    lr_scheduler: str = flag("learning rate after its warm-up: kept, or down to zero", "cosine", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | None = flag("steps of a linear rise (4 % of the first stage, at most 500)", type=COUNT_OR_0)
    ema_decay: float = flag("EMA decay of the saved weights; 0: no EMA", 0.999, type=number(float, 0, 0.999999))
    optimizer: str = flag("muon takes matrices of blocks, adamw the rest", "muon", choices=["muon", "adamw"])
    max_grad_norm: float = flag("gradient clipping: maximum norm", 1.0, type=number(float, above=0))
    weight_decay: float = flag("weight decay", 0.0, type=number(float, low=0))


@group("Performance")
class PerformanceFlags(ComputeFlags):
    """Where and in which precision the run computes."""

    teacher_dtype: str | None = flag("of the teacher's weights (that of --dtype)", choices=["fp32", "bf16", "fp8"])
    teacher_offload: str | None = choice(
        "keep the teacher in host memory: blocks, each on the device while it answers; without a value experts, the one in use of two",
        "experts", "blocks",
    )  # fmt: skip
    shard: str | None = choice(
        "under torchrun: shard student, teacher or, without a value, both (FSDP2); left out: a copy in each process (DDP)",
        "both", "student", "teacher",
    )  # fmt: skip
    gradient_checkpointing: bool = switch("recompute the student's blocks in the backward pass to save memory")
    compile: bool = switch("torch.compile for the student and the teacher")


@group("Output")
class SavingFlags:
    """What is written, and how often."""

    output_dir: str = flag("folder for the student", "outputs/demo", type=path)
    save_every: int = flag("steps between checkpoints, to resume from; 0: none", 500, type=COUNT_OR_0)
    keep_checkpoints: int = flag("number of newest checkpoints to keep", 2, type=COUNT)
    overwrite: bool = switch("start anew where the output folder holds checkpoints; what is there is kept beside")
    eval_every: int | None = flag("steps between measurements; 0: none (about 6 in the first stage)", type=COUNT_OR_0)
    dry_run: bool = switch("check everything, print what the run takes and whether it fits; write nothing")


@group("Output")
class OutputFlags(SavingFlags):
    """What is written, measured, drawn and printed."""

    sample_prompts: list[str] | None = flag("prompts to draw, or files of them", nargs="+", metavar="PROMPT")
    sample_seed: int = flag("of the first such picture's noise; each next has one more", 0, type=number(int, 0, 2**62))
    num_samples: int = flag("held-out prompts to draw instead; 0: none", 8, type=number(int, 0, MAX_SAMPLES))
    sample_every: int = flag("steps between pictures, the first at 25, 50, 100; 0: none", 0, type=COUNT_OR_0)
    report: str = flag("send losses and pictures to a tracker too (pip install it)", "none", choices=REPORTS)
    assume_gpu: Card | None = flag(
        f"with --dry_run: a GPU that is not here, {', '.join(CARDS)} or GiB of memory", type=card, metavar="NAME"
    )


@group("Flags in files")
class FileFlags:
    """Where flags are read from that are not typed."""

    config: str | None = flag("YAML file of flags, as a run writes run.yaml; what is typed counts instead", type=path)
    preset: str | None = flag(f"a file of config/presets: {', '.join(PRESETS)}", choices=[*PRESETS], metavar="NAME")


@group()
class Flags(
    DataFlags,
    StudentFlags,
    GuidanceFlags,
    StatesFlags,
    ObjectiveFlags,
    OptimizationFlags,
    PerformanceFlags,
    OutputFlags,
    FileFlags,
):
    """What was typed."""


@group()
class EncoderFlags(PromptFlags, SavingFlags, ComputeFlags):
    """The flags of distill_text_encoder.py, as `--help` describes them."""

    teacher_path: str = flag("where the text encoder and its tokenizer are", DEMO_TEACHER, type=path)
    text_encoder_config: str = flag("shape of the small encoder", "config/demo_text_encoder.json", type=path)
    student: str | None = flag("a student whose cross-attention reads the embeddings; its errors count too", type=path)
    data_path: str = flag("prompts: text file, table, folder, glob or templates", "data/demo_prompts.txt", type=path)
    output_dir: str = flag("folder for the small encoder", "outputs/demo_text_encoder", type=path)
    max_steps: int = flag("optimizer steps of the run", 6000, type=COUNT)
    batch_size: int = flag("prompts per process and step", 16, type=COUNT)
    lr: float | None = flag("peak learning rate (by the encoder's width)", type=number(float, above=0, high=1e9))


# Flags that decide the student, with the value that counts where a checkpoint was written before the flag existed
NEUTRAL = {each.name: each.metadata["neutral"] for each in fields(Flags) if "neutral" in each.metadata}


def parse_args(
    argv: list[str] | None = None, prog: str = "train_distillation.py", defaults: dict[str, object] | None = None
) -> Flags:
    """Read the command line; a mistake ends the process with one line and exit code 2.

    Args:
        defaults: of flags, instead of their general ones.
    """
    from wandistiller.run.flag_files import DEMO_FILE, read_flags

    about = "Distil a Wan checkpoint into a small 2D image student.\n\nThe demo teacher brings the flags of config/demo.yaml."
    parser = FlagParser(prog, about, flags=Flags)
    known = parser.given(argv)
    if file := known.get("config"):
        known = read_flags(file, parser) | known
    teacher_path = known.get("teacher_path", (defaults or {}).get("teacher_path", DEMO_TEACHER))
    init_from = known.get("init_from", "")
    if os.path.isfile(os.path.join(init_from, CONFIG_NAME)):
        known = {"student_config": init_from} | known
    if preset := known.get("preset"):
        known = read_flags(PRESETS[preset], parser) | known
    elif os.path.realpath(teacher_path) == os.path.realpath(DEMO_TEACHER):
        known = read_flags(DEMO_FILE, parser) | known
    return Flags(**parser.defaults | (defaults or {}) | known)


def one_for_each_lora(flags: Flags) -> list[Flags]:
    """Return the flags of each run of a command: of --train lora with a folder of LoRAs one for each, and of any other one."""
    loras = flags.teacher_lora or []
    place, scale = loras[0] if len(loras) == 1 else ("", 1.0)
    if flags.train != "lora" or not os.path.isdir(place) or os.path.exists(os.path.join(place, PEFT_FILE)):
        return [flags]
    names = sorted(name for name in os.listdir(place) if name.endswith(".safetensors"))
    if not names:
        raise UserError(f"--teacher_lora {place}: holds no .safetensors file; give a LoRA, or a folder of them")
    folders = [os.path.join(flags.output_dir, name.removesuffix(".safetensors")) for name in names]
    return [
        replace(flags, teacher_lora=[(os.path.join(place, name), scale)], output_dir=folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def flags_of(**values: object) -> Flags:
    """Return the flags that keywords name, as if they were typed; a mistake ends as on the command line."""
    from wandistiller.run.flag_files import words_of

    parser, words = FlagParser("train_distillation.py", "", flags=Flags), []
    for name, value in values.items():
        text = [str(part) for part in value] if isinstance(value, (list, tuple)) else str(value)
        words += words_of(name, None if value is None else text, parser)
    return parse_args(words)
