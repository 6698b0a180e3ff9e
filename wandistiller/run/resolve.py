"""From what was typed to the settings of a run: every default, correction and refusal, once. Nothing is written, no weight is read.

`resolve` is the order; each function below it decides one thing from those before it, and prints a line where it corrects what was
typed. The defaults that were measured lie in defaults.py.
"""

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from wandistiller.budget.workload import guided_fraction
from wandistiller.device import pick_device
from wandistiller.errors import UserError
from wandistiller.model.config import MAX_PATCHES, StudentConfig
from wandistiller.model.image_sizes import ImageSize, resolve_sizes, square
from wandistiller.processes import Processes, join
from wandistiller.projection.selection import check_fits
from wandistiller.reports.trackers import check_report
from wandistiller.run.defaults import suggested_lr, suggested_replay, suggested_warmup
from wandistiller.run.flags import Flags
from wandistiller.run.held_out import MAX_SHARE, NUM_MEASUREMENTS, NUM_PATHS, path_steps
from wandistiller.run.inputs import Inputs
from wandistiller.run.mistakes import samples_per_step
from wandistiller.run.presets import preset_lines
from wandistiller.run.settings import Settings
from wandistiller.training.loop import steps_of_epochs
from wandistiller.training.optimizer import OptimizationOptions, check_optimizer
from wandistiller.walk.batches import make_schedules
from wandistiller.walk.grids import teacher_levels
from wandistiller.walk.segments import calls_of_run
from wandistiller.wan.identity import prompts_digest
from wandistiller.wan.layouts import check_headers, open_teacher
from wandistiller.wan.lora import merge_loras
from wandistiller.wan.settings import TeacherSettings, resolve_settings
from wandistiller.wan.text_encoder import EncodingOptions, count_tokens
from wandistiller.wan.text_encoder_files import TextEncoderFiles, find_text_encoder
from wandistiller.wan.vae import LatentStatistics, VaeLocation, check_statistics, find_vae, read_vae_config
from wandistiller.wan.wan_files import WanFiles

ALL_LEVELS = (0.0, 1.0)
# The recipe that won on two teachers (docs/experiments.md)
RENOISE_FRACTION = {"trajectory": 0.25, "renoise": 0.75, "noise": 0.0}
STUDENT_ROLLOUT = (0.0, 1.0)
FEATURE_LOSS_WEIGHT = 1.0
# Experts that take turns on the device answer many batches each, so that moving one in is rare.
OFFLOAD_CALLS_PER_EXPERT = 64
# A teacher of so few steps was distilled to them, as lightning LoRAs are, unless its sampler is named.
FEW_TEACHER_STEPS = 8
# The tokens of so many prompts stand for those of all.
NUM_COUNTED_PROMPTS = 256


@dataclass(frozen=True)
class Files:
    """What is known of the files of a run by their headers; names and meanings are those of `Settings`."""

    wan_files: WanFiles
    teacher: TeacherSettings
    encoder: TextEncoderFiles | None
    vae_location: VaeLocation | None


def resolve(flags: Flags, inputs: Inputs, command: Sequence[str] = ()) -> Settings:
    """Join the processes, open the files by their headers and give every setting its value.

    Args:
        command: the words after the script's name.

    Raises:
        UserError: something is missing, damaged or contradictory, or does not fit together.
    """
    processes = join(flags.performance.device, pick_device)
    check_optimizer(flags.optimization.optimizer)
    check_report(flags.output.report)
    files = open_files(flags, inputs.config)
    check_prompt_cache(inputs.prompts.train, files.encoder, inputs.config, flags.data.prompt_cache_gib)
    if flags.output.preset:
        print("\n".join(preset_lines(flags.output.preset, flags.as_dict(), len(inputs.prompts.train))))
    print("\n".join(inputs.prompts.lines))
    return decide(flags, inputs, files, processes, command)


def decide(flags: Flags, inputs: Inputs, files: Files, processes: Processes, command: Sequence[str] = ()) -> Settings:
    """Return the settings: what was typed, with every default and correction."""
    config, own, teacher = inputs.config, flags.optimization, files.teacher
    sizes = pixel_sizes(flags, config, files)
    states = resolve_states(flags, files.wan_files, config)
    length = resolve_length(flags, inputs, files, states, sizes)
    num_samples = own.batch_size * own.grad_accum_steps * processes.count
    eval_every, held_out_steps = resolve_measuring(flags, teacher, length, num_samples)
    decided = {
        "command": list(command),
        "config": config,
        "teacher_levels": (teacher_levels(teacher) or ())[:-1],
        "prompts": inputs.prompts.train,
        "held_out_prompts": inputs.prompts.held_out if eval_every else [],
        "prompts_digest": prompts_digest(inputs.prompts.train),
        "image_sizes": sizes,
        "optimization": resolve_optimization(flags, config, num_samples, length.num_steps),
        "processes": processes,
        "eval_every": eval_every,
        "held_out_steps": held_out_steps,
        "sample_every": flags.output.sample_every if files.vae_location else 0,
        "is_device_typed": flags.performance.device is not None,
    }
    names = {known.name for known in fields(Settings)}
    typed = {name: value for name, value in flags.as_dict().items() if name in names}
    parts = vars(files) | vars(states) | vars(length) | vars(resolve_device(flags, processes))
    return Settings(**(typed | decided | parts))


# ---- files ----


def open_files(flags: Flags, config: StudentConfig) -> Files:
    """Open everything that the run reads weights from, by its headers."""
    wan_files, teacher = open_fitting_teacher(flags, config)
    encoder = find_encoder(flags, wan_files, config)
    wan_files = replace(wan_files, encoder=encoder)  # which is a part of what the teacher is
    return Files(wan_files, teacher, encoder, find_sample_vae(flags, wan_files, teacher))


def open_fitting_teacher(flags: Flags, config: StudentConfig) -> tuple[WanFiles, TeacherSettings]:
    """Open the teacher by its headers, and refuse it unless the student is a part of it."""
    data, student = flags.data, flags.student
    wan_files = open_teacher(data.teacher_path, config, data.teacher_path_low)
    wan_files = merge_loras(wan_files, data.teacher_lora, data.teacher_lora_low)
    if data.vae_path:
        wan_files = wan_files.with_vae_config(
            find_vae(data.vae_path, data.teacher_path, wan_files.config.num_channels).config_path()
        )
    check_fits(wan_files.expert(student.init_expert).config, config, student.layers, student.student_config)
    settings = sampled_as(flags, wan_files)
    check_levels(flags, settings)
    config.check_image_size(settings.vae_scale_factor, student.student_config)
    return wan_files, settings


def sampled_as(flags: Flags, wan_files: WanFiles) -> TeacherSettings:
    """Return how the teacher is sampled."""
    typed = dict(vars(flags.teacher))
    if guided := typed["guidance_range"]:
        typed["guidance_range"] = tuple(guided)
    if typed["teacher_sampler"] is None and (typed["teacher_steps"] or math.inf) <= FEW_TEACHER_STEPS:
        typed["teacher_sampler"] = "euler"
    return resolve_settings(wan_files, **typed)


def check_levels(flags: Flags, teacher: TeacherSettings) -> None:
    """Refuse a run that needs other noise levels than a teacher of a few of them has."""
    if not teacher.has_few_levels:
        return
    num_steps, student_steps = teacher.num_inference_steps, flags.objective.student_steps
    if student_steps and num_steps % student_steps:
        allowed = ", ".join(str(count) for count in range(1, num_steps + 1) if num_steps % count == 0)
        raise UserError(
            f"--student_steps {student_steps}: does not divide the teacher's {num_steps} steps, and it has no noise levels between "
            f"them; allowed: {allowed}"
        )
    low, high = flags.states.sigma_range or ALL_LEVELS
    levels = (teacher_levels(teacher) or ())[:-1]
    if not any(low <= level <= high for level in levels):
        known = ", ".join(f"{level:.4g}" for level in levels)
        raise UserError(f"--sigma_range {low:g} {high:g}: holds none of the teacher's noise levels, {known}")


def find_encoder(flags: Flags, wan_files: WanFiles, config: StudentConfig) -> TextEncoderFiles | None:
    """Find the text encoder and its tokenizer; None where the mock teacher's stand-in embeddings will do."""
    given = flags.data.text_encoder_path
    if wan_files.is_mock and given is None:
        return None
    encoder = find_text_encoder(given) if given else wan_files.text_encoder()
    encoder.check_text_dim(config.text_encoder_output_dim)
    return encoder


def find_sample_vae(flags: Flags, wan_files: WanFiles, teacher: TeacherSettings) -> VaeLocation | None:
    """Find the VAE of the sample pictures; None where none can be drawn. A --vae_path without a VAE is a mistake.

    Raises:
        UserError: it is not the teacher's, or its files are not whole.
    """
    given = flags.data.vae_path
    if not flags.output.num_samples or (wan_files.is_mock and given is None):
        return None
    if tuple(flags.states.sigma_range or ALL_LEVELS) != ALL_LEVELS:
        print("No sample pictures: a student of a part of the noise levels does not draw on its own")
        return None
    try:
        location = find_vae(given, flags.data.teacher_path, wan_files.config.num_channels)
        check_is_vae_of(teacher, wan_files.config.num_channels, location.config_path())
        if Path(location.location).exists():  # else the hub's client sees to its files
            check_headers(location.folder())
    except UserError as error:
        if given is not None:
            raise
        print(f"No sample pictures: {error}")
        return None
    return location


def check_is_vae_of(teacher: TeacherSettings, num_channels: int, config_path: Path) -> None:
    """Refuse a VAE of other latents than the teacher's, by its config.json."""
    vae = read_vae_config(config_path, num_channels)
    folder = config_path.parent
    if vae.vae_scale_factor not in (None, teacher.vae_scale_factor):
        raise UserError(
            f"{folder}: is a VAE of factor {vae.vae_scale_factor}; the teacher's latents have factor "
            f"{teacher.vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    if vae.latents_mean and vae.latents_std:
        learnt = LatentStatistics(teacher.latents_mean, teacher.latents_std)
        check_statistics(learnt, LatentStatistics(vae.latents_mean, vae.latents_std), folder)


# ---- text ----


def check_prompt_cache(
    prompts: Sequence[str], encoder: TextEncoderFiles | None, config: StudentConfig, room_gib: float
) -> None:
    """Refuse more prompts than --prompt_cache_gib has room for; the mock's embeddings are made when they are needed."""
    if encoder is None:
        return
    token_bytes = config.text_encoder_output_dim * EncodingOptions().encoder_dtype.itemsize
    if len(prompts) * config.text_max_length * token_bytes <= room_gib * 2**30:
        return
    counts = token_counts(some_of(prompts), encoder)
    prompt_bytes = token_bytes * sum(min(count, config.text_max_length) for count in counts) / len(counts)
    if (needed := len(prompts) * prompt_bytes / 2**30) <= room_gib:
        return
    affordable = int(room_gib * 2**30 / prompt_bytes)
    raise UserError(
        f"--prompt_cache_gib {room_gib:g}: the embeddings of {len(prompts):,} prompts, about {prompt_bytes / 2**10:,.0f} KiB each, "
        f"take {needed:.3g} GiB; give " + (f"--num_prompts {affordable} or more room" if affordable else "more room")
    )


def some_of(prompts: Sequence[str]) -> Sequence[str]:
    """Return some prompts, evenly spread, that stand for all of them."""
    return prompts[:: max(1, len(prompts) // NUM_COUNTED_PROMPTS)][:NUM_COUNTED_PROMPTS]


def token_counts(texts: Sequence[str], encoder: TextEncoderFiles | None) -> list[int]:
    """Count the tokens of texts with the run's own tokenizer; where there is none (the mock) words count."""
    return count_tokens(texts, encoder) if encoder else [len(text.split()) + 1 for text in texts]


# ---- sizes, states and length ----


def pixel_sizes(flags: Flags, config: StudentConfig, files: Files) -> tuple[ImageSize, ...]:
    """Return the image sizes that are trained at, in turn."""
    unit = files.teacher.vae_scale_factor * math.lcm(config.patch_size, files.wan_files.config.patch_size)
    given = flags.student.image_sizes or [square(config.image_size)]
    return resolve_sizes(given, config.image_size, unit, MAX_PATCHES)


@dataclass(frozen=True)
class States:
    """The states that the student learns at; names and meanings are those of `Settings`."""

    states: str
    sigma_range: tuple[float, float]
    renoise_fraction: float
    student_rollout: tuple[float, float]
    calls_per_expert: int
    feature_loss_weight: float
    teacher_offload: bool


def resolve_states(flags: Flags, wan_files: WanFiles, config: StudentConfig) -> States:
    """Return the states: those that were typed, else the recipe that won, where it can be had."""
    own, few_steps = flags.states, flags.objective.student_steps is not None
    low, high = own.sigma_range or ALL_LEVELS
    has_paths, is_live = own.states != "noise", own.teacher_cache is None
    offload = can_offload(flags, wan_files)
    takes_turns = offload and own.states == "trajectory" and not few_steps and not own.renoise_fraction
    calls = given(own.calls_per_expert, OFFLOAD_CALLS_PER_EXPERT if takes_turns else 0)
    can_renoise = (
        has_paths and (low, high) == ALL_LEVELS and samples_per_step(flags) > 1 and not few_steps and not calls
    )
    rollout = given(own.student_rollout, STUDENT_ROLLOUT if has_paths and is_live else (0.0, 0.0))
    features = FEATURE_LOSS_WEIGHT if has_paths and is_live and not few_steps else 0.0
    return States(
        states=own.states,
        sigma_range=(low, high),
        renoise_fraction=given(own.renoise_fraction, RENOISE_FRACTION[own.states] if can_renoise else 0.0),
        student_rollout=(rollout[0], rollout[1]),
        calls_per_expert=calls,
        feature_loss_weight=comparable(given(flags.objective.feature_loss_weight, features), wan_files.config, config),
        teacher_offload=offload,
    )


def given(typed, otherwise):
    """Return what was typed, else the other value."""
    return otherwise if typed is None else typed


def comparable(weight: float, teacher: StudentConfig, config: StudentConfig) -> float:
    """Return the weight of the hidden-state loss, which compares token by token; a lite student has other patches."""
    if weight and config.patch_size != teacher.patch_size:
        print(
            f"Hidden states are not compared: the student's tokens are patches of {config.patch_size}, the teacher's of "
            f"{teacher.patch_size}"
        )
        return 0.0
    return weight


def can_offload(flags: Flags, wan_files: WanFiles) -> bool:
    """Return whether the teacher's experts are kept in host memory in turn."""
    if flags.performance.teacher_offload and len(wan_files.experts) == 1:
        print("--teacher_offload is of no use here, this teacher has one expert; the usual states are trained on")
        return False
    return flags.performance.teacher_offload


@dataclass(frozen=True)
class Length:
    """How long a run is; names and meanings are those of `Settings`."""

    replay: int
    num_steps: int
    num_calls: int
    guided_fraction: float


def resolve_length(flags: Flags, inputs: Inputs, files: Files, states: States, sizes: Sequence[ImageSize]) -> Length:
    """Return the steps of the run, and the teacher's calls that they take."""
    own, teacher, student_steps = flags.optimization, files.teacher, flags.objective.student_steps
    per_target, before_first = calls_of_run(teacher, student_steps, samples_per_step(flags))
    guided = guided_fraction(teacher, states.sigma_range)
    replay = flags.states.replay or suggested_replay(
        files.wan_files.config,
        inputs.config,
        max((teacher.latent_shape(inputs.config, size)[1:] for size in sizes), key=math.prod),
        guided_fraction=guided,
        calls_per_target=per_target,
    )
    if own.teacher_calls:
        num_steps = replay * max(1, own.teacher_calls // per_target)
    else:
        epochs = steps_of_epochs(own.num_epochs or 1, len(inputs.prompts.train), samples_per_step(flags))
        num_steps = own.max_steps or epochs
    schedules = make_schedules(num_steps, replay, len(sizes), per_target, before_first)
    return Length(replay, num_steps, sum(schedule.num_calls for schedule in schedules), guided)


def resolve_optimization(flags: Flags, config: StudentConfig, num_samples: int, num_steps: int) -> OptimizationOptions:
    """Return how the weights move; `num_samples` are those of a step."""
    own = flags.optimization
    return OptimizationOptions(
        lr=own.lr or suggested_lr(own.optimizer, config.hidden_size, num_samples),
        optimizer=own.optimizer,
        lr_scheduler=own.lr_scheduler,
        lr_warmup_steps=given(own.lr_warmup_steps, suggested_warmup(num_steps)),
        weight_decay=own.weight_decay,
        max_grad_norm=own.max_grad_norm,
        ema_decay=own.ema_decay,
    )


def resolve_measuring(flags: Flags, teacher: TeacherSettings, length: Length, num_samples: int) -> tuple[int, int]:
    """Return the steps between held-out measurements (0: none), and the teacher's steps on a measured path."""
    num_steps = path_steps(teacher, flags.objective.student_steps)
    if flags.output.eval_every is not None:
        return flags.output.eval_every, num_steps
    is_cheap = NUM_PATHS * num_steps <= MAX_SHARE * length.num_calls * num_samples
    return math.ceil(length.num_steps / NUM_MEASUREMENTS) if is_cheap else 0, num_steps


# ---- device ----


@dataclass(frozen=True)
class Device:
    """Where and in which precision a run computes; names and meanings are those of `Settings`."""

    dtype: str
    teacher_dtype: str
    is_for_gpu: bool
    shard_teacher: bool
    shard_student: bool


def check_compiler(flags: Flags) -> None:
    """Refuse --compile where the C++ compiler is missing that torch calls (torch: _inductor/cpp_builder.py), as in slim containers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if flags.performance.compile and not flags.output.dry_run and shutil.which(compiler) is None:
        raise UserError(
            f"--compile: torch.compile needs a C++ compiler, and there is no {compiler}; install one, or leave it out"
        )


def resolve_device(flags: Flags, processes: Processes) -> Device:
    """Return the precision for the device of this process, or for the GPU that --dry_run plans for."""
    own, output = flags.performance, flags.output
    is_elsewhere = output.dry_run and (output.assume_gpu_gib is not None or own.device is None)
    is_for_gpu = is_elsewhere or processes.device.startswith("cuda")
    dtype = own.dtype or ("bf16" if is_for_gpu else "fp32")
    check_compiler(flags)
    return Device(
        dtype=dtype,
        teacher_dtype=own.teacher_dtype or dtype,
        is_for_gpu=is_for_gpu,
        shard_teacher=own.shard in ("teacher", "both"),
        shard_student=own.shard in ("student", "both"),
    )
