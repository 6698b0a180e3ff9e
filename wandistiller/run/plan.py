"""A plan: everything that is known of a run before anything is written or a weight is read, and every refusal up to there."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from wandistiller.budget.workload import guided_fraction
from wandistiller.device import pick_device, pick_dtype, pick_teacher_dtype
from wandistiller.errors import UserError
from wandistiller.model.config import MAX_PATCHES, StudentConfig
from wandistiller.model.image_sizes import ImageSize, check_sizes, sizes_of_ratios, square
from wandistiller.processes import Processes, join
from wandistiller.projection.selection import check_fits
from wandistiller.prompts.prompts import Texts
from wandistiller.reports.trackers import check_report
from wandistiller.run.defaults import suggested_lr, suggested_replay, suggested_warmup
from wandistiller.run.flags import Flags
from wandistiller.run.measuring import Measuring, plan_measuring
from wandistiller.run.reach import within_prompt_cache
from wandistiller.sampling.recorded import StudentRecord
from wandistiller.sampling.sampler import SamplingOptions
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.segments import calls_per_answer
from wandistiller.targets.states import StatesOptions, teacher_levels
from wandistiller.training.loop import TrainingOptions, steps_of_epochs
from wandistiller.training.optimizer import OptimizationOptions, check_optimizer
from wandistiller.wan.layouts import check_headers, open_teacher
from wandistiller.wan.lora import merge_loras
from wandistiller.wan.settings import TeacherSettings, resolve_settings
from wandistiller.wan.text_encoder_files import TextEncoderFiles, find_text_encoder
from wandistiller.wan.vae import LatentStatistics, VaeLocation, check_statistics, find_vae, read_vae_config
from wandistiller.wan.wan_files import WanFiles


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is going to do.

    Attributes:
        flags: as they were typed, less what this teacher makes impossible, with a value for each that was left out.
        texts: the prompts.
        wan_files: the teacher by its headers.
        settings: how the teacher is sampled.
        lanes: the samples of a step, and this process's among them.
        dtype: of matrix products.
        encoder: the text encoder and its tokenizer on disk; None where the mock's stand-in embeddings will do.
        vae_location: where the VAE of the sample pictures is; None where none are drawn.
        num_used: how many prompts come in turn, where --prompt_cache_gib has no room for all that the run can come to; else None.
    """

    flags: Flags
    config: StudentConfig
    texts: Texts
    wan_files: WanFiles
    settings: TeacherSettings
    processes: Processes
    lanes: Lanes
    dtype: torch.dtype
    encoder: TextEncoderFiles | None
    vae_location: VaeLocation | None
    num_used: int | None = None

    @property
    def device(self) -> str:
        return self.processes.device

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        own = self.flags.optimization
        if own.teacher_calls:
            return steps_of_calls(self.flags, self.settings.num_inference_steps)
        return own.max_steps or steps_of_epochs(own.num_epochs, len(self.texts.prompts), self.lanes.total)

    @property
    def trained_texts(self) -> Sequence[str]:
        """The prompts, and after them those that come by --prompt_swap alone."""
        return self.texts.trained

    @property
    def measuring(self) -> Measuring:
        """How the student is measured at held-out states while it trains."""
        steps, num_prompts = self.settings.num_inference_steps, len(self.texts.held_out)
        is_fixed = self.settings.has_few_levels
        return plan_measuring(self.flags, steps, self.num_steps, self.lanes.count, num_prompts, is_fixed=is_fixed)

    @property
    def held_out_texts(self) -> Sequence[str]:
        """The prompts that the student is measured on."""
        return self.texts.held_out if self.measuring.every else []

    @property
    def teacher_sampling(self) -> SamplingOptions:
        """How the teacher draws in this run."""
        return SamplingOptions(
            shift=self.settings.shift,
            num_inference_steps=self.settings.num_inference_steps,
            sampler=StudentRecord(teacher_sampler=self.settings.teacher_sampler).sampler_of_teacher,
            compute_dtype=self.dtype,
            device=self.device,
        )

    @property
    def teacher_levels(self) -> tuple[float, ...]:
        """The only noise levels that the teacher answers rightly at, from 1 down; none where all will do."""
        return (teacher_levels(self.settings) or ())[:-1]

    @property
    def image_sizes(self) -> tuple[ImageSize, ...]:
        """The sizes that are trained at in turn; most runs have one."""
        return self.flags.student.image_sizes or (square(self.config.image_size),)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of the images of each size behind the teacher's VAE."""
        return [self.settings.latent_shape(self.config, size) for size in self.image_sizes]

    @property
    def largest_latent_size(self) -> tuple[int, int]:
        """(H, W) of the size that takes most memory and time."""
        return max((shape[1:] for shape in self.latent_shapes), key=math.prod)

    @property
    def states_options(self) -> StatesOptions:
        """Which states the flags ask for."""
        states = self.flags.states
        return StatesOptions(
            kind=states.states,
            sigma_range=states.sigma_range,
            renoise_fraction=states.renoise_fraction,
            prompt_swap=states.prompt_swap,
            num_extra_prompts=len(self.texts.extra),
            calls_per_expert=states.calls_per_expert,
            seed=self.flags.optimization.seed,
        )

    @property
    def training_options(self) -> TrainingOptions:
        """What the loop is told; its batch is that of a step, over all processes."""
        own, output = self.flags.optimization, self.flags.output
        return TrainingOptions(
            batch_size=self.lanes.total,
            num_steps=self.num_steps,
            optimization=OptimizationOptions(
                lr=own.lr,
                optimizer=own.optimizer,
                lr_scheduler=own.lr_scheduler,
                lr_warmup_steps=own.lr_warmup_steps,
                weight_decay=own.weight_decay,
                max_grad_norm=own.max_grad_norm,
                ema_decay=own.ema_decay,
            ),
            eval_every=self.measuring.every,
            sample_every=0 if self.vae_location is None else output.sample_every,
            save_every=output.save_every,
            boundary=self.settings.boundary_ratio,
            device=self.device,
            seed=own.seed,
        )


def make_plan(flags: Flags, config: StudentConfig, texts: Texts) -> Plan:
    """Join the processes and look at everything that a run needs; nothing is written.

    Raises:
        UserError: something is missing, damaged, contradictory, or does not fit together.
    """
    performance, optimization = flags.performance, flags.optimization
    if texts.is_endless and not (optimization.teacher_calls or optimization.max_steps):
        raise UserError(
            f"--data_path {flags.data.data_path}: these templates give prompts without end, so --num_epochs does not say how long "
            "the run is; give --teacher_calls or --max_steps"
        )
    processes = join(performance.device, pick_device)
    dtype = pick_dtype(performance.dtype, processes.device)
    check_optimizer(optimization.optimizer)
    check_report(flags.output.report)
    wan_files, settings = open_fitting_teacher(flags, config)
    flags = with_image_sizes(possible_flags(flags, wan_files, config), config, wan_files, settings)
    encoder = find_encoder(flags, wan_files, config)
    vae_location = find_sample_vae(flags, wan_files, settings)
    if not flags.output.dry_run:  # which plans for a device that may not be here
        flags = flags.replace(teacher_dtype=pick_teacher_dtype(performance.teacher_dtype, dtype))
    plan = Plan(
        flags=flags,
        config=config,
        texts=texts,
        wan_files=wan_files,
        settings=settings,
        processes=processes,
        lanes=Lanes.of_process(optimization.batch_size, optimization.grad_accum_steps, processes.rank, processes.count),
        dtype=dtype,
        encoder=encoder,
        vae_location=vae_location,
    )
    plan = with_defaults(plan)
    return replace(plan, num_used=within_prompt_cache(plan))


def steps_of_calls(flags: Flags, num_teacher_steps: int) -> int:
    """Count the optimiser steps that --teacher_calls makes possible; a target of --student_steps takes several calls."""
    num_calls, replay = flags.optimization.teacher_calls, flags.states.replay
    return replay * max(1, num_calls // calls_per_answer(num_teacher_steps, flags.objective.student_steps))


def with_defaults(plan: Plan) -> Plan:
    """Return the plan with values for the flags that were left out and whose defaults depend on teacher, student and batch."""
    own, config = plan.flags.optimization, plan.config

    def changed(**values: object) -> Plan:
        return replace(plan, flags=plan.flags.replace(**values))

    if plan.flags.states.replay is None:
        per_answer = calls_per_answer(plan.settings.num_inference_steps, plan.flags.objective.student_steps)
        replay = suggested_replay(
            plan.wan_files.config,
            config,
            plan.largest_latent_size,
            guided_fraction=guided_fraction(plan.settings, plan.flags.states.sigma_range),
            calls_per_answer=per_answer,
        )
        plan = changed(replay=replay)
    if own.lr is None:
        plan = changed(lr=suggested_lr(own.optimizer, config.hidden_size, plan.lanes.total))
    if own.lr_warmup_steps is None:
        plan = changed(lr_warmup_steps=suggested_warmup(plan.num_steps))
    return plan


def open_fitting_teacher(flags: Flags, config: StudentConfig) -> tuple[WanFiles, TeacherSettings]:
    """Open the teacher by its headers and refuse it unless the student is a part of it; no weight is read yet."""
    data, student, teacher = flags.data, flags.student, flags.teacher
    wan_files = open_teacher(data.teacher_path, config, data.teacher_path_low)
    wan_files = merge_loras(wan_files, data.teacher_lora, data.teacher_lora_low)
    if data.vae_path:
        wan_files = wan_files.with_vae_config(find_vae(data.vae_path, data.teacher_path).config_path())
    check_fits(wan_files.expert(student.init_expert).config, config, student.layers, student.student_config)
    settings = resolve_settings(wan_files, **asdict(teacher))
    check_levels(flags, settings)
    config.check_image_size(settings.vae_scale_factor, student.student_config)
    return wan_files, settings


def check_levels(flags: Flags, settings: TeacherSettings) -> None:
    """Refuse a run that would need other noise levels than a teacher of a few of them has."""
    if not settings.has_few_levels:
        return
    num_steps, student_steps = settings.num_inference_steps, flags.objective.student_steps
    if student_steps and num_steps % student_steps:
        allowed = ", ".join(str(count) for count in range(1, num_steps + 1) if num_steps % count == 0)
        raise UserError(
            f"--student_steps {student_steps}: the teacher's {num_steps} steps do not divide into so many segments, and it has no "
            f"noise levels between them; allowed: {allowed}"
        )
    low, high = flags.states.sigma_range
    levels = teacher_levels(settings)[:-1]
    if not any(low <= level <= high for level in levels):
        known = ", ".join(f"{level:.4g}" for level in levels)
        raise UserError(f"--sigma_range {low:g} {high:g}: holds none of the teacher's noise levels, {known}")


def with_image_sizes(flags: Flags, config: StudentConfig, wan_files: WanFiles, settings: TeacherSettings) -> Flags:
    """Return the flags with the sizes that the run is trained at, or with none where that is the square of image_size alone.

    Raises:
        UserError: one of them cannot be had of this teacher, or there are too many.
    """
    student = flags.student
    unit = settings.vae_scale_factor * math.lcm(config.patch_size, wan_files.config.patch_size)
    if student.aspect_ratios:
        sizes = sizes_of_ratios(student.aspect_ratios, config.image_size, unit)
    else:
        sizes = student.image_sizes or ()
    check_sizes(sizes, unit, MAX_PATCHES)
    is_square = sizes == (square(config.image_size),)
    return flags.replace(aspect_ratios=None, image_sizes=None if is_square or not sizes else sizes)


def possible_flags(flags: Flags, wan_files: WanFiles, config: StudentConfig) -> Flags:
    """Return the flags less what this teacher makes impossible, and print a line for each that is left out."""
    patch_size = wan_files.config.patch_size
    if flags.objective.feature_loss_weight and config.patch_size != patch_size:
        # Hidden states can be compared only token by token, which a student of other patches (a lite one) does not have.
        print(
            f"Hidden states are not compared: the student's tokens are patches of {config.patch_size}, the teacher's of "
            f"{patch_size}"
        )
        flags = flags.replace(feature_loss_weight=0.0)
    if flags.performance.teacher_offload and len(wan_files.experts) == 1:
        print(
            "--teacher_offload is of no use here, this teacher has one expert; without it the usual states are trained on"
        )
        flags = flags.replace(teacher_offload=False)
    return flags


def find_encoder(flags: Flags, wan_files: WanFiles, config: StudentConfig) -> TextEncoderFiles | None:
    """Find the text encoder and its tokenizer; None where the mock teacher's stand-in embeddings will do."""
    given = flags.data.text_encoder_path
    if wan_files.is_mock and given is None:
        return None
    encoder = find_text_encoder(given) if given else wan_files.text_encoder()
    encoder.check_text_dim(config.text_encoder_output_dim)
    return encoder


def find_sample_vae(flags: Flags, wan_files: WanFiles, settings: TeacherSettings) -> VaeLocation | None:
    """Find the VAE of the sample pictures; None where none can be drawn. A --vae_path without a VAE is a mistake.

    Raises:
        UserError: it is not the teacher's, or its files are not whole.
    """
    given = flags.data.vae_path
    if not flags.output.num_samples or (wan_files.is_mock and given is None):
        return None
    if flags.states.sigma_range != (0.0, 1.0):
        print("No sample pictures: a student of a part of the noise levels does not draw by itself")
        return None
    try:
        location = find_vae(given, flags.data.teacher_path)
        check_is_vae_of(settings, wan_files.config.num_channels, location.config_path())
        if Path(location.location).exists():  # else the hub's client sees to its files
            check_headers(location.folder())
    except UserError as error:
        if given is not None:
            raise
        print(f"No sample pictures: {error}")
        return None
    return location


def check_is_vae_of(settings: TeacherSettings, num_channels: int, config_path: Path) -> None:
    """Refuse a VAE of other latents than a run learns, by its config.json."""
    vae = read_vae_config(config_path, num_channels)
    folder = config_path.parent
    if vae.vae_scale_factor not in (None, settings.vae_scale_factor):
        raise UserError(
            f"{folder}: is a VAE of factor {vae.vae_scale_factor}; the teacher's latents have factor "
            f"{settings.vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    if vae.latents_mean and vae.latents_std:
        learnt = LatentStatistics(settings.latents_mean, settings.latents_std)
        check_statistics(learnt, LatentStatistics(vae.latents_mean, vae.latents_std), folder)
