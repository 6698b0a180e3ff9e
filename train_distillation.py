"""Distil a Wan text-to-video checkpoint into a small 2D image student, from a text file of prompts.

    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt \
        --output_dir ./outputs/wan_t2i --num_epochs 100 --batch_size 4 --lr 1e-5

The demo, on a CPU in minutes and with no download, needs no flags:

    python train_distillation.py
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import end_process, run_command
from wandistiller.files.output_folder import (
    METRICS_NAME,
    check_output_folder,
    lock_output_folder,
    prepare_output_folder,
    set_aside_previous_student,
    unlock_output_folders,
)
from wandistiller.files.prompts import Texts, read_texts
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.run.config_help import print_config
from wandistiller.run.flags import parse_args
from wandistiller.run.start_clock import StartClock

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    import torch
    from torch import Tensor

    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.processes import Processes
    from wandistiller.projection.project import ProjectionReport
    from wandistiller.reports.metrics import StepMetrics
    from wandistiller.reports.samples import Samples
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.targets.cache import TeacherCache
    from wandistiller.wan.files import WanFiles
    from wandistiller.wan.settings import TeacherSettings


# The flags that say how a student was made, recorded with it
RECIPE_FLAGS = [
    "data_path", "extra_prompts", "init", "init_expert", "states", "sigma_range", "renoise_fraction", "student_rollout",
    "prompt_swap", "calls_per_expert", "replay", "feature_loss_weight", "sigma_weighting", "student_steps",
    "teacher_dtype",
]  # fmt: skip
# Recorded too, so that whoever samples the student finds them from any folder
RECIPE_PATHS = ["teacher_path", "teacher_path_low", "text_encoder_path"]


def open_fitting_teacher(args: argparse.Namespace, config: StudentConfig) -> "tuple[WanFiles, TeacherSettings]":
    """The teacher by its headers, refused unless the student is a part of it; no weight is read yet."""
    from wandistiller.projection.selection import check_fits
    from wandistiller.wan.open import open_teacher
    from wandistiller.wan.settings import resolve_settings
    from wandistiller.wan.vae import find_vae, vae_config_path

    wan_files = open_teacher(args.teacher_path, config, args.teacher_path_low)
    if args.vae_path:
        wan_files.complete_from_vae(vae_config_path(*find_vae(args.vae_path, args.teacher_path)))
    check_fits(wan_files.expert(args.init_expert).config, config, args.layers, args.student_config)
    settings = resolve_settings(
        wan_files,
        shift=args.shift,
        guidance_scale=args.guidance_scale,
        guidance_scale_2=args.guidance_scale_2,
        boundary_ratio=args.boundary_ratio,
        negative_prompt=args.negative_prompt,
    )
    config.check_image_size(settings.vae_scale_factor, args.student_config)
    return wan_files, settings


def draw_last_samples(samples: "Samples", student: "WanLiteStudent", step: int) -> None:
    """The picture that a run ends with."""
    options = samples.student_options
    who = "the student" if samples.teacher is None else "teacher and student"
    print(f"Drawing {len(samples.prompts)} prompts with {who}, {options.num_inference_steps} steps", flush=True)
    if file := samples(student, step):
        print(f"{samples.what}: {file}")


def build_teacher(
    args: argparse.Namespace,
    wan_files: "WanFiles",
    settings: "TeacherSettings",
    config: StudentConfig,
    negative_prompt_embeds: "Tensor | None",
    dtype: "torch.dtype",
    processes: "Processes",
) -> "Teacher":
    """The whole checkpoint in 2D, its weights kept as the flags say."""
    from wandistiller.device import DTYPES
    from wandistiller.projection.project import project_experts
    from wandistiller.sampling.teacher import Teacher

    is_fp8 = args.teacher_dtype == "fp8"
    stored_dtype = dtype if is_fp8 else DTYPES[args.teacher_dtype]
    place = "cpu" if args.teacher_offload else processes.device
    is_sharded = args.shard in ("teacher", "both") and processes.can_shard
    experts = project_experts(
        wan_files,
        config.text_max_length,
        stored_dtype,
        place,
        fp8=is_fp8,
        shard=processes.shard if is_sharded else None,
    )
    return Teacher(
        experts,
        settings,
        negative_prompt_embeds,
        processes.device if args.teacher_offload else None,
        processes.any_true if is_sharded else bool,
    )


def build_student(
    args: argparse.Namespace, wan_files: "WanFiles", config: StudentConfig, device: str
) -> "tuple[WanLiteStudent, ProjectionReport]":
    """What is trained: a part of the teacher, or a student that inherits nothing."""
    from wandistiller.projection.project import fresh_student, project_teacher

    if args.init == "random":
        return fresh_student(wan_files, config, args.init_expert, device=device, seed=args.seed)
    return project_teacher(wan_files, config, args.init_expert, layers=args.layers, device=device, seed=args.seed)


def tell_first_step(args: argparse.Namespace, clock: StartClock, metrics: "StepMetrics") -> None:
    """With --verbose, once: where the time until now went."""
    if clock.first_step(metrics.elapsed_s) and args.verbose:
        from tqdm import tqdm

        tqdm.write(clock.table(), file=sys.stdout)  # beside the progress bar


def calls_line(num_calls: int, num_steps: int, cache: "TeacherCache | None", teacher: "Teacher | None") -> str:
    """What the teacher was asked; of two experts also how often the one in use changed, since this process began."""
    if cache is not None:
        return f"its answers came from {cache.num_answers} in {cache.folder}"
    line = f"the teacher answered {num_calls} batches, {num_calls / num_steps:.2f} a step"
    return line if len(teacher.experts) == 1 else f"{line}, with {teacher.num_swaps} swaps of its experts"


def dry_run(
    args: argparse.Namespace,
    wan_files: "WanFiles",
    settings: "TeacherSettings",
    config: StudentConfig,
    texts: Texts,
    encoder: "tuple[Path, Path] | None",
    device: str,
) -> int:
    """What the run would take; headers are all that is read, and nothing is written."""
    from wandistiller.errors import UserError
    from wandistiller.run.dry_run import check_places, report_budget

    check_places(args, wan_files, settings, config, texts)
    verdict, machine = report_budget(args, wan_files, settings, config, texts, encoder, device)
    if verdict.is_certain_not_to_fit and machine.is_known:
        raise UserError(f"--dry_run: {verdict.sentence}")
    print(verdict.sentence)
    return 0


def out_of_memory(args: argparse.Namespace) -> Exception:
    """What was in the memory of the device that ran out, and which flags to change."""
    import torch

    from wandistiller.budget.report import OutOfMemory, out_of_memory_message
    from wandistiller.run.dry_run import changeable_flags, has_checkpoints, workload_from_args

    config = StudentConfig.load(args.student_config)
    texts, _ = read_texts(args.data_path, args.extra_prompts, args.eval_prompts, args.eval_every > 0)
    wan_files, settings = open_fitting_teacher(args, config)
    is_gpu = torch.cuda.is_available() and not (args.device or "cuda").startswith("cpu")
    dtype = args.dtype or ("bf16" if is_gpu else "fp32")
    workload = workload_from_args(args, wan_files, settings, config, texts, dtype, is_gpu)
    return OutOfMemory(out_of_memory_message(workload, changeable_flags(args), has_checkpoints(args)))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.print_config:
        print_config(args.print_config)
        return 0
    try:
        return distil(args, sys.argv[1:] if argv is None else argv)
    except Exception as error:
        from wandistiller.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise out_of_memory(args) from error
    finally:
        unlock_output_folders()


def distil(args: argparse.Namespace, command: list[str]) -> int:
    clock = StartClock()
    # What a person typed is checked before torch loads, and every file before anything is written or a weight is read:
    config = StudentConfig.load(args.student_config)
    texts, prompt_file = read_texts(args.data_path, args.extra_prompts, args.eval_prompts, args.eval_every > 0)
    check_output_folder(args.output_dir)
    clock.lap("config and prompts read")

    from wandistiller.device import pick_device, pick_dtype, pick_teacher_dtype
    from wandistiller.files.hub import hub_id
    from wandistiller.processes import join, leave
    from wandistiller.reports.cards import try_to_write_model_card
    from wandistiller.reports.progress import Progress, Silence
    from wandistiller.reports.trackers import Trackers, check_report
    from wandistiller.run.build import (
        build_answers,
        build_evaluation,
        build_objective,
        build_samples,
        build_segment_answers,
        build_trackers,
        compile_blocks,
        fill_cache,
        lanes_of,
        open_cache,
        run_description,
        segment_sigmas,
        training_options,
    )
    from wandistiller.run.dry_run import check_disk
    from wandistiller.run.inputs import (
        embed_prompts,
        find_encoder,
        find_sample_vae,
        leave_features_out,
        leave_offload_out,
        print_batch,
        print_run,
    )
    from wandistiller.run.messages import (
        command_line,
        held_out_prompts,
        next_commands,
        resume_command,
        summary_lines,
    )
    from wandistiller.run.record import commands_so_far, distillation_record, save_student
    from wandistiller.sampling.recorded import recorded_path
    from wandistiller.targets.cache import CachedAnswers
    from wandistiller.targets.replay import ReplayedAnswers
    from wandistiller.training.checkpoints import Checkpoints
    from wandistiller.training.loop import train
    from wandistiller.training.optimizer import check_optimizer

    clock.lap("torch and our modules imported")
    processes = join(args.device, pick_device)
    device, lanes = processes.device, lanes_of(args, processes)
    dtype = pick_dtype(args.dtype, device)
    check_optimizer(args.optimizer)
    check_report(args.report)
    wan_files, settings = open_fitting_teacher(args, config)
    leave_features_out(args, wan_files.config, config)
    leave_offload_out(args, wan_files)
    encoder = find_encoder(args, wan_files, config)
    vae_location = find_sample_vae(args, wan_files, settings)
    if args.dry_run:
        print_run(prompt_file, wan_files, settings, config)
        return dry_run(args, wan_files, settings, config, texts, encoder, device)
    args.teacher_dtype = pick_teacher_dtype(args.teacher_dtype, dtype)
    cache = open_cache(args, wan_files, settings, texts, config, lanes.total, processes)
    print_run(prompt_file, wan_files, settings, config)
    print_batch(args, lanes, processes)
    folder = processes.first_then_all(lambda: prepare_output_folder(args.output_dir))
    processes.first_then_all(lambda: lock_output_folder(folder))
    description = run_description(args, wan_files, settings, texts, config)
    checkpoints = Checkpoints(folder, description, lanes.total, args.keep_checkpoints, processes)
    resume_from = None if args.overwrite else checkpoints.newest()
    if resume_from is not None:
        print(f"Going on from step {resume_from.step} of {folder} (--overwrite starts anew)")
        if not resume_from.has_same_batch:
            had = resume_from.batch_size
            why = (
                f"a step had {had} samples, and has {lanes.total} now"
                if had
                else "this checkpoint was saved without them"
            )
            print(f"Training states start anew: {why}")
    check_disk(checkpoints, args, wan_files, settings, config, texts)
    clock.lap("headers of the teacher, output folder")

    # Text first: its encoder leaves memory before the teacher comes:
    embeds = embed_prompts(args, texts, encoder, settings, config, processes)
    clock.lap("prompts encoded, or found in their cache")

    # Student and teacher are projections of one checkpoint, a part of it and all of it:
    options = training_options(args, len(texts.prompts), settings, device, lanes.total)
    sources = (embeds, len(texts.prompts), config)
    teacher = None
    if cache is None or not cache.is_complete or not args.offline_teacher:
        teacher = build_teacher(args, wan_files, settings, config, embeds.negative, dtype, processes)
    clock.lap("teacher read and projected")
    if cache is not None and not cache.is_complete:
        fill_cache(
            cache, build_answers(args, teacher, *sources, [], dtype, device, lanes), options.num_steps, args.replay
        )
        clock.lap("answers of the teacher written to its cache")
    if args.offline_teacher:
        teacher = None  # its memory is the student's from here on
    student, report = build_student(args, wan_files, config, device)
    print(report.summary())
    clock.lap("student read and projected")
    student.gradient_checkpointing = args.gradient_checkpointing

    # Train:
    objective, feature_layers = build_objective(
        args, report.layers, report.channels, wan_files.config, config, settings.shift, dtype, device
    )
    if args.compile:
        compile_blocks([student, *(teacher.experts.values() if teacher else [])])
    if args.shard and not processes.can_shard:
        print("--shard is of no use to a process by itself; start several with torchrun --nproc_per_node N")
    if args.shard in ("student", "both"):
        processes.shard(student)
        processes.shard(objective.feature_loss)
    if cache is not None:
        answers = CachedAnswers(cache, lanes.total, device, args.seed, lanes if lanes.pads else None)
    elif args.student_steps:
        answers = build_segment_answers(args, teacher, student, *sources, dtype, device, lanes)
    else:
        answers = build_answers(args, teacher, *sources, feature_layers, dtype, device, lanes)
    if args.replay > 1 and cache is None:
        answers = ReplayedAnswers(answers, args.replay, args.seed, device)
    clock.lap("states, answers and objective set up")
    evaluate = build_evaluation(args, teacher, embeds, config, dtype, device)
    clock.lap("held-out states of the teacher")
    if resume_from is None:
        aside = processes.first_then_all(lambda: set_aside_previous_student(folder))
        if aside:
            print(f"The student that was in {folder} is now in {aside}")
    first_step, commands = (resume_from.step, resume_from.commands) if resume_from else (0, [])
    typed = command_line("train_distillation.py", command)
    checkpoints.commands = commands_so_far(commands, first_step, typed, args.lr)
    shown = Progress(options.num_steps, folder / METRICS_NAME, first_step=first_step)
    with build_trackers(args, folder, first_step) if processes.is_first else Trackers() as trackers:
        samples = None
        if vae_location is not None:
            drawn = (texts.prompts, embeds.trained, vae_location)
            samples = build_samples(args, teacher, settings, config, *drawn, dtype, processes, folder, trackers)
        clock.lap("TensorBoard and sample pictures set up")
        with shown if processes.is_first else nullcontext(Silence()) as progress:
            result = train(
                student,
                answers,
                embeds.trained,
                objective,
                options,
                lambda metrics: (progress.step(metrics), trackers.step(metrics), tell_first_step(args, clock, metrics)),
                evaluate,
                checkpoints if args.save_every else None,
                resume_from,
                processes,
                samples,
            )

        # Save:
        recipe = {name: recorded_path(getattr(args, name)) for name in RECIPE_PATHS}
        recipe |= {name: getattr(args, name) for name in RECIPE_FLAGS}
        if args.student_steps:
            recipe["segment_sigmas"] = segment_sigmas(settings.shift, args.student_steps).tolist()
        record = distillation_record(
            settings,
            options,
            result,
            layers=report.layers,
            num_prompts=len(texts.prompts),
            num_teacher_batches=answers.num_calls,
            num_processes=processes.count,
            base_model=hub_id(args.teacher_path),
            commands=checkpoints.commands,
            **recipe,
        )
        save_student(student, record, folder, processes)
        if processes.is_first:
            report.save(folder)
        if samples is not None and not result.interrupted:
            draw_last_samples(samples, student, result.num_steps)

    # Tell:
    if processes.is_first:
        try_to_write_model_card(folder)
        state = "Interrupted after" if result.interrupted else "Done:"
        print(f"{state} {result.num_steps} steps. Saved {CONFIG_NAME} and diffusion_model.safetensors in {folder}")
        print("\n".join(summary_lines(folder, calls_line(answers.num_calls, result.num_steps, cache, teacher))))
        if result.interrupted and args.save_every:
            print(f"To go on:\n  {resume_command('train_distillation.py', command)}")
        elif samples is not None and not result.interrupted:
            prompts_file = args.eval_prompts or held_out_prompts(wan_files)
            print("\n  ".join(["Next:", *next_commands(folder, texts.prompts[0], prompts_file, args.vae_path)]))
    leave()
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    end_process(run_command(main))
