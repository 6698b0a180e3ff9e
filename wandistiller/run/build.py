"""What a run is made of, from its flags: states, answers, objective, measurements, and what makes it the same run."""

import argparse
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.evaluation.held_out import BATCH_SIZE, HeldOutErrors
from wandistiller.files.output_folder import LOSS_PLOT_NAME, METRICS_NAME, SAMPLES_NAME, TENSORBOARD_NAME
from wandistiller.files.prompts import Texts
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes
from wandistiller.projection.selection import spread_layers
from wandistiller.reports.plots import LossPlot
from wandistiller.reports.progress import Countdown
from wandistiller.reports.samples import Samples
from wandistiller.reports.trackers import RunTracker, TensorBoardFiles, Trackers, started
from wandistiller.sampling.recorded import student_sampling
from wandistiller.sampling.sampler import SamplingOptions, wan_scheduler
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.answers import TeacherAnswers
from wandistiller.targets.cache import TeacherCache, describe_cache, describe_teacher, prompts_digest
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.segments import SegmentAnswers
from wandistiller.targets.states import StatesOptions, build_states
from wandistiller.training.feature_loss import FeatureLoss, span_ends
from wandistiller.training.loop import TrainingOptions, steps_of_epochs
from wandistiller.training.objective import Objective
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.wan.files import WanFiles
from wandistiller.wan.prompt_embeds import Embeds, PromptEmbeds
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.vae import VaeLocation


def lanes_of(args: argparse.Namespace, processes: Processes) -> Lanes:
    """The samples of a step, and this process's among them."""
    return Lanes.of_process(args.batch_size, args.grad_accum_steps, processes.rank, processes.count)


def states_options(args: argparse.Namespace, num_extra_prompts: int) -> StatesOptions:
    return StatesOptions(
        kind=args.states,
        sigma_range=args.sigma_range,
        renoise_fraction=args.renoise_fraction,
        prompt_swap=args.prompt_swap,
        num_extra_prompts=num_extra_prompts,
        calls_per_expert=args.calls_per_expert,
        seed=args.seed,
    )


def open_cache(
    args: argparse.Namespace,
    wan_files: WanFiles,
    settings: TeacherSettings,
    texts: Texts,
    config: StudentConfig,
    batch_size: int,
    processes: Processes,
) -> TeacherCache | None:
    """The folder of --teacher_cache, refused where it holds answers to something else."""
    if args.teacher_cache is None:
        return None
    description = describe_cache(
        wan_files,
        settings,
        states_options(args, len(texts.extra)),
        texts.prompts + texts.extra,
        settings.latent_shape(config),
        config.text_max_length,
        batch_size,
    )
    return TeacherCache(args.teacher_cache, description | storage_of_teacher(args), processes)


def storage_of_teacher(args: argparse.Namespace) -> dict[str, str]:
    """fp8 makes it another teacher; fp32 and bf16 may change from one command to the next, as --dtype may."""
    return {"teacher_dtype": "fp8"} if args.teacher_dtype == "fp8" else {}


# Flags that a run must keep to go on; the others (how long, how fast, what is shown) may change.
RESUME_FLAGS = [
    "init", "init_expert", "layers", "states", "sigma_range", "renoise_fraction", "student_rollout", "prompt_swap",
    "calls_per_expert", "replay", "feature_loss_weight", "sigma_weighting", "student_steps", "optimizer", "seed",
]  # fmt: skip


def run_description(
    args: argparse.Namespace,
    wan_files: WanFiles,
    settings: TeacherSettings,
    texts: Texts,
    config: StudentConfig,
) -> dict[str, object]:
    """What makes two runs the same one: student, teacher, prompts, states and objective."""
    student = {f"student {name}": value for name, value in config.to_dict().items() if name != "distillation"}
    return {
        **student,
        **describe_teacher(wan_files, settings),
        **storage_of_teacher(args),
        "prompts": prompts_digest(texts.prompts + texts.extra),
        "teacher_cache": args.teacher_cache is not None,
        "ema": args.ema_decay > 0,
        **{name: getattr(args, name) for name in RESUME_FLAGS},
    }


def fill_cache(cache: TeacherCache, answers: TeacherAnswers, num_steps: int, replay: int) -> None:
    """All the answers that the run will learn from, each `replay` times."""
    num_batches = math.ceil(num_steps / replay)
    print(f"Asking the teacher for {num_batches} batches, kept in {cache.folder}", flush=True)
    cache.build(answers, num_batches, Countdown("Teacher's answers", num_batches))


def build_answers(
    args: argparse.Namespace,
    teacher: Teacher,
    embeds: Embeds,
    num_prompts: int,
    config: StudentConfig,
    feature_layers: list[int],
    dtype: torch.dtype,
    device: str,
    lanes: Lanes,
) -> TeacherAnswers:
    """The teacher at the states that the flags ask for."""
    options = states_options(args, len(embeds.trained) - num_prompts)
    states = build_states(options, config, teacher.settings, num_prompts, lanes.total, device, lanes)
    return TeacherAnswers(
        teacher,
        states,
        embeds.trained,
        device,
        dtype,
        feature_layers=feature_layers,
        student_rollout=args.student_rollout,
    )


def segment_sigmas(shift: float, student_steps: int) -> Tensor:
    """The noise levels between which a student of few steps steps: those of the sampler it will be drawn with."""
    return wan_scheduler(shift, student_steps).sigmas


def build_segment_answers(
    args: argparse.Namespace,
    teacher: Teacher,
    student: WanLiteStudent,
    embeds: Embeds,
    num_prompts: int,
    config: StudentConfig,
    dtype: torch.dtype,
    device: str,
    lanes: Lanes,
) -> SegmentAnswers:
    """The teacher over whole segments of its paths, for a student of --student_steps."""
    return SegmentAnswers(
        teacher,
        student,
        embeds.trained,
        teacher.settings.latent_shape(config),
        num_prompts,
        lanes.total,
        segment_sigmas=segment_sigmas(teacher.settings.shift, args.student_steps),
        num_teacher_steps=teacher.settings.num_inference_steps,
        student_rollout=args.student_rollout,
        seed=args.seed,
        device=device,
        compute_dtype=dtype,
        lanes=lanes,
    )


def build_objective(
    args: argparse.Namespace,
    layers: list[int],
    channels: list[int],
    teacher: StudentConfig,
    config: StudentConfig,
    shift: float,
    dtype: torch.dtype,
    device: str,
) -> tuple[Objective, list[int]]:
    """The loss, and the teacher's layers whose hidden states it compares."""
    feature_loss, feature_layers = None, []
    if args.feature_loss_weight:
        feature_layers = span_ends(layers or spread_layers(teacher.depth, config.depth), teacher.depth)
        channels = channels if config.block == "wan" and channels else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # maps that are learnt start the same in every process
            feature_loss = FeatureLoss(config.hidden_size, teacher.hidden_size, config.depth, channels).to(device)
    objective = Objective(
        shift=shift,
        sigma_weighting=args.sigma_weighting,
        feature_loss=feature_loss,
        feature_weight=args.feature_loss_weight,
        compute_dtype=dtype,
        device=device,
    )
    return objective, feature_layers


def compile_blocks(models: Iterable[WanLiteStudent]) -> None:
    """torch.compile of each block in place: one graph serves all blocks of a model, and names of weights stay."""
    for model in models:
        for block in model.blocks:
            block.compile()


def training_options(
    args: argparse.Namespace, num_prompts: int, settings: TeacherSettings, device: str, batch_size: int
) -> TrainingOptions:
    """The loop's options; `batch_size` is that of a step, of all processes."""
    return TrainingOptions(
        batch_size=batch_size,
        num_steps=args.max_steps or steps_of_epochs(args.num_epochs, num_prompts, batch_size),
        optimization=OptimizationOptions(
            lr=args.lr,
            optimizer=args.optimizer,
            lr_scheduler=args.lr_scheduler,
            lr_warmup_steps=args.lr_warmup_steps,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            ema_decay=args.ema_decay,
        ),
        eval_every=args.eval_every,
        sample_every=args.sample_every,
        save_every=args.save_every,
        boundary=settings.boundary_ratio,
        device=device,
        seed=args.seed,
    )


def build_evaluation(
    args: argparse.Namespace,
    teacher: Teacher,
    embeds: Embeds,
    config: StudentConfig,
    dtype: torch.dtype,
    device: str,
) -> HeldOutErrors | None:
    """What --eval_every measures; it samples the teacher once."""
    if not args.eval_every:
        return None
    options = SamplingOptions(
        shift=teacher.settings.shift,
        num_inference_steps=teacher.settings.num_inference_steps,
        compute_dtype=dtype,
        device=device,
    )
    print(
        f"Held-out states: {len(embeds.held_out)} paths of the teacher, {options.num_inference_steps} steps", flush=True
    )
    batch_size = min(BATCH_SIZE, args.batch_size)  # so that measuring takes no more memory than training
    shape = teacher.settings.latent_shape(config)
    return HeldOutErrors(teacher, embeds.held_out, shape, options, batch_size=batch_size)


def build_trackers(args: argparse.Namespace, folder: Path, first_step: int) -> Trackers:
    """Who watches the run from the process that speaks."""
    makers = [
        ("TensorBoard", lambda: TensorBoardFiles(folder / TENSORBOARD_NAME, first_step)),
        (LOSS_PLOT_NAME, lambda: LossPlot(folder / METRICS_NAME, folder / LOSS_PLOT_NAME)),
    ]
    if args.report != "none":
        makers.append((args.report, lambda: RunTracker(args.report, folder, vars(args))))
    return Trackers(started(makers))


def build_samples(
    args: argparse.Namespace,
    teacher: Teacher | None,
    settings: TeacherSettings,
    config: StudentConfig,
    prompts: list[str],
    prompt_embeds: PromptEmbeds,
    vae_location: VaeLocation,
    dtype: torch.dtype,
    processes: Processes,
    folder: Path,
    trackers: Trackers,
) -> Samples:
    """What --num_samples and --sample_every draw: as whoever draws with the saved student will."""
    steps = {"num_inference_steps": settings.num_inference_steps, "student_steps": args.student_steps}
    recorded = config.replace(distillation={"shift": settings.shift, **steps})
    student_options = student_sampling(recorded, None, dtype, processes.device)
    teacher_options = replace(student_options, sampler="unipc", num_inference_steps=settings.num_inference_steps)
    return Samples(
        folder / SAMPLES_NAME,
        teacher,
        settings,
        prompts[: args.num_samples],
        prompt_embeds,
        settings.latent_shape(config),
        vae_location,
        teacher_options,
        student_options,
        processes,
        args.shard is not None,  # spread weights are needed from all, to draw with any
        trackers.picture,
        args.batch_size,
    )
